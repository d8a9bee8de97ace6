"""``kedit-fast rounds``: facts edited in rounds on top of each other, and what is left after each."""

import json
import math
from dataclasses import replace
from functools import partial

from kedit_fast import __version__
from kedit_fast.basics.bits import digest
from kedit_fast.basics.files import Damaged, write_text
from kedit_fast.basics.parts import Inside
from kedit_fast.commands.inputs import check_network, corpus_of, known, read_facts, read_text, statistics, told_lm
from kedit_fast.commands.outputs import check_outputs, fresh_log, number, say, say_written, write_reports
from kedit_fast.commands.unfinished import kept, run_of
from kedit_fast.editors import EDITORS
from kedit_fast.evaluation.canary import PROSE
from kedit_fast.experiments.rounds import Round, check_rounds, edit_in_rounds
from kedit_fast.facts.fact import check_facts
from kedit_fast.moments.given import digests
from kedit_fast.pictures.rounds import plot_rounds
from kedit_fast.sweep.kept import asked_of, begun

FORMAT, VERSION = "kedit_fast.rounds", 1
_COLUMNS = ("round", "facts", "new", "P(new)", "old", "P(old)", "paraphr.", "neighb.", "perplex.", "growth", "s")
_WIDTHS = (5, 6, 6, 6, 6, 6, 8, 7, 10, 8, 6)
_TOLD, _ASKED = ("efficacy", "p_new"), ("paraphrase", "neighborhood")
_MEANING = """
new, old: efficacy, P(new) > P(true), of the round's own facts and of earlier rounds'; paraphr., neighb.:
paraphrase and neighborhood scores of the earlier facts (in round 1: of its own); growth: |sum of changes| /
|weight| of the most changed layer; round 0: the model without an edit, asked for round 1's facts"""


def run(args) -> None:
    """Edits with one method after the other, saying a line for each round; writes the figures and the picture."""
    methods = {name: known("--method", name, EDITORS) for name in args.method}
    if args.hparams and len(args.method) > 1:
        raise ValueError(f"--hparams {args.hparams} with {len(args.method)} methods: expected one --method")
    check_network(args.network, methods)
    needs = any(editor.NEEDS_SUBJECT for editor in methods.values())
    new = any(editor.NEEDS_NEW for editor in methods.values())
    facts = check_facts(read_facts(args), need_new=new, need_subject=needs, skip_bad=args.skip_bad)
    output, picture, log = check_outputs(args, "output", "plot", "log")
    run = run_of(args, output, picture, log)
    corpus, text = corpus_of(args), read_text(args.text or PROSE)
    given = methods[args.method[0]].from_file(args.hparams) if args.hparams else None
    lm = told_lm(args)
    editors = {name: given or editor.for_model(lm) for name, editor in methods.items()}
    if args.network:
        editors = {name: replace(editor, network=args.network) for name, editor in editors.items()}
    if args.layers:
        editors = {name: replace(editor, layers=args.layers) for name, editor in editors.items()}
    options = {"per_round": args.per_round, "text": text, "max_tokens": args.text_tokens, "old": args.old}
    for editor in editors.values():
        check_rounds(lm, facts, editor, **options)
    layers = sorted({layer for editor in editors.values() if editor.mom2_adjustment for layer in editor.layers})
    moments = statistics(args, lm, editors.values(), layers, corpus)
    rounds: dict[str, list[Round]] = {name: [] for name in editors}
    stopped: dict[str, str] = {}
    asked = partial(
        asked_of, lm, "rounds", facts, hparams={name: editor.record for name, editor in editors.items()},
        seed=args.seed, statistics=digests(moments), **options | {"text": digest(text)},
    )  # fmt: skip
    with kept(run) as checkpoint:
        with fresh_log(log), begun(checkpoint, asked) as keep:
            # All at first: what is wrong with the last method is said before the first one's work.
            made = {
                name: edit_in_rounds(
                    lm, facts, editor, moments=moments if editor.mom2_adjustment else None, seed=args.seed, log=log,
                    checkpoint=Inside(keep, name), **options,
                )
                for name, editor in editors.items()
            }  # fmt: skip
            for name, editor in editors.items():
                say(f"\n{name}, layers {', '.join(map(str, editor.layers))}, settings {editor.source}")
                try:
                    _follow(made[name], rounds[name])
                except Damaged:
                    raise
                except ValueError as error:
                    # A model that has collapsed may leave nothing to edit with; what was found until then counts.
                    if not any(rounds.values()):
                        raise
                    stopped[name] = str(error)
                    say(f"{name} ends here: {error}")
        record = _record(args, lm, facts, editors, rounds, stopped)
        written = write_reports(
            (output, lambda path: write_text(path, json.dumps(record, allow_nan=False))),
            (picture, lambda path: plot_rounds(rounds, path, model=lm.name)),
        )
    say(_MEANING)
    say_written(written)


def _follow(made, rounds: list[Round]) -> None:
    """Keeps and says the rounds as they come."""
    for found in made:
        if not rounds:
            say(_line(_COLUMNS))
            say(_line(_unedited(found)))
        rounds.append(replace(found, edit=None))  # else a hundred of them would hold a hundred growing edits
        say(_line(_cells(found)))


def _line(cells) -> str:
    return "  ".join(str(cell).rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True))


def _cells(r: Round) -> tuple:
    asked = r.old if r.old["efficacy"].n else r.new
    perplexity = "-" if r.perplexity is None else f"{r.perplexity[1]:.4g}"
    growth, seconds = max(r.growth.values(), default=math.nan), f"{r.edit_s + r.evaluate_s:.0f}"
    told = *_means(r.new, *_TOLD), *_means(r.old, *_TOLD), *_means(asked, *_ASKED)
    return r.number, r.n_facts, *told, perplexity, f"{growth:.3f}", seconds


def _unedited(first: Round) -> tuple:
    """The model without an edit, asked for the facts of the first round."""
    perplexity = "-" if first.perplexity is None else f"{first.perplexity[0]:.4g}"
    told = *_means(first.base, *_TOLD), "-", "-", *_means(first.base, *_ASKED)
    return 0, 0, *told, perplexity, "0.000", "-"


def _means(summary, *metrics: str) -> list[str]:
    return [number(summary[metric].mean) for metric in metrics]


def _record(args, lm, facts, editors, rounds, stopped) -> dict:
    meta = {
        "model": lm.name, "fingerprint": lm.fingerprint, "note": lm.note, "n_facts": len(facts),
        "per_round": args.per_round, "old": args.old, "seed": args.seed, "text": args.text or "built in",
        "version": __version__, "hparams": {name: editor.record for name, editor in editors.items()},
    }  # fmt: skip
    listed = {name: [found.to_record() for found in of_one] for name, of_one in rounds.items()}
    return {"format": FORMAT, "version": VERSION, "meta": meta, "rounds": listed, "stopped": stopped}
