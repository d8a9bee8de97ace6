"""CounterFact's metrics by hand: the columns of a fact, and the score."""

import json
import math
from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.basics.intervals import summarize
from kedit_fast.evaluation.benchmark import Writing
from kedit_fast.evaluation.benchmarks import counterfact
from kedit_fast.evaluation.benchmarks.counterfact import COUNTERFACT, METRICS
from kedit_fast.evaluation.probes import Answer, Probe
from kedit_fast.facts.fact import record_facts
from kedit_fast.facts.files import Notes
from tests.conftest import tiny_lm

NAN = math.nan
TOP = 7  # the token that the base model finds likeliest


def reading(rewrite=((0.5, 0.2, 1, 0),), paraphrases=(), neighborhood=(), same=(), left_out=0):
    """(probes, answers) of rows (p_new, p_true, exact_new, exact_true); same: ((p, exact) or None, same top, p_top)"""
    rows = [(counterfact.REWRITE, row) for row in rewrite] + [(counterfact.PARAPHRASE, row) for row in paraphrases]
    rows += [(counterfact.NEIGHBORHOOD, row) for row in neighborhood]
    asked = [
        (Probe([1], "", tuple(None if math.isnan(p) else [2] for p in row[:2]), kind), Answer(row[:2], row[2:]))
        for kind, row in rows
    ]
    for own, same_top, p_top in same:
        p, exact = own or (NAN, NAN)
        one = Probe([1], "", (None, [2] if own else None), counterfact.SAME_SUBJECT, likeliest=True)
        asked.append((one, Answer((NAN, p), (NAN, exact), top=TOP + (not same_top), p_top=p_top)))
    asked += [(Probe([1], "", (), counterfact.LEFT_OUT), Answer())] * left_out
    return tuple(map(list, zip(*asked, strict=True)))


def columns(one, base=None):
    """Columns of a reading; base: the base model's answers, which its likeliest tokens are those of."""
    probes, answers = one
    asked = zip(*(base or one), strict=True)
    before = [answer._replace(top=TOP if probe.likeliest else None) for probe, answer in asked]
    return COUNTERFACT.values(None, probes, answers, before)


def test_columns_by_hand():
    one = reading(
        rewrite=[(0.5, 0.2, 1, 0)],
        paraphrases=[(0.3, 0.1, 1, 0), (0.2, 0.6, 0, 1)],
        neighborhood=[(0.1, 0.4, 0, 1), (0.3, 0.05, 0, 0), (0.02, 0.1, 0, 0), (0.2, 0.2, 0, 0)],
        same=[((0.4, 1), 1, 0.9), ((0.2, 0), 0, 0.1), (None, 1, 0.2)],
        left_out=3,
    )
    expected = {
        "efficacy": 1,
        "efficacy_magnitude": 0.3,
        "efficacy_exact": 1,
        "efficacy_match": math.nan,  # nothing was written
        "efficacy_contains": math.nan,
        "p_new": 0.5,
        "p_true": 0.2,
        "paraphrase": 0.5,
        "paraphrase_magnitude": (0.2 - 0.4) / 2,
        "paraphrase_exact": 0.5,
        "paraphrase_match": math.nan,
        "paraphrase_contains": math.nan,
        "paraphrase_p_new": 0.25,
        "neighborhood": 0.5,  # a tie is no success
        "neighborhood_magnitude": (0.3 - 0.25 + 0.08 + 0) / 4,
        "neighborhood_exact": 0.25,
        "neighborhood_p_true": 0.75 / 4,
        "known_neighbors_p_true": (0.4 + 0.1 + 0.2) / 3,
        "same_subject_same_top": 2 / 3,
        "same_subject_p_top": 0.4,
        "same_subject_exact": 0.5,
        "same_subject_p_true": 0.3,
        "generation_entropy": math.nan,
        "neighborhood_left_out": 3,
    }
    got = columns(one)
    assert list(got) == list(METRICS) == list(expected)
    assert got == pytest.approx(expected, nan_ok=True)


def test_efficacy_is_strict():
    assert [columns(reading([(p_new, 0.2, 0, 0)]))["efficacy"] for p_new in (0.19, 0.2, 0.21)] == [0, 0, 1]


