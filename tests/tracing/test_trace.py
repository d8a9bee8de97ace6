"""Tracing equals the slow oracle, whatever the family, kind, window, corruption and metric, packed or alone."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kedit_fast as kf
from kedit_fast.edits.deltas import LowRank
from kedit_fast.kernels.dispatch import backend_for
from kedit_fast.sweep import engine
from kedit_fast.sweep.plan import CALL_ROWS, RowCost
from kedit_fast.tracing import tasks as trace_tasks
from kedit_fast.tracing import trace as tracing
from kedit_fast.tracing.tasks import Task, Traced
from tests.conftest import open_tiny, refused, tiny_lm
from tests.make import killed_at, watched
from tests.oracle.access import subject_span
from tests.oracle.tracing import trace_oracle
from tests.tiny import DISTINCT, PROMPTS, tiny_model, tiny_tokenizer

NOISE, SAMPLES = 0.5, 2
ATOL = 1e-5  # on probabilities, design.md section 9; on log-probabilities relative to their size
CAPITAL = kf.Fact(prompt="The capital of {} is", subject="France")
EIFFEL, NEEDLE, BEN = (kf.Fact(prompt=p.template, subject=p.subject) for p in PROMPTS[:3])


def oracle(family, fact, kind, lm=None, **options):
    """The slow trace of one fact; the level "s3" it works out by itself."""
    model = (lm or tiny_lm(family)).model
    ids, span = subject_span(tiny_tokenizer(), fact.prompt, fact.subject)
    options = {"samples": SAMPLES, "noise": NOISE, "window": 3} | options
    return trace_oracle(model, ids, span, kind, **options)


def traced(family, facts, lm=None, **options):
    return kf.trace(lm or tiny_lm(family), facts, **({"samples": SAMPLES, "noise": NOISE, "window": 3} | options))


def same(result: kf.TraceResult, wanted: dict, size: float = 1.0) -> None:
    """Every number of a result against the oracle's."""
    assert result.answer_id == wanted["answer"]
    assert result.p_restored.dtype == np.float32
    assert abs(result.p_clean - wanted["p_clean"]) <= ATOL * size
    assert abs(result.p_corrupted - wanted["p_corrupted"]) <= ATOL * size
    assert result.p_restored.shape == tuple(wanted["scores"].shape)
    assert np.abs(result.p_restored - wanted["scores"].numpy()).max() <= ATOL * size


def alike(got: kf.TraceResult, want: kf.TraceResult, atol: float = ATOL) -> None:
    """Two results of one trace."""
    assert (got.fact, got.kind, got.answer_id, got.tokens) == (want.fact, want.kind, want.answer_id, want.tokens)
    assert abs(got.p_clean - want.p_clean) <= atol and abs(got.p_corrupted - want.p_corrupted) <= atol
    assert np.abs(got.p_restored - want.p_restored).max() <= atol


# ---- against the oracle


@pytest.mark.parametrize("family", (*DISTINCT, "qwen2_moe", "gpt_oss"))
def test_every_family_and_kind_equals_the_oracle(family):
    for result in traced(family, NEEDLE):
        wanted = oracle(family, NEEDLE, result.kind)
        same(result, wanted)
        # the comparison sees something: cells differ from each other by far more than the tolerance
        assert wanted["scores"].std() > 30 * ATOL or result.kind != "state"


PLACES = [
    kf.Fact("{} is located in", "Zürich"),  # the first token
    kf.Fact("The capital of {}", "France"),  # ends the prompt
    kf.Fact("{} is", "Big"),  # one token
    kf.Fact("{}", "The Eiffel Tower"),  # nothing else
    kf.Fact("{}", "The"),
    kf.Fact("In {braces} is {} of", "Beats Music"),
]


