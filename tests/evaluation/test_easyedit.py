"""EasyEdit's results under our names: its accuracies, protocols and what it leaves out."""

import json
import math
import re

import pytest
import torch

import kedit_fast as kf
from kedit_fast.evaluation.easyedit import load_easyedit

REQUEST = {
    "prompt": "Big Ben is located in the city of", "target_new": "Seattle", "ground_truth": "<|endoftext|>",
    "subject": "Big Ben", "rephrase_prompt": "Where is Big Ben? In",
    "locality": {
        "neighborhood": {"prompt": ["The Louvre is in", "Big Ben was built by"], "ground_truth": ["Paris", "Barry"]},
        "distracting": {"prompt": "Rome is in", "ground_truth": "Italy"},
    },
    "portability": {
        "one_hop": {"prompt": "The country of Big Ben is", "ground_truth": "the USA"},
        "Subject_Aliasing": {"prompt": ["The Great Bell is in", "The bell is in"], "ground_truth": ["Seattle"] * 2},
    },
}  # fmt: skip
RECORD = {
    "case_id": 0, "requested_rewrite": REQUEST, "time": 1.5,
    "pre": {"rewrite_acc": [0.0], "rephrase_acc": 0.25, "locality": {"neighborhood_output": [[1, 2], [3]]},
            "portability": {"one_hop_acc": [1.0], "Subject_Aliasing_acc": [0.0, 0.5]},
            "fluency": {"ngram_entropy": 6.5}},
    "post": {"rewrite_acc": [1.0], "rephrase_acc": [[0.5]], "rewrite_ppl": 3.0,
             "locality": {"neighborhood_output": [[1, 2], [4]], "neighborhood_acc": [0.5, 0.75],
                          "distracting_acc": [1.0]},
             "portability": {"one_hop_acc": [0.0], "Subject_Aliasing_acc": [1.0, math.nan]},
             "fluency": {"ngram_entropy": 5.5}},
}  # fmt: skip
BARE = {"requested_rewrite": {"prompt": "Vimeo is owned by", "target_new": "Apple"}, "post": {"rewrite_acc": [0.5]}}


@pytest.fixture
def read(tmp_path):
    def load(*records):
        path = tmp_path / "results.json"
        path.write_text(json.dumps(records))
        return load_easyedit(path)

    return load


def values(side):
    return {name: pytest.approx(column.tolist(), nan_ok=True) for name, column in side.items()}


def test_every_part_by_its_name(read):
    found = read(RECORD, BARE)
    nan = math.nan
    assert found.edited == values(
        {name: torch.tensor(column) for name, column in {
            "rewrite.token": [1.0, 0.5], "paraphrase.token": [0.5, nan], "locality.same": [0.75, nan],
            "same_subject.same": [0.75, nan], "kept.same": [0.75, nan],
            "alias.token": [1.0, nan], "reasoning.token": [0.0, nan],
            "portability.token": [0.5, nan], "fluency.ngram_entropy": [5.5, nan],
        }.items()}
    )  # fmt: skip
    assert found.base == values(
        {name: torch.tensor(column) for name, column in {
            "rewrite.token": [0.0, nan], "paraphrase.token": [0.25, nan], "locality.same": [1.0, nan],
            "same_subject.same": [1.0, nan], "kept.same": [1.0, nan],
            "alias.token": [0.25, nan], "reasoning.token": [1.0, nan],
            "portability.token": [0.5, nan], "fluency.ngram_entropy": [6.5, nan],
        }.items()}
    )  # fmt: skip
    assert list(found.metrics)[:4] == ["rewrite.token", "paraphrase.token", "locality.same", "same_subject.same"]
    first, second = found.facts
    assert (first.subject, first.target_new, first.target_true) == ("Big Ben", "Seattle", None)
    assert second.text == "Vimeo is owned by" and second.subject is None
    assert found.prompts["locality"] == [("The Louvre is in", "Rome is in"), ()]
    assert found.prompts["portability"][0] == ("The country of Big Ben is", "The Great Bell is in", "The bell is in")
    assert found.notes[0].endswith("post.rewrite_ppl (1 time)") and "Columns(2 facts, rewrite.token" in repr(found)


def test_the_protocol_says_the_mode(read):
    def meta(protocol, locality):
        about = {"rewrite": {"protocol": protocol}, "rephrase": {"protocol": protocol}}
        return about | {f"locality.{name}": {"protocol": locality} for name in ("neighborhood", "distracting")}

    def modes(**changes):
        found = read(RECORD | {"post": RECORD["post"] | changes})
        return {name: name.partition(".")[2] for name in found.metrics}.values()

    judged = meta("free_generation_judge", "pre_post_free_generation_output_match")
    assert set(modes(metric_meta=judged)) == {"judge", "same_text", "ngram_entropy"}
    assert "match" in modes(metric_meta=meta("free_generation_exact_match_fallback", "x"))
    grace = modes(metric_meta=meta("vanilla_generation", "pre_post_generated_token_match"))
    assert {"vanilla_generation", "pre_post_generated_token_match"} <= set(grace)
    assert {"judge", "same_text"} <= set(modes(rewrite_gen_content=["Seattle"]))  # of before there were protocols


def test_values_that_easyedit_left_out(read):
    """Where all prompts of a name are of one kind its mean is what is left; else nobody knows whose is missing."""
    post = RECORD["post"] | {"portability": {"Subject_Aliasing_acc": [1.0]}}
    assert read(RECORD | {"post": post}).edited["alias.token"].tolist() == [1.0]
    post = RECORD["post"] | {"locality": {"neighborhood_acc": [1.0]}}
    with pytest.raises(ValueError, match=r"record 0: post.locality.neighborhood_acc has 1 values for 2 prompts of"):
        read(RECORD | {"post": post})


@pytest.mark.parametrize(
    "records, says",
    [
        ([3], "record 0: found a number; expected a list of records with requested_rewrite, pre and post"),
        ([RECORD, {"pre": {}}], "record 1: requested_rewrite is not there; expected"),
        ([RECORD | {"requested_rewrite": []}], "record 0: requested_rewrite is an array"),
        ([RECORD | {"post": [1]}], "record 0: post: expected an object, found an array"),
        (
            [BARE | {"post": {"rewrite_acc": ["x"]}}],
            "record 0: post.rewrite_acc: expected shares from 0 to 1, found 'x'",
        ),
        ([BARE | {"post": {"rewrite_acc": 97.5}}], "post.rewrite_acc: expected shares from 0 to 1, found 97.5"),
        ([BARE | {"post": {"locality": {"a_acc": [1]}}}], "post.locality.a_acc has 1 values for 0 prompts"),
        ([BARE | {"post": {"fluency": {"ngram_entropy": -1}}}], "post.fluency.ngram_entropy: expected numbers from 0"),
        ([BARE | {"requested_rewrite": {"prompt": ["a"], "target_new": "b"}}], "record 0: requested_rewrite: "),
        ([{k: v for k, v in RECORD.items() if k != "post"}], "nothing is measured in post"),
    ],
)
def test_other_files_are_refused(read, records, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        read(*records)


def test_it_is_public(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps(BARE))
    assert kf.load_easyedit(tmp_path / "r.jsonl").edited["rewrite.token"].tolist() == [0.5]
