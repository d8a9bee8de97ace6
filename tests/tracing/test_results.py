"""Results of tracing: averages by hand, the six roles, files that read back."""

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest

import kedit_fast as kf
from kedit_fast.pictures.labels import ROLES
from kedit_fast.tracing.results import average, read_log
from tests.conftest import refused

FACT = kf.Fact(prompt="{} is in", subject="Zürich {x}", target_new="Rome", id="7", provenance={"who": "me"})


def result(p_restored, span, **changes) -> kf.TraceResult:
    table = np.array(p_restored, dtype=np.float32)
    fields = dict(
        fact=FACT, tokens=tuple(f"t{i}" for i in range(len(table))), subject_span=span, answer_id=3, answer=" Paris",
        kind="state", window=1, noise=0.1, metric="prob", sever=None, p_clean=0.9, p_corrupted=0.1, p_restored=table,
        backend="attention reference", reliability=0.75, stride=3, cost=0.4,
    )  # fmt: skip
    return kf.TraceResult(**fields | changes)


def rows(*effects, base=0.1):
    """[T, 2] tables whose indirect effects are the given numbers in layer 0 and their doubles in layer 1."""
    return [[base + e, base + 2 * e] for e in effects]


# ---- one result


def test_effects():
    r = result([[0.1, 0.5], [0.9, 0.3]], (0, 1))
    np.testing.assert_allclose(r.indirect_effect, [[0.0, 0.4], [0.8, 0.2]], atol=1e-7)
    np.testing.assert_allclose(r.normalized_effect, [[0.0, 0.5], [1.0, 0.25]], atol=1e-6)
    assert np.isnan(replace(r, p_clean=0.1).normalized_effect).all()


