"""Knowledge neurons of a fact against the loop of one forward and one backward pass for each layer and step.

The loop is the tests' oracle, over the model's own forward; both must agree, or nothing is reported. Then what erasing
a fact's neurons does to P(answer), beside as many random neurons of the same layers; and the published rewrite on known
CounterFact facts, each an edit of its own (on GPT-2 XL S was 35.6, Meng et al. 2022).
"""

import dataclasses
from collections.abc import Sequence

import torch

import kedit_fast as kf
from bench import edit as edit_bench
from bench.common import CheckFailed, Figure, Measured, peak_matmul, timed
from kedit_fast.basics.parts import make_now
from kedit_fast.editors.neurons import columns
from kedit_fast.edits.changes import WeightChange
from kedit_fast.edits.deltas import LowRank
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.wordings import wordings
from kedit_fast.jobs.integrate import Asked, integrate
from kedit_fast.jobs.neurons import Wordings, attribute, chosen
from kedit_fast.jobs.score import next_token_probs
from tests.oracle import neurons as oracle

TOLERANCE = 1e-3  # of the map's RMS, in fp32
COLUMNS = {"score": "S", "efficacy": "ES", "paraphrase": "PS", "neighborhood": "NS"}


def run(options) -> Measured:
    """The benchmark as the command line asks for it. Raises Skipped without the data sets."""
    edit_bench.check_data()
    lm, known = kf.open_model("smollm2"), edit_bench.draw()
    timed_facts, judged, steps = (1, 2, 2) if options.quick else (1, 20, 20)
    return measure(lm, known[:timed_facts], known[:judged], steps)


def measure(lm, timed_facts: Sequence[Fact], judged: Sequence[Fact], steps: int) -> Measured:
    """The times first; raises CheckFailed where the maps differ."""
    peak, figures = peak_matmul(), []
    for fact in timed_facts:
        figures += _times(lm, fact, steps)
    editor = dataclasses.replace(kf.KnowledgeNeurons.for_model(lm), steps=steps)
    figures += _erased(lm, judged, editor) + _rewritten(lm, judged, editor)
    return Measured(figures, max(peak, peak_matmul()), [f"{steps} steps, all {lm.n_layers} layers."])


def _times(lm, fact: Fact, steps: int) -> list[Figure]:
    """One fact, the first token of its answer."""
    prompts, answers, label, _ = wordings(lm.tokenizer, fact)
    one = Asked(prompts[0], answers[0][0], label)
    ours = timed(integrate, lm, [one], range(lm.n_layers), steps)
    loop = timed(oracle.attributions, lm.model, one.tokens, [one.answer], steps)
    error = ((ours.result[1][0] - loop.result).norm() / loop.result.norm()).item()
    if not error < TOLERANCE:
        raise CheckFailed(f"the attributions of {label} differ by {error:.1e} of their norm")
    rows = [
        ("ratio to the loop", loop.seconds / ours.seconds, "x", ">= 5"), ("one sweep, CPU time", ours.cpu, "s", ""),
        ("loop, CPU time", loop.cpu, "s", ""), ("largest difference, of the norm", error, "difference", ""),
    ]  # fmt: skip
    case = f"neurons of one fact, {len(one.tokens)} tokens"
    return [Figure(case, metric, value, unit, mark=mark) for metric, value, unit, mark in rows]


def _erased(lm, facts: Sequence[Fact], editor: kf.KnowledgeNeurons) -> list[Figure]:
    """P(answer) of each fact's prompt with its neurons erased, or as many random ones in the same layers."""
    how = editor.settings(lm)
    asked = [Wordings(*wordings(lm.tokenizer, fact)) for fact in facts]
    found = attribute(lm, asked, how, make_now)
    generator, p = torch.Generator().manual_seed(0), {"no edit": [], "its neurons": [], "random ones": []}
    for one, result, neurons in zip(asked, found, chosen(asked, found, how), strict=True):
        random = torch.randint(lm.d_ff, neurons.shape, generator=generator) + neurons // lm.d_ff * lm.d_ff
        for name, some in (("no edit", neurons[:0]), ("its neurons", neurons), ("random ones", random)):
            view = lm.with_edit(_erasing(lm, some)) if len(some) else lm
            p[name].append(next_token_probs(view, one.prompts[:1])[0, result.answers[0][0]].item())
    n = sum(map(len, chosen(asked, found, how))) / len(facts)
    case = f"erased, {len(facts)} facts"
    figures = [Figure(case, f"P(old answer), {name}", sum(each) / len(each), "probability") for name, each in p.items()]
    return [*figures, Figure(case, "neurons a fact", n, "mean")]


def _erasing(lm, neurons: torch.Tensor) -> kf.Edit:
    """The edit by which these neurons say nothing."""
    changes = []
    for layer in (neurons // lm.d_ff).unique().tolist():
        mine = (neurons[neurons // lm.d_ff == layer] % lm.d_ff).unique()
        one_hot = torch.nn.functional.one_hot(mine, lm.d_ff).T.float()
        changes.append(WeightChange(layer, LowRank(-columns(lm, layer, mine).float(), one_hot)))
    return kf.Edit(method="erase", hparams={}, fingerprint=lm.fingerprint, facts=(), changes=tuple(changes))


def _rewritten(lm, facts: Sequence[Fact], editor: kf.KnowledgeNeurons) -> list[Figure]:
    """CounterFact's scores of the published rewrite, each fact an edit of its own."""
    made = timed(editor.edit, lm, facts, independent=True)
    summary = kf.evaluate(lm, facts, made.result, both_forms=False).summary()
    case, figures = f"rewrite, {len(facts)} facts, each alone", []
    for metric, name in COLUMNS.items():
        found = summary[metric]["edited"]
        if found is not None:
            figures.append(Figure(case, name, 100 * found.mean, "mean", 100 * found.low, 100 * found.high, found.n))
    return [*figures, Figure(case, "CPU time a fact", made.cpu / len(facts), "s")]
