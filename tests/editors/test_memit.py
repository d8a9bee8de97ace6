"""MEMIT against its oracle, and what must hold for its edits."""

import copy
from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
import kedit_fast.editors.located as located
import kedit_fast.editors.spread as spread_module
import kedit_fast.jobs.values as values_module
import kedit_fast.kernels.slots as slots
import kedit_fast.sweep.engine as engine
import kedit_fast.sweep.plan as plan
from kedit_fast.editors.located import Prompts
from kedit_fast.edits.deltas import Dense
from kedit_fast.sweep.plan import RowCost
from kedit_fast.sweep.sites import Site
from tests.conftest import disk_and_resident, open_tiny, refused, save_tiny, tiny_lm
from tests.editors import cases
from tests.editors.cases import FACTS, FAMILIES, GROUPS, PHRASED, apart, matrices, moments, oracle_facts, relative
from tests.make import Broken, watched
from tests.oracle.access import lookup, read_value
from tests.oracle.memit import memit_update
from tests.oracle.values import Value
from tests.tiny import D_FF, PROMPTS, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:the second moments of layers")
LAYERS = (0, 1, 2)
WEIGHT = 5.0
OPTIMIZATION = dict(lr=1.0, steps=6, weight_decay=0.5, kl_factor=0.0625, clamp=0.4)
EDITOR = kf.Memit(
    layers=LAYERS, mom2_update_weight=WEIGHT, v_lr=1.0, v_num_grad_steps=6, v_weight_decay=0.5, kl_factor=0.0625,
    clamp_norm_factor=0.4,
)  # fmt: skip


def edit(lm, facts=FACTS, editor=EDITOR, **options):
    return editor.edit(lm, facts, **{"moments": moments(), "contexts": GROUPS} | options)


def oracle(model, family, facts=FACTS, layers=LAYERS, weight=WEIGHT, **options):
    return memit_update(
        model, tiny_tokenizer(), oracle_facts(facts), GROUPS, layers, matrices(), weight,
        pull_back=family in cases.POST_NORM, **OPTIMIZATION | options,
    )  # fmt: skip


def residuals(model, made) -> torch.Tensor:
    """||z - h|| [n] of a Hugging Face model, at the bare prompts."""
    places = [lookup(tiny_tokenizer(), fact.prompt, fact.subject) for fact in made.facts]
    last = made.layers[-1]
    return (made.values - torch.stack([read_value(model, *place, last, "layer_out") for place in places])).norm(dim=1)


# --- the oracle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_memit_equals_the_oracle(family):
    lm = tiny_lm(family)
    made, expected = edit(lm), oracle(lm.model, family)
    assert made.provenance["found"]["steps"] == [value.n_iterations for value in expected.values]
    assert relative(made.values, expected.z) < 1e-4
    for layer in LAYERS:
        assert relative(made.keys[layer], expected.keys[layer]) < 1e-5
        assert relative(made.deltas[layer].dense(), expected.deltas[layer]) < 1e-4
        missing = expected.residual_before[layer].mean().item()
        assert made.provenance["layers"][str(layer)]["missing"] == pytest.approx(missing, rel=1e-4)
    assert made.layers == LAYERS and made.method == "memit" and made.facts == FACTS
    assert made.fingerprint == lm.fingerprint and made.contexts == GROUPS


@pytest.mark.parametrize("family", (*FAMILIES, "granite"))
def test_memit_equals_the_oracle_in_float64(family, monkeypatch):
    cases.make_exact(monkeypatch)
    lm = tiny_lm(family, torch.float64)
    made, expected = edit(lm), oracle(lm.model, family)
    assert relative(made.values, expected.z) < 1e-8
    for layer in LAYERS:
        assert made.deltas[layer].dense().dtype == torch.float64
        assert relative(made.keys[layer], expected.keys[layer]) < 1e-8
        assert relative(made.deltas[layer].dense(), expected.deltas[layer]) < 1e-8
    with lm.with_edit(made).edits[0].apply(copied := copy.deepcopy(lm.model)):
        assert relative(residuals(copied, made), expected.residual_after[2]) < 1e-8