@pytest.mark.parametrize(
    ("family", "fact", "options"),
    [
        *(("llama", fact, {}) for fact in PLACES),
        # windows odd, even and longer than the model
        *((family, CAPITAL, {"window": n}) for family in ("llama", "gptj") for n in (1, 2, 5, 10)),
        *(("qwen3", BEN, {"samples": n}) for n in (1, 3)),
        ("llama", BEN, {"seed": 2}),
        ("gpt2", BEN, {"metric": "logprob"}),
    ],
)
def test_options_and_subjects_anywhere_equal_the_oracle(family, fact, options):
    for result in traced(family, fact, **options):
        wanted = oracle(family, fact, result.kind, **options)
        same(result, wanted, size=abs(wanted["p_corrupted"]) if "metric" in options else 1.0)
        assert result.window == (1 if result.kind == "state" else options.get("window", 3))
        assert len(result.tokens) == result.p_restored.shape[0]


@pytest.mark.parametrize("layers", [1, 2])
def test_the_smallest_models(layers):
    lm = tiny_lm("llama", layers=layers)
    for result in traced("llama", CAPITAL, lm):
        same(result, oracle("llama", CAPITAL, result.kind, lm))
    (severed,) = traced("llama", CAPITAL, lm, kinds=("state",), sever="mlp")
    same(severed, oracle("llama", CAPITAL, "state", lm, severed="mlp"))


@pytest.mark.parametrize("sever", ["mlp", "attn"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "olmo2"])
def test_severed(family, sever):
    options = {"kinds": ("state",), "metric": "logprob"}  # gemma2's capped probabilities hardly move
    (result,) = traced(family, NEEDLE, **options, sever=sever)
    wanted = oracle(family, NEEDLE, "state", severed=sever, metric="logprob")
    same(result, wanted, size=abs(wanted["p_corrupted"]))
    (whole,) = traced(family, NEEDLE, **options)
    assert np.abs(result.p_restored - whole.p_restored).max() > 100 * ATOL


def test_a_start_token_is_a_position_of_its_own():
    tokenizer = tiny_tokenizer(bos=True)
    lm = kf.open_model(tiny_lm("llama").model, tokenizer=tokenizer)
    ids, span = subject_span(tokenizer, EIFFEL.prompt, EIFFEL.subject)
    assert span[0] == 1
    for result in traced("llama", EIFFEL, lm):
        assert result.subject_span == span
        same(result, trace_oracle(lm.model, ids, span, result.kind, samples=SAMPLES, noise=NOISE, window=3))


def test_other_seeds_are_other_draws():
    results = [traced("llama", BEN, kinds=("state",), seed=seed)[0] for seed in (1, 1, 2)]
    assert np.array_equal(results[0].p_restored, results[1].p_restored)
    assert abs(results[0].p_corrupted - results[2].p_corrupted) > 100 * ATOL


def test_logit_difference_is_a_difference_of_logprobs():
    fact = replace(BEN, target_new="Paris")
    foil = tiny_tokenizer()(" Paris")["input_ids"][0]
    (result,) = traced("gpt2", fact, kinds=("mlp",), metric="logit_diff")
    answer, other = (oracle("gpt2", fact, "mlp", metric="logprob", answer=token) for token in (result.answer_id, foil))
    wanted = {name: answer[name] - other[name] for name in ("p_clean", "p_corrupted", "scores")}
    same(result, wanted | {"answer": result.answer_id}, size=abs(wanted["p_corrupted"]) + 1)


def test_a_given_answer():
    for result in traced("llama", EIFFEL, answer="Paris"):
        token = tiny_tokenizer()(" Paris")["input_ids"][0]
        assert result.answer == tiny_tokenizer().decode([token])
        same(result, oracle("llama", EIFFEL, result.kind, answer=token))


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_corruption_by_another_subject(family):
    other = subject_span(tiny_tokenizer(), CAPITAL.prompt, "England")
    assert len(other[0]) == len(subject_span(tiny_tokenizer(), CAPITAL.prompt, CAPITAL.subject)[0])
    for result in traced(family, CAPITAL, corrupt="England"):
        assert result.noise is None
        same(result, oracle(family, CAPITAL, result.kind, corrupt_ids=other[0]))


