"""The benchmarks' harness: what it checks before it reports, how it pools, what it keeps and what it prints."""

import dataclasses
import gzip
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kedit_fast as kf
from bench import (
    agreement,
    attribution,
    claims,
    common,
    edit,
    editors,
    flows,
    gradients,
    kernels,
    mass,
    memory,
    phases,
    phrasings,
    published,
    replaced,
    report,
    second_moment,
    solve,
    strided,
    trace,
)
from bench import neurons as neurons_bench
from bench import values as values_bench
from bench.__main__ import main
from bench.common import CheckFailed, Figure, Measured, Skipped
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.tokens import fact_answer
from kedit_fast.sweep.sites import Site
from tests.conftest import relative_error, tiny_lm
from tests.kernels.triton import skip_where_nothing_runs
from tests.oracle import access
from tests.oracle import values as oracle_values
from tests.tiny import PROMPTS, TEXT

FACTS = [
    Fact(p.template, p.subject, target_new=new, target_true=p.answer.strip())
    for p, new in zip(PROMPTS[:4], ("Rome", "London", "Madrid", "English"), strict=True)
]


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    """The machine's peak is not what is tested."""
    for module in (trace, attribution, edit, editors, memory, replaced, second_moment, solve, strided, values_bench):
        monkeypatch.setattr(module, "peak_matmul", lambda: 100.0)


def values(measured: Measured) -> dict[tuple[str, str], Figure]:
    return {(figure.case, figure.metric): figure for figure in measured.figures}


def spoil(monkeypatch, where, name, change):
    """What a function gives is from here on as ``change`` makes it."""
    right = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *args, **options: change(right(*args, **options)))


# ---- trace


def test_trace_checks_and_times_both_kinds_on_one_and_on_several_facts():
    figures = values(trace.measure(tiny_lm("llama"), FACTS[:3], samples=2))
    assert {case for case, _ in figures} == {"state, 1 fact", "state, 3 facts", "mlp, 1 fact", "mlp, 3 facts"}
    assert figures["state, 3 facts", "ratio to the published loop"].mark == ">= 6"
    assert figures["mlp, 1 fact", "ratio to the published loop"].mark == ">= 4.5"
    for case in ("state, 1 fact", "mlp, 3 facts"):
        ours, rival = (figures[case, f"{name}, CPU time a fact"].value for name in ("kedit_fast", "batched loop"))
        assert figures[case, "ratio to the batched loop"].value == pytest.approx(rival / ours)
        assert 0 <= figures[case, "largest difference of p"].value <= 1e-5
        for name in ("kedit_fast", "published loop", "batched loop"):
            assert 0 < figures[case, f"{name}, largest distance from fp64"].value <= 1e-5


@pytest.mark.parametrize("kind", trace.KINDS)
def test_counted_flop_of_any_number_of_draws_follows_from_one_and_two(kind):
    ground = trace.Ground(tiny_lm("llama"), kind, 4, 1.0)
    assert ground.flop_ours(FACTS[:1]) == trace.count_flop(ground.ours, FACTS[:1], 4)
    assert ground.flop_ours(FACTS[:1]) < ground.flop_published(FACTS[0])


def test_a_trace_that_differs_from_a_rival_is_not_reported(monkeypatch):
    def off_by_little(given):
        scores = given["scores"].clone()
        scores[1, 0] += 1e-4
        return given | {"scores": scores}

    spoil(monkeypatch, trace, "published_loop", off_by_little)
    monkeypatch.setitem(trace.RIVALS, "published loop", trace.published_loop)
    with pytest.raises(CheckFailed, match=r"state trace of .* differs by 1\.\de-04 in fp32 .* by 1\.\de-04 in fp64"):
        trace.measure(tiny_lm("llama"), FACTS[:1], samples=2)


def test_a_rival_that_rounds_is_told_apart_from_one_that_is_wrong():
    """Two fp32 ways, 1.4e-5 apart: fine where ours is the nearer one, and in fp64 they agree."""
    truth = np.array([0.3, 0.6])

    def judged(ours, rival, rival_exact=truth, **options):
        def distance(a, b):
            return float(np.abs(a - b).max())

        ways = truth + ours, truth + rival
        return agreement.check_ways("a trace", *ways, distance, 1e-5, lambda: truth, lambda: rival_exact, **options)

    assert judged(6e-7, 1.3e-5) == pytest.approx((1.24e-5, 6e-7, 1.3e-5, 0.0), abs=1e-12)
    assert judged(6e-7, 6e-6) == (pytest.approx(5.4e-6), None, None, None)
    assert judged(6e-7, 6e-6, always=True)[:3] == pytest.approx((5.4e-6, 6e-7, 6e-6))
    for ours, rival, rival_exact in ((1.3e-5, 6e-7, truth), (6e-7, 1.3e-5, truth + 2e-6), (np.nan, 0.0, truth)):
        with pytest.raises(CheckFailed, match=r"a trace differs by .*it is not rounding"):
            judged(ours, rival, rival_exact)


def test_facts_are_spread_over_the_file():
    assert trace.spread(FACTS, 2) == [FACTS[0], FACTS[2]]
    with pytest.raises(ValueError, match="--facts 5: expected 1 to 4"):
        trace.spread(FACTS, 5)


# ---- second moment


def test_second_moment_is_checked_against_fp64():
    figures = values(second_moment.measure(widths=(17, 32), n_rows=33, repeats=2))
    assert figures["d_ff 17", "native, fp64 sum: error"].value < 1e-6
    assert figures["d_ff 32", "torch.addmm, fp32: share of peak"].value > 0


def test_a_wrong_second_moment_is_not_reported(monkeypatch):
    monkeypatch.setattr(second_moment, "second_moment_", lambda c, keys: c.addmm_(keys[1:].T.to(c), keys[1:].to(c)))
    with pytest.raises(CheckFailed, match="native, fp64 sum, d_ff 17"):
        second_moment.measure(widths=(17,), n_rows=33, repeats=1)


# ---- solve


def test_solves_are_checked_and_timed():
    figures = values(solve.measure(d_ff=40, facts=(3,), repeats=1))
    assert figures["3 facts", "once: residual"].value < 1e-10
    assert figures["3 facts", f"cached factor: ratio to {solve.RIVAL}"].value > 0


def test_a_wrong_solve_is_not_reported(monkeypatch):
    spoil(monkeypatch, solve, "memit_solve", lambda given: [1.001 * x for x in given])
    with pytest.raises(CheckFailed, match="once, 3 facts: relative residual"):
        solve.measure(d_ff=40, facts=(3,), repeats=1)


# ---- kernels and flows

