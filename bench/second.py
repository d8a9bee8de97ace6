"""A second real model beside SmolLM2: where facts are traced in Gemma-3-270M, and what ROME and MEMIT make of them.

Both models on CounterFact facts that each knows, by the same settings: derived ones. Gemma has norms behind its MLPs,
so a value is reached through one; how far the layers of an edit bring what they are to reach is told layer by layer.
The edit of ten facts is made again with the layers read from disk, one at a time, and has to give the same figures.
Nothing is fetched: Gemma is opened where its terms were accepted and it lies in the cache.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import kedit_fast as kf
from bench import edit as edit_bench
from bench.common import CheckFailed, Figure, Measured, Skipped, peak_matmul
from kedit_fast.editors.located import Prompts
from kedit_fast.edits.chain import edited_so_far
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.tokens import fact_tokens
from kedit_fast.model.gemma3 import GEMMA3
from kedit_fast.model.packaged import is_complete
from kedit_fast.pictures.labels import ROLES
from kedit_fast.sweep.sites import Site

MODELS = {"smollm2": "SmolLM2-135M", "gemma3": "Gemma-3-270M"}
TRACED, LONGEST = 12, 10  # facts, and their tokens at most
PARTS = ("traces", "rome", "memit", "disk")
N_CHARACTERS = 6_000  # of the text for perplexity, which each edit is judged by
PLACES = {  # {kind of trace: the role of the token where it is looked at}
    "state": "last subject token",
    "mlp": "last subject token",
    "attn": "last token",
}
SIZES = {"rome": {1: 10}, "memit": {10: 2, 30: 1}}  # {facts a batch: batches}
QUICK = {"rome": {1: 2}, "memit": {2: 1, 3: 1}}
STREAMED = 10  # facts
MEMORY = {"smollm2": "400MB", "gemma3": "1GB"}  # less than 4/3 of the weights: layers come from disk
APART = 1e-4  # of p_new, resident and streamed: fp32, layers in other packs


class Ground(NamedTuple):
    """A model, by what it is opened, its name in the tables, and facts that it knows."""

    lm: object
    opened: str
    name: str
    facts: list[Fact]


def run(options) -> Iterator[Measured]:
    """The rows that the command line asks for. Raises Skipped without the data sets or without Gemma, ValueError for an
    unknown row."""
    edit_bench.check_data()
    check_at_hand()
    rows = [f"{opened}, {part}" for opened in MODELS for part in PARTS]
    if unknown := set(options.rows) - set(rows):
        raise ValueError(f"--rows {sorted(unknown)}: expected some of {rows}")
    sizes, (n_traced, samples) = (QUICK, (2, 2)) if options.quick else (SIZES, (TRACED, 10))
    text = edit_bench.perplexity_text(N_CHARACTERS)
    for opened, name in MODELS.items():
        parts = [part for part in PARTS if f"{opened}, {part}" in (options.rows or rows)]
        if not parts:
            continue
        lm = kf.open_model(opened)
        facts = edit_bench.known_to(lm, max(n * sets for of in sizes.values() for n, sets in of.items()))
        ground = Ground(lm, opened, name, facts)
        for part in parts:
            if part == "traces":
                short = [fact for fact in facts if len(fact_tokens(lm.tokenizer, fact).ids) <= LONGEST]
                yield traced(ground, short[:n_traced], samples)
            elif part == "disk":
                yield streamed(ground, facts[: 3 if options.quick else STREAMED])
            else:
                yield edited(ground, part, sizes[part], text)


def check_at_hand() -> None:
    """Raises Skipped where Gemma is not in the cache."""
    if not is_complete(GEMMA3, GEMMA3.folder):
        raise Skipped("Gemma-3-270M is not at hand: `kedit-fast info gemma3 --accept-licence` fetches it")


def traced(ground: Ground, facts: Sequence[Fact], samples: int) -> Measured:
    """The average trace of each kind: the layer of the largest effect where it is looked at, and that effect as a share
    of the total one."""
    lm, name = ground.lm, f"{ground.name}, {len(facts)} traces"
    window = round(lm.n_layers * 10 / 48)  # as published, of GPT-2-XL
    averages = kf.average(kf.trace(lm, facts, kinds=tuple(PLACES), samples=samples, window=window))
    figures = []
    for kind, average in averages.items():
        effect = average.mean[ROLES.index(PLACES[kind])] / average.total_effect
        where = f"{kind}, {PLACES[kind]}"
        figures += [
            Figure(name, f"{where}: largest effect, of the total", 100 * float(effect.max()), "%", n=len(facts)),
            Figure(name, f"{where}: its layer, of the depth", 100 * int(effect.argmax()) / lm.n_layers, "%"),
            Figure(name, f"{kind}: reliability", average.reliability, "correlation", n=len(facts)),
        ]
    total = averages["state"].total_effect  # corruption is the same for every kind
    figures.append(Figure(name, "total effect", total, "probability", n=len(facts)))
    return Measured(figures, peak_matmul(), [f"{samples} draws, windows of {window} in {name.partition(',')[0]}."])


def edited(ground: Ground, method: str, sizes: dict[int, int], text: str) -> Measured:
    """The table of ``bench edit``, a column a batch size, and what MEMIT's layers leave of the way to z."""
    editor = kf.EDITORS[method].for_model(ground.lm)
    moments = edit_bench.statistics_of(ground.lm, editor.layers)
    batches = {n: edit_bench.cut(ground.facts, n, sets) for n, sets in sizes.items()}
    return edit_bench.measure(
        ground.lm, editor, moments, batches, text, marked=False, whose=f"{ground.name}, {method.upper()}, ",
        also=partial(left, ground.lm) if method == "memit" else None,
    )  # fmt: skip