def test_logit_difference_against_another_subjects_answer():
    (result,) = traced("gpt2", CAPITAL, corrupt=["England"], kinds=("state",), metric="logit_diff")
    model = tiny_lm("gpt2").model
    ids, other = (subject_span(tiny_tokenizer(), CAPITAL.prompt, s)[0] for s in ("France", "England"))
    with torch.no_grad():
        clean, corrupted = model(torch.tensor([ids, other])).logits[:, -1]
    a, b = int(clean.argmax()), int(corrupted.argmax())
    assert abs(result.p_clean - float(clean[a] - clean[b])) < 1e-4
    assert abs(result.p_corrupted - float(corrupted[a] - corrupted[b])) < 1e-4
    assert abs(result.p_restored[-1, -1] - result.p_clean) < 1e-6


def test_noise_of_three_standard_deviations():
    facts = [EIFFEL, NEEDLE, BEN]
    model = tiny_lm("gemma2").model
    with torch.no_grad():
        rows = [model.get_input_embeddings()(torch.tensor(tiny_tokenizer()(f.subject)["input_ids"])) for f in facts]
    level = 3 * torch.cat(rows).std().item()
    results = traced("gemma2", facts, noise="s3", kinds=("state",))
    for fact, result in zip(facts, results, strict=True):
        assert abs(result.noise - level) < 1e-5 * level
        same(result, oracle("gemma2", fact, "state", noise=level))


def test_uniform_noise(monkeypatch):
    def uniform(seed, samples, n_tokens, width):
        return torch.from_numpy(np.random.RandomState(seed).uniform(-1, 1, size=(samples, n_tokens, width)))

    monkeypatch.setattr("tests.oracle.tracing.draw_noise", uniform)
    (result,) = traced("llama", NEEDLE, noise="u0.8", kinds=("state",))
    assert result.noise == 0.8
    same(result, oracle("llama", NEEDLE, "state", noise=0.8))


def test_float64_is_exact():
    lm = tiny_lm("llama", torch.float64)
    for result in traced("llama", CAPITAL, lm, samples=1):
        wanted = oracle("llama", CAPITAL, result.kind, lm, samples=1)
        assert abs(result.p_clean - wanted["p_clean"]) < 1e-12
        assert np.abs(result.p_restored - wanted["scores"].numpy()).max() < 1e-7  # kept as fp32


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_bfloat16_is_as_near_as_hugging_face(family):
    """Noise is rounded once, as published: the sweep errs no more than the model's own forward in bf16 does."""
    lm, exact = tiny_lm(family, torch.bfloat16), tiny_lm(family, torch.float64)
    exact.model.load_state_dict({name: t.double() for name, t in lm.model.state_dict().items()})
    try:
        (result,) = traced(family, CAPITAL, lm, kinds=("state",), noise=0.25)
        theirs, truth = (
            oracle(family, CAPITAL, "state", m, noise=0.25, answer=result.answer_id)["scores"].double().numpy()
            for m in (lm, exact)
        )
        assert np.abs(result.p_restored - truth).max() <= 2 * np.abs(theirs - truth).max() + 2**-8
    finally:
        tiny_lm.cache_clear()


# ---- packed, cut, logged


@pytest.fixture(scope="module")
def three():
    """Three facts of different lengths, traced together, every kind."""
    return traced("gpt2", [EIFFEL, BEN, CAPITAL])


def test_packed_equals_alone(three):
    alone = [r for fact in (EIFFEL, BEN, CAPITAL) for r in traced("gpt2", fact)]
    assert [r.kind for r in three] == ["state", "mlp", "attn"] * 3
    for got, want in zip(three, alone, strict=True):
        alike(got, want)


