"""Compositions: one edit that acts as a chain does, and what it remembers of its parts."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.edits.compose import compose
from kedit_fast.edits.deltas import Dense, LowRank
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.evaluation.perplexity import perplexity
from kedit_fast.jobs.score import text_logprobs
from kedit_fast.shipping.adapter import export_peft
from tests.conftest import open_tiny, refused, tiny_lm
from tests.editors import cases
from tests.make import FACTS, lowrank, make_edit, owned_edit
from tests.shipping.checkpoints import save_checkpoint
from tests.tiny import D_FF

TEXTS = [[5, 17, 23, 42, 9], [3, 3, 8, 77, 120, 4]]


def exact(seed, rank=2, dense=False):
    delta = lowrank(seed=seed, rank=rank, scale=0.05, dtype=torch.float64)
    return Dense(delta.dense()) if dense else delta


def chain(fingerprint=""):
    """Three edits: low rank on low rank, low rank on dense, dense on dense, and layers that only one of them has."""
    one = make_edit(deltas={0: exact(1), 1: exact(2), 2: exact(3, dense=True)}, fingerprint=fingerprint)
    two = make_edit(deltas={1: exact(4, rank=3), 2: exact(5), 3: exact(6)}, fingerprint=fingerprint)
    three = make_edit(deltas={1: exact(7), 2: exact(8, dense=True)}, fingerprint=fingerprint)
    return one, two, three


def edited_logprobs(lm):
    """[tokens] of the edited side."""
    return torch.cat(text_logprobs(lm, TEXTS)[1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_it_acts_as_the_chain_does(family):
    lm = tiny_lm(family, torch.float64)
    edits = chain(lm.fingerprint)
    chained = lm
    for edit in edits:
        chained = chained.with_edit(edit)
    got, want = edited_logprobs(lm.with_edit(compose(edits))), edited_logprobs(chained)
    assert torch.allclose(got, want, rtol=0, atol=1e-12 * want.abs().max())
    two = compose([compose(edits[:2]), edits[2]])
    assert torch.allclose(edited_logprobs(lm.with_edit(two)), want, rtol=0, atol=1e-12 * want.abs().max())
    apart = edited_logprobs(lm.with_edit(edits[0]))
    assert (apart - want).abs().max() > 1e-3  # each part matters
    base, edited = perplexity(lm.with_edit(compose(edits)), TEXTS)
    assert base != pytest.approx(edited)


def test_deltas_are_joined_in_their_smaller_form():
    made = compose(chain())
    assert made.layers == (0, 1, 2, 3)
    assert isinstance(made.deltas[1], LowRank) and made.deltas[1].rank == 7
    assert isinstance(made.deltas[2], Dense)
    many = [make_edit(deltas={1: lowrank(seed=i, rank=10)}) for i in range(4)]  # 40 * 128 > 48 * 80
    total = compose(many).deltas[1]
    assert isinstance(total, Dense) and total.delta.dtype == torch.float32
    want = sum(edit.deltas[1].part(slice(None)) for edit in many)
    assert torch.equal(total.delta, want.float())  # summed in fp64, rounded once


def test_the_widest_dtype_holds_the_sum():
    narrow = make_edit(deltas={1: lowrank(dtype=torch.bfloat16)})
    other = make_edit(deltas={1: lowrank(seed=1, dtype=torch.bfloat16)})
    assert compose([narrow, other]).deltas[1].u.dtype == torch.float32
    wide = make_edit(deltas={1: lowrank(dtype=torch.float64)})
    assert compose([narrow, wide]).deltas[1].v.dtype == torch.float64


def test_a_large_sum_is_made_block_by_block(monkeypatch):
    edits = [make_edit(deltas={1: exact(i, dense=True)}) for i in range(2)]
    whole = compose(edits).deltas[1].delta
    monkeypatch.setattr("kedit_fast.edits.compose._BLOCK", 7 * D_FF)  # 48 outputs are no multiple of 7
    assert torch.equal(compose(edits).deltas[1].delta, whole)


def test_one_edit_is_itself():
    edit = make_edit()
    assert compose([edit]) is edit


def test_facts_keys_and_values_are_joined():
    keys, other = {1: torch.ones(2, D_FF), 2: torch.ones(2, D_FF)}, {1: lowrank(seed=5), 2: lowrank(seed=6)}
    one, two = make_edit(), make_edit(facts=FACTS[::-1], deltas=other, keys=keys)
    made = compose([one, two])
    assert made.facts == (*FACTS, *FACTS[::-1])
    assert list(made.keys) == [1]  # the first has none of layer 2
    assert torch.equal(made.keys[1], torch.cat([one.keys[1].float(), two.keys[1]]))
    assert torch.equal(made.values, torch.cat([one.values, two.values]))
    assert made.method == "memit" and made.hparams == one.hparams and made.contexts == one.contexts


def test_values_of_different_meaning_are_left_out():
    one, other = make_edit(), {1: lowrank(seed=5), 2: lowrank(seed=6)}
    assert compose([one, make_edit(deltas=other)]).values is not None
    assert compose([one, make_edit(deltas=other, method="rome")]).values is None
    assert compose([one, make_edit(deltas={1: lowrank()})]).values is None
    assert compose([one, make_edit(deltas=other, values=None)]).values is None


def test_it_says_what_it_is_made_of():
    one = make_edit(provenance={"who": "Ana"})
    other, third = ({1: lowrank(seed=seed), 2: lowrank(seed=seed + 1)} for seed in (11, 21))
    two = make_edit(
        changes=other, method="rome", hparams={"layers": [2]}, contexts=[["{}"]], facts=FACTS[:1], values=None, keys={}
    )
    three = make_edit(deltas=third)
    made = compose([compose([one, two]), three])
    assert made.method == "memit + rome" and made.hparams == {} and made.contexts == []
    parts = made.provenance["composed_of"]
    assert [part["method"] for part in parts] == ["memit", "rome", "memit"]
    assert [part["digest"] for part in parts] == [digest(one), digest(two), digest(three)]
    assert parts[0]["provenance"] == {"who": "Ana"} and parts[1]["n_facts"] == 1 and parts[1]["layers"] == [1, 2]
    assert "on_top_of" not in made.provenance


def test_a_composition_is_saved_and_is_built_on(tmp_path):
    lm = tiny_lm("llama", torch.float64)
    editor = kf.Memit(layers=(0, 1), v_num_grad_steps=2, v_lr=1.0, clamp_norm_factor=0.4, mom2_adjustment=False)
    first = editor.edit(lm, cases.FACTS[:1], contexts=cases.GROUPS)
    second = editor.edit(lm, cases.FACTS[1:2], contexts=cases.GROUPS, previous=first)
    both = compose([first, second])
    both.save(tmp_path / "both.safetensors")
    loaded = Edit.load(tmp_path / "both.safetensors")
    assert digest(loaded) == digest(both) and loaded.provenance == both.provenance
    on_both = editor.edit(lm, cases.FACTS[2:3], contexts=cases.GROUPS, previous=loaded)
    on_chain = editor.edit(lm, cases.FACTS[2:3], contexts=cases.GROUPS, previous=[first, second])
    for layer in (0, 1):  # the same model below, the same keys kept
        assert cases.relative(on_both.deltas[layer].dense(), on_chain.deltas[layer].dense()) < 1e-9
    assert len(compose([both, on_both]).facts) == len(compose([first, second, on_chain]).facts) == 3
    refused("give the whole chain in its order", compose, [both, on_chain])


@pytest.mark.parametrize(
    "edits, error, says",
    [
        ([], ValueError, "edits is empty; expected Edits"),
        (["edit.safetensors"], TypeError, "Edit.load reads a file"),
        ([make_edit(), owned_edit()], ValueError, r"2 independent edits.*edit 2 of 2.*edit.only\(i\).*--independent"),
        ([owned_edit()], ValueError, r"edit.only\(i\)"),
        ([make_edit(fingerprint="a"), make_edit(fingerprint="b")], ValueError, "made for model b, the first one for a"),
        ([make_edit(), make_edit(deltas={1: lowrank(d=9)}, values=None)], ValueError, "layer 1: deltas of"),
    ],
)
def test_what_cannot_be_composed(edits, error, says):
    refused(says, compose, edits, error=error)


def test_the_order_is_checked():
    one = make_edit()
    two = make_edit(deltas={2: lowrank(seed=9)}, provenance={"on_top_of": [{"digest": digest(one)}]})
    assert len(compose([one, two]).facts) == 4
    for wrong in ([two, one], [replace(one, changes={1: lowrank(seed=8)}), two]):
        refused("was made on top of", compose, wrong)


def test_an_edit_acts_once_wherever_edits_meet(tmp_path):
    """By its digest: bits, not objects; also as a part of a composition, and as a dtype holds it."""
    lm = open_tiny(save_checkpoint(tmp_path / "base"))
    one, two = (make_edit(lm.model, deltas={1: lowrank(seed=seed)}) for seed in (1, 2))
    one.save(tmp_path / "one")
    again, both = Edit.load(tmp_path / "one"), compose([one, two])
    editor = kf.Rome(layers=(1,), v_num_grad_steps=1, mom2_adjustment=False)
    history = kf.EditHistory(tmp_path / "edits")
    history.add(one)
    ways = {
        "compose": lambda *edits: compose(edits),
        "merge": lambda *edits: kf.merge_checkpoint(tmp_path / "base", edits, tmp_path / "out"),
        "merge, forced": lambda *edits: kf.merge_checkpoint(tmp_path / "base", edits, tmp_path / "out", force=True),
        "adapter": lambda *edits: export_peft(edits, tmp_path / "out"),
        "gate": lambda *edits: kf.gate(lm, edits),
        "on top": lambda *edits: editor.edit(lm, cases.FACTS[0], previous=edits, contexts=["{}"]),
        "views": lambda a, b: lm.with_edit(a).with_edit(b),
        "evaluate": lambda a, b: kf.evaluate(lm.with_edit(a), FACTS[0], b),
        "written": lambda a, b: lm.with_edit(a, written=torch.bfloat16).with_edit(b, written=torch.bfloat16),
        "with both": lambda a, b: lm.with_edit(both).with_edit(b),
        "in both": lambda a, b: compose([a, both]),
        "history": lambda a, b: history.add(b),
        "history, forced": lambda a, b: history.add(b, check_chain=False),
    }
    for name, way in ways.items():
        with pytest.raises(ValueError, match=r"edits 1 and 2 of 2 are the same.*leave one of them out"):
            pytest.fail(f"{name}: {way(one, again)}")
    assert not (tmp_path / "out").exists() and len(history.versions) == 2
    empty = make_edit(lm.model, deltas={})
    lm.with_edit(one).with_edit(two).with_edit(empty).with_edit(make_edit(lm.model, deltas={}))  # nothing twice
    with one.apply(lm.model), pytest.raises(ValueError, match="another edit is applied already"):
        again.apply(lm.model)
