"""A model that gives NaN, by whatever way it is asked: the same sentence, never a figure."""

import math

import pytest
import torch

import kedit_fast as kf
from kedit_fast.edits.deltas import Dense
from kedit_fast.edits.edit import Edit
from kedit_fast.evaluation.perplexity import perplexity, text_windows
from kedit_fast.evaluation.probes import probe
from kedit_fast.evaluation.written import write_probes
from kedit_fast.experiments.by_layer import edit_by_layer
from kedit_fast.experiments.rounds import edit_in_rounds
from kedit_fast.gating import gate
from kedit_fast.jobs.finite import check_answers, is_broken, not_finite
from kedit_fast.jobs.generate import generate
from tests.conftest import open_tiny, tiny_lm
from tests.gating.cases import FACT, SUITE, TEXT, judged
from tests.tiny import D_FF, D_MODEL, tiny_model

OTHER = kf.Fact("{} plays the", "Miles Davis", same_subject=("Miles Davis was born in",))
GROUPS = [["{}"]]
PLAIN = {"mom2_adjustment": False, "v_num_grad_steps": 1}


def overflowing():
    """fp16 holds its weights, and not what its second layer makes of them."""
    model = tiny_model("llama", torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e4
    return model


def overflowing_at_the_end():
    """All its hidden states are finite."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    return model


BROKEN = {"layers": overflowing, "head": overflowing_at_the_end}
FLOWS = {
    "top_tokens": lambda lm: lm.top_tokens(FACT.text),
    "generate": lambda lm: lm.generate(FACT.text, 3),
    "sampled": lambda lm: lm.generate(FACT.text, 3, temperature=1.0, top_k=5, seed=0),
    "evaluate": lambda lm: kf.evaluate(lm, FACT),
    "evaluate, same subject": lambda lm: kf.evaluate(lm, OTHER),
    "evaluate, generate": lambda lm: kf.evaluate(lm, OTHER, generate=2),
    "evaluate an edit": lambda lm: kf.evaluate(lm, FACT, edit_of(lm)),
    "perplexity": lambda lm: perplexity(lm, text_windows(lm, TEXT)),
    "perplexity of an edit": lambda lm: perplexity(lm.with_edit(edit_of(lm)), text_windows(lm, TEXT)),
    "logit_lens": lambda lm: kf.logit_lens(lm, FACT),
    "write_probes": lambda lm: write_probes(lm, [probe(lm, FACT.text, n_written=2)]),
    "gate": lambda lm: judged(gate, lm, edit_of(lm), SUITE),
    "trace": lambda lm: kf.trace(lm, FACT, samples=1),
    "trace of an answer": lambda lm: kf.trace(lm, FACT, samples=1, answer="Rome", kinds="state"),
    "attribution": lambda lm: kf.trace(lm, FACT, samples=1, method="attribution"),
    "statistics, sampled": lambda lm: kf.second_moments(lm, [1], "self", n_tokens=40),
    "contexts": lambda lm: kf.Memit(layers=(1,), **PLAIN).edit(lm, FACT),
    "memit": lambda lm: kf.Memit(layers=(1,), **PLAIN).edit(lm, FACT, contexts=GROUPS),
    "rome": lambda lm: kf.Rome(layers=(1,), **PLAIN).edit(lm, FACT, contexts=GROUPS),
    "ft": lambda lm: kf.EDITORS["ft"](layers=(1,), num_steps=1).edit(lm, FACT),
    "ft-l": lambda lm: kf.EDITORS["ft-l"](layers=(1,), num_steps=1).edit(lm, FACT),
    "rounds": lambda lm: list(edit_in_rounds(lm, [FACT], kf.EDITORS["ft"](layers=(1,), num_steps=1), per_round=1)),
    "layers": lambda lm: edit_by_layer(lm, [FACT], kf.Rome(layers=(1,), **PLAIN), [1], contexts=GROUPS),
}
STATISTICS = {"statistics": lambda lm: kf.second_moments(lm, [2], [TEXT * 3], n_tokens=40)}


def edit_of(lm, size=1e-3):
    delta = Dense(torch.full((D_MODEL, D_FF), size))
    return Edit("by hand", {}, lm.fingerprint, (FACT,), {2: delta})


@pytest.mark.parametrize(("broken", "flow"), [*((b, f) for b in BROKEN for f in FLOWS), ("layers", "statistics")])
def test_a_model_that_gives_nan_is_an_error_everywhere(broken, flow):
    lm = open_tiny(BROKEN[broken]())
    narrow = ", or float16, too narrow" if broken == "layers" else ""
    with pytest.raises(ValueError, match=f"(NaN|infinite).*: damaged weights .*{narrow}"):
        (FLOWS | STATISTICS)[flow](lm)


def test_an_edit_that_overflows_is_reported_and_no_error():
    """The base model's figures stand, and the edited one's are those of a model that is wrong."""
    lm = tiny_lm("llama")
    edit = edit_of(lm, 3e38)
    report = kf.evaluate(lm, FACT, edit, text=TEXT, generate=2)
    assert report.base["p_new"][0] > 0 and report.edited["p_new"].tolist() == [0]
    assert math.isfinite(report.perplexity[0]) and math.isnan(report.perplexity[1])
    _, before, after = report.generations[0]
    assert before and after == ""
    lens = kf.logit_lens(lm, FACT, edit)
    assert not lens.before.p_new.isnan().any() and lens.after.p_new[0, -1].isnan()
    assert not judged(gate, lm, edit).passed
    edited = lm.with_edit(edit)
    for ask in (edited.top_tokens, edited.generate, lambda text: kf.trace(edited, FACT)):
        with pytest.raises(
            ValueError, match=r"NaN after 'Big Ben is .*damaged weights .* or an edit on the model that"
        ):
            ask(FACT.text)


def test_a_text_that_ends_in_nan_leaves_the_others_as_they_are(monkeypatch):
    lm, prompts = tiny_lm("llama"), [[5, 6, 7], [8, 9], [10, 11, 12]]
    want = generate(lm, prompts, 5, stop=False)
    head, steps = type(lm).head, []

    def torn(self, h):
        steps.append(1)
        logits = head(self, h)
        return logits.index_fill(0, torch.tensor([1]), torch.nan) if len(steps) == 3 else logits

    monkeypatch.setattr(type(lm), "head", torn)
    assert generate(lm, prompts, 5, stop=False, nan_ends=True) == [want[0], want[1][:2], want[2]]
    steps.clear()
    with pytest.raises(ValueError, match=r"gives NaN after .* \(1 of 3 answers\)"):
        generate(lm, prompts, 5, stop=False)


def test_what_counts_as_broken():
    rows = torch.tensor([[0.0, -math.inf], [0.0, math.nan], [math.inf, 0.0]])
    assert is_broken(rows).tolist() == [False, True, True] and is_broken(rows[:, 0]).tolist() == [False, False, True]
    assert is_broken(rows[:0]).shape == (0,)
    lm = tiny_lm("llama")
    check_answers(lm, rows[:1], lambda i: [1])
    with pytest.raises(ValueError, match=r"'Big Ben' \(2 of 3 answers\): damaged"):
        check_answers(lm, rows, lambda i: lm.encode(["no", "Big Ben", "no"][i]))
    assert str(not_finite(lm, "x")) == "x: damaged weights (fetch the model again)"
