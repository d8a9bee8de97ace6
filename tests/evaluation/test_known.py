"""The unedited model is asked once for several edits of it, and every report is as it is alone."""

import importlib

import pytest
import torch

from kedit_fast.evaluation import evaluate
from kedit_fast.evaluation.benchmarks.knowedit import KNOWEDIT
from kedit_fast.evaluation.known import Known
from tests.evaluation.test_evaluate import FACTS, TEXT, lowrank, make_edit, make_lm
from tests.make import watched

module = importlib.import_module("kedit_fast.evaluation.known")
ASKED = FACTS[:3]


@pytest.fixture(scope="module")
def lm():
    return make_lm()


def same(a, b):
    return all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-7, equal_nan=True) for name in a)


def test_reports_are_as_they_are_alone(lm, monkeypatch):
    edits = [make_edit(lm), make_edit(lm, deltas={3: lowrank(5)})]
    alone = [evaluate(lm, ASKED, edit, benchmark=KNOWEDIT, generate=3) for edit in edits]
    read, written = (watched(monkeypatch, module, name) for name in ("read_probes", "write_probes"))
    known = Known()
    found = [evaluate(lm, ASKED, edit, benchmark=KNOWEDIT, generate=3, known=known) for edit in edits]
    assert len(read) == len(written) == 1  # of the base, for both
    for one, want in zip(found, alone, strict=True):
        assert same(one.base, want.base) and same(one.edited, want.edited)
        assert one.generations == want.generations
    assert all(
        torch.equal(found[0].base[name].nan_to_num(-1), found[1].base[name].nan_to_num(-1)) for name in KNOWEDIT.metrics
    )
    assert same(evaluate(lm, ASKED, benchmark=KNOWEDIT, generate=3, known=known).base, alone[0].base)
    assert len(read) == len(written) == 1


def test_probabilities_of_the_bases_likeliest_token(lm):
    facts = [fact for fact in FACTS if fact.same_subject]
    edit = make_edit(lm)
    alone, found = evaluate(lm, facts, edit), evaluate(lm, facts, edit, known=Known())
    assert same(found.edited, alone.edited)
    kept = alone.edited["same_subject_p_top"]
    assert not kept.isnan().all() and not torch.allclose(kept, alone.base["same_subject_p_top"], equal_nan=True)


def test_a_text_is_read_once(lm, monkeypatch):
    edits, known = [make_edit(lm), make_edit(lm, deltas={3: lowrank(5)})], Known()
    alone = [evaluate(lm, ASKED, edit, text=TEXT) for edit in edits]
    read = watched(monkeypatch, module, "perplexity")
    found = [evaluate(lm, ASKED, edit, text=TEXT, known=known).perplexity for edit in edits]
    assert len(read) == 1
    assert found == [pytest.approx(one.perplexity, rel=1e-5) for one in alone]


def test_another_model_is_another(lm, monkeypatch):
    known, other = Known(), make_lm("gpt2")
    evaluate(lm, ASKED, known=known)
    read = watched(monkeypatch, module, "read_probes")
    found = evaluate(other, ASKED, known=known)
    assert len(read) == 1 and same(found.base, evaluate(other, ASKED).base)