CPU = torch.device("cpu")


def test_on_a_gpu_each_call_stands_between_two_events_with_a_cold_cache(monkeypatch):
    said = []

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = len(said)
            said.append("event")

        def elapsed_time(self, other):
            return other.at - self.at  # ms; one thing said between them: 2

    watch = common.Stopwatch(CPU, seconds=0.01, least=3, most=7)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch._flushed = SimpleNamespace(zero_=lambda: said.append("flush"))
    assert watch(lambda: said.append("work")) == (0.002, 0.002, 0.002, 5)
    assert said == ["work", *["flush", "event", "work", "event"] * 6]


def test_every_op_is_checked_and_timed_beside_its_reference_and_a_rival():
    plan = kernels.Plan.of(CPU, quick=True)
    measured = kernels.measure(plan)
    assert len(measured.notes) == 1 and "divided by 64" in measured.notes[0]
    figures = values(measured)
    for problem in kernels.problems(plan):
        assert "llama-3-8b / 64" in problem.name
        cases = {case for case, _ in figures if case.startswith(problem.name)}
        assert len(cases) >= 3, cases
        for case in cases:
            low, time, high = (getattr(figures[case, "time"], part) for part in ("low", "value", "high"))
            assert 0 < low <= time <= high
    rate, peak = (figures["linear, llama-3-8b / 64, fp32, reference", name] for name in ("product rate", "FLOP"))
    assert rate.unit == "TFLOP/s" and peak.value == pytest.approx(1e-9 * 2 * 24 * 64 * 224)


@pytest.mark.parametrize("op", ["attention", "rows.branch_rows"])
def test_the_backend_that_ran_is_named(op, monkeypatch):
    skip_where_nothing_runs()
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "triton")
    measured = kernels.measure(kernels.Plan.of(CPU, quick=True, ops=(op,), rows=24))
    assert any(case.endswith("fp32, kedit_fast (triton)") for case, _ in values(measured))


def test_a_wrong_op_is_not_reported_and_ends_only_its_own_cases(monkeypatch):
    from bench import kernel_cases

    monkeypatch.setattr(kernel_cases, "branch_rows", lambda h, source: torch.cat([*h, h[0][source.roll(1)]]))
    plan = kernels.Plan.of(CPU, quick=True, ops=("rows.branch_rows", "rows.add_noise"))
    with pytest.raises(CheckFailed, match="branch_rows, llama-3-8b / 64, bf16: kedit_fast: relative error"):
        kernels.measure(plan)
    measured = kernels.measure(plan._replace(lenient=True))
    assert sum(note.startswith("FAILED: rows.branch_rows") for note in measured.notes) == 2
    assert {case.split(",")[0] for case, _ in values(measured)} == {"rows.add_noise"}


def test_a_rival_that_cannot_run_is_noted(monkeypatch):
    def missing(*args, **options):
        raise NotImplementedError("no such product")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", missing)
    measured = kernels.measure(kernels.Plan.of(CPU, quick=True, ops=("attention",)))
    assert "SDPA cannot run here: no such product." in " ".join(measured.notes)
    assert {metric for _, metric in values(measured)} >= {"time"}


def test_figures_are_given_away_when_they_are_made():
    kept = []
    plan = kernels.Plan.of(CPU, quick=True, ops=("rows.branch_rows",))
    measured = kernels.measure(plan, lambda *figures: kept.append(figures))
    assert len(kept) == 2 and [figure for figures in kept for figure in figures] == measured.figures


def test_no_case_is_begun_too_late():
    measured = kernels.measure(kernels.Plan.of(CPU, quick=True, ops=("linear",), until=0.0))
    assert not measured.figures
    assert measured.notes[1].startswith("NOT RUN for want of time: linear, llama-3-8b / 64, bf16;")


@pytest.mark.parametrize("model", flows.MODELS)
def test_a_trace_on_a_model_made_from_its_config(model):
    figures = values(flows.measure(flows.dry(model, CPU)))
    (case,) = {case for case, _ in figures}
    assert case == f"trace, {model} shrunk, fp32, 2 facts"
    shown = {metric: figure.value for (_, metric), figure in figures.items()}
    assert shown["patches a second"] == pytest.approx(shown["facts a second"] * 12 * 3)
    assert shown["FLOP a fact"] > 0 and figures[case, "difference in fp32"].met


def test_a_flow_that_differs_from_a_rival_is_not_reported(monkeypatch):
    spoil(monkeypatch, flows.oracle, "batched_loop", lambda given: given | {"scores": given["scores"].roll(1, 1)})
    with pytest.raises(CheckFailed, match="llama-3-8b, 4 layers in fp32: differences"):
        flows.measure(flows.dry("llama-3-8b", CPU))


def test_facts_of_random_words_have_equal_lengths():
    tokenizer = flows.word_tokenizer(300)
    for one in flows.random_facts(5, 300):
        ids, span, *_ = flows.fact_tokens(tokenizer, one)
        assert (len(ids), span) == (12, (1, 5))


# ---- edit


def test_edit_table_of_a_tiny_model():
    lm = tiny_lm("llama")
    editor = kf.Memit(layers=(1, 2), mom2_update_weight=80.0, v_num_grad_steps=3)
    moments = kf.second_moments(lm, editor.layers, [TEXT], n_tokens=200)
    asked = [dataclasses.replace(f, paraphrases=[f"Indeed {f.text}"], same_subject=[f"{f.subject} is"]) for f in FACTS]
    measured = edit.measure(lm, editor, moments, {1: [asked[:1], asked[1:2]], 4: [asked]}, TEXT)
    figures = values(measured)
    assert {case for case, _ in figures} == {"n = 1, 2 edits", "n = 4, 1 edit"}
    report_of_four = kf.evaluate(lm, asked, editor.edit(lm, asked, moments=moments), text=TEXT)
    shown = figures["n = 4, 1 edit", "P(new)"]
    assert shown.value == pytest.approx(float(report_of_four.edited["p_new"].mean()), rel=1e-4)
    assert (shown.n, shown.mark, shown.unit) == (4, ">= 0.85", "probability")
    assert shown.low < shown.value < shown.high
    assert figures["n = 1, 2 edits", "paraphrase"].n == 2
    assert ("n = 4, 1 edit", "neighborhood") not in figures, "these facts have no neighborhood prompts"
    assert figures["n = 4, 1 edit", "perplexity, worst edit"].value == pytest.approx(100 * report_of_four.drift, 1e-3)
    assert "mom2_update_weight 80.0" in measured.notes[0]