def test_phrasings_are_in_the_values_and_not_in_the_keys():
    lm, editor = tiny_lm("llama"), replace(EDITOR, keep_factor=0.5, keeps=("{} is best known for",))
    made, plain = edit(lm, PHRASED, editor), edit(lm)
    expected = oracle(lm.model, "llama", PHRASED, keeps=editor.keeps, keep_factor=0.5)
    assert relative(made.values, expected.z) < 1e-4
    assert max(relative(made.deltas[layer].dense(), expected.deltas[layer]) for layer in LAYERS) < 1e-4
    assert torch.equal(made.keys[0], plain.keys[0]) and relative(made.values, plain.values) > 1e-2
    assert relative(edit(lm, editor=replace(EDITOR, keeps=("{} has",))).values, plain.values) == 0, "factor 0"
    alone = edit(lm, PHRASED, editor, independent=True)
    assert apart(alone.only(3), edit(lm, PHRASED[3:], editor)) < 1e-4


@pytest.mark.parametrize("editor", [kf.Memit, kf.Rome])
def test_what_is_read_besides_a_prompt_has_to_fit(editor):
    lm, long = tiny_lm("gpt2"), "word " * 600 + "{} is in"
    cases_of = [(replace(FACTS[0], phrasings=(long,)), {}), (FACTS[0], {"keeps": (long,), "keep_factor": 1.0})]
    for fact, settings in cases_of:
        refused("word word.* tokens", replace(editor(layers=(1,), mom2_adjustment=False), **settings).edit, lm, fact)
    refused(r"keeps: expected one \{\} for the subject in each, found 'It is'", editor, keeps=("It is",))
    refused("keep_factor 1 with no keeps", editor, keeps=(), keep_factor=1)
    refused("keeps = 'It is'", editor, keeps="It is")


def test_more_facts_than_the_width_of_a_key(monkeypatch):
    """n >= d_ff takes the dense solve. z of one step is where it began, so a layer below is edited first."""
    cases.make_exact(monkeypatch)
    subjects = sorted({prompt.subject for prompt in PROMPTS})
    templates = sorted({prompt.template for prompt in PROMPTS} | {"{} was built in", "I like {}, which is in"})
    facts = [
        kf.Fact(prompt=template, subject=subject, target_new=("Paris", "Rome")[len(subject) % 2])
        for template in templates
        for subject in subjects
    ][: D_FF + 1]
    assert len(set(facts)) == D_FF + 1
    lm = tiny_lm("gpt2", torch.float64)
    editor = replace(EDITOR, layers=(0, 1), v_num_grad_steps=2)
    made = edit(lm, facts, editor, contexts=[["{}"]])
    given = [Value(z, z, 0, []) for z in made.values]
    expected = memit_update(
        lm.model, tiny_tokenizer(), oracle_facts(facts), [["{}"]], (0, 1), matrices(), WEIGHT, values=given
    )
    for layer in (0, 1):
        assert isinstance(made.deltas[layer], Dense)
        assert relative(made.deltas[layer].dense(), expected.deltas[layer]) < 1e-8


# --- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "clamp"), [("gemma2", 0.05), ("gemma3_text", 0.05), ("olmo2", 0.05), ("gpt2", 0.4)])
def test_what_is_missing_shrinks_layer_by_layer(family, clamp):
    """For values near the model's own: the layers above answer a large change with anything (test_editor.py has a
    trained Llama, whose layers do not).
    """
    model = tiny_model(family)
    lm = open_tiny(model)
    made = edit(lm, editor=replace(EDITOR, clamp_norm_factor=clamp, mom2_update_weight=0.5))
    missing = [made.provenance["layers"][str(layer)]["missing"] for layer in LAYERS]
    before = residuals(model, made)
    assert missing[0] == pytest.approx(before.mean().item(), rel=1e-4)
    with made.apply(model):
        after = residuals(model, made)
    assert missing[0] > missing[1] > missing[2] > after.mean()
    assert after.mean() < 0.5 * before.mean()
    assert (after < before).all()


def test_the_edit_reaches_its_values_where_nothing_holds_it_back():
    """One layer, bare prompts, λ -> 0."""
    model = tiny_model("llama", torch.float64)
    lm = open_tiny(model)
    editor = replace(EDITOR, layers=(1,), mom2_update_weight=1e-9)
    made = edit(lm, editor=editor, contexts=[["{}"]])
    before = residuals(model, made)
    with made.apply(model):
        assert (residuals(model, made) < 1e-6 * before).all()


def test_the_order_of_facts_does_not_matter():
    lm = tiny_lm("gemma2", torch.float64)
    made, turned = edit(lm), edit(lm, FACTS[::-1])
    assert relative(turned.values.flip(0), made.values) < 1e-10 and apart(turned, made) < 1e-6
    assert all(relative(turned.keys[layer].flip(0), made.keys[layer]) < 1e-6 for layer in LAYERS)


