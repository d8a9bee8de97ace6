"""Editing in rounds: each round on top of those before, asked about old and new facts, written down as it goes."""

import json
import math
from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
import kedit_fast.evaluation.known as known_module
import kedit_fast.experiments.rounds as rounds_module
from kedit_fast.editors import AlphaEdit
from kedit_fast.editors.editor import Editor
from kedit_fast.editors.finetune import Ft
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.experiments.rounds import Round, edit_in_rounds
from kedit_fast.pictures.rounds import plot_rounds
from tests.conftest import refused, tiny_lm
from tests.editors import cases, networks
from tests.make import killed_at, lowrank
from tests.tiny import TEXT

pytestmark = pytest.mark.filterwarnings("ignore:the second moments of layers")
NEAR = {"target_true": "Paris", "neighborhood": ("The capital of France is", "Big Ben is in")}
FACTS = tuple(replace(fact, paraphrases=(f"Today {fact.text}",), **NEAR) for fact in cases.FACTS)
COMMON = dict(v_lr=1.0, v_num_grad_steps=4, clamp_norm_factor=0.5)
MEMIT = kf.Memit(layers=(0, 1), mom2_update_weight=5.0, **COMMON)
EDITORS_UNDER_TEST = {
    "rome": kf.Rome(layers=(1,), **COMMON),
    "memit": MEMIT,
    "alphaedit": AlphaEdit(layers=(0, 1), nullspace_threshold=0.0, nullspace_share=0.5, L2=0.3, **COMMON),
}


def in_rounds(lm, editor=MEMIT, facts=FACTS, **options):
    given = {"per_round": 1, "contexts": cases.GROUPS, "moments": cases.moments()}
    return edit_in_rounds(lm, facts, editor, **given | options)


@pytest.mark.parametrize("name", EDITORS_UNDER_TEST)
def test_each_round_is_on_top_of_those_before(name):
    lm, editor = tiny_lm("llama", torch.float64), EDITORS_UNDER_TEST[name]
    found = list(in_rounds(lm, editor, per_round=2))
    first = editor.edit(lm, FACTS[:2], moments=cases.moments(), contexts=cases.GROUPS)
    second = editor.edit(lm, FACTS[2:], moments=cases.moments(), contexts=cases.GROUPS, previous=first)
    alone = editor.edit(lm, FACTS[2:], moments=cases.moments(), contexts=cases.GROUPS)
    assert [(r.number, r.n_facts, r.method) for r in found] == [(1, 2, name), (2, 4, name)]
    for layer in second.layers:
        total = first.deltas[layer].dense() + second.deltas[layer].dense()
        assert cases.relative(found[1].edit.deltas[layer].dense(), total) < 1e-10
        apart = first.deltas[layer].dense() + alone.deltas[layer].dense()
        assert cases.relative(found[1].edit.deltas[layer].dense(), apart) > 1e-3  # the second saw the first
        weight = lm.source.weight(layer, "down").detach().norm()
        assert found[1].growth[layer] == pytest.approx(float(total.norm() / weight), rel=1e-6)
    assert found[1].edit.facts == FACTS


def test_what_is_asked_after_a_round():
    lm = tiny_lm("llama")
    found = list(in_rounds(lm, text=TEXT, max_tokens=60))
    assert [r.old["efficacy"].n for r in found] == [0, 1, 2, 3]
    assert all(r.new["efficacy"].n == 1 for r in found)
    last = found[-1]
    report = kf.evaluate(lm, FACTS, last.edit, text=TEXT, max_tokens=60)
    assert last.new["p_new"].mean == pytest.approx(float(report.edited["p_new"][3]), rel=1e-4)
    for metric in ("p_new", "paraphrase_p_new", "neighborhood_p_true"):
        assert last.old[metric].mean == pytest.approx(float(report.edited[metric][:3].mean()), rel=1e-4)
        assert last.base[metric].mean == pytest.approx(float(report.base[metric].mean()), rel=1e-4)
    assert last.perplexity == pytest.approx(report.perplexity, rel=1e-5)
    assert last.drift == pytest.approx(report.drift, rel=1e-4)
    assert last.new["p_new"].mean != pytest.approx(last.base["p_new"].mean, rel=1e-2)
    assert min(r.edit_s for r in found) > 0 and min(r.evaluate_s for r in found) > 0


