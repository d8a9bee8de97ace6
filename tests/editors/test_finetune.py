"""FT and FT-L against Adam on a plain Hugging Face model, and what they must leave alone."""

import json
import math
import re
from dataclasses import asdict, replace

import pytest
import torch

import kedit_fast as kf
import kedit_fast.jobs.finetune as job_module
import kedit_fast.jobs.losses as losses_module
import tests.oracle.finetune as oracle_module
from kedit_fast.basics.progress import Bar
from kedit_fast.editors.finetune import PUBLISHED, PUBLISHED_L, Ft, FtL
from kedit_fast.edits.deltas import Dense
from kedit_fast.facts.tokens import answer_tokens, fact_tokens
from kedit_fast.jobs.finetune import TuneSettings, TuneTask, fine_tune
from kedit_fast.model.source import Resident
from kedit_fast.sweep import ascent
from tests.conftest import close, disk_and_resident, open_tiny, refused, save_tiny, tiny_lm
from tests.editors.cases import (
    FACTS,
    MODULE_PATHS,
    PHRASED,
    left_as_it_was,
    make_exact,
    named,
    oracle_facts,
    relative,
    written,
)
from tests.editors.test_editor import complaints
from tests.editors.test_editor import facts as known_facts  # noqa: F401 (a fixture)
from tests.live import LiveBytes
from tests.make import bits, lowrank, make_edit, same_bits, watched
from tests.oracle.finetune import fine_tune as oracle_fine_tune
from tests.tiny import tiny_model, tiny_tokenizer

FAMILIES = ("gpt2", "gptj", "llama", "gemma2")
EPS = 0.02
FAST = dict(lr=5e-3, num_steps=8)  # random models want larger steps than trained ones
# One prompt begins as another, two differ in their last words, targets of one, two and three tokens.
ALIKE = (
    kf.Fact(prompt="{}", subject="The Space Needle", target_new="cheese boat"),
    kf.Fact(prompt="{} is in the city of", subject="The Space Needle", target_new="Rome"),
    kf.Fact(prompt="{} is in the capital of", subject="The Space Needle", target_new="Berlin"),
)


def oracle(lm, facts, editor):
    return oracle_fine_tune(
        lm.model, tiny_tokenizer(), oracle_facts(facts), editor.layers, lr=editor.lr, steps=editor.num_steps,
        eps=editor.norm_constraint or None, weight_decay=editor.weight_decay, batch_size=editor.batch_size,
        objective=editor.objective_optimization,
    )  # fmt: skip


def compare(edit, expected, tolerance):
    assert edit.provenance["steps"] == len(expected.losses)
    assert edit.provenance["losses"] == pytest.approx(expected.losses, abs=1e-4)
    assert sorted(edit.deltas) == sorted(expected.deltas)
    for layer, delta in expected.deltas.items():
        assert isinstance(edit.deltas[layer], Dense)
        assert relative(edit.deltas[layer].delta, delta) < tolerance, layer


def tasks(lm, facts=FACTS):
    asked = [(fact_tokens(lm.tokenizer, fact), answer_tokens(lm.tokenizer, "a", fact.target_new)) for fact in facts]
    return [TuneTask(list(said.ids), answer, fact.label) for (said, answer), fact in zip(asked, facts, strict=True)]


# --- the same as the oracle ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [(1,), (2, 0)])
@pytest.mark.parametrize("eps", [0.0, EPS])
# In fp32 a gradient that rounding made of nothing is a whole step of Adam's, which divides it by its own size.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-4), (torch.float64, 1e-8)])
def test_deltas_equal_the_oracle(family, layers, eps, dtype, tolerance, monkeypatch):
    if dtype == torch.float64:
        make_exact(monkeypatch)
    lm, editor = tiny_lm(family, dtype), Ft(layers=layers, norm_constraint=eps, **FAST)
    edit = editor.edit(lm, FACTS)
    expected = oracle(lm, FACTS, editor)
    compare(edit, expected, tolerance)
    assert edit.deltas[layers[0]].delta.dtype == dtype
    assert expected.losses[-1] < expected.losses[0] - 0.2  # something was learned
    if eps:  # some weights are held and some are not
        held = (expected.deltas[layers[0]].abs() > 0.999 * eps).double().mean()
        assert 0.1 < held < 0.95