@pytest.mark.parametrize("rows", [110, 150, 1000])
def test_cut_into_packs_equals_whole(three, rows, monkeypatch):
    """Facts apart, facts together, and one fact in many packs."""
    lm = tiny_lm("gpt2")
    cost, packs = RowCost.of(lm), watched(monkeypatch, engine.Pack, "run")
    lm = replace(lm, memory=CALL_ROWS * cost.passing + rows * cost.kept)
    for got, want in zip(traced("gpt2", [EIFFEL, BEN, CAPITAL], lm), three, strict=True):
        alike(got, want)
    assert len(packs) > {110: 20, 150: 10, 1000: 3}[rows]


def test_too_little_memory_says_what_is_needed():
    refused(r"needs .*B and memory allows", traced, "gpt2", EIFFEL, replace(tiny_lm("gpt2"), memory=1))


def test_log_grows_by_a_line_a_result_and_reads_back(three, tmp_path, monkeypatch):
    log, sizes, finish = tmp_path / "trace.jsonl", [], tracing._trace_group

    def measured(*args):
        sizes.append(len(log.read_text().splitlines()) if log.exists() else 0)
        return finish(*args)

    monkeypatch.setattr(tracing, "_trace_group", measured)
    cost = RowCost.of(tiny_lm("gpt2"))
    lm = replace(tiny_lm("gpt2"), memory=CALL_ROWS * cost.passing + 1000 * cost.kept)
    results = traced("gpt2", [EIFFEL, BEN, CAPITAL], lm, log=log)
    assert sizes == [0, 3, 6]
    assert all(json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
    for got, want in zip(tracing.read_log(log), results, strict=True):
        alike(got, want, atol=0)
        assert got.p_clean == want.p_clean and got.subject_span == want.subject_span and got.noise == want.noise


def test_facts_do_not_touch():
    """A fact beside one is what it is beside another of the same length."""
    beside = (EIFFEL, replace(EIFFEL, subject="Big Ben"))
    alike(*(traced("llama", [CAPITAL, other], kinds=("state",))[0] for other in beside))


def test_before_the_subject_and_in_the_last_layer_nothing_is_restored():
    (result,) = traced("llama", CAPITAL, kinds=("state",))
    begin = result.subject_span[0]
    assert begin > 0 and (result.p_restored[:begin] == np.float32(result.p_corrupted)).all()
    assert (result.p_restored[:-1, -1] == np.float32(result.p_corrupted)).all()
    assert result.p_restored[-1, -1] == np.float32(result.p_clean)


def test_no_noise_changes_nothing():
    results = traced("gpt2", CAPITAL, noise=0.0, kinds=("attn", "attn", "state", "mlp"))
    assert [result.kind for result in results] == ["attn", "state", "mlp"]  # what is named twice is traced once
    for result in results:
        assert np.abs(result.indirect_effect).max() <= ATOL and abs(result.p_clean - result.p_corrupted) <= ATOL


def test_windows_that_begin_at_the_bottom_are_one_run_there(monkeypatch):
    """Only the first of them owns a row in layer 0; the longer ones branch from the shorter above it."""
    calls = watched(monkeypatch, type(tiny_lm("llama").source), "call")
    (result,) = traced("llama", CAPITAL, kinds=("mlp",), window=4)  # [0, 2) [0, 3) [0, 4) [1, 4)
    rows = [[h.shape[1] for _, at, h, _ in calls if at == layer] for layer in (0, 1)]
    n, behind = len(result.tokens), len(result.tokens) - result.subject_span[0]
    cells, suffixes = SAMPLES * behind, SAMPLES * behind * (behind + 1) // 2
    assert rows[0] == [n, n + cells + cells]  # the answers' sweep; clean, corrupted, one window
    assert rows[1][1] == n + cells + suffixes + cells  # its other rows have joined; [1, 4) begins


def test_model_is_left_as_it_was():
    model = tiny_model("gptj")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    traced("gptj", CAPITAL, open_tiny(model))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


# ---- the public door


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"facts": []}, "facts is empty; expected Facts"),
        ({"kinds": ("state", "heads")}, "kinds = 'heads': expected some of state, mlp, attn"),
        ({"kinds": ()}, r"kinds = \(\): expected some of"),
        ({"metric": "rank"}, "metric = 'rank': expected one of prob, logprob, logit_diff"),
        ({"window": 0}, "window = 0: expected a whole number from 1 to"),
        ({"samples": 0}, "samples = 0: expected a whole number of at least 1, e.g. 10"),
        ({"samples": 1.5}, "samples = 1.5: expected a whole number"),
        ({"samples": 10**9}, r"samples = 1000000000: the noise .* would take .*B, .*; take at most \d+ samples"),
        ({"seed": "a"}, "seed = 'a': expected a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed = 4294967296: expected a whole number from 0 to 4294967295"),
        ({"answer": ""}, r"answer is empty \(''\)"),
        ({"top": 0}, "top = 0: expected a whole number"),
        ({"method": "guess"}, "method = 'guess': expected one of exact, attribution, screen"),
        ({"sever": "mlp", "kinds": ("state",), "method": "screen"}, "method='screen': expected"),
        ({"sever": "mlp"}, "sever='mlp'"),
        ({"sever": "state", "kinds": ("state",)}, "sever = 'state': expected one of mlp, attn"),
        ({"noise": "t3"}, "noise = 't3': expected a number"),
        ({"noise": "s"}, "noise = 's': expected a number"),
        *(
            ({"noise": noise}, f"noise = {noise!r}: expected a number from 0 on")
            for noise in (math.nan, math.inf, -0.1, None, "nan", "snan", "s-1", "sinf", "u-0.1", "uinf")
        ),
        ({"metric": "logit_diff"}, "needs a foil"),
        ({"corrupt": "Danielle Darrieux"}, "takes 5 tokens, the subject 'France' 2; give a subject of 2 tokens"),
        ({"corrupt": ["Spain", "Italy"]}, "2 subjects, 1 fact; expected one"),
    ],
)
def test_what_cannot_be_traced_is_refused_before_any_work(options, message, no_sweep):
    refused(message, traced, "gpt2", **{"facts": CAPITAL} | options)