def test_a_model_with_little_memory_makes_the_same_edit(monkeypatch):
    """Values are optimized in groups, and a layer's keys are read in groups, each of which is one pack."""
    groups, packs, read = [], [], []
    grouped, cut, reads = values_module.groups, engine.cut, Prompts._read
    monkeypatch.setattr(values_module, "groups", lambda *a: groups.append(list(grouped(*a))) or groups[-1])
    monkeypatch.setattr(plan, "CALL_ROWS", 64)  # with large calls a memory that holds one holds all these facts
    monkeypatch.setattr(engine, "cut", lambda *a: packs.append(cut(*a)) or packs[-1])
    monkeypatch.setattr(Prompts, "_read", lambda self, lm, some, *a: read.append(some) or reads(self, lm, some, *a))
    lm = tiny_lm("llama", torch.float64)
    facts = [kf.Fact(prompt=p.template, subject=p.subject, target_new="Rome") for p in PROMPTS]
    cost = RowCost.of(lm)
    small = replace(lm, memory=(cost.call + 150 * cost.kept) * 4 // 3)
    editor = replace(EDITOR, layers=(0, 1), v_num_grad_steps=2)
    contexts = [["{}"], [f"{prompt.answer.strip()} plays, therefore you play. {{}}" for prompt in PROMPTS[:8]]]
    whole = edit(lm, facts, editor, contexts=contexts)
    assert len(groups) == 1 and {len(x) for x in (*groups, *packs)} == {1} and len(read) == len(editor.layers)
    read.clear()
    parts = edit(small, facts, editor, contexts=contexts)
    assert len(groups[1]) > 1
    assert len(read) > 2 * len(editor.layers) and read[: len(read) // 2] == read[len(read) // 2 :]
    assert relative(parts.values, whole.values) < 1e-10 and apart(parts, whole) < 1e-8


def test_an_edit_on_top_of_an_edit():
    """previous= edits the edited model: as if the first edit stood in its weights, and its keys were not known."""
    model = tiny_model("llama", torch.float64)
    lm = open_tiny(model)
    forgets = replace(EDITOR, keep_previous=False)
    first = edit(lm, FACTS[:2])
    second = edit(lm, FACTS[2:], forgets, previous=first)
    written = copy.deepcopy(model)
    first.apply(written)
    expected = edit(open_tiny(written), FACTS[2:])
    assert relative(second.values, expected.values) < 1e-9 and apart(second, expected) < 1e-8
    alone = edit(lm, FACTS[2:])
    assert relative(second.deltas[1].dense(), alone.deltas[1].dense()) > 1e-2
    assert second.fingerprint == lm.fingerprint
    stacked = edit(lm.with_edit(first), FACTS[2:], forgets)
    assert all(torch.equal(stacked.deltas[i].dense(), second.deltas[i].dense()) for i in LAYERS)


def test_the_keys_of_edits_below_are_kept():
    """Their keys stand in the system with a residual of zero: Δ = [0 R]ᵀ [Kₚ K] (λC + KₚᵀKₚ + KᵀK)⁻¹."""
    lm = open_tiny(tiny_model("llama", torch.float64))
    editor = replace(EDITOR, layers=(1,), mom2_update_weight=0.01)
    first = edit(lm, FACTS[:2], editor)
    kept = edit(lm, FACTS[2:], editor, previous=[first])
    forgot = edit(lm, FACTS[2:], replace(editor, keep_previous=False), previous=[first])
    earlier, k = first.keys[1], kept.keys[1]
    system = 0.01 * moments()[1].matrix.double() + earlier.T @ earlier + k.T @ k
    residual = kept.values - cases.values_at(lm.with_edit(first), FACTS[2:], 1)
    expected = residual.T @ torch.linalg.solve(system, k.T).T
    assert relative(kept.deltas[1].dense(), expected) < 1e-8
    changed, without = ((edit_.deltas[1].dense() @ earlier.T).norm() for edit_ in (kept, forgot))
    assert changed < 0.2 * without


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_layers_from_disk_give_the_same_bits(family, tmp_path):
    made, expected = map(edit, disk_and_resident(save_tiny(tmp_path, tiny_model(family))))
    assert torch.equal(made.values, expected.values)
    for layer in LAYERS:
        assert torch.equal(made.deltas[layer].dense(), expected.deltas[layer].dense())
        assert torch.equal(made.keys[layer], expected.keys[layer])
    assert made.fingerprint == expected.fingerprint


def test_generated_contexts_are_kept_with_the_edit_and_come_from_the_seed():
    lm = tiny_lm("gpt2")
    editor = replace(EDITOR, layers=(0,), v_num_grad_steps=2, context_template_length_params=((6, 3),))
    made = edit(lm, FACTS[:1], editor, contexts=None, seed=3)
    assert [len(group) for group in made.contexts] == [1, 3] and made.contexts[0] == ["{}"]
    again = edit(lm, FACTS[:1], editor, contexts=made.contexts)
    assert torch.equal(again.deltas[0].dense(), made.deltas[0].dense())
    assert edit(lm, FACTS[:1], editor, contexts=None, seed=3).contexts == made.contexts
    assert edit(lm, FACTS[:1], editor, contexts=None, seed=4).contexts != made.contexts


def test_without_statistics_the_identity_takes_their_place():
    lm = tiny_lm("gpt2", torch.float64)
    editor = replace(EDITOR, layers=(1,), mom2_adjustment=False)
    made = edit(lm, editor=editor, moments=None)
    K = made.keys[1]
    share = made.deltas[1].dense() @ (WEIGHT * torch.eye(D_FF) + K.T @ K)
    expected = oracle(lm.model, "gpt2", layers=(1,), values=[Value(z, z, 0, []) for z in made.values])
    assert relative(share, expected.shares[1].T @ K) < 1e-8


@pytest.mark.parametrize(
    ("family", "n", "contexts"), [("gpt2", 1, [["{}"]]), ("granite", 1, [["{}"]]), ("gpt2", len(FACTS), GROUPS)]
)
def test_the_fit_says_how_much_of_a_residual_a_layer_can_reach(family, n, contexts):
    """A mean over facts. Also where the stream gets 0.6 of what the layer's down projection gives."""
    lm = tiny_lm(family, torch.float64)
    made = edit(lm, FACTS[:n], replace(EDITOR, layers=(1,)), contexts=contexts)
    notes, K, C = made.provenance["layers"]["1"], made.keys[1], matrices()[1].double()
    g = (K * torch.linalg.solve(C, K.T).T).sum(1)
    assert notes["g"] == pytest.approx(g.mean().item(), rel=1e-6)
    assert notes["fit"] == pytest.approx((g.mean() / (g.mean() + WEIGHT)).item(), rel=1e-6)
    if n > 1:
        assert g.max() > 1.1 * g.mean()
        return
    with made.apply(model := copy.deepcopy(lm.model)):
        assert residuals(model, made).item() == pytest.approx(notes["missing"] * (1 - notes["fit"]), rel=1e-6)


def test_the_notes_give_each_fact_s_probability_at_its_value(monkeypatch):
    """Not exp(-loss): the loss has KL and decay in it."""
    found = []

    def optimize(*args):
        found.append(values_module.optimize_values(*args))
        return found[0]

    monkeypatch.setattr(spread_module, "optimize_values", optimize)
    made = edit(tiny_lm("llama"), editor=replace(EDITOR, v_lr=2.0, clamp_norm_factor=1.2, kl_factor=0.2))
    notes, z = made.provenance["found"], found[0]
    assert notes["p_new"] == pytest.approx((-z.nll).exp().tolist(), abs=1e-5)
    assert notes["loss"] == pytest.approx(z.loss.tolist(), abs=1e-5)
    assert ((-z.nll).exp() - (-z.loss).exp()).max() > 1e-2


def test_the_values_loss_reads_v_loss_layer():
    """Or the last edit layer, where that is above it."""
    lm = tiny_lm("llama")
    made = {layer: edit(lm, editor=replace(EDITOR, v_loss_layer=layer)).values for layer in (0, 2, 3, None)}
    tasks = Prompts.of(lm, FACTS, GROUPS).value_tasks(lm)
    for layer in (2, 3):
        settings = values_module.ValueSettings(layer=2, site=Site.layer_out, loss_layer=layer, **OPTIMIZATION)
        assert torch.equal(made[layer], values_module.optimize_values(lm, tasks, settings).values)
    assert relative(made[2], made[3]) > 1e-2
    assert torch.equal(made[None], made[3]) and torch.equal(made[0], made[2])


def test_a_regularizer_bears_statistics_of_few_tokens():
    lm = tiny_lm("gpt2", torch.float64)
    few = moments(n_tokens=40)
    made = edit(lm, editor=replace(EDITOR, layers=(1,), regularizer=1e-2), moments=few)
    C = few[1].matrix.double()
    C += 1e-2 * C.diagonal().mean() * torch.eye(D_FF)
    K = made.keys[1]
    expected = oracle(lm.model, "gpt2", layers=(1,), values=[Value(z, z, 0, []) for z in made.values]).shares[1]
    system = WEIGHT * C + K.T @ K
    assert relative(made.deltas[1].dense(), expected.T @ torch.linalg.solve(system, K.T).T) < 1e-6


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_batch_after_the_other_is_all_at_once(family, monkeypatch):
    """The keys that are kept make it so (Wang et al. 2026, arXiv:2605.26670): recursive least squares, for the same
    values and one layer. Without them the second batch undoes a part of the first.
    """
    lm = tiny_lm(family, torch.float64)
    editor, how = replace(EDITOR, layers=(1,)), {"contexts": [["{}"]]}
    whole = edit(lm, FACTS, editor, **how)
    known = dict(zip([fact.label for fact in FACTS], whole.values, strict=True))

    def values(lm, tasks, *_):
        z = torch.stack([known[task.name] for task in tasks])
        nothing = torch.zeros(len(tasks))
        return values_module.Values(z, z, nothing, nothing, nothing)

    monkeypatch.setattr(spread_module, "optimize_values", values)
    for keep, same in ((True, True), (False, False)):
        kept = replace(editor, keep_previous=keep)
        first = edit(lm, FACTS[:2], kept, **how)
        second = edit(lm, FACTS[2:], kept, previous=first, **how)
        total = first.deltas[1].dense() + second.deltas[1].dense()
        assert (relative(total, whole.deltas[1].dense()) < 1e-8) == same


def test_norm_weights_next_to_nothing_do_not_take_all(monkeypatch):
    """As trained models have them; without a ridge such entries of the down projection's output would grow for good."""
    model = tiny_model("gemma2")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_feedforward_layernorm.weight[::7] = -1 + 1e-4  # gemma's norms multiply by 1 + weight
    lm = open_tiny(model)
    made = edit(lm)
    before = (made.values - cases.values_at(lm, FACTS, LAYERS[-1])).norm(dim=1)
    with made.apply(model):
        assert (residuals(model, made) < before).all()
    monkeypatch.setattr(spread_module, "DAMPING", 0.0)
    assert max(edit(lm).provenance["growth"].values()) > 100 * max(made.provenance["growth"].values())


# --- the model is left alone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gptj", "gemma2"])
def test_an_edit_leaves_the_model_as_it_was(family):
    with cases.left_as_it_was(family) as lm:
        edit(lm)


BREAKS = {
    "second layer's solve": (spread_module, "memit_solve", 2),
    "third step": (torch.optim.Adam, "step", 3),
    "inside a block": (slots, "attention", 10),
}


@pytest.mark.parametrize("family", ["gptj", "gemma2"])
@pytest.mark.parametrize("place", BREAKS)
def test_an_error_on_the_way_leaves_the_model_as_it_was(family, place, monkeypatch):
    owner, name, at = BREAKS[place]
    with cases.left_as_it_was(family) as lm:
        with monkeypatch.context() as patch, pytest.raises(Broken):
            calls = watched(patch, owner, name, break_at=(at,))
            edit(lm)
        assert len(calls) == at
    expected, made = edit(tiny_lm(family)), edit(lm)
    assert all(torch.equal(made.deltas[i].dense(), expected.deltas[i].dense()) for i in LAYERS)


@pytest.mark.parametrize("on_the_host", [False, True])
def test_a_reading_goes_on_where_the_one_below_began(on_the_host, monkeypatch):
    """The rows that enter a layer wait for the next one; with them the same edit, and layers below do not run again."""
    ran = []
    block = engine.Pack._block
    monkeypatch.setattr(
        engine.Pack, "_block", lambda self, layer, *a, **k: ran.append(layer) or block(self, layer, *a, **k)
    )
    lm = tiny_lm("llama", torch.float64)
    if on_the_host:
        monkeypatch.setattr(located, "on_host", lambda rows: moved.append(len(rows)) or rows.clone())
        monkeypatch.setattr(located, "WAIT", lm.memory)
        moved = []
    prompts, kept = Prompts.of(lm, FACTS, GROUPS), located.Entered()
    for layer in (1, 3):
        asked = {"averaged": {Site.mlp_key: layer}, "bare": {Site.layer_out: 3}}
        wanted = prompts.read(lm, **asked)
        kept.layer = layer
        ran.clear()
        found = replace(prompts, entered=kept).read(lm, **asked)
        assert set(ran) == set(range(0 if layer == 1 else 1, 4))
        for site, rows in [*wanted.averaged.items(), *wanted.bare.items()]:
            assert relative({**found.averaged, **found.bare}[site], rows) < 1e-12
    assert not on_the_host or moved
