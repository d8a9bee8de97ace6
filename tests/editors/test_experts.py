"""MEMIT of a mixture of experts: one exact solve for all experts of a layer, routing held fixed."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.edits.edit import digest
from kedit_fast.edits.experts import expert_change
from kedit_fast.jobs.score import next_token_probs
from kedit_fast.kernels.solve import factor
from kedit_fast.model.family import as_out_in, projection
from kedit_fast.moments.blocks import Blocks
from kedit_fast.moments.second_moment import SecondMoment
from tests.conftest import close, open_tiny, refused, relative_error, tiny_lm
from tests.editors.cases import FACTS, GROUPS, relative
from tests.make import bits, lowrank, make_edit, same_bits
from tests.oracle.access import lookup
from tests.tiny import D_FF, D_MODEL, EXPERTS, MIXTURES, TEXT, tiny_model, tiny_tokenizer

WIDTH, LAYERS, WEIGHT = D_FF // EXPERTS, (0, 1), 0.05
EDITOR = kf.Memit(layers=LAYERS, mom2_update_weight=WEIGHT, v_lr=0.5, v_num_grad_steps=8, regularizer=1e-3)
LINES = [line for line in TEXT.splitlines() if line]


def routed(model, ids, layer) -> torch.Tensor:
    """[tokens, E, width] g_j k_j of a text by its own forward, as the model's code has it: an expert's input, its gated
    up projection, and the weight that its output is multiplied by."""
    seen, experts = {}, model.model.layers[layer].mlp.experts
    hook = experts.register_forward_pre_hook(lambda module, args: seen.update(args=args))
    with torch.no_grad():
        model(torch.tensor([ids]))
        hook.remove()
        x, index, weights = seen["args"]
        keys = torch.zeros(len(ids), EXPERTS, WIDTH, dtype=x.dtype)
        for t, (chosen, given) in enumerate(zip(index.tolist(), weights, strict=True)):
            for expert, g in zip(chosen, given, strict=True):
                both = experts.gate_up_proj[expert] @ x[t]
                keys[t, expert] = g * experts.act_fn(both[:WIDTH]) * both[WIDTH:]
    return keys


def moments_of(lm, layers=LAYERS):
    return kf.second_moments(lm, layers, LINES * 8, n_tokens=2000)


@pytest.fixture(scope="module")
def made():
    """(model, its statistics, an edit of it, the edit with its layers' statistics as random blocks)"""
    lm = open_tiny(tiny_model("qwen3_moe"))
    moments = moments_of(lm)
    return lm, moments, EDITOR.edit(lm, FACTS, moments=moments, contexts=GROUPS)


# ---- against slow code


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_second_moments_are_per_expert_with_the_routers_weights(family):
    lm = tiny_lm(family)
    moment = kf.second_moments(lm, [1], LINES[:4], n_tokens=60)[1]
    rows, left = [], 60
    for line in LINES[:4]:
        ids = tiny_tokenizer()(line)["input_ids"][:left]
        left -= len(ids)
        rows += [routed(lm.model, ids, 1)] if ids else []
    keys = torch.cat(rows).double()
    assert moment.matrix.shape == (EXPERTS, WIDTH, WIDTH) == lm.moment_shape and moment.n_tokens == len(keys) == 60
    close(family, moment.matrix, torch.einsum("tew,tev->ewv", keys, keys).float() / len(keys))


def test_keys_are_the_means_of_the_contexts_routed_keys(made):
    lm, _, edit = made
    expected = []
    for fact in FACTS:
        of_groups = []
        for group in GROUPS:
            places = [lookup(tiny_tokenizer(), template.replace("{}", fact.prompt), fact.subject) for template in group]
            of_groups.append(torch.stack([routed(lm.model, ids, 0)[at].flatten() for ids, at in places]).mean(0))
        expected.append(torch.stack(of_groups).mean(0))
    close("keys", edit.keys[0].float(), torch.stack(expected))


def test_all_experts_of_a_layer_are_one_exact_solve():
    """Δ against the dense system of all experts side by side, fp64; both layers, and on top of an earlier edit."""
    lm = tiny_lm("qwen3_moe", torch.float64)
    moments = moments_of(lm)
    first = EDITOR.edit(lm, FACTS, moments=moments, contexts=GROUPS)
    again = [replace(FACTS[0], target_new="Madrid")]
    second = EDITOR.edit(lm, again, moments=moments, contexts=GROUPS, previous=first)
    for edit, earlier in ((first, None), (second, first)):
        for layer in LAYERS:
            c = torch.block_diag(*moments[layer].matrix.double())
            c += 1e-3 * c.diagonal().mean() * torch.eye(D_FF)
            k, delta = edit.keys[layer], edit.deltas[layer]
            before = k[:0] if earlier is None else earlier.keys[layer]
            v = torch.linalg.solve(WEIGHT * c + before.T @ before + k.T @ k, k.T)
            assert relative(delta.v, v) < 1e-8
            nothing = delta.u.new_zeros(len(before) + D_FF, D_MODEL)
            least = torch.linalg.lstsq(  # the same as one least-squares problem over the stacked system
                torch.cat([k, before, torch.linalg.cholesky(WEIGHT * c).T]), torch.cat([delta.u.T, nothing])
            ).solution.T
            assert relative(delta.dense(), least) < 1e-8


@pytest.mark.parametrize("n", [1, 7, 90])
def test_the_blocks_solve_to_1e_8(n):
    """n x n, against the factor of the whole matrix; keys of earlier edits tie the experts together."""
    draw = torch.Generator().manual_seed(n)
    half = torch.randn(EXPERTS, WIDTH, 40, generator=draw, dtype=torch.float64)
    keys, kept = (torch.randn(m, D_FF, generator=draw, dtype=torch.float64) for m in (n, 5))
    blocks = Blocks(half @ half.mT / 40, 3.0, 0.01, kept)
    whole = factor(torch.block_diag(*blocks.matrix) + 0.01 * torch.eye(D_FF), 3.0, kept=kept)
    a = torch.linalg.inv(whole.lower @ whole.lower.T)
    assert relative(blocks.solve(keys.T), a @ keys.T) < 1e-8
    v = torch.linalg.solve(torch.linalg.inv(a) + keys.T @ keys, keys.T)
    assert relative(blocks.update(keys, alone=False), v) < 1e-8
    alone = a @ keys.T / (1 + (keys @ a * keys).sum(1))
    assert relative(blocks.update(keys, alone=True), alone) < 1e-8
    assert relative(blocks.gains(keys), 3.0 * (keys @ a * keys).sum(1)) < 1e-8


# ---- what an edit does, and does not


@pytest.mark.parametrize("family", MIXTURES)
def test_an_edited_mixture_says_the_new_answer_and_nothing_else_moves(family, tmp_path):
    model = tiny_model(family)
    lm, fact, kept = open_tiny(model), FACTS[2], bits(model)
    editor = kf.Memit(
        layers=(1, 2), mom2_update_weight=1e-2, v_num_grad_steps=25, clamp_norm_factor=4.0, regularizer=1e-3
    )
    edit = editor.edit(lm, [fact], moments=moments_of(lm, (1, 2)), contexts=[["{}"]])
    assert edit.provenance["written"]["written"] == [True]
    notes = edit.provenance["layers"]
    assert notes["1"]["rerouted"] == 0.0 and notes["2"]["rerouted"] in (0.0, 1.0)
    sent = (edit.keys[1].view(1, EXPERTS, WIDTH) != 0).any(2)[0]
    delta = edit.deltas[1].dense().view(D_MODEL, EXPERTS, WIDTH)
    assert sent.sum() == 2 and not delta[:, ~sent].any(), "experts that the key is not sent to stay as they are"
    edit.save(tmp_path / "edit.safetensors")
    loaded = kf.Edit.load(tmp_path / "edit.safetensors")
    assert digest(loaded) == digest(edit)
    with loaded.apply(model):
        now = bits(model)
    assert {name for name in now if not torch.equal(now[name], kept[name])} == {
        f"model.layers.{layer}.mlp.experts.down_proj" for layer in (1, 2)
    }
    assert same_bits(model, kept)
    texts = [fact.text, "Miles Davis plays the", "The capital of Spain is", "Beats Music is owned by"]
    ids = [lm.encode(text) for text in texts]
    moved = (next_token_probs(lm.with_edit(edit), ids) - next_token_probs(lm, ids)).abs().sum(1) / 2
    assert moved[0] > 0.5 and (moved[1:] < 0.5 * moved[0]).all(), moved


def test_routing_that_changes_is_reported(made):
    """A lower layer's edit moves what the router above sees: the share by hooks on the written model."""
    lm, moments, _ = made
    editor = replace(
        EDITOR, layers=(0, 3), v_num_grad_steps=15, v_lr=2.0, clamp_norm_factor=4.0, mom2_update_weight=1e-3
    )
    edit = editor.edit(
        lm, FACTS, moments=moments | kf.second_moments(lm, [3], LINES * 8, n_tokens=2000), contexts=GROUPS
    )
    lower = replace(edit, changes=edit.changes[:1])
    places = [lookup(tiny_tokenizer(), fact.prompt, fact.subject) for fact in FACTS]

    def sent():
        return torch.stack([(routed(lm.model, ids, 3)[at] != 0).any(1) for ids, at in places])

    base = sent()
    with lower.apply(lm.model):
        share = (sent() != base).any(1).double().mean().item()
    assert edit.provenance["layers"]["3"]["rerouted"] == pytest.approx(share) and share > 0


def test_independent_edits_are_those_of_each_fact_alone(made):
    lm, moments, _ = made
    options = dict(moments=moments, contexts=GROUPS)
    both = EDITOR.edit(lm, FACTS[:2], independent=True, **options)
    for i in range(2):
        alone = EDITOR.edit(lm, FACTS[i], **options)
        for layer in LAYERS:
            assert relative_error(both.only(i).deltas[layer].dense(), alone.deltas[layer].dense()) < 1e-4


# ---- a change of one expert


@pytest.mark.parametrize("dense", [False, True])
def test_a_change_of_one_expert_changes_that_one(dense):
    model = tiny_model("gpt_oss")
    lm, delta = open_tiny(model), lowrank(D_MODEL, WIDTH, seed=8)
    given = type(make_edit().deltas[1])(delta.dense()) if dense else delta
    edit = make_edit(model, changes=[expert_change(lm, 2, 3, given)], values=None, keys={})
    before = as_out_in(projection(model, 2)).clone()
    with edit.apply(model):
        changed = as_out_in(projection(model, 2)) - before
    assert not changed[:, : 3 * WIDTH].any()
    close("expert", changed[:, 3 * WIDTH :], delta.dense())
    refused("expert = 4|got 4", expert_change, lm, 2, 4, delta, error=Exception)
    refused("changes a weight of", expert_change, lm, 2, 0, lowrank())
    refused("has no experts", expert_change, tiny_lm("llama"), 2, 0, delta)


# ---- refusals


def test_what_has_no_form_for_experts_is_refused(made):
    lm, moments, _ = made
    for editor in (kf.Rome(layers=(1,)), kf.Ft(layers=(1,)), kf.AlphaEdit(layers=(1,)), kf.EDITORS["nas"](layers=(1,))):
        refused("has no form for the mixtures of experts.*kf.Memit", editor.edit, lm, FACTS, moments=None, corpus=None)
    refused("no editor is trained for mixtures of experts", kf.train_editor, lm, FACTS, "mend")
    flat = {layer: SecondMoment(torch.eye(D_FF), 500, layer) for layer in LAYERS}
    refused(r"is \[80, 80\]; this model's d_ff is 80, 20 of each of 4 experts", EDITOR.edit, lm, FACTS, moments=flat)
    few = {layer: replace(moments[layer], matrix=moments[layer].matrix * 0) for layer in LAYERS}
    with pytest.raises(ValueError, match=r"expert [0-3], to which few tokens may have been sent: .*regularizer"):
        replace(EDITOR, regularizer=0.0).edit(lm, FACTS, moments=few, contexts=[["{}"]])


def test_the_settings_for_a_model_bear_experts_that_few_tokens_are_sent_to(made):
    lm, moments, _ = made
    editor = kf.Memit.for_model(lm)
    assert editor.regularizer > 0 and editor.mom2_update_weight == lm.d_ff
    few = {i: replace(m, matrix=m.matrix * (torch.arange(EXPERTS) > 0)[:, None, None]) for i, m in moments.items()}
    for moment in (moments, few):
        made_so = replace(editor, layers=(1,)).edit(lm, FACTS[:1], moments=moment, contexts=[["{}"]])
        assert torch.isfinite(made_so.deltas[1].dense()).all()


def test_without_statistics_each_expert_is_as_important(made):
    lm = made[0]
    edit = replace(EDITOR, mom2_adjustment=False, regularizer=0.0).edit(lm, FACTS, contexts=GROUPS)
    k = edit.keys[0].double()
    v = torch.linalg.solve(WEIGHT * torch.eye(D_FF, dtype=torch.float64) + k.T @ k, k.T)
    assert relative(edit.deltas[0].v.double(), v) < 1e-5