def test_kept_share_is_a_ratio_of_means_with_an_interval():
    base, edited = torch.tensor([0.2, 0.4, math.nan, 0.6]), torch.tensor([0.1, 0.2, math.nan, 0.3])
    assert edit.kept_share(base, edited) == pytest.approx((0.5, 0.5, 0.5, 3))
    uneven = edit.kept_share(base, torch.tensor([0.2, 0.2, math.nan, 0.2]))
    assert uneven.mean == pytest.approx(0.5)
    residual_sd = torch.tensor([0.1, 0.0, -0.1]).std().item()  # of edited - 0.5 base
    assert uneven.high - uneven.mean == pytest.approx(1.959964 * residual_sd / 3**0.5 / 0.4, rel=1e-4)


def fact(subject, relation, prompt="{} is in", new="Rome", true="Paris"):
    return Fact(prompt, subject, target_new=new, target_true=true, provenance={"relation_id": relation})


def test_conflicts_are_dropped_and_slices_are_disjoint():
    first, again, other = fact("Vimeo", "P1"), fact("VIMEO", "P1", "{} stands in", new="Oslo"), fact("Vimeo", "P2")
    kept = edit.without_conflicts([first, again, other])
    assert kept == [first, other]
    assert edit.cut(kept, 1, 2) == [[first], [other]]
    with pytest.raises(ValueError, match=r"3 sets of 1 facts: .* 2 at most"):
        edit.cut(kept, 1, 3)


def test_the_draw_over_known_counterfact_facts():
    if not (common.DATA / edit.COUNTERFACT).exists():
        pytest.skip(f"{common.DATA} does not hold CounterFact")
    facts = edit.draw()
    assert facts == edit.draw()
    assert len(facts) >= 90
    assert not any(target.lower() in f.subject.lower() for f in facts for target in (f.target_true, f.target_new))
    assert all(f.subject in prompt for f in facts for prompt in f.same_subject)
    assert sum(len(f.same_subject) == edit.N_OTHER for f in facts) > 0.9 * len(facts)
    with pytest.raises(ValueError, match="contradict"):
        kf.Memit(layers=(1,)).edit(tiny_lm("llama"), [facts[0], dataclasses.replace(facts[0], target_new="Basque")])


# ---- values

CONTEXTS = [["{}"], ["So. {}", "The end of it. {}"]]
PROBED = [
    dataclasses.replace(f, paraphrases=(f"Indeed {f.text}",), neighborhood=("Vienna is in the city of", "Oslo is in"))
    for f in FACTS
]


@pytest.fixture
def ground():
    """The ground of ``bench values`` on a tiny model."""
    lm = tiny_lm("llama")
    editor = kf.Memit(layers=(1, 2), mom2_update_weight=80.0, v_num_grad_steps=3)
    made = values_bench.Ground(lm, editor, kf.Rome(layers=(1,), v_num_grad_steps=3), CONTEXTS, PROBED, 2)
    made.__dict__["moments"] = kf.second_moments(lm, (1, 2), [TEXT], n_tokens=200)
    made.__dict__["lm_fp64"] = tiny_lm("llama", torch.float64)
    return made


def test_values_of_one_and_of_several_facts_are_checked_and_timed(ground):
    figures = values(values_bench.z(ground, 3))
    assert {case for case, _ in figures} == {"z, 1 fact", "z, 3 facts"}
    for case, mark in (("z, 1 fact", ">= 3"), ("z, 3 facts", ">= 7")):
        ours, rival = (figures[case, f"{name}, CPU time a fact"].value for name in ("kedit_fast", "published loop"))
        assert figures[case, "ratio to the published loop"].value == pytest.approx(rival / ours)
        assert figures[case, "ratio to the published loop"].mark == mark
        assert 0 < figures[case, "largest relative difference of a value"].value <= 1e-4
    assert figures["z, 3 facts", "mean iterations"].value <= 3


def test_a_value_that_differs_from_the_loops_is_not_reported(ground, monkeypatch):
    spoil(monkeypatch, published, "optimize_value", lambda given: given._replace(value=1.001 * given.value))
    with pytest.raises(CheckFailed, match=r"value of .* by 1\.0e-03 in fp64 \(allowed 1e-06\)"):
        values_bench.z(ground, 2)


def test_values_that_rounding_drove_apart_are_judged_in_fp64(ground, monkeypatch):
    monkeypatch.setattr(agreement, "VALUE_TOLERANCE", 1e-12)
    figures = values(values_bench.z(ground, 2))
    assert figures["z, 2 facts", "largest relative difference of a value"].value > 1e-12, "reported as it is"
    assert 0 < figures["z, 2 facts", "the same in fp64"].value <= 1e-9


def test_an_fp32_value_that_is_off_by_more_than_rounding_is_not_reported(ground):
    loop, settings = ground.loop(ground.memit), ground.memit.z_settings(ground.lm)
    rival = loop.value(PROBED[0], 2, "layer_out").result
    steps = torch.tensor([rival.n_iterations])
    for ours, told in ((1.001 * rival.value, "is not rounding"), (torch.nan * rival.value, "is not finite")):
        with pytest.raises(CheckFailed, match=told):
            agreement.check_values(PROBED, [rival], ours[None], steps, ground.in_fp64(loop, settings))


def test_iterations_may_differ_by_one():
    def of(n_iterations, value=1.0):
        return oracle_values.Value(torch.full((3,), value), torch.ones(3), n_iterations, [])

    def check(rival):
        return agreement.check_values(FACTS, [rival], torch.ones(1, 3), torch.tensor([7]), in_fp64=None)

    assert check(of(7)) == (0, None)
    assert check(of(8, value=1.5)) == (0, None), "an update apart"
    with pytest.raises(CheckFailed, match="7 iterations, the loop's 9"):
        check(of(9))


def test_counted_flop_of_a_value_is_linear_in_its_steps(ground):
    counted = [trace.count_flop(ground.ours, PROBED[:2], steps) for steps in (1, 2, 3)]
    assert counted[2] - counted[1] == counted[1] - counted[0] > 0
    assert values_bench._flop(ground, PROBED[:2], 3) == counted[2] / 2


def test_memit_is_compared_phase_by_phase(ground):
    figures = values(values_bench.memit_part(ground, 3))
    shown = {metric: figure for (_, metric), figure in figures.items()}
    assert shown["ratio to the published loop"].mark == ">= 5"
    assert shown["relative difference of Δ"].met and shown["relative difference of Δ"].value > 0
    of_phases = [figure.value for metric, figure in shown.items() if metric.startswith("published loop, share of")]
    assert len(of_phases) == 3 and sum(of_phases) == pytest.approx(100)


