"""What phrasings and keeps are worth: other wordings, other relations of the subject, neighbors, perplexity.

Phrasings of a fact are the commonest other CounterFact prompts of its relation that none of its paraphrases, which are
held out, ends with; every editor may have the same ones. The first ``JUDGED`` facts of ``bench.edit``'s draw are there
to choose by ("choose"), the next as many to report on ("report"), so no row is judged by the facts that it was chosen
on; a larger batch is filled up with the others. Rows are those of ``bench editors``, and beside them what P(new) on
paraphrases is in times plain MEMIT's.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import kedit_fast as kf
from bench import edit as edit_bench
from bench.common import DATA, Figure, Measured
from bench.editors import JUDGED, Ground, Row, done, measure, networks_of, shared_values
from kedit_fast.editors.contexts import memit_contexts
from kedit_fast.editors.spread import Spread
from kedit_fast.facts.fact import Fact

SIZES = (100, 500)
HALVES = ("choose", "report")
PLAIN, ASKED_FOR = "MEMIT", "P(new), paraphrases"


class Variant(NamedTuple):
    """An editor with so many phrasings a fact; change: of its settings for the model; route: as in ``Row``"""

    label: str
    editor: str = "memit"
    phrasings: int = 0
    change: Callable[[Spread], dict] = lambda made: {}
    route: str = ""


def _keeping(factor: float) -> Callable[[Spread], dict]:
    return lambda made: {"keep_factor": factor}


def _more(layers: tuple[int, ...], n: int) -> tuple[int, ...]:
    return (*layers, *range(layers[-1] + 1, layers[-1] + 1 + n))


VARIANTS = (
    Variant(PLAIN),
    Variant("keeps x 0.25", change=_keeping(0.25)),
    Variant("3 phrasings", phrasings=3),
    Variant("3 phrasings, keeps x 0.25", phrasings=3, change=_keeping(0.25)),
    Variant("3 phrasings, keeps x 1", phrasings=3, change=_keeping(1.0)),
    Variant("6 phrasings, keeps x 0.25", phrasings=6, change=_keeping(0.25)),
    Variant("3 phrasings, BLUE", "memit-blue", 3),
    Variant("3 phrasings, RECT", "rect", 3),
    Variant("3 phrasings, PMET", "pmet", 3),
    Variant("3 phrasings, AlphaEdit", "alphaedit", 3),
    Variant("3 phrasings, in scope", phrasings=3, route="scope"),
    Variant("3 phrasings, by name", phrasings=3, route="names"),
    Variant("MEND by name", "mend", route="names"),
    Variant("MEND in scope", "mend", route="scope"),
    Variant(
        "3 phrasings, a quarter of λ", "memit", 3, lambda made: {"mom2_update_weight": made.mom2_update_weight / 4}
    ),
    Variant("3 phrasings, three layers more", "memit", 3, lambda made: {"layers": _more(made.layers, 3)}),
)


def run(options) -> Iterator[Measured]:
    """The rows that the command line asks for. Raises Skipped without the data sets, ValueError for an unknown row."""
    edit_bench.check_data()
    sizes = (2,) if options.quick else SIZES
    networks = networks_of(options)
    names = [f"{half}: {variant.label}, n = {n}" for n in sizes for half in HALVES for variant in VARIANTS]
    if unknown := set(options.rows) - set(names):
        raise ValueError(f"--rows {sorted(unknown)}: expected some of {names}")
    lm = kf.open_model("smollm2")
    ground = Ground(
        lm=lm, facts=edit_bench.draw(), moments={}, contexts=memit_contexts(lm),
        text=edit_bench.perplexity_text(edit_bench.N_CHARACTERS // (20 if options.quick else 1)),
        steps=4 if options.quick else None,
        done=frozenset() if options.quick else done(options.results, "phrasings"),
    )  # fmt: skip
    return measured(ground, kf.load_facts(DATA / edit_bench.COUNTERFACT), sizes, options.rows or names, networks)


def measured(
    ground: Ground, everything: Sequence[Fact], sizes: Sequence[int], names: Sequence[str], networks: dict[str, str]
) -> Iterator[Measured]:
    """A Measured a row of these names, and of each half the model without an edit. networks: {method: file}"""
    with shared_values():
        for n in sizes:
            judged = min(n, JUDGED)
            behind = [*ground.facts[judged:], *ground.facts[:judged]]
            for half, facts in zip(HALVES, (ground.facts[:n], behind[:n]), strict=True):
                plain, unedited = None, True
                for variant in VARIANTS:
                    row = row_of(ground, variant, n, networks)
                    if f"{half}: {row.name}" not in names:
                        continue
                    phrased = kf.related(facts, everything, phrasings=variant.phrasings, same_subject=0)
                    own = dataclasses.replace(ground, facts=phrased, whose=f"{half}: ")
                    for part in measure(own, [row], unedited):
                        found = {f.metric: f.value for f in part.figures if f.case != f"{half}: no edit"}
                        plain = found.get(ASKED_FOR) if variant.label == PLAIN and found else plain
                        yield _beside(part, found.get(ASKED_FOR), plain)
                    unedited = False


def row_of(ground: Ground, variant: Variant, n: int, networks: dict[str, str]) -> Row:
    """The row of a variant, with the settings, or the network, that it has on this model."""
    changed = variant.change(kf.EDITORS[variant.editor].for_model(ground.lm))
    if variant.editor in networks:
        changed |= {"network": networks[variant.editor]}
    return Row(variant.label, variant.editor, n, 1, changed, variant.route)


def _beside(part: Measured, value: float | None, plain: float | None) -> Measured:
    """The row with its P(new) on paraphrases in times plain MEMIT's, where both are known."""
    if not value or not plain:
        return part
    more = Figure(part.figures[0].case, f"{ASKED_FOR}, to {PLAIN}'s", value / plain, "x")
    return dataclasses.replace(part, figures=[*part.figures, more])
