"""Scores and texts of many prompts in shared sweeps against Hugging Face, one prompt at a time, in the same run.

The loop is what evaluation code commonly does: a forward pass for every prompt and answer, of which the logits behind
the prompt are read, and one ``generate`` call for every prompt. Every P and every text is compared, or nothing is
reported. Facts as in ``bench.edit``, with CounterFact's probes; ratios are of CPU time on one thread.
"""

import torch

import kedit_fast as kf
from bench import edit as edit_bench
from bench.common import CheckFailed, Figure, Measured, Timing, peak_matmul, timed
from kedit_fast.evaluation.benchmark import Case
from kedit_fast.evaluation.benchmarks.counterfact import COUNTERFACT
from kedit_fast.evaluation.probes import Probe, probe, read_probes, write_probes

FACTS, QUICK = 200, 4
WRITTEN = 20  # tokens
TOLERANCE = 1e-5  # of P; below it relative differences are of answers that nobody gives
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
    pairs = [
        (a, b)
        for got, want in zip(ours.result[0], theirs.result, strict=True)
        for a, b in zip(got.p, want, strict=True)
    ]
    worst = max(abs(a - b) for a, b in pairs if b is not None)
    if not worst <= TOLERANCE:
        raise CheckFailed(f"P of an answer differs by {worst:.1g}, more than {TOLERANCE:g}")
    rows = _figures(f"CounterFact's probes of {n} facts", "scores", n, ours, theirs)
    return [*rows, Figure(rows[0].case, "largest difference of P", worst, "difference", n=len(pairs))]


@torch.no_grad()
def _score_loop(lm, asked: list[Probe]) -> list[list[float | None]]:
    """P of each answer of each probe, a forward pass each; a probe whose likeliest token is read takes one more."""
    found = []
    for one in asked:
        values: list[float | None] = []
        for answer in one.answers:
            if answer is None:
                values.append(None)
                continue
            logits = lm.model(torch.tensor([one.prompt + answer[:-1]])).logits[0, len(one.prompt) - 1 :]
            log_p = logits.double().log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
            values.append(log_p.mean().exp().item())
        if one.likeliest:
            lm.model(torch.tensor([one.prompt])).logits[0, -1].argmax()
        found.append(values)
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