def test_a_wrong_layer_loop_is_not_reported(ground, monkeypatch):
    def twice(given):
        return given._replace(deltas={layer: 2 * delta for layer, delta in given.deltas.items()})

    spoil(monkeypatch, values_bench, "memit_update", twice)
    with pytest.raises(CheckFailed, match=r"Δ of 2 facts differs by 5\.0e-01"):
        values_bench.memit_part(ground, 3)


def test_independent_rome_edits_are_checked_with_their_evaluation(ground, monkeypatch):
    before = [p.detach().clone() for p in ground.lm.model.parameters()]
    shown = {metric: figure for (_, metric), figure in values(values_bench.rome_part(ground, 3)).items()}
    assert shown["ratio to the published loop"].mark == ">= 7"
    assert shown["largest difference of p after the edit"].met
    assert all(torch.equal(a, b) for a, b in zip(before, ground.lm.model.parameters(), strict=True))
    spoil(monkeypatch, published.Loop, "probabilities", lambda p: p + 0.01)
    with pytest.raises(CheckFailed, match=r"p of .* differs by 1\.0e-02"):
        values_bench.rome_part(ground, 2)


def test_the_published_second_projection_changes_no_value(ground):
    loop = ground.loop(ground.memit)
    once, twice = (loop.value(PROBED[0], 2, "layer_out", twice=twice) for twice in (False, True))
    assert torch.allclose(once.result.value, twice.result.value, atol=1e-5)
    ids = torch.tensor([ground.lm.encode(PROBED[0].text)] * 2)
    alone = trace.count_flop(ground.lm.model, ids)
    with published.second_projection(ground.lm.model, 2):
        both = trace.count_flop(ground.lm.model, ids)
    assert both - alone == 2 * ids.numel() * ground.lm.d_model * ground.lm.n_vocab
    assert not ground.lm.model._forward_hooks


def test_the_loops_keys_and_current_values_are_the_oracles(ground, monkeypatch):
    monkeypatch.setattr(published, "KEY_ROWS", 4)  # facts are cut anywhere
    lm, loop = ground.lm, ground.loop(ground.memit)
    keys, current = loop.keys(PROBED[:2], 1), loop.current(PROBED[:2], 2)
    for fact, key, value in zip(PROBED, keys, current, strict=False):
        plain = published.plain(fact)
        assert torch.allclose(key, oracle_values.keys(lm.model, lm.tokenizer, plain, CONTEXTS, 1), atol=1e-5)
        place = access.lookup(lm.tokenizer, fact.prompt, fact.subject)
        assert torch.allclose(value, access.read_value(lm.model, *place, 2, Site.layer_out), atol=1e-5)


def test_seconds_are_scaled_by_work():
    timings = [common.Timing(None, 2.0, 4.0), common.Timing(None, 4.0, 8.0)]
    assert published.scaled(timings, lambda i: [1, 2, 3, 6][i], 4) == (None, pytest.approx(24), pytest.approx(48))


def test_phases_add_up_and_are_put_back(ground):
    right = [getattr(where, name) for where, name, _ in phases.PHASES]
    with phases.phase_times() as spent:
        whole = common.timed(ground.memit.edit, ground.lm, PROBED, moments=ground.moments, contexts=CONTEXTS)
    assert [getattr(where, name) for where, name, _ in phases.PHASES] == right
    assert set(spent) == {"z", "keys and current values", "solves"}
    assert 0.2 * whole.wall < phases.summed(list(spent.values())).wall <= whole.wall


# ---- editors


@pytest.fixture
def bed():
    """The ground of ``bench editors`` on a tiny model."""
    lm = tiny_lm("llama")
    layers = {layer for name in ("rome", "memit") for layer in kf.EDITORS[name].for_model(lm).layers}
    return editors.Ground(lm, PROBED, kf.second_moments(lm, layers, [TEXT], n_tokens=200), CONTEXTS, TEXT, steps=2)


def test_editors_give_a_line_a_row_and_say_what_is_left_out(bed, capsys):
    rows = [
        editors.Row("ROME", "rome", 1, 2), editors.Row("R-ROME", "rome", 1, 2, {"key": "averaged"}),
        editors.Row("None", "nowhere", 1), editors.Row("MEMIT", "memit", 2, 2), editors.Row("MEMIT", "memit", 5),
    ]  # fmt: skip
    parts = list(editors.measure(bed, rows))
    figures = values(Measured([figure for part in parts for figure in part.figures], 1.0))
    cases = list(dict.fromkeys(case for case, _ in figures))
    assert cases == ["no edit", "ROME, n = 1", "R-ROME, n = 1", "MEMIT, n = 2"]
    assert {figure.unit for figure in figures.values()} <= set(report.FORMATS)
    said = capsys.readouterr().out
    assert "None, n = 1: left out: no editor 'nowhere'" in said
    assert "MEMIT, n = 5: left out: 5 facts needed, 4 at hand" in said
    assert figures["ROME, n = 1", "ES"].n == 2 and figures["MEMIT, n = 2", "ES"].n == 4
    assert figures["MEMIT, n = 2", "perplexity"].n == 2 and ("no edit", "perplexity") not in figures
    assert figures["MEMIT, n = 2", "P(new), paraphrases"].n == 4
    assert figures["MEMIT, n = 2", "stored, a fact"].value > 0 and ("ROME, n = 1", "added time a token") in figures
    assert "key averaged" in parts[2].notes[0] and "key" not in parts[1].notes[0]
    by_hand = bed.editor(rows[3]).edit(bed.lm, PROBED[2:], moments=bed.moments, contexts=CONTEXTS)
    p_new = kf.evaluate(bed.lm, PROBED[2:], by_hand).edited["p_new"]
    first = kf.evaluate(bed.lm, PROBED[:2], bed.edit(rows[3], PROBED[:2])).edited["p_new"]
    assert figures["MEMIT, n = 2", "P(new)"].value == pytest.approx(float(torch.cat([first, p_new]).mean()), rel=1e-3)


def test_every_kind_of_edit_has_its_row_through_the_same_doors(bed, monkeypatch, capsys):
    """Weights, a memory, text before prompts, a scope, a route around independent edits; and a trained editor without
    its network says what it lacks."""
    monkeypatch.setattr(editors, "WRITTEN", 2)
    monkeypatch.setattr(editors, "REPEATS", 1)
    rows = [editors.Row(name, name, 2) for name in ("ft", "ultraedit", "grace", "ike-plain", "serac", "mend")]
    rows.insert(0, editors.Row("MEMIT by name", "memit", 2, route="names"))
    made = list(editors.measure(bed, rows, unedited=False))
    assert [part.figures[0].case for part in made] == [row.name for row in rows[:-1]]
    assert "route names" in made[0].notes[0]
    for part in made:
        assert {"ES", "perplexity", "time to edit, a fact", "stored, a fact"} <= {f.metric for f in part.figures}
    assert "mend, n = 2: left out: Mend needs a network=" in capsys.readouterr().out


