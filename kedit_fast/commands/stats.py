"""``kedit-fast stats``: second moments of the keys at the layers to edit, kept for later edits."""

from kedit_fast.basics.settings import statistics_folder
from kedit_fast.commands.inputs import corpus_of, told_lm
from kedit_fast.commands.outputs import output_folder, say, say_table
from kedit_fast.editors import EDITORS
from kedit_fast.moments.second_moment import second_moments


def run(args) -> None:
    """Measures the statistics and says how well conditioned they are."""
    folder = output_folder(statistics_folder() if args.output is None else args.output)
    corpus = corpus_of(args)
    lm = told_lm(args)
    reading = [editor for editor in EDITORS.values() if editor.mom2_adjustment]
    layers = args.layers or sorted({layer for editor in reading for layer in editor.for_model(lm).layers})
    made = second_moments(lm, layers, corpus, n_tokens=args.tokens, seed=args.seed, cache_dir=folder)
    rows = [(layer, f"{m.n_tokens:,}", f"{m.condition:.2g}") for layer, m in sorted(made.items())]
    say_table(("layer", "tokens", "condition number"), rows)
    n_tokens = min(m.n_tokens for m in made.values())
    if n_tokens < lm.d_ff:
        say(f"{n_tokens:,} tokens are fewer than d_ff = {lm.d_ff:,}: an edit then needs a regularizer, or more tokens")
    say(f"corpus {next(iter(made.values())).corpus}; kept in {folder}")