def test_the_base_model_is_asked_once(monkeypatch):
    def watched_things(name, of):
        seen, real = [], getattr(known_module, name)

        def watch(lm, things, *rest):
            assert not lm.edits
            seen.extend(of(one) for one in things)
            return real(lm, things, *rest)

        monkeypatch.setattr(known_module, name, watch)
        return seen

    asked = watched_things("read_probes", lambda one: (one.text, str(one.answers)))
    read = watched_things("perplexity", tuple)
    found = list(in_rounds(tiny_lm("llama"), text=TEXT, max_tokens=60))
    assert [r.old["efficacy"].n for r in found] == [0, 1, 2, 3]
    assert len(set(asked)) == len(asked) and {fact.text for fact in FACTS} <= {text for text, _ in asked}
    assert read and len(set(read)) == len(read)


class Nothing(Editor):
    """An editor that writes edits of nothing."""

    layers, mom2_adjustment = (1,), False

    def check(self, lm):
        pass

    def edit(self, lm, facts, **given):
        nothing = lowrank(seed=FACTS.index(facts[0]), scale=0.0)  # no two rounds write the same
        return Edit("nothing", {}, lm.fingerprint, tuple(facts), {1: nothing})


def test_earlier_facts_are_sampled_with_the_seed(monkeypatch):
    lm, asked = tiny_lm("gpt2"), []
    report = kf.evaluate(lm.with_edit(Nothing().edit(lm, FACTS)), FACTS)

    def evaluate(lm, facts, *args, **options):
        if args:  # with an edit; the base model is asked before
            asked.append([fact.subject for fact in facts])
        return report

    monkeypatch.setattr(rounds_module, "evaluate", evaluate)
    subjects, drawn = [fact.subject for fact in FACTS], []
    for seed in (0, 0, 1, 2):
        asked.clear()
        list(edit_in_rounds(lm, FACTS, Nothing(), per_round=1, old=1, seed=seed))
        assert [len(each) for each in asked] == [1, 2, 2, 2]
        assert all(each[0] == subjects[i] and each[1] in subjects[:i] for i, each in enumerate(asked[1:], 1))
        drawn.append([each[1:] for each in asked])
    assert drawn[0] == drawn[1] and len({str(each) for each in drawn}) > 1
    asked.clear()
    list(edit_in_rounds(lm, FACTS, Nothing(), per_round=3, old=0))
    assert asked == [subjects[:3], subjects[3:]]


def counted_asks(monkeypatch, editor):
    """What is asked of an editor's contexts and of statistics: once is enough for all rounds and layers."""
    asked = []

    def contexts(self, lm, seed):
        asked.append("contexts")
        return cases.GROUPS

    def measured(lm, layers, corpus):
        assert not lm.edits
        asked.append(tuple(layers))
        return cases.moments()

    monkeypatch.setattr(editor, "sampled_contexts", contexts)
    monkeypatch.setattr("kedit_fast.moments.given.second_moments", measured)
    return asked


def test_contexts_are_sampled_and_statistics_measured_once(monkeypatch):
    lm, asked = tiny_lm("llama"), counted_asks(monkeypatch, kf.Memit)
    found = list(in_rounds(lm, contexts=None, moments=None, corpus="self", per_round=2))
    assert sorted(asked, key=str) == [MEMIT.layers, "contexts"]
    given = list(in_rounds(lm, per_round=2))
    for layer in MEMIT.layers:
        assert torch.equal(found[1].edit.deltas[layer].u, given[1].edit.deltas[layer].u)


def test_editors_without_statistics_and_contexts():
    """Fine-tuning refuses both; rounds hand it neither."""
    lm = tiny_lm("llama")
    found = list(edit_in_rounds(lm, FACTS, Ft(layers=(1,), num_steps=3, lr=1e-3), per_round=2))
    assert [r.n_facts for r in found] == [2, 4] and found[1].growth[1] > found[0].growth[1] * 0.5
    plain = list(in_rounds(lm, replace(MEMIT, mom2_adjustment=False), moments=None, per_round=2))
    assert len(plain) == 2