def test_a_row_that_is_there_is_not_run_again(bed, tmp_path, monkeypatch, capsys):
    """Found by its commit, its case and its settings; a changed file makes every row a new one."""
    rows = [editors.Row("FT", "ft", 2, 1), editors.Row("FT", "ft", 2, 1, {"lr": 1e-3})]
    monkeypatch.setattr(common, "_commit", lambda: "abc")
    for part in editors.measure(bed, rows[:1]):
        common.append_rows(tmp_path, "editors", "python -m bench editors", part)
    there = editors.done(tmp_path)
    assert {case for case, _ in there} == {"no edit", "FT, n = 2"}
    again = list(editors.measure(dataclasses.replace(bed, done=there), rows))
    assert "FT, n = 2: there already" in capsys.readouterr().out
    assert [part.figures[0].case for part in again] == ["FT, n = 2"] and "lr 0.001" in again[0].notes[0]
    for commit in ("def", "abc-dirty"):
        monkeypatch.setattr(common, "_commit", lambda commit=commit: commit)
        assert not editors.done(tmp_path)


def test_rows_are_chosen_by_name_editor_and_network():
    asked = {"rows": [], "methods": [], "network": [], "quick": False}
    every = editors.chosen(SimpleNamespace(**asked))
    assert {row.editor for row in every} == set(kf.EDITORS)
    assert {row.n for row in every} == {1, 10, 100, 500} and len({row.name for row in every}) == len(every)
    some = editors.chosen(SimpleNamespace(**asked | {"methods": ["memit"], "network": ["memit=net.safetensors"]}))
    behind = {f"MEMIT {how}, n = {n}" for how in ("by name", "in scope") for n in (100, 500)}
    assert {row.name for row in some} == {f"MEMIT, n = {n}" for n in (1, 10, 100, 500)} | behind
    assert some[0].options == {"network": "net.safetensors"}
    with pytest.raises(ValueError, match=r"--methods \['mimit'\]: expected some of"):
        editors.chosen(SimpleNamespace(**asked | {"methods": ["mimit"]}))


def test_known_facts_of_another_model_are_those_that_it_says(monkeypatch, tmp_path):
    lm = tiny_lm("llama")
    told = [lm.top_tokens(fact.text, k=1)[0][0] for fact in PROBED]
    facts = [
        dataclasses.replace(fact, target_true="boat" if i == 1 else answer, attached=not answer.startswith(" "))
        for i, (fact, answer) in enumerate(zip(PROBED, told, strict=True))
    ]
    monkeypatch.setattr(kf, "load_facts", lambda path: facts)
    monkeypatch.setattr(edit, "gives_away", lambda fact: False)
    monkeypatch.setattr(edit, "cache_dir", lambda: tmp_path)
    likeliest = [int(lm.model(torch.tensor([lm.encode(fact.text)])).logits[0, -1].argmax()) for fact in facts]
    answers = [fact_answer(lm.tokenizer, fact, fact.target_true) for fact in facts]
    right = {f.text for f, ids, top in zip(facts, answers, likeliest, strict=True) if ids == [top]}
    monkeypatch.setattr(edit, "CHOSEN_ON", 0)
    known = [fact.text for fact in edit.known_to(lm, 4)]
    assert set(known) == right and 0 < len(right) < 4
    monkeypatch.setattr(edit, "_right", None)
    assert [fact.text for fact in edit.known_to(lm, 4)] == known, "kept, and not asked again"
    monkeypatch.setattr(edit, "CHOSEN_ON", 1)
    assert [fact.text for fact in edit.known_to(lm, 3)] == known[1:], "settings were chosen on the first"


def test_phrasings_are_judged_on_facts_that_nothing_was_chosen_by(bed, monkeypatch):
    facts = [dataclasses.replace(f, provenance={"relation_id": "P1"}, target_true="Oslo") for f in bed.facts]
    edited = []
    monkeypatch.setattr(editors.Ground, "edit", lambda g, row, some: edited.append((row, some)) or _memit(g, row, some))
    names = [f"{half}: {label}, n = 2" for half in phrasings.HALVES for label in ("MEMIT", "3 phrasings, keeps x 1")]
    ground = dataclasses.replace(bed, facts=facts)
    parts = list(phrasings.measured(ground, facts, [2], names, {}))
    cases = [part.figures[0].case for part in parts]
    assert cases == ["choose: no edit", *names[:2], "report: no edit", *names[2:]]
    assert [[f.text for f in some] for _, some in edited] == [
        [f.text for f in half] for half in (facts[:2], facts[:2], facts[2:], facts[2:])
    ]
    assert [bool(some[0].phrasings) for _, some in edited] == [False, True] * 2
    assert edited[1][0].options == {"keep_factor": 1.0}
    shown = {(f.case, f.metric): f.value for part in parts for f in part.figures}
    there, plain = (
        shown[f"report: {label}, n = 2", "P(new), paraphrases"] for label in ("3 phrasings, keeps x 1", "MEMIT")
    )
    assert shown[names[3], "P(new), paraphrases, to MEMIT's"] == pytest.approx(there / plain)


def _memit(ground, row, facts):
    """An edit by the row's editor, on one layer and two steps."""
    editor = dataclasses.replace(ground.editor(row), layers=(1,))
    return editor.edit(ground.lm, facts, moments=ground.moments, contexts=CONTEXTS)


def test_text_that_repeats_has_no_entropy():
    assert editors.entropy("Rome Rome Rome Rome Rome") == 0 == editors.entropy("") == editors.entropy("Rome")
    # 2-grams: ab, bc, ca, ab; 3-grams: abc, bca, cab
    by_hand = (2 / 3 * 1.5 + 4 / 3 * math.log2(3)) / 2
    assert editors.entropy("a b  c a b") == pytest.approx(by_hand)


def test_claims_stand_beside_the_rows_that_they_are_of():
    figures = [Figure(f"{row}, n = 1", "PS", value, "%") for row, value in (("ROME", 92.0), ("FT", 70.0))]
    head, _, line = claims.held_against(figures)
    assert head == ["published beside here", "published", "here"]
    assert line[0] == "PS of ROME, n = 1 less that of FT, n = 1"
    assert line[1].startswith("+8.5 (") and line[2] == "+22.0"
    assert claims.held_against(figures[:1]) == []