def test_a_trace_without_numbers_is_refused_before_it_is_written(tmp_path):
    """Noise that makes the model give NaN."""
    says = "fact 'The capital of France is': the corrupted run gives NaN: damaged weights.*, or noise that is too large"
    refused(says, traced, "gpt2", CAPITAL, noise=3e38, log=tmp_path / "log.jsonl")
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize("what", ["clean", "corrupted", "restored"])
def test_no_run_of_a_trace_may_be_nan(what):
    values = {"clean": torch.zeros(1), "corrupted": torch.zeros(1), "restored": torch.zeros(3, 4)}
    values[what].view(-1)[-1] = math.nan
    found = Traced(values["clean"], values["corrupted"], {"mlp": values["restored"]})
    with pytest.raises(ValueError, match=rf"fact 'France': .*{what} runs? .*gives? NaN: damaged weights"):
        found.check(tiny_lm("gpt2"), Task(kf.Fact("{}", "France"), [1], (0, 1), [1], [2]))


def test_a_result_says_which_backends_ran(monkeypatch):
    lm = tiny_lm("gpt2")
    (result,) = traced("gpt2", CAPITAL, lm, kinds=("state",))
    wanted = {op: backend_for(op, "cpu", torch.float32) for op in ("attention", "linear", "rows", "target_logprob")}
    assert result.backend == ", ".join(f"{op} {name}" for op, name in wanted.items())
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "reference")
    (result,) = traced("gpt2", CAPITAL, lm, kinds=("state",))
    assert result.backend == "attention reference, linear reference, rows reference, target_logprob reference"