def test_known_neighbors_are_the_base_models():
    base = reading(neighborhood=[(0, 0.5, 0, 0), (0, 0.05, 0, 0)])
    after = reading(neighborhood=[(0, 0.01, 0, 0), (0, 0.9, 0, 0)])
    assert columns(after, base=base)["known_neighbors_p_true"] == pytest.approx(0.01)
    none = reading(neighborhood=[(0, 0.05, 0, 0)])
    assert math.isnan(columns(none)["known_neighbors_p_true"])


def test_neighbors_that_the_model_does_not_know_are_told():
    """Of three facts one has a neighbor that is known, one has none that is, one has no neighbors."""
    facts = [kf.Fact("{} is in", "Big Ben", target_new="Rome", neighborhood=("Toyota is in",))] * 3
    rows = [reading(neighborhood=[(0, 0.5, 0, 0), (0, 0.05, 0, 0)]), reading(neighborhood=[(0, 0.05, 0, 0)]), reading()]
    values = {name: torch.tensor([columns(row).get(name, NAN) for row in rows]) for name in METRICS}
    _, know = counterfact.sentences(facts, values, values)
    assert len(know) == 1 and know[0].startswith("the neighborhood of 1 fact says little: before the edit the model")
    assert counterfact.sentences(facts, values, None)[1] == []


def test_a_mean_is_over_the_prompts_that_have_a_value():
    """Of three neighbors one has no answer, and to one the new answer is its own."""
    got = columns(reading(neighborhood=[(0.1, 0.4, 0, 1), (0.1, NAN, 0, NAN), (NAN, 0.2, NAN, 0)]))
    assert got["neighborhood"] == 1 and got["neighborhood_p_true"] == pytest.approx(0.3)
    assert got["neighborhood_exact"] == 0.5 and got["known_neighbors_p_true"] == pytest.approx(0.3)


def test_what_a_fact_lacks_is_nan():
    no_true, no_new = (0.5, NAN, 1, NAN), (NAN, 0.5, NAN, 1)
    for asked, known in (
        ([(0.5, 0.2, 1, 0)], "efficacy efficacy_magnitude efficacy_exact p_new p_true"),
        ([no_true] * 3, "efficacy_exact p_new paraphrase_exact paraphrase_p_new"),
        ([no_new] * 3, "p_true neighborhood_exact neighborhood_p_true known_neighbors_p_true"),
    ):
        got = columns(reading(*([row] for row in asked))).items()
        assert {name for name, value in got if not math.isnan(value)} == {*known.split(), "neighborhood_left_out"}


def full(**values):
    """Columns of every metric, NaN but for those given."""
    n = len(next(iter(values.values())))
    return {name: torch.tensor(values.get(name, [NAN] * n)) for name in METRICS}


def summary(columns):
    return summarize(columns, METRICS, COUNTERFACT.score_of)


def test_score_is_of_the_data_sets_means():
    columns = full(efficacy=[1.0, 1.0], paraphrase=[1.0, 0.0], neighborhood=[0.5, NAN])
    got = summary(columns)
    assert got["score"].mean == pytest.approx(3 / (1 + 2 + 2))  # not the mean of each fact's
    assert math.isnan(got["score"].low)
    assert got["neighborhood"].n == 1
    columns = full(efficacy=[1.0, 1.0], paraphrase=[0.0, 0.0], neighborhood=[0.5, 0.5])
    assert summary(columns)["score"].mean == 0.0
    assert math.isnan(summary(full(efficacy=[1.0]))["score"].mean)


# ---- texts

PROMPTS = ["Eve was born in", "Eve speaks"]


def record(**more):
    rewrite = {
        "prompt": "The mother tongue of {} is", "subject": "Eve", "relation_id": "P103",
        "target_new": {"str": "French", "id": "Q150"}, "target_true": {"str": "Dutch", "id": "Q7411"},
    }  # fmt: skip
    return {"requested_rewrite": rewrite, "generation_prompts": [*PROMPTS, PROMPTS[0]]} | more


def written_case(tmp_path, texts, chat=False):
    """(the case, its probes and answers) of what is written behind the generation prompts"""
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([record()]))
    (case,) = COUNTERFACT.load(path)
    case = replace(case, facts=tuple(replace(fact, chat=chat) for fact in case.facts))
    probes = [Probe([1], prompt, (), counterfact.GENERATION) for prompt in PROMPTS]
    return case, probes, [Answer(text=text) for text in texts]