def left(lm, facts: list[Fact], edit: kf.Edit) -> dict[str, float]:
    """{line: what is missing behind each layer, in % of what it was before the first one, as the mean over the facts:
    ||z - h||, and ||norm(z) - norm(h)||, z and h as the model's last norm reads them}."""
    z, norm = edit.values.double(), lm.model.get_submodule(lm.family.norm)
    prompts, at = Prompts.of(lm, facts, [["{}"]]), {Site.layer_out: edit.layers[-1]}
    missing: dict[str, list[float]] = {"||z - h||": [], "||norm(z) - norm(h)||": []}
    for n in range(len(edit.layers) + 1):
        view = edited_so_far(lm, {change.layer: change.delta for change in edit.changes[:n]}, facts, None)
        h = prompts.read(view, averaged={}, bare=at).bare[Site.layer_out].cpu()
        for line, apart in zip(missing, (z - h, norm(z.to(lm.dtype)) - norm(h.to(lm.dtype))), strict=True):
            missing[line].append(apart.norm(dim=1).mean().item())
    return {
        f"{line} behind {n} of {len(edit.layers)} layers": 100 * each[n] / each[0]
        for line, each in missing.items()
        for n in range(1, len(each))
    }


def streamed(ground: Ground, facts: list[Fact]) -> Measured:
    """MEMIT and its evaluation with the layers read from disk; CheckFailed where its figures are others."""
    lm, disk = ground.lm, kf.open_model(ground.opened, memory=MEMORY[ground.opened])
    editor = kf.Memit.for_model(lm)
    moments = edit_bench.statistics_of(lm, editor.layers)
    edit = editor.edit(lm, facts, moments=moments)
    again = editor.edit(disk, facts, moments=moments, contexts=edit.contexts)
    ours, theirs = (kf.evaluate(m, facts, e, both_forms=False).edited["p_new"] for m, e in ((lm, edit), (disk, again)))
    apart = float((ours - theirs).abs().max())
    if not apart <= APART:
        raise CheckFailed(f"{ground.name}: P(new) from disk and in memory are {apart:.1e} apart")
    case, line = f"{ground.name}, layers from disk", "P(new), largest distance from the model in memory"
    return Measured([Figure(case, line, apart, "difference", n=len(facts))], peak_matmul())