def test_a_subject_that_changes_the_tokens_before_it_is_refused():
    """A tokenizer that looks ahead may write the words before the subject in another way; they would be shared."""
    ids = {"to Paris": [1, 2, 3], "to Rome": [9, 2, 3]}

    def tokenizer(text, **options):
        return {"input_ids": ids[text], "offset_mapping": [(0, 2), (2, 3), (3, len(text))]}

    tokenizer.is_fast = True
    tokenizer.convert_ids_to_tokens = str
    fact = kf.Fact(prompt="to {}", subject="Paris")
    prompts = [trace_tasks.fact_tokens(tokenizer, fact)]
    with pytest.raises(ValueError, match="tokens before the subject differ"):
        trace_tasks._corrupted(SimpleNamespace(tokenizer=tokenizer), [fact], prompts, "Rome")


@pytest.mark.smollm2
def test_the_real_model_knows_where_the_tower_is(smollm2):
    fact = kf.Fact(prompt="{} is in the city of", subject="The Eiffel Tower")
    (result,) = kf.trace(smollm2, fact, kinds=("state",), samples=1, noise=0.1)
    assert result.answer == " Paris" and abs(result.p_clean - 0.656) < 2e-3
    assert result.p_corrupted < 0.3 and result.p_restored.shape == (len(result.tokens), 30)
    at_last = result.p_restored[-1]  # the answer reaches the last token in the upper layers, and only there
    assert at_last[-1] == np.float32(result.p_clean) and at_last[23:].min() > 0.4 and at_last[:20].max() < 0.02


# ---- long runs


def one_by_one(monkeypatch):
    """Each fact is a group of its own."""
    monkeypatch.setattr(tracing, "groups", lambda lm, tasks, how: ([task] for task in tasks))


def test_a_killed_trace_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    one_by_one(monkeypatch)
    facts, options = [CAPITAL, EIFFEL, CAPITAL, NEEDLE], {"method": "screen", "top": 3, "noise": "s3"}
    whole = traced("gpt2", facts, log=tmp_path / "whole.jsonl", **options)
    kept = {"log": tmp_path / "log.jsonl", "checkpoint": tmp_path / "run"} | options
    for _ in range(2):  # two more facts each time
        with killed_at(2):
            traced("gpt2", facts, **kept)
    again = traced("gpt2", facts, **kept)
    assert [result.to_record() for result in again] == [result.to_record() for result in whole]
    assert (tmp_path / "log.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [result.fact is facts[i // 3] for i, result in enumerate(again)] == [True] * 12
    refused("holds other work: its window is 3, this one's 4", traced, "gpt2", facts, window=4, **kept)
    refused("holds other work: its edits below is null", traced, "gpt2", facts, lm=with_an_edit(), **kept)


def with_an_edit() -> kf.LM:
    lm = tiny_lm("gpt2")
    delta = LowRank(torch.ones(lm.d_model, 1), torch.ones(lm.d_ff, 1))
    return lm.with_edit(kf.Edit("by hand", {}, lm.fingerprint, (CAPITAL,), {1: delta}))


def test_a_trace_that_runs_out_of_memory_goes_on_in_smaller_groups(monkeypatch):
    """Three facts at a time are too many; what was done before them is kept."""
    lm, facts, made = tiny_lm("llama"), [CAPITAL, EIFFEL, NEEDLE, BEN], []
    whole, trace_group = traced("llama", facts), tracing._trace_group

    def short(lm, group, *rest):
        if len(group) > 1:
            raise torch.OutOfMemoryError("out of memory")
        made.append(group[0].fact)
        return trace_group(lm, group, *rest)

    monkeypatch.setattr(tracing, "groups", lambda now, tasks, how: (
        [tasks[:1], tasks[1:]] if now.memory == lm.memory else [[task] for task in tasks]
    ))  # fmt: skip
    monkeypatch.setattr(tracing, "_trace_group", short)
    with pytest.warns(UserWarning, match="out of memory"):
        results = traced("llama", facts)
    assert made == facts
    for got, want in zip(results, whole, strict=True):
        alike(got, want)