def test_phrasings_are_trained_on():
    lm, editor = tiny_lm("llama"), Ft(layers=(1,), batch_size=3, **FAST)
    made = editor.edit(lm, PHRASED)
    compare(made, oracle(lm, PHRASED, editor), 1e-4)
    assert relative(made.deltas[1].delta, editor.edit(lm, FACTS).deltas[1].delta) > 0.1
    assert len(made.provenance["found"]["p_new"]) == len(PHRASED)


def test_facts_without_a_subject():
    """The whole text is the prompt: the same edit as with the subject named, and other editors refuse it."""
    lm = tiny_lm("llama")
    whole = [kf.Fact(prompt=fact.text, target_new=fact.target_new) for fact in ALIKE]
    named, bare = (Ft(layers=(1,), **FAST).edit(lm, facts) for facts in (ALIKE, whole))
    assert torch.equal(bare.deltas[1].delta, named.deltas[1].delta)
    refused(r"has no subject: .* or edit by fine-tuning", kf.Memit(layers=(1,), mom2_adjustment=False).edit, lm, whole)
    refused("has no subject", kf.trace, lm, whole)


def test_it_stops_at_a_hundredth_of_a_nat():
    lm, editor = tiny_lm("gpt2", torch.float64), Ft(layers=(3,), lr=2e-2)
    edit, expected = editor.edit(lm, FACTS[:1]), oracle(lm, FACTS[:1], editor)
    compare(edit, expected, 1e-8)
    assert 10 < len(expected.losses) < 25 and expected.losses[-1] < 0.01 < expected.losses[-2]