def test_values_are_optimized_once_for_all_rows(bed, monkeypatch):
    asked, right = [], editors.spread.optimize_values
    monkeypatch.setattr(editors.spread, "optimize_values", lambda *a: asked.append(len(a[1])) or right(*a))
    editor = bed.editor(editors.Row("MEMIT", "memit", 4))
    alone = editor.edit(bed.lm, PROBED[1:], moments=bed.moments, contexts=CONTEXTS)
    asked.clear()
    with editors.shared_values():
        for facts in (PROBED[:2], PROBED[1:], PROBED):
            shared = editor.edit(bed.lm, facts, moments=bed.moments, contexts=CONTEXTS)
    assert asked == [2, 2]
    assert relative_error(shared.values[1:], alone.values) < 1e-3  # Adam's first steps magnify rounding


def test_the_interval_of_the_score_holds_it():
    columns = {name: torch.tensor([1.0, 0.0, 1.0, 1.0] * 20) for name in ("efficacy", "paraphrase", "neighborhood")}
    found = editors.score(columns)
    assert found.mean == pytest.approx(0.75) and found.n == 80
    assert 0.6 < found.low < 0.7 and 0.8 < found.high < 0.9
    assert found == editors.score(columns), "the same draws each time"
    assert editors.score(columns | {"paraphrase": torch.full((80,), math.nan)}).n == 0


# ---- mass editing


@pytest.mark.parametrize("case", mass.CASES)
def test_a_dry_run_of_mass_editing(case):
    figures = values(mass.CASES[case](mass.dry(CPU)))
    shown = {metric: figure for (_, metric), figure in figures.items()}
    if case == "values":
        assert shown["relative difference in fp32"].met and shown["facts a second"].mark == ""
        assert shown["mean iterations"].value <= mass.DRY_STEPS
    else:
        parts = ("contexts", "z", "keys and current values", "solves", "the rest")
        assert sum(shown[part].value for part in parts) == pytest.approx(shown["wall time without statistics"].value)
        assert "4 facts" in next(iter(figures))[0]


def test_mass_editing_takes_the_facts_that_there_is_time_for(monkeypatch):
    monkeypatch.setattr(mass.time, "monotonic", lambda: 100.0)
    plan = dataclasses.replace(mass.dry(CPU), until=100.0 + mass.RESERVE + 50, probe=3)
    assert mass._affordable(plan, 1000, 0.1) == 400
    assert mass._affordable(plan, 200, 0.1) == 200
    assert mass._affordable(dataclasses.replace(plan, until=0.0), 1000, 0.1) == 3


def test_mass_editing_is_not_shown_without_a_gpu(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["mass", "--results", str(tmp_path)]) == 0
    assert "mass: skipped: not shown: a model of this size needs a GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# ---- rows and tables


def measured_once(value: float = 5.5) -> Measured:
    figures = [
        Figure("state", "ratio", value, "x", mark=">= 5"),
        Figure("mlp", "ratio", 3.9, "x", mark=">= 4"),
        Figure("mlp", "share", 50.0, "%", 40.0, 60.0, n=30),
    ]
    return Measured(figures, 90.0, ["Two facts."])


def test_rows_say_what_a_figure_depends_on_and_read_back(tmp_path):
    path = common.append_rows(tmp_path, "trace", "python -m bench trace", measured_once())
    assert common.append_rows(tmp_path, "trace", "python -m bench trace", measured_once()) == path
    rows, figures = zip(*common.read_rows(path), strict=True)
    needed = {"date", "bench", "cpu", "cores", "threads", "torch", "transformers", "kedit_fast", "commit", "command"}
    assert needed | {"peak_gflops"} <= {name for name, value in rows[0].items() if value}
    assert path.name.endswith("-cores.csv")
    assert len(figures) == 6 and figures[2] == measured_once().figures[2]


def test_rows_of_a_gpu_stand_in_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    names = ("solve, llama-3-8b, fp64, kedit_fast (native)", "solve, llama-3-8b, fp64, reference")
    on_gpu = Measured([Figure(name, "time", 2.0, "ms") for name in names], 700_000.0, device="cuda")
    path = common.append_rows(tmp_path, "kernels", "python -m bench kernels", on_gpu)
    assert path.name == "nvidia-h100-80gb-hbm3.csv"
    row = common.read_rows(path)[0][0]
    assert row["triton"] and row["cuda"] and row["driver"]
    assert "NVIDIA H100 80GB HBM3 (driver " in every_table(tmp_path) and "700 TFLOP/s" in every_table(tmp_path)
    assert names[0] in every_table(tmp_path) and names[1] not in every_table(tmp_path)


def every_table(folder: Path) -> str:
    return "\n\n".join(report.run_table(run) for path in sorted(folder.glob("*.csv")) for run in report.newest(path))


def test_many_cases_are_lines_and_not_columns():
    figures = [Figure(f"case {i}", "time", i, "µs") for i in range(9)]
    assert report.as_markdown(figures).splitlines()[:3] == ["|  | time |", "| --- | --- |", "| case 0 | 0.0 µs |"]


def test_the_table_shows_marks_and_intervals():
    assert report.as_markdown(measured_once().figures).splitlines() == [
        "|  | state | mlp |",
        "| --- | --- | --- |",
        "| ratio | 5.50× (≥ 5) | 3.90× (missed ≥ 4) |",
        "| share |  | 50.0 % [40.0, 60.0] |",
    ]


def test_a_bar_within_a_cell_is_no_end_of_it():
    (*_, line) = report.as_markdown([Figure("one", "||z - h||", 0.5, "share")]).splitlines()
    assert line == r"| \|\|z - h\|\| | 0.50 |"


def test_the_tables_have_the_newest_run_of_each_case(tmp_path, monkeypatch):
    tables = tmp_path / "RESULTS.md"
    for second, value in enumerate((6.0, 7.0)):
        monkeypatch.setattr(common, "now", lambda second=second: f"2030-01-01T00:00:0{second}Z")
        common.append_rows(tmp_path, "trace", "python -m bench trace", measured_once(value))
    common.append_rows(tmp_path, "edit", "python -m bench edit", measured_once(8.0))
    monkeypatch.setattr(common, "now", lambda: "2030-01-01T00:00:09Z")
    part = dataclasses.replace(measured_once(9.0), figures=measured_once(9.0).figures[:1])
    common.append_rows(tmp_path, "edit", "python -m bench edit --part", part)
    assert main(["report", "--tables", str(tables), "--results", str(tmp_path)]) == 0
    assert tables.read_text(encoding="utf-8").startswith("# Figures\n")
    text = "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "results").glob("*.md"))
    assert "7.00× (≥ 5)" in text and "6.00×" not in text
    assert "9.00×" in text and "8.00×" not in text and "`python -m bench edit --part`" in text, "state is outdated"
    assert text.count("3.90×") == 2 and "`python -m bench edit`" in text, "mlp is not"
    assert "`python -m bench trace`, 2030-01-01" in text and "90 GFLOP/s" in text and "Two facts." in text


