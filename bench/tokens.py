"""How few tokens do an edit's statistics need? MEMIT on SmolLM2 with C over more and more of WikiText-2.

Judged by what the edit does, not by C's spectrum alone. The values z, which do not depend on C, are optimized once.
"""

from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import kedit_fast as kf
from bench.common import DATA, Figure, Measured, peak_matmul
from bench.edit import STATISTICS_TEXT, Outcome, check_data, draw, perplexity_text, table
from kedit_fast.basics.settings import cache_dir
from kedit_fast.editors import spread
from kedit_fast.jobs.values import optimize_values

FACTS, QUICK = 40, 4
FEATURES = (1.5, 2, 4, 8, 16, 26)  # tokens for each of the d_ff features; the last is nearly all of the text
SHOWN = (
    "efficacy", "P(new)", "paraphrase", "neighborhood", "neighborhood, change", "known neighbors, P(true) kept",
    "perplexity, mean change",
)  # fmt: skip


def run(options) -> Measured:
    """The benchmark as the command line asks for it. Raises Skipped where the public data sets are not at hand."""
    check_data()
    lm, facts = kf.open_model("smollm2"), draw()[: QUICK if options.quick else FACTS]
    editor, text = kf.Memit.for_model(lm), perplexity_text(3_000 if options.quick else 60_000)
    features = FEATURES[1:3] if options.quick else FEATURES
    return Measured(list(_measured(lm, editor, facts, text, features)), peak_matmul(), [
        f"MEMIT of {len(facts)} known CounterFact facts at layers {', '.join(map(str, editor.layers))}, "
        f"λ {editor.mom2_update_weight:,.0f}, d_ff {lm.d_ff}; C over the first tokens of WikiText-2's validation split",
    ])  # fmt: skip


def _measured(lm, editor, facts, text: str, features) -> Iterator[Figure]:
    contexts, found = None, {}

    def once(*args):
        """z of the facts: the same whatever C is."""
        if "z" not in found:
            found["z"] = optimize_values(*args)
        return found["z"]

    for each in features:
        case, n_tokens = f"{each:g} d_ff", round(each * lm.d_ff)
        moments = kf.second_moments(
            lm, editor.layers, DATA / STATISTICS_TEXT, n_tokens=n_tokens, cache_dir=cache_dir() / "bench"
        )
        with patch.object(spread, "optimize_values", once):
            edit = editor.edit(lm, facts, moments=moments, contexts=contexts)
        contexts = edit.contexts  # sampled once
        judged = Outcome(kf.evaluate(lm, facts, edit, text=text, both_forms=False), 0.0, 0.0)
        yield Figure(case, "condition of C, largest", max(m.condition for m in moments.values()), "mean")
        for figure in table(case, [judged]):
            if figure.metric in SHOWN:
                yield replace(figure, mark="")
        print(f"{case}: done", flush=True)