def test_edits_that_the_model_carries_come_first():
    lm = tiny_lm("llama", torch.float64)
    below = MEMIT.edit(lm, FACTS[:2], moments=cases.moments(), contexts=cases.GROUPS)
    (on_it,) = in_rounds(lm.with_edit(below), facts=FACTS[2:], per_round=2)
    through = list(in_rounds(lm, per_round=2))[1]
    assert on_it.n_facts == 2 and on_it.growth == pytest.approx(through.growth, rel=1e-8)
    assert on_it.new["p_new"].mean == pytest.approx(through.new["p_new"].mean, rel=1e-6)


def test_rounds_come_one_by_one_and_are_logged(tmp_path):
    log = tmp_path / "rounds.jsonl"
    made = in_rounds(tiny_lm("llama"), text=TEXT, max_tokens=60, log=log)
    assert not log.exists()
    first = next(made)
    assert len(log.read_text().splitlines()) == 1
    found = [first, *made]
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert records == [r.to_record() for r in found]
    assert records[0]["old"]["efficacy"] == [None, None, None, 0]  # NaN is not JSON
    for record, r in zip(records, found, strict=True):
        read = Round.from_record(record)
        assert read.to_record() == record and read.edit is None
        for name in ("number", "n_facts", "growth", "perplexity"):
            assert getattr(read, name) == getattr(r, name)


def test_a_ruined_model_is_reported_not_hidden(monkeypatch):
    """Perplexity without bound and norms that are no number are None in the record, and the picture leaves them out."""
    (found,) = in_rounds(tiny_lm("llama"), per_round=4, text=TEXT, max_tokens=60)
    ruined = replace(found, perplexity=(found.perplexity[0], math.inf), growth={0: math.nan})
    record = json.loads(json.dumps(ruined.to_record(), allow_nan=False))
    assert record["perplexity"][1] is None and record["growth"] == {"0": None}
    read = Round.from_record(record)
    assert math.isnan(read.perplexity[1]) and math.isnan(read.drift)
    assert "perplexity +" not in plot_rounds({"memit": [ruined]}).get_label()


@pytest.mark.parametrize(
    "options, says",
    [
        ({"per_round": 0}, "per_round = 0"),
        ({"per_round": 1.5}, "per_round = 1.5"),
        ({"old": -1}, "old = -1"),
        ({"facts": []}, "facts is empty"),
        ({"facts": [*FACTS, replace(FACTS[0], target_new="Oslo")]}, "contradict"),
        ({"facts": [*FACTS, replace(FACTS[0], subject="Io", target_new=None)]}, "no target_new"),
        ({"facts": [*FACTS, replace(FACTS[0], subject="x y " * 200)]}, "in context"),
        ({"editor": replace(MEMIT, layers=())}, "needs layers"),
        ({"editor": replace(MEMIT, layers=(0, 9))}, "layers = 0, 9: this model has layers 0 to 3"),
        ({"moments": None}, "second moments"),
        ({"corpus": "self"}, "both given"),
        ({"text": "a", "max_tokens": 1}, "max_tokens = 1: expected a whole number of at least 2"),
        ({"text": "a", "max_tokens": 2}, "no token to predict"),
        ({"contexts": ["no place"]}, "bare prompt"),
        ({"log": f"{__file__}/log.jsonl"}, "is no folder"),
    ],
)
def test_errors_come_before_work(options, says, no_sweep):
    error = NotADirectoryError if "log" in options else ValueError
    refused(says, in_rounds, tiny_lm("gpt2"), **options, error=error)  # whose positions have an end