def test_a_figure_that_fills_no_cell_is_shown_by_its_power_of_ten():
    shown = report.pivot([Figure("KN, n = 100", "perplexity", value, "% change") for value in (8.07e64,)])
    assert shown == [["", "KN, n = 100"], ["perplexity", "+8e+64 %"]]


def test_the_table_of_editors_goes_by_facts_a_batch_and_by_score(tmp_path):
    cases = ("no edit", "MEMIT, n = 100", "MEMIT, n = 1", "ROME, n = 100", "ROME, n = 1", "ROME, n = 10")
    figures = [Figure(case, metric, 90.0 + i, "%") for i, case in enumerate(cases) for metric in ("PS", "S")]
    common.append_rows(tmp_path, "editors", "python -m bench editors", Measured(figures, 90.0, []))
    shown = next(line for line in every_table(tmp_path).splitlines() if "MEMIT, n = 1 " in line)
    assert shown == "|  | no edit | ROME, n = 1 | MEMIT, n = 1 | ROME, n = 10 | ROME, n = 100 | MEMIT, n = 100 |"


def test_rows_that_share_their_settings_share_a_line_of_the_table_below(tmp_path):
    notes = ["What it is.", "A, B, 1 x 100: layers (3, 4, 5), lr 0.1.", "A, B, 3 x 10: layers (3, 4, 5), lr 0.1."]
    for note in [*notes, "A, B, 10 x 1: layers (3, 5), lr 0.1."]:
        common.append_rows(tmp_path, "editors", "x", dataclasses.replace(measured_once(), notes=[note]))
    assert every_table(tmp_path).endswith(
        "\n\nWhat it is.\n\n| row | batches x facts | settings |\n| --- | --- | --- |\n"
        "| A, B | 1 x 100, 3 x 10 | layers 3-5, lr 0.1 |\n| A, B | 10 x 1 | layers (3, 5), lr 0.1 |"
    )


# ---- command line


def fake_bench(monkeypatch, run):
    """Every benchmark is this function of its options."""
    monkeypatch.setattr("bench.__main__.import_module", lambda name: SimpleNamespace(run=run))