def each_alone(monkeypatch):
    """Memory that holds one fact. (A tiny model's facts all fit into the least memory that a sweep takes.)"""
    monkeypatch.setattr(job_module, "held_bytes", lambda lm, task, layers, recompute=False, loss=None: lm.memory // 2)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_each_batch_takes_a_step_of_its_own(size, cut, monkeypatch):
    """Batches that have reached the goal move nothing while the others go on; alike when a batch is cut by memory."""
    goal = 6.6  # nats
    monkeypatch.setattr(job_module, "STOP_BELOW", goal)
    monkeypatch.setattr(oracle_module, "LOSS_GOAL", goal)
    make_exact(monkeypatch)
    if cut:
        each_alone(monkeypatch)
    lm = tiny_lm("gptj", torch.float64)
    editor = Ft(layers=(1,), lr=2e-3, num_steps=8, batch_size=size)
    edit, expected = editor.edit(lm, FACTS), oracle(lm, FACTS, editor)
    compare(edit, expected, 1e-8)
    assert 2 < len(expected.losses) < 8
    assert relative(Ft(layers=(1,), lr=2e-3, num_steps=8).edit(lm, FACTS).deltas[1].delta, expected.deltas[1]) > 0.01


@pytest.mark.parametrize(
    ("options", "dtype", "tolerance", "matters"),
    [
        ({"layers": (3,)}, torch.float32, 1e-4, 0),  # only rows that a target is read after pass its down projection
        ({"weight_decay": 0.1}, torch.float64, 1e-6, 0.01),  # of the whole weight
        ({"objective_optimization": "prompt_last"}, torch.float32, 1e-4, 0.1),  # the published loss
    ],
)
def test_each_option_is_the_oracle_s(options, dtype, tolerance, matters):
    lm, plain = tiny_lm("llama", dtype), Ft(layers=(1,), **FAST)
    editor = replace(plain, **options)
    expected = oracle(lm, FACTS, editor)
    compare(editor.edit(lm, FACTS), expected, tolerance)
    if matters:
        assert relative(oracle(lm, FACTS, plain).deltas[1], expected.deltas[1]) > matters


def test_prompts_that_begin_alike_share_rows(monkeypatch):
    make_exact(monkeypatch)
    lm, editor = tiny_lm("llama", torch.float64), Ft(layers=(1,), **FAST)
    pack = job_module._Pack(lm, tasks(lm, ALIKE), [0, 1, 2], TuneSettings((1,), 1e-3, 1), lm.memory, None)
    lengths = [len(task.prompt) + len(task.target) - 1 for task in tasks(lm, ALIKE)]
    assert pack.runs.n_rows.sum() <= sum(lengths) - 2 * len(tasks(lm, ALIKE)[0].prompt)
    assert max(len(task.target) for task in tasks(lm, ALIKE)) > 1
    compare(editor.edit(lm, ALIKE), oracle(lm, ALIKE, editor), 1e-8)


def test_what_lies_below_is_computed_once(monkeypatch):
    calls = watched(monkeypatch, Resident, "call")
    Ft(layers=(2,), lr=5e-3, num_steps=3).edit(tiny_lm("llama"), FACTS)
    layers = [layer for _, layer, *_ in calls]
    # three steps, the last look, and the question whether the facts are written
    assert [layers.count(layer) for layer in range(3)] == [2, 2, 5]


# --- how the target is read ------------------------------------------------------------------------------------------


def test_a_target_of_several_tokens_is_said_only_when_teacher_forced():
    lm, fact = tiny_lm("llama"), FACTS[1]
    target = answer_tokens(lm.tokenizer, "a", fact.target_new)
    assert len(set(target)) == len(target) > 1
    said = {}
    for objective in ("target_new", "prompt_last"):
        edit = Ft(layers=(1,), lr=5e-3, num_steps=60, objective_optimization=objective).edit(lm, fact)
        said[objective] = lm.with_edit(edit).generate(fact.text, max_new_tokens=len(target)).strip()
    assert said["target_new"] == fact.target_new != said["prompt_last"]


# --- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_weight_leaves_its_bound(dtype):
    lm = tiny_lm("gpt2", dtype)
    editors = (FtL(layers=(1, 2), norm_constraint=EPS, **FAST), Ft(layers=(1, 2), **FAST))
    bound, free = (editor.edit(lm, FACTS) for editor in editors)
    for layer, delta in bound.deltas.items():
        assert (delta.delta.abs() <= EPS).all()
        assert delta.delta.abs().max() == delta.delta.new_tensor(EPS)
        share = (delta.delta.abs() == delta.delta.new_tensor(EPS)).double().mean().item()
        notes = bound.provenance["layers"][str(layer)]
        assert notes["at_limit"] == pytest.approx(share) and notes["norm"] == pytest.approx(delta.norm())
        assert free.deltas[layer].delta.abs().max() > EPS
    assert "at_limit" not in free.provenance["layers"]["1"]
    assert (bound.method, free.method) == ("ft-l", "ft")


def test_only_the_chosen_layer_s_weight_is_written():
    model = tiny_model("llama")
    lm, before = open_tiny(model), bits(model)
    edit = FtL(layers=(1,), norm_constraint=EPS, **FAST).edit(lm, FACTS)
    assert same_bits(model, before) and edit.layers == (1,)
    with edit.apply(model):
        after = bits(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.layers.1.mlp.down_proj.weight"}
    moved = after["model.layers.1.mlp.down_proj.weight"] - before["model.layers.1.mlp.down_proj.weight"]
    assert moved.abs().max() <= EPS * (1 + 1e-5)  # rounding of W + Δ
    assert same_bits(model, before)


# --- the edit --------------------------------------------------------------------------------------------------------


def test_the_edit_says_what_was_done():
    lm = tiny_lm("llama")
    editor = Ft(layers=(1,), **FAST)
    edit = editor.edit(lm, FACTS)
    assert edit.hparams == json.loads(json.dumps(asdict(editor))) and edit.fingerprint == lm.fingerprint
    assert edit.facts == FACTS and edit.provenance["version"] == kf.__version__
    assert edit.provenance["steps"] == len(edit.provenance["losses"]) == FAST["num_steps"]
    report = kf.evaluate(lm, FACTS, edit)
    at_end = edit.provenance["found"]
    assert at_end["steps"] == [FAST["num_steps"]] * len(FACTS)
    assert at_end["p_new"] == pytest.approx(report.edited["p_new"].tolist(), abs=2e-5)
    assert at_end["p_new"] == pytest.approx([math.exp(-loss) for loss in at_end["loss"]], abs=2e-5)
    assert sum(at_end["loss"]) / len(FACTS) < edit.provenance["losses"][-1] < edit.provenance["losses"][0]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_on_top_of_an_earlier_edit(weight_decay):
    """As on a model that has it in its weights; the bound counts from there."""
    lm = open_tiny(tiny_model("llama", torch.float64))
    deltas = {1: lowrank(seed=1, scale=0.02, dtype=torch.float64), 2: lowrank(seed=2, scale=0.02, dtype=torch.float64)}
    previous = make_edit(lm.model, deltas=deltas, values=None, keys={}, facts=(), contexts=[])
    editor = Ft(layers=(1,), norm_constraint=EPS, weight_decay=weight_decay, **FAST)
    edit = editor.edit(lm, FACTS, previous=previous)
    with previous.apply(lm.model):
        expected = oracle(lm, FACTS, editor)
    compare(edit, expected, 1e-6)
    assert relative(editor.edit(lm, FACTS).deltas[1].delta, expected.deltas[1]) > 0.05
    assert [below["method"] for below in edit.provenance["on_top_of"]] == ["memit"]
    twice = editor.edit(lm, FACTS[:1], previous=[previous, edit])
    assert [below["method"] for below in twice.provenance["on_top_of"]] == ["memit", "ft-l"]


def test_a_bfloat16_model_is_tuned_in_float32():
    """Steps far below the weight's own step are not lost."""
    lm = tiny_lm("llama", torch.bfloat16)
    edit = Ft(layers=(1,), **FAST).edit(lm, FACTS)
    expected = oracle(tiny_lm("llama"), FACTS, Ft(layers=(1,), **FAST))
    assert edit.deltas[1].delta.dtype == torch.float32
    assert edit.provenance["losses"] == pytest.approx(expected.losses, rel=0.1)
    assert relative(edit.deltas[1].delta, expected.deltas[1]) < 0.5


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", [1, 2])
def test_packs_cut_by_memory_are_the_whole(fit, monkeypatch):
    lm, settings = tiny_lm("gpt2", torch.float64), TuneSettings((1,), 5e-3, 6, limit=EPS)
    some, whole = tasks(lm), fine_tune(lm, tasks(lm), settings)
    monkeypatch.setattr(
        job_module, "held_bytes", lambda lm, task, layers, recompute=False, loss=None: lm.memory * 0.9 / fit
    )
    assert len(list(job_module._cut(lm, some, range(len(some)), settings, lm.memory))) == len(some) // fit
    parts = fine_tune(lm, some, settings)
    assert relative(parts.deltas[1], whole.deltas[1]) < 1e-10
    assert parts.losses == pytest.approx(whole.losses, rel=1e-12)
    close("nll", parts.nll, whole.nll)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_task_that_does_not_fit_computes_its_layers_again(layer, monkeypatch):
    """And where the rows that enter the first layer take too much, they are made anew in each step."""
    lm, settings = tiny_lm("gpt2", torch.float64), TuneSettings((layer,), 5e-3, 3)
    some, whole, swept = tasks(lm), fine_tune(lm, tasks(lm), settings), []
    counted, sweep = job_module.held_bytes, ascent.sweep
    many, state = 200 * some, 4 * 48 * 80 * 8
    rows = sum(len(task.prompt) + len(task.target) - 1 for task in many) * 48 * 8
    for memory, kept in ((2 * rows + state, rows), (2 * rows + state - 1, 0)):
        assert job_module._budget(replace(lm, memory=memory), many, settings) == (memory - state - kept, kept)
    monkeypatch.setattr(ascent, "sweep", lambda *a, **k: swept.append(k.get("recompute")) or sweep(*a, **k))
    monkeypatch.setattr(
        job_module, "held_bytes",
        lambda lm, task, layers, recompute=False, loss=None: counted(lm, task, layers) if recompute else lm.memory,
    )  # fmt: skip
    monkeypatch.setattr(job_module, "_budget", lambda lm, tasks, settings: (lm.memory // 2, 0))
    parts = fine_tune(lm, some, settings)
    swept = [again for again in swept if again is not None]  # of those above the layers that are computed once
    assert len(swept) > 3 * len(some) and all(swept)
    assert relative(parts.deltas[layer], whole.deltas[layer]) < 1e-10
    close("nll", parts.nll, whole.nll)


def test_packs_from_disk_go_up_and_down_side_by_side(tmp_path, monkeypatch):
    """A pack for each task takes no more passes than one for all, and the same bits as in memory for the same cut."""
    lm, resident = disk_and_resident(save_tiny(tmp_path, tiny_model("gpt2", layers=6)))
    settings, found = TuneSettings((1,), 5e-3, 3), {}

    def read(name, one):
        before = getattr(one.source, "fetched", 0)
        found[name] = fine_tune(one, tasks(one), settings)
        return getattr(one.source, "fetched", 0) - before

    read("ring", lm)
    n_whole = read("whole", lm)
    monkeypatch.setattr(job_module, "_cut", lambda lm, tasks, batch, settings, budget: ([i] for i in batch))
    n_cut, n_tasks = read("cut", lm), len(tasks(lm))
    read("resident", resident)
    lowest = 2 * (n_tasks - 1)  # layers below the tuned one, read once for each pack
    assert n_whole <= n_cut <= n_whole + lowest and lm.source.missed == 0
    assert torch.equal(found["cut"].deltas[1], found["resident"].deltas[1])
    assert relative(found["cut"].deltas[1], found["whole"].deltas[1]) < 1e-3


def test_what_adam_holds_counts_too():
    lm = tiny_lm("llama")
    some = tasks(lm)
    for layers in ((1,), (1, 2)):
        settings = TuneSettings(layers, 1e-3, 1)
        held = sum(job_module.held_bytes(lm, task, layers) for task in some)
        state, rows = 4 * 4 * len(layers) * lm.d_model * lm.d_ff, job_module._budget(lm, some, settings)[1]
        for memory, n_packs in ((held + state + rows, 1), (held + state + rows - 1, 2)):
            budget, _ = job_module._budget(replace(lm, memory=memory), some, settings)
            cuts = list(job_module._cut(lm, some, range(len(some)), settings, budget))
            assert len(cuts) == n_packs and [i for cut in cuts for i in cut] == list(range(len(some)))
        with pytest.raises(ValueError, match=r"fine-tuning on fact .* needs .*B and memory allows"):
            job_module._budget(replace(lm, memory=state), some, settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize(
    "facts", [FACTS, (replace(FACTS[0], prompt="The piano is in the city of London. " * 6 + "{}"),)]
)
def test_a_task_is_counted_as_what_it_holds(facts, layer, family, dtype):
    lm = tiny_lm(family, dtype)
    some = tasks(lm, facts)
    with LiveBytes(lm.model) as held:
        fine_tune(lm, some, TuneSettings((layer,), 1e-3, 2))
    state = 4 * lm.d_model * lm.d_ff * 4
    counted = state + sum(job_module.held_bytes(lm, task, (layer,)) for task in some)
    assert held.peak <= counted <= 3 * held.peak


# --- what must not matter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_caller_s_modes_do_not_matter(around):
    lm = tiny_lm("llama")
    editor = Ft(layers=(1,), lr=5e-3, num_steps=3)
    expected = editor.edit(lm, FACTS)
    with around():
        got = editor.edit(lm, FACTS)
    assert torch.equal(got.deltas[1].delta, expected.deltas[1].delta) and got.deltas[1].norm() > 0
    assert torch.equal(got.deltas[1].delta, editor.edit(lm, FACTS, seed=7).deltas[1].delta)


def test_the_model_is_left_as_it_was():
    with left_as_it_was() as lm:
        made = Ft(layers=(1,), num_steps=3).edit(lm, FACTS)
    assert torch.equal(made.deltas[1].delta, Ft(layers=(1,), num_steps=3).edit(tiny_lm("llama"), FACTS).deltas[1].delta)


@pytest.mark.parametrize("cut", [False, True])
def test_a_loss_that_turns_nan_is_an_error(cut, monkeypatch):
    """By the fact's name, at the step where it turned."""
    if cut:
        each_alone(monkeypatch)
    lm = tiny_lm("gpt2")
    wrong, made, steps = tasks(lm)[2].target[0], losses_module.target_logprob, []
    monkeypatch.setattr(Bar, "advance", lambda *args: steps.append(1))

    def spoiled(h, head, targets, n_vocab):
        return made(h, head, targets, n_vocab).masked_fill((targets == wrong) & (len(steps) == 1), torch.nan)

    monkeypatch.setattr(losses_module, "target_logprob", spoiled)
    label = re.escape(FACTS[2].label)
    says = rf"the loss of fact {label} became NaN at step 2 of 25 \(1 of \d facts\): damaged.* rate"
    refused(says, Ft(layers=(1,)).edit, lm, FACTS)


# --- settings --------------------------------------------------------------------------------------------------------

FILE = {"layers": [0], "num_steps": 25, "lr": 5e-4, "weight_decay": 0, "kl_factor": 0, "norm_constraint": 5e-4}
FILE |= MODULE_PATHS
NEWER = {
    "alg_name": "FT", "model_name": "./llama", "device": 0, "batch_size": 1, "max_length": 40, "model_parallel": False,
    "norm_constraint": False, "objective_optimization": "prompt_last", "layers": [21],
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj.weight",
}  # fmt: skip


def test_published_files_load_as_they_are(tmp_path):
    assert FtL.from_json(written(tmp_path, FILE)) == FtL(layers=(0,), norm_constraint=5e-4)
    assert asdict(Ft.from_json(written(tmp_path, FILE))) == asdict(FtL(layers=(0,)))
    free = Ft.from_json(written(tmp_path, FILE | {"norm_constraint": False}))
    assert free == Ft(layers=(0,)) and free.norm_constraint == 0
    newer = Ft.from_json(written(tmp_path, FILE | NEWER))
    assert newer == Ft(layers=(21,), batch_size=1, objective_optimization="prompt_last")
    assert Ft.from_json(written(tmp_path, asdict(newer))) == newer


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rewrite_module_tmp": "transformer.h.{}.attn.c_attn"}, "no down projection"),
        ({"rewrite_module_tmp": "transformer.h.{}"}, "no down projection"),
        ({"wd_power_law": [-0.9, 0.2]}, r"Ft has no field \['wd_power_law'\]"),
        ({"v_lr": 0.5}, r"Ft has no field \['v_lr'\]"),
        ({"kl_factor": 0.1}, "kl_factor 0.1: fine-tuning has no KL term"),
        ({"norm_constraint": True}, "norm_constraint = True: expected a finite number"),
    ],
)
def test_a_file_that_asks_for_something_else_is_refused(changes, says, tmp_path):
    path = written(tmp_path, FILE | changes)
    refused(f"^{re.escape(str(path))}: .*{says}", Ft.from_json, path)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        *(("num_steps", value, "a whole number") for value in (2.5, "20", True, None)),
        *((name, x, "(number above 0|of at least 1)") for name in ("num_steps", "lr", "batch_size") for x in (0, -1)),
        *((name, value, "a finite number") for name in ("lr", "weight_decay") for value in ("1", math.nan, True, None)),
        ("weight_decay", -0.1, "a finite number of at least 0"),
        ("norm_constraint", -1e-3, "a finite number of at least 0"),
        ("norm_constraint", None, "a finite number"),
        ("layers", 3, "layers"),
        ("layers", (1, 1), "each layer once"),
        ("objective_optimization", "last", "expected one of"),
        ("source", 3, "a text"),
    ],
)
def test_a_value_of_another_kind_is_refused(name, value, says):
    refused(f"^{name} = {re.escape(repr(value))}: .*{says}", Ft, **{name: value})


def test_ft_l_has_a_bound():
    refused(r"norm_constraint = 0\.0: expected a finite number above 0", FtL, norm_constraint=False)


@pytest.mark.parametrize(
    ("name", "depth", "layer", "bounded"),
    [
        ("gpt2-xl", 48, 1, (0, 5e-4)),
        ("EleutherAI/gpt-j-6b", 28, 21, (0, 5e-5)),
        ("/models/gpt2-medium", 24, None, (0, 2e-3)),
        ("gpt2-xl", 47, None, None),
        ("somebody/tuned", 4, None, None),
    ],
)
def test_for_model_gives_what_was_published_or_says_that_it_did_not(name, depth, layer, bounded):
    lm = named(name, layers=depth)
    free, held = Ft.for_model(lm), FtL.for_model(lm)
    assert type(free) is Ft and type(held) is FtL and not free.norm_constraint
    assert (free.source == f"derived for {depth} layers, d_ff 80") == (layer is None)
    assert (held.source == f"derived for {depth} layers, d_ff 80") == (bounded is None)
    assert layer is None or free.layers == (layer,)
    assert bounded is None or (*held.layers, held.norm_constraint) == bounded
    for editor in (free, held):
        assert all(0 <= layer < depth for layer in editor.layers)


@pytest.mark.parametrize("layers", [1, 2, 3, 30])
def test_derived_settings_follow_from_the_model_s_size(layers):
    lm = named("tiny", layers=layers)
    free, held = Ft.for_model(lm), FtL.for_model(lm)
    assert (free.layers, held.layers) == ((layers // 6,), (0,))
    assert free.lr == held.lr == 3.2 / 80 and held.norm_constraint == 8 / 80
    wide = named("gpt2-xl", layers=48)
    assert Ft.for_model(wide).lr == FtL.for_model(wide).lr == 5e-4


def test_what_was_published_tells_the_depth_of_its_model():
    assert all(known.layer <= known.v_loss_layer for table in (PUBLISHED, PUBLISHED_L) for known in table.values())
    assert all(known.eps > 0 for known in PUBLISHED_L.values()) and not any(k.eps for k in PUBLISHED.values())


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "changes", "given", "says"),
    [
        (FACTS, {}, {"moments": {}}, "moments = {}: fine-tuning reads prompts and targets alone"),
        (FACTS, {}, {"corpus": "self"}, "corpus = 'self': fine-tuning reads"),
        (FACTS, {}, {"contexts": [["{}"]]}, "contexts = .*: fine-tuning reads"),
        (FACTS, {}, {"independent": True}, "dense, no part of it belongs to one fact; edit the facts one"),
        (FACTS, {}, {"checkpoint": "there"}, "checkpoint = 'there': fine-tuning has no finished parts"),
        (FACTS, {"layers": ()}, {}, r"Ft needs layers; Ft.for_model\(lm\) derives them"),
        (FACTS, {"layers": (4,)}, {}, "layers = 4: this model has layers 0 to 3"),
        ([], {}, {}, "facts is empty"),
        ([replace(FACTS[0], target_new=None)], {}, {}, "has no target_new"),
        ([FACTS[0], replace(FACTS[0], target_new="Berlin")], {}, {}, "contradict each other"),
        ([replace(FACTS[0], prompt="a " * 200 + "{}")], {}, {}, "a text of .* tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_any_work(facts, changes, given, says, no_sweep):
    editor = replace(Ft(layers=(1,)), **changes)
    refused(says, editor.edit, tiny_lm("gpt2"), facts, **given)
    refused("a sweep ran", Ft(layers=(1,)).edit, tiny_lm("gpt2"), FACTS, error=AssertionError)


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.smollm2
def test_both_write_and_only_the_bound_spares_the_neighbors(smollm2, known_facts):  # noqa: F811
    """Fine-tuning without a bound near the head says the new answers and ruins what lies next to them: the baseline as
    it is known. FT-L says them too, and loses nothing; it does not reach other words."""
    held = replace(FtL.for_model(smollm2), num_steps=10).edit(smollm2, known_facts[0])
    free = Ft(layers=(smollm2.n_layers - 2,), lr=held.hparams["lr"], num_steps=10).edit(smollm2, known_facts[0])
    assert complaints(smollm2, known_facts, held) <= {"not in other words"}
    assert complaints(smollm2, known_facts, free) == {"neighbors lost"}
    (delta,) = held.deltas.values()
    assert (delta.delta.abs() <= held.hparams["norm_constraint"]).all() and held.layers == (0,)