@pytest.mark.parametrize("name", ["trace.npz", "trace", "trace.v1"])
def test_saved_results_read_back_exactly(tmp_path, name):
    table = np.random.RandomState(0).rand(5, 3).astype(np.float32) * np.float32(1e-9)
    r = result(table, (1, 3), noise=None, sever="mlp")
    r.save(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    same(kf.TraceResult.load(tmp_path / name), r)


def same(got, want):
    assert np.array_equal(got.p_restored, want.p_restored) and got.p_restored.dtype == np.float32
    for field in fields(want):
        assert field.name == "p_restored" or getattr(got, field.name) == getattr(want, field.name)
    assert got.fact.provenance == want.fact.provenance


def test_a_record_is_plain_json_and_loses_nothing():
    tiny = np.float32([[1e-20, 0.1], [1 / 3, 1.0], [np.nan, np.inf]])
    r = result(tiny[:2], (0, 1))
    line = json.dumps(r.to_record())
    assert "\n" not in line
    same(kf.TraceResult.from_record(json.loads(line)), r)
    old = kf.TraceResult.from_record(before(r.to_record()))
    assert (old.backend, old.exact, old.stride, old.cost) == ("", None, 1, None) and math.isnan(old.reliability)


def before(record):
    """A record as it was written before results said what ran, and how reliable they are."""
    later = ("backend", "exact", "reliability", "stride", "cost")
    return {name: value for name, value in record.items() if name not in later}


def test_a_reliability_that_is_not_known_is_null_in_files(tmp_path):
    unknown = result([[0.5]], (0, 1), reliability=math.nan)
    assert json.loads(json.dumps(unknown.to_record(), allow_nan=False))["reliability"] is None
    unknown.save(tmp_path / "trace.npz")
    assert math.isnan(kf.TraceResult.load(tmp_path / "trace.npz").reliability)
    assert "reliability" not in repr(unknown) and repr(result([[0.5]], (0, 1))).endswith("1 layers, reliability 0.75)")
    for name, wrong in (("reliability", "high"), ("stride", 0), ("cost", "low")):
        refused(f"{name} = ", result, [[0.5]], (0, 1), **{name: wrong})


def test_a_log_that_was_cut_short_says_where(tmp_path):
    lines = [json.dumps(result([[0.5]], (0, 1)).to_record()) for _ in range(2)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert len(read_log(tmp_path / "log.jsonl")) == 2
    for rest in (lines[1][:-9], "3", "{}"):
        (tmp_path / "log.jsonl").write_text(f"{lines[0]}\n{rest}")
        refused(r"log\.jsonl: line 2 is no trace", read_log, tmp_path / "log.jsonl")


def test_foreign_files_are_refused(tmp_path):
    other = tmp_path / "other.npz"
    np.savez(other, scores=np.zeros(3))
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    objects = tmp_path / "pickled.npz"
    np.savez(objects, p_restored=np.zeros((1, 1)), record=np.array({"a": 1}, dtype=object))
    short = tmp_path / "short.npz"
    result([[0.5]], (0, 1)).save(short)
    short.write_bytes(short.read_bytes()[:-9])
    for path in (other, text, objects, short):
        refused("is not a saved trace", kf.TraceResult.load, path)
    with pytest.raises(FileNotFoundError):
        kf.TraceResult.load(tmp_path / "absent.npz")


# ---- averages


def test_average_over_roles_by_hand():
    """Seven tokens with the subject at 1 to 3, and six with a subject of one token at 0."""
    a = result(rows(9.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6), (1, 4), p_clean=0.9)
    b = result(rows(0.7, 0.8, 0.0, 0.2, 0.4, 0.1, base=0.2), (0, 1), p_clean=0.4, p_corrupted=0.2)
    averaged = kf.average([a, b])["state"]
    assert list(averaged.counts) == [2, 1, 2, 2, 4, 2]
    first_layer = [(0.1 + 0.7) / 2, 0.2, (0.3 + 0.7) / 2, (0.4 + 0.8) / 2, (0.5 + 0.0 + 0.2 + 0.4) / 4, (0.6 + 0.1) / 2]
    np.testing.assert_allclose(averaged.mean[:, 0], first_layer, rtol=1e-5)
    np.testing.assert_allclose(averaged.mean[:, 1], 2 * np.array(first_layer), rtol=1e-5)
    spread = np.std([0.1, 0.7], ddof=1) / np.sqrt(2)
    np.testing.assert_allclose(averaged.stderr[0], [spread, 2 * spread], rtol=1e-5)
    assert np.isnan(averaged.stderr[1]).all()  # one token: no spread
    assert averaged.n_facts == 2 and averaged.kind == "state" and averaged.metric == "prob"
    assert averaged.total_effect == pytest.approx((0.8 + 0.2) / 2)
    assert averaged.mean.shape == (len(ROLES), 2) and averaged.mean.dtype == np.float32


@pytest.mark.parametrize(
    ("tokens", "span", "roles"),
    [
        (6, (1, 3), ([1], [], [2], [3], [4], [5])),
        (6, (0, 4), ([0], [1, 2], [3], [4], [], [5])),
        (4, (1, 3), ([1], [], [2], [3], [], [3])),  # one token behind the subject counts twice, as published
        (3, (1, 3), ([1], [], [2], [], [], [])),  # the subject ends the prompt: nothing behind it
        (3, (2, 3), ([2], [], [2], [], [], [])),
        (1, (0, 1), ([0], [], [0], [], [], [])),
    ],
)
def test_each_token_has_its_roles(tokens, span, roles):
    table = [[0.1 + 1.0 * token] for token in range(tokens)]
    averaged = kf.average([result(table, span)])["state"]
    wanted = [np.mean(r) if r else np.nan for r in roles]
    np.testing.assert_allclose(averaged.mean[:, 0], wanted, rtol=1e-6, atol=1e-6)
    assert list(averaged.counts) == [len(r) for r in roles]


def test_kinds_are_averaged_apart():
    a = result(rows(0.1, 0.2), (0, 1), kind="mlp")
    b = result(rows(0.3, 0.4), (0, 1), kind="attn")
    got = average(iter([a, b]))
    assert list(got) == ["mlp", "attn"] and got["attn"].mean[0, 0] == pytest.approx(0.3)


def test_what_cannot_be_averaged_is_refused():
    a = result(rows(0.1, 0.2), (0, 1))
    refused("results is empty; expected TraceResults", average, [])
    for other in (replace(a, metric="logprob"), replace(a, sever="mlp"), result([[0.1] * 3] * 2, (0, 1))):
        refused("differ in metric, severing or number of layers", average, [a, other])


def test_recommended_layers():
    """The window with the largest sum at the last subject token, wherever the single peak is."""
    effect = np.array([0.0, 0.9, 0.0, 0.5, 0.6, 0.5, 0.0], dtype=np.float32)
    noise = np.full(7, 0.1, dtype=np.float32)
    other = np.full(7, 5.0, dtype=np.float32)
    averaged = average([result(np.stack([other, noise + effect, other]), (0, 2))])["state"]
    assert averaged.recommend_layers(1) == (1,)
    assert averaged.recommend_layers(3) == (3, 4, 5)
    assert averaged.recommend_layers(7) == tuple(range(7))
    assert averaged.recommend_layers() == (1, 2, 3, 4, 5)
    for n in (0, 8, -1):
        refused(f"n = {n}: expected a whole number from 1 to 7", averaged.recommend_layers, n)


@pytest.mark.parametrize(
    "at_last_subject, at_last, total, says",
    [
        ([0.0, 0.3, 0.2, 0.0], 0.0, 0.8, "layers 1-2 carry most at the last subject token (mean indirect effect 0.25"),
        ([0.0, 0.3, 0.2, 0.0], 0.4, 0.8, "strongest at the last token, layer 3 (mean indirect effect 0.400); at the "
         "last subject token layers 1-2 carry most (0.250)"),
        ([0.0, 0.01, 0.0, 0.0], 0.4, 0.8, "strongest at the last token, layer 3 (mean indirect effect 0.400); at the "
         "last subject token nothing stands out"),
        ([0.0, 0.01, 0.0, 0.0], 0.0, 0.8, "no token and layer stands out (the largest mean indirect effect is 0.01, at "
         "the last subject token, layer 1)"),
        ([0.0, 0.0, 0.0, 0.0], 0.0, 0.0, "no token and layer stands out (the largest"),
    ],
)  # fmt: skip
def test_a_finding_is_told_from_noise(at_last_subject, at_last, total, says):
    base = 0.1
    tables = [np.array([[0] * 4, at_last_subject, [0] * 4, [0, 0, 0, at_last]]) + base for _ in range(2)]
    averaged = average([result(table, (0, 2), p_clean=base + total, p_corrupted=base) for table in tables])["state"]
    assert says in averaged.in_words(2)


def test_of_one_fact_the_strongest_cells_are_named():
    """The mean of a role hides them: two tokens of the subject's middle are without effect."""
    table = np.array(rows(0, 0, 0.2, 0, 0, 0.4))
    one, other = result(table, (0, 5)), result(table, (0, 5), kind="mlp")
    outside, inside = "token 5 ('t5'), layer 1: 0.800", "token 2 ('t2'), layer 1: 0.400"
    said = average([one])["state"].where([one, other], 2)
    assert said == f"indirect effect strongest at {outside}; within the subject at {inside}"
    assert result(table, (5, 6)).in_words() == f"indirect effect strongest at {outside}"
    many = average([one, one])["state"]
    assert many.where([one, one, other], 9) == many.in_words(2)


def test_what_differs_from_fact_to_fact_is_noise():
    """A mean effect of 0.1 with a standard error of 0.1."""
    up, down = (np.array([[0.0], [effect], [0.0]], dtype=np.float32) + 0.1 for effect in (0.2, 0.0))
    averaged = average([result(table, (0, 2)) for table in (up, down)])["state"]
    assert averaged.mean[2, 0] == pytest.approx(0.1) and averaged.stderr[2, 0] == pytest.approx(0.1)
    assert "no token and layer stands out" in averaged.in_words(1)
    assert "layers 0-0 carry most" in average([result(up, (0, 2))] * 2)["state"].in_words(1)


@pytest.mark.parametrize("name", ["average.npz", "average"])
def test_saved_averages_read_back_exactly(tmp_path, name):
    averaged = average([result(rows(0.1, 0.2, 0.3), (0, 1))])["state"]
    averaged.save(tmp_path / name)
    got = kf.AverageTrace.load(tmp_path / name)
    for field in ("mean", "stderr", "counts"):
        np.testing.assert_array_equal(getattr(got, field), getattr(averaged, field))
    for field in ("n_facts", "kind", "metric", "total_effect", "reliability"):
        assert getattr(got, field) == getattr(averaged, field)
    refused("is not a saved trace", kf.TraceResult.load, tmp_path / name)


def test_an_average_has_the_mean_reliability_of_those_that_have_one(tmp_path):
    a, b, unknown = (result(rows(0.1, 0.2, 0.3), (0, 1), reliability=r) for r in (0.9, 0.6, math.nan))
    averaged = average([a, b, unknown])["state"]
    assert averaged.reliability == pytest.approx(0.75) and repr(averaged).endswith("in prob, reliability 0.75)")
    none = average([unknown])["state"]
    assert math.isnan(none.reliability) and "reliability" not in repr(none)
    none.save(tmp_path / "none.npz")
    assert math.isnan(kf.AverageTrace.load(tmp_path / "none.npz").reliability)


def test_averages_that_older_versions_saved_are_read(tmp_path):
    averaged = average([result(rows(0.1, 0.2, 0.3), (0, 1))])["state"]
    averaged.save(tmp_path / "average.npz")
    arrays = dict(np.load(tmp_path / "average.npz"))
    record = json.loads(str(arrays["record"]))
    del record["reliability"]
    np.savez(tmp_path / "old.npz", **arrays | {"record": json.dumps(record)})
    old = kf.AverageTrace.load(tmp_path / "old.npz")
    assert math.isnan(old.reliability) and old.total_effect == averaged.total_effect