def test_generation_prompts_and_ids_are_kept_with_the_fact(tmp_path):
    (fact,) = written_case(tmp_path, [])[0].facts
    about = {"relation_id": "P103", "target_id": "Q150", "generation_prompts": PROMPTS}
    assert fact.provenance == about
    assert record_facts(fact.to_record(), 0, Notes())[0] == fact


def test_generation_prompts_are_written_on_where_texts_are_asked_for(tmp_path):
    lm = tiny_lm("llama")
    case, _, _ = written_case(tmp_path, [])
    for n in (0, 5):
        probes = COUNTERFACT.probes(lm, replace(case, writing=Writing(n)))
        asked = [(one.text, one.n_written) for one in probes if one.kind == counterfact.GENERATION]
        assert asked == [(prompt, n) for prompt in PROMPTS if n]


def test_entropy_is_the_mean_over_texts_with_their_prompts(tmp_path):
    case, probes, answers = written_case(tmp_path, [" Paris .", None])
    found = COUNTERFACT.values(case, probes, answers, answers)
    # "Eve was born in Paris .": 5 pairs and 4 triples, each once
    assert found["generation_entropy"] == pytest.approx((2 / 3 * math.log2(5) + 4 / 3 * math.log2(4)) / 2)
    case, probes, answers = written_case(tmp_path, [" a b c", " a a a"], chat=True)
    found = COUNTERFACT.values(case, probes, answers, answers)
    assert found["generation_entropy"] == pytest.approx((2 / 3 * math.log2(2) + 0) / 2 / 2)
    assert math.isnan(COUNTERFACT.values(case, [], [], [])["generation_entropy"])


SNIPPETS = [
    {"relation_id": "P103", "target_id": "Q150", "samples": [{"text": "She speaks French"}, {"text": "French is"}]},
    {"relation_id": "P103", "target_id": "Q9", "samples": [{"text": "He is Persian"}]},
]


def test_reference_score_by_hand(tmp_path):
    path = tmp_path / "snippets.json"
    path.write_text(json.dumps(SNIPPETS))
    benchmark = kf.counterfact_with(path)
    case, probes, answers = written_case(tmp_path, [" French", " speaks"], chat=True)
    found = benchmark.values(case, probes, answers, answers)
    # " French speaks" and "She speaks French French is"; of three texts "is" and "french" stand in two, the rest in one
    once, twice = 1 + math.log(4 / 2), 1 + math.log(4 / 3)
    said, known = {"french": twice, "speaks": once}, {"she": once, "speaks": once, "french": 2 * twice, "is": twice}
    norms = [math.sqrt(sum(x * x for x in one.values())) for one in (said, known)]
    expected = sum(x * known[word] for word, x in said.items()) / math.prod(norms)
    assert found[counterfact.REFERENCE_SCORE] == pytest.approx(expected, rel=1e-6)
    same = [Answer(text="She speaks French"), Answer(text="French is")]
    assert benchmark.values(case, probes, same, same)[counterfact.REFERENCE_SCORE] == pytest.approx(1)
    assert (
        found.items() >= {k: v for k, v in COUNTERFACT.values(case, probes, answers, answers).items() if v == v}.items()
    )


def test_a_fact_without_references_is_not_scored(tmp_path):
    path = tmp_path / "snippets.json"
    path.write_text(json.dumps(SNIPPETS[1:]))
    case, probes, answers = written_case(tmp_path, [" French", " speaks"])
    found = kf.counterfact_with(path).values(case, probes, answers, answers)
    assert math.isnan(found[counterfact.REFERENCE_SCORE]) and found["generation_entropy"] > 0


@pytest.mark.parametrize(
    "wrong", [{"relation_id": "P1"}, {"relation_id": "P1", "target_id": "Q", "samples": [{"text": 3}]}, 7]
)
def test_other_files_are_no_references(tmp_path, wrong):
    path = tmp_path / "snippets.json"
    path.write_text(json.dumps([SNIPPETS[0], wrong]))
    with pytest.raises(ValueError, match=r"snippets.json: record 1 is no record of snippets"):
        kf.counterfact_with(path)
