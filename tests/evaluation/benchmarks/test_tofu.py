"""TOFU's scores by hand, and on a tiny model by one forward a text."""

import copy
import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kedit_fast as kf
from kedit_fast.evaluation.benchmarks.tofu import (
    TOFU,
    TofuItem,
    TofuScores,
    forget_quality,
    load_tofu,
    model_utility,
    rouge_l_recall,
    tofu_scores,
    truth_ratio,
)
from tests.conftest import refused, tiny_lm
from tests.tiny import tiny_model, tiny_tokenizer

SHARED = Path(__file__).parents[4] / "shared" / "data" / "tofu" / "tofu_qa.json.gz"


def test_each_number_by_hand():
    # s: NLL of the paraphrase 0.5, of the wrong ones 1 and 2: exp(1.5 - 0.5)
    assert truth_ratio(math.exp(-0.5), [math.exp(-1), math.exp(-2)]) == pytest.approx(math.e)
    scores = TofuScores([0.5, 0.3], [2.0, 0.5], [1.0, 0.5])
    assert scores.of_utility() == pytest.approx({"rouge": 0.75, "probability": 0.4, "truth": 0.25})
    assert scores.forget_truth == pytest.approx(0.5)
    same = {name: scores for name in ("retain", "real_authors", "world_facts")}
    assert model_utility(same) == pytest.approx(3 / (1 / 0.75 + 1 / 0.4 + 1 / 0.25))
    assert model_utility(same | {"retain": TofuScores([0.0], [2.0], [1.0])}) == 0
    refused("real_authors, world_facts is missing", model_utility, {"retain": scores})
    partly = TofuScores([0.5], [], [1.0])
    refused("needs truth ratios and ROUGE", model_utility, same | {"retain": partly})
    assert math.isnan(partly.forget_truth)


def test_forget_quality_is_the_ks_test():
    """Of two lists of 4 that do not overlap: D = 1, exact p = 2 / C(8, 4)."""
    assert forget_quality([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / 70)
    assert forget_quality([1, 2, 3], [1, 2, 3]) == pytest.approx(1.0)
    refused("one list is empty", forget_quality, [], [1.0])


@pytest.mark.parametrize(
    ("reference", "said", "recall"),
    [("the cat sat on the mat", "The cat, on a mat!", 4 / 6), ("a b", "", 0), ("a b c", "c b a", 1 / 3), ("!", "x", 0)],
)
def test_rouge_l_recall(reference, said, recall):
    assert rouge_l_recall(reference, said) == pytest.approx(recall)


ITEMS = [
    TofuItem("Where is Big Ben?", "London", ("Paris", "New York"), "In London", "world_facts"),
    TofuItem("Where is Vimeo?", "New York", ("Rome", "Spain"), None, "world_facts"),
]


def nll(lm, question, answer):
    """Of a text's answer, one forward."""
    head = lm.encode(f"Question: {question}\nAnswer:")
    ids = head + lm.encode(f" {answer}")
    with torch.no_grad():
        log_p = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(log_p[i - 1, ids[i]].item() for i in range(len(head), len(ids))) / (len(ids) - len(head))


def test_scores_of_a_model():
    lm = tiny_lm("llama", torch.float64)
    scores = tofu_scores(lm, ITEMS, max_new_tokens=3)
    for item, p, s in zip(ITEMS, scores.probability, scores.s, strict=True):
        wrong = [nll(lm, item.question, answer) for answer in item.perturbed]
        right = math.exp(-nll(lm, item.question, item.answer))
        assert s == pytest.approx(math.exp(sum(wrong) / 2 - nll(lm, item.question, item.paraphrased or item.answer)))
        assert p == pytest.approx(right / (right + sum(math.exp(-each) for each in wrong)))
    assert len(scores.rouge) == 2
    mixed = [replace(ITEMS[0], split="retain"), ITEMS[1]]  # each by the set that it is of, in whatever order
    alone = [math.exp(-nll(lm, ITEMS[0].question, ITEMS[0].answer)), scores.probability[1]]
    for order in (1, -1):
        assert tofu_scores(lm, mixed[::order], max_new_tokens=0).probability[::order] == pytest.approx(alone)
    plain = tofu_scores(lm, [TofuItem(i.question, i.answer) for i in ITEMS], max_new_tokens=0)
    assert plain.probability[0] == pytest.approx(math.exp(-nll(lm, "Where is Big Ben?", "London")))
    assert plain.s == plain.rouge == []
    refused("some items have perturbed", tofu_scores, lm, [ITEMS[0], TofuItem("a", "b")])
    refused("items", tofu_scores, lm, [])


@pytest.mark.parametrize("chat", [False, True])
def test_as_a_benchmark(tmp_path, chat):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    lm = kf.open_model(tiny_model("llama", torch.float64), tokenizer=tokenizer)
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    records = [
        {"question": i.question, "answer": i.answer, "perturbed_answer": i.perturbed, "split": i.split}
        | ({"paraphrased_answer": i.paraphrased} if i.paraphrased else {})
        for i in ITEMS
    ]
    (tmp_path / "tofu.json").write_text(json.dumps([*records, {"question": "Who plays?", "answer": "Monk"}]))
    cases = TOFU.load(tmp_path / "tofu.json")
    cases = [replace(case, facts=tuple(replace(fact, chat=chat) for fact in case.facts)) for case in cases]
    found = kf.evaluate(lm, cases, benchmark=TOFU, generate=3, both_forms=False)
    scores = tofu_scores(lm, ITEMS, max_new_tokens=3, chat=chat)
    for name, values in (("probability", scores.probability), ("truth_ratio", scores.s), ("rouge", scores.rouge)):
        assert found.base[name][:2].tolist() == pytest.approx(values, rel=1e-5)
    assert found.base["truth"][:2].mean().item() == pytest.approx(scores.of_utility()["truth"], rel=1e-5)
    assert found.base["forget_truth"][:2].mean().item() == pytest.approx(scores.forget_truth, rel=1e-5)
    assert math.isnan(found.base["truth_ratio"][2]) and found.base["probability"][2] > 0
    fact = kf.Fact("Who plays?", target_new="Monk", chat=chat)  # of any file
    assert kf.evaluate(lm, fact, benchmark=TOFU, both_forms=False).base["probability"] == found.base["probability"][2]
    refused("no answer", kf.evaluate, lm, kf.Fact("Who plays?", target_true="Monk"), benchmark=TOFU)


def test_files(tmp_path):
    record = {"question": "q", "answer": "a", "perturbed_answer": ["b"], "paraphrased_answer": "c"}
    (tmp_path / "tofu.jsonl").write_text(json.dumps(record))
    assert load_tofu(tmp_path / "tofu.jsonl") == [TofuItem("q", "a", ("b",), "c")]
    refused("no item of split 'retain'; it has forget", load_tofu, tmp_path / "tofu.jsonl", "retain")
    for damaged in ({"perturbed_answer": "bcd"}, {"answer": None}, {"question": 1}, {"perturbed_answer": [1]}):
        (tmp_path / "damaged.jsonl").write_text(json.dumps(record | damaged))
        refused("is no TOFU file", load_tofu, tmp_path / "damaged.jsonl")
    (tmp_path / "other.json").write_text('[{"prompt": "a"}]')
    refused("is no TOFU file", load_tofu, tmp_path / "other.json")


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data set is not beside this checkout")
def test_the_shared_file():
    with gzip.open(SHARED, "rt", encoding="utf-8") as file:
        n = sum(record["split"] == "retain" for record in json.load(file))
    assert len(load_tofu(SHARED, "retain")) == n == 300