def test_what_an_editor_needs_of_facts_is_asked_before_work(no_sweep):
    lm, unlearn = tiny_lm("gpt2"), kf.Unlearn(layers=(1,))
    forget, both = (
        kf.forgetting(FACTS[:2]),
        [replace(FACTS[0], target_true="Oslo"), replace(FACTS[1], target_true=None)],
    )
    refused("ask whether new answers are said.*kf.verify_forgotten", edit_in_rounds, lm, forget, unlearn, per_round=1)
    refused("nothing to forget", edit_in_rounds, lm, both, unlearn, per_round=1)  # in the second round
    plain = [kf.Fact("The Louvre is in", target_new="Rome")]
    refused("no subject", edit_in_rounds, lm, plain, MEMIT, per_round=1)
    edit_in_rounds(lm, plain, Ft(layers=(1,)), per_round=1)


def test_a_trained_editor_s_rounds_are_kept(tmp_path):
    lm = tiny_lm("llama")
    mend = kf.Mend(network=networks.network(lm, "mend", torch.float32))
    facts = networks.FACTS[:2]
    first, again = (list(edit_in_rounds(lm, facts, mend, per_round=1, checkpoint=tmp_path / "run")) for _ in range(2))
    assert [digest(r.edit) for r in first] == [digest(r.edit) for r in again] and len(first) == 2


# ---- the picture


def test_the_picture(tmp_path):
    lm = tiny_lm("llama")
    rounds = {
        name: list(in_rounds(lm, editor, text=TEXT, max_tokens=60, per_round=2))
        for name, editor in EDITORS_UNDER_TEST.items()
    }
    figure = plot_rounds(rounds, tmp_path / "rounds.png", model="tiny")
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")
    efficacy, neighborhood, perplexity, growth = figure.axes
    lines = {line.get_label(): line for line in efficacy.lines}
    assert set(lines) == {f"{name}, {side}" for name in rounds for side in ("new", "earlier")}
    drawn = lines["rome, new"]
    assert list(drawn.get_xdata()) == [2, 4]
    assert list(drawn.get_ydata()) == [r.new["efficacy"].mean for r in rounds["rome"]]
    assert {line.get_label() for line in perplexity.lines} == {*rounds, "without edits"}
    edited = next(line for line in perplexity.lines if line.get_label() == "memit")
    assert list(edited.get_ydata()) == [r.perplexity[1] for r in rounds["memit"]]
    moved = next(line for line in growth.lines if line.get_label() == "memit")
    assert list(moved.get_ydata()) == [max(r.growth.values()) for r in rounds["memit"]]
    assert len(neighborhood.lines) == len(rounds) + 1
    assert "memit after 4 facts: efficacy of new facts" in figure.get_label()


def test_the_picture_of_few_figures():
    (alone,) = in_rounds(tiny_lm("llama"), per_round=4)  # no text, no earlier facts
    figure = plot_rounds({"memit": [alone], "rome": []})
    assert figure.axes[2].texts[0].get_text() == "no text given"
    assert figure.axes[3].get_yscale() == "linear"
    collapsed = replace(alone, n_facts=8, growth={0: 100 * alone.growth[0], 1: 100 * alone.growth[1]})
    assert plot_rounds({"memit": [alone, collapsed]}).axes[3].get_yscale() == "log"
    refused("no rounds to plot", plot_rounds, {"rome": []})


def test_killed_rounds_go_on_to_the_same_bits(tmp_path):
    """Killed inside a round, and between two; the times are those of the run that did the round."""
    lm = tiny_lm("llama")
    options = {"per_round": 1, "old": 2, "seed": 3}
    whole = list(in_rounds(lm, log=tmp_path / "whole.jsonl", **options))
    kept = {"log": tmp_path / "log.jsonl", "checkpoint": tmp_path / "run"} | options
    for n in (2, 8):  # parts: a round's values, layers and evaluation, then the round
        with killed_at(n):
            list(in_rounds(lm, **kept))
    again = list(in_rounds(lm, **kept))
    for one, other in zip(again, whole, strict=True):
        one.edit.save(tmp_path / "one"), other.edit.save(tmp_path / "other")
        assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
        timeless = [replace(each, edit_s=0.0, evaluate_s=0.0).to_record() for each in (one, other)]
        assert timeless[0] == timeless[1]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [one.to_record() for one in again]
    assert len(list((tmp_path / "run").glob("*.safetensors"))) == len(again)
    refused("holds other work: its old is 2", list, in_rounds(lm, **kept | {"old": 3}))