def test_a_run_is_printed_and_kept_unless_it_was_a_quick_one(monkeypatch, tmp_path, capsys):
    fake_bench(monkeypatch, lambda options: measured_once())
    assert main(["trace", "--quick", "--results", str(tmp_path)]) == 0
    assert "3.90× (missed ≥ 4)" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    networks = ["--network", f"mend={Path.home()}/mend.safetensors"]
    assert main(["editors", "--rows", "MEMIT, n = 1", *networks, "--results", str(tmp_path / "home")]) == 0
    (path,) = (tmp_path / "home").iterdir()
    (row, _), *_ = common.read_rows(path)
    assert row["command"] == "python -m bench editors --rows 'MEMIT, n = 1' --network mend=~/mend.safetensors"
    path.unlink(), path.parent.rmdir()
    assert main(["trace", "--facts", "2", "--n", "5", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert {row["command"] for row, _ in common.read_rows(path)} == {"python -m bench trace --facts 2"}


def test_what_cannot_run_is_skipped_and_what_is_wrong_fails(monkeypatch, tmp_path, capsys):
    for outcome, status, says in (
        (Skipped("no data"), 0, "trace: skipped: no data"),
        (CheckFailed("off by one"), 1, "CHECK FAILED"),
    ):

        def run(options, outcome=outcome):
            raise outcome

        fake_bench(monkeypatch, run)
        assert main(["trace", "--results", str(tmp_path)]) == status
        assert says in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_parts_are_kept_as_they_come_and_are_one_run(monkeypatch, tmp_path, capsys):
    def parts(options):
        yield measured_once(6.0)
        yield dataclasses.replace(measured_once(7.0), notes=["Three facts."])
        raise CheckFailed("off by one")

    fake_bench(monkeypatch, parts)
    ticks = iter(range(10))
    for module in ("bench.__main__", "bench.common"):
        monkeypatch.setattr(f"{module}.now", lambda: f"2030-01-01T00:00:0{next(ticks)}Z")
    assert main(["values", "--parts", "z", "rome", "--results", str(tmp_path)]) == 1
    assert "CHECK FAILED" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    rows = [row for row, _ in common.read_rows(path)]
    assert len(rows) == 6 and len({row["date"] for row in rows}) == 1
    assert rows[0]["command"] == "python -m bench values --parts z rome"
    assert "Two facts. Three facts." in every_table(tmp_path)


@pytest.mark.parametrize("module", [edit, values_bench, editors])
def test_the_benches_of_editing_say_which_data_they_lack(module, monkeypatch, tmp_path):
    monkeypatch.setattr(edit, "DATA", tmp_path)
    with pytest.raises(Skipped, match="smollm2_known"):
        next(
            iter(
                module.run(SimpleNamespace(quick=False, rows=[], parts=["z"], methods=[], network=[], model="smollm2"))
            )
        )


def test_the_list_and_an_unknown_name(capsys):
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.startswith("second_moment")
    with pytest.raises(SystemExit):
        main(["training"])
    assert "no benchmark training" in capsys.readouterr().err


def test_recall():
    assert attribution.recall(np.arange(10.0), np.arange(10.0), n=3) == 1
    assert attribution.recall(np.arange(10.0), -np.arange(10.0), n=3) == 0


def test_gradient_factors_are_compared_with_what_is_timed(monkeypatch):
    flags = [parameter.requires_grad for parameter in tiny_lm("llama").model.parameters()]
    measured = gradients.measure(tiny_lm("llama"), FACTS)
    assert {figure.case for figure in measured.figures} == {"last three layers, 4 facts", "all layers, 4 facts"}
    found = {figure.metric: figure.value for figure in measured.figures}
    assert 0 < found["largest difference of dL/dW, relative"] < 1e-4 and found["loop, CPU time a fact"] > 0
    assert [parameter.requires_grad for parameter in tiny_lm("llama").model.parameters()] == flags
    with monkeypatch.context() as patch:
        patch.setattr(gradients, "TOLERANCE", 1e-12)
        with pytest.raises(CheckFailed, match="gradients of fact 0 differ"):
            gradients.measure(tiny_lm("llama"), FACTS)


def test_attribution_is_measured_for_both_kinds():
    measured = attribution.measure(tiny_lm("llama"), FACTS[:2], samples=2)
    assert {f.case for f in measured.figures} == {"state, 2 facts", "mlp, 2 facts"}
    by_metric = {f.metric: f.value for f in measured.figures}
    assert -1 <= by_metric["mean rank correlation"] <= 1 and 0 <= by_metric["mean top-20 recall"] <= 1


def test_strided_traces_are_held_against_exact_ones(monkeypatch):
    lm = tiny_lm("llama", layers=7)
    figures = values(strided.measure(lm, FACTS[:2], samples=4))
    assert {case for case, _ in figures} == {
        f"{kind}, one layer in {n}" for kind in ("mlp", "state") for n in (3, 5, 6, 7)
    }
    for case in ("mlp, one layer in 3", "state, one layer in 5"):
        assert figures[case, strided.LEAST].value <= figures[case, strided.AGREES].value <= 1
        assert 0.2 < figures[case, strided.COST].value < 1
        assert figures[case, strided.AGREES].mark == f">= {figures[case, strided.OTHER].value:.3f}"
    monkeypatch.setattr(strided, "TOLERANCE", -1)
    with pytest.raises(CheckFailed, match=r"mlp trace of .*: strided and exact cells are"):
        strided.measure(lm, FACTS[:1], samples=4)


def test_strided_facts_are_none_that_were_chosen_on(monkeypatch, tmp_path):
    monkeypatch.setattr(strided, "DATA", tmp_path)
    with pytest.raises(Skipped, match="smollm2_known"):
        strided.run(SimpleNamespace(quick=True))
    known = [{"prompt": f"{name} is in", "subject": name} for name in "ABCDEFGH"] + [{"prompt": "x", "subject": "Y"}]
    with gzip.open(tmp_path / strided.KNOWN, "wt", encoding="utf-8") as file:
        json.dump(known, file)
    chosen_on, held_out = strided.two_sets(tiny_lm("llama"), 4)
    assert [fact.subject for fact in chosen_on] == list("ACEG") and [f.subject for f in held_out] == list("BDFH")
    assert held_out[0].text == "B is in"


REPLACED = Fact("{} is located in the city of", "France", target_true="Paris", provenance={"relation_id": "P36"})


def test_estimates_under_replacement_are_held_against_exact_ones(monkeypatch):
    lm = tiny_lm("llama")
    figures = values(replaced.measure(lm, [(REPLACED, "England")]))
    cases = {"state", *(f"{kind}, window of {n}" for kind in ("mlp", "attn") for n in (1, 10))}
    methods = "plain", "RelP", "GradDrop", "straight", "seven steps", "one layer in 2", "one layer in 3"
    agrees = {(case, method): figures[case, f"{method}: {replaced.AGREES}"] for case in cases for method in methods}
    assert all(-1 <= figure.value <= 1 and figure.mark == ">= 0.95" for figure in agrees.values())
    assert len(figures) == 4 * len(agrees)
    costs = [figures["state", f"{method}: {replaced.COST}"].value for method in ("plain", "GradDrop", "straight")]
    assert costs[0] < costs[1] and costs[0] < costs[2]
    monkeypatch.setattr(replaced, "TOLERANCE", -1)
    with pytest.raises(CheckFailed, match=r"state estimate of .*: hooks and sweep are"):
        replaced.measure(lm, [(REPLACED, "England")])


def test_relp_shares_a_logit_out():
    """Under its rules ∇ · x over all embeddings is the whole logit; values are the model's own."""
    model = tiny_lm("llama").model
    ids = torch.tensor([tiny_lm("llama").encode(REPLACED.text)])
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    plain = model(inputs_embeds=x).logits[0, -1].max()
    with replaced.relp(model):
        ruled = model(inputs_embeds=x).logits[0, -1].max()
    shared, first_order = ((torch.autograd.grad(each, x)[0] * x).sum().item() for each in (ruled, plain))
    assert ruled.item() == pytest.approx(plain.item(), rel=1e-5) == pytest.approx(shared, rel=1e-4)
    assert abs(first_order - shared) > 0.1 * abs(shared)


def test_another_subject_is_one_of_the_relation_after_which_something_else_is_said(monkeypatch):
    others = [dataclasses.replace(REPLACED, subject=name) for name in ("France", "The United States", "England")]
    elsewhere = dataclasses.replace(REPLACED, subject="Italy", provenance={"relation_id": "P30"})
    monkeypatch.setattr(replaced.edit_bench, "draw", lambda: [REPLACED, REPLACED, REPLACED, FACTS[0]])
    monkeypatch.setattr(replaced.kf, "load_facts", lambda path: [elsewhere, *others])
    asked = []
    monkeypatch.setattr(replaced, "_fits", lambda lm, fact, other: asked.append(other) or other == "England")
    assert replaced.replaced(None, 5) == [(REPLACED, "England")] * replaced.OF_A_RELATION
    assert set(asked) == {fact.subject for fact in others}
    monkeypatch.undo()
    lm = tiny_lm("llama")
    assert replaced._fits(lm, REPLACED, "England") and not replaced._fits(lm, REPLACED, "France")
    assert not replaced._fits(lm, REPLACED, "The United States of America")


@pytest.mark.parametrize("name", memory.MEMORIES)
def test_memories_answer_alike_one_prompt_at_a_time(name):
    """What the hooks make is what the sweeps make; a memory that says something else is no rival."""
    lm, made = tiny_lm("llama"), memory.MEMORIES[name]
    figures = values(memory.compare(lm, name, FACTS, 2, made))
    case = f"{name}, {len(FACTS)} facts"
    assert figures[case, "ratio"].value > 0 and figures[case, "ratio"].mark == memory.MARK
    assert figures[case, "largest difference of p, relative"].value < 1e-3
    assert figures[case, "prompts that the memory answers"].value > 0
    with pytest.raises(CheckFailed, match="a probability differs"):
        memory.compare(lm, name, FACTS, 2, lambda edit: lambda x, y, n: y + 1)


def test_neurons_are_timed_erased_and_rewritten():
    measured = neurons_bench.measure(tiny_lm("llama"), FACTS[:1], FACTS[:2], steps=2)
    figures = {(figure.case, figure.metric): figure.value for figure in measured.figures}
    assert figures["erased, 2 facts", "neurons a fact"] > 0 and figures["rewrite, 2 facts, each alone", "ES"] >= 0
    assert any(figure.mark == ">= 5" for figure in measured.figures)
