"""Scores and texts of many prompts in shared sweeps against Hugging Face, one prompt at a time, in the same run.

The loop is what evaluation code commonly does: a forward pass for every prompt and answer, of which the logits behind
the prompt are read, and one ``generate`` call for every prompt. Every P and every text is compared, those furthest
apart with fp64, or nothing is reported. Facts as in ``bench.edit``, with CounterFact's probes; ratios are of CPU time
on one thread.
"""

import copy

import torch

import kedit_fast as kf
from bench import edit as edit_bench
from bench.common import CheckFailed, Figure, Measured, Timing, peak_matmul, timed
from kedit_fast.evaluation.benchmark import Case
from kedit_fast.evaluation.benchmarks.counterfact import COUNTERFACT
from kedit_fast.evaluation.probes import Probe, probe, read_probes
from kedit_fast.evaluation.written import write_probes

FACTS, QUICK = 200, 4
WRITTEN = 20  # tokens
WORST = 20  # answers that are asked in fp64 too: of 3,000 some are rounded by 1e-5 in fp32, by Hugging Face's too
TOLERANCE = 1e-5  # of P
MARK = ">= 5"


def run(options) -> Measured:
    """The benchmark as the command line asks for it. Raises Skipped without the data sets."""
    edit_bench.check_data()
    lm = kf.open_model("smollm2")
    facts = edit_bench.draw()[: QUICK if options.quick else options.facts or FACTS]
    peak = peak_matmul()
    cases = [Case((fact,), number=i) for i, fact in enumerate(facts)]
    asked = [one for case in cases for one in COUNTERFACT.probes(lm, case)]
    prompts = [probe(lm, fact.text, n_written=WRITTEN) for fact in facts]
    read_probes(lm, asked[:2])  # whatever is made once
    figures = [*_scores(lm, asked, len(facts)), *_texts(lm, prompts)]
    return Measured(figures, max(peak, peak_matmul()), [f"{len(asked)} prompts; {WRITTEN} tokens are written."])


def _scores(lm, asked: list[Probe], n: int) -> list[Figure]:
    ours = timed(read_probes, lm, asked)
    theirs = timed(_score_loop, lm, asked)
    found = [
        (one, i, got.p[i], p)
        for one, got, wanted in zip(asked, ours.result[0], theirs.result, strict=True)
        for i, p in enumerate(wanted)
        if p is not None
    ]
    found.sort(key=lambda each: -abs(each[2] - each[3]))
    exact = _in_fp64(lm, [(one.prompt, one.answers[i]) for one, i, _, _ in found[:WORST]])
    apart = [max(abs(p - each[side]) for each, p in zip(found, exact, strict=False)) for side in (2, 3)]
    if not apart[0] <= TOLERANCE:
        raise CheckFailed(f"P of an answer is {apart[0]:.1g} from that in fp64, more than {TOLERANCE:g}")
    rows = _figures(f"CounterFact's probes of {n} facts", "scores", n, ours, theirs)
    named = (("largest difference of P", abs(found[0][2] - found[0][3])),)
    named += ((f"the {WORST} furthest apart: ours from fp64", apart[0]), ("the same: the loop from fp64", apart[1]))
    return [*rows, *(Figure(rows[0].case, what, value, "difference", n=len(found)) for what, value in named)]


@torch.no_grad()
def _in_fp64(lm, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """P of answers behind prompts by the same weights in fp64."""
    model = copy.deepcopy(lm.model).double()
    return [_p(model, *pair) for pair in pairs]


def _p(model, prompt: list[int], answer: list[int]) -> float:
    logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
    log_p = logits.double().log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
    return log_p.mean().exp().item()


@torch.no_grad()
def _score_loop(lm, asked: list[Probe]) -> list[list[float | None]]:
    """P of each answer of each probe, a forward pass each; a probe whose likeliest token is read takes one more."""
    found: list[list[float | None]] = []
    for one in asked:
        found.append([None if answer is None else _p(lm.model, one.prompt, answer) for answer in one.answers])
        if one.likeliest:
            lm.model(torch.tensor([one.prompt])).logits[0, -1].argmax()
    return found


def _texts(lm, prompts: list[Probe]) -> list[Figure]:
    ours = timed(write_probes, lm, prompts)
    theirs = timed(_text_loop, lm, prompts)
    apart = sum(a != b for a, b in zip(ours.result, theirs.result, strict=True))
    # two tokens as likely as each other to rounding part two right texts
    if apart > 0.02 * len(prompts):
        raise CheckFailed(f"{apart} of {len(prompts)} texts differ")
    rows = _figures(f"{len(prompts)} texts of {WRITTEN} tokens", "texts", len(prompts), ours, theirs)
    return [*rows, Figure(rows[0].case, "texts that differ", 100 * apart / len(prompts), "%", n=len(prompts))]


@torch.no_grad()
def _text_loop(lm, prompts: list[Probe]) -> list[str]:
    made = []
    for one in prompts:
        ids = torch.tensor([one.prompt])
        how = {"max_new_tokens": one.n_written, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        out = lm.model.generate(ids, pad_token_id=lm.tokenizer.eos_token_id, **how)[0, ids.shape[1] :]
        made.append(lm.tokenizer.decode(out, skip_special_tokens=True))
    return made


def _figures(case: str, what: str, n: int, ours: Timing, theirs: Timing) -> list[Figure]:
    rows = [
        ("ratio to one at a time", theirs.seconds / ours.seconds, "x"),
        (f"{what} in shared sweeps, CPU time a fact", ours.seconds / n, "s"),
        (f"{what} one at a time, CPU time a fact", theirs.seconds / n, "s"),
    ]
    return [Figure(case, name, value, unit, n=n, mark=MARK * (unit == "x")) for name, value, unit in rows]
