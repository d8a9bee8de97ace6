"""What vLLM takes of an adapter: ranks, families and matrices, asked at the export. vLLM itself runs nowhere here."""

import pytest

from kedit_fast.edits.changes import WeightChange
from kedit_fast.model.family import FAMILIES
from kedit_fast.shipping import vllm
from kedit_fast.shipping.adapter import export_peft
from tests.conftest import refused
from tests.make import lowrank, make_edit
from tests.tiny import D_FF, D_MODEL, tiny_model


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (17, 32), (257, 320), (321, 512), (512, 512)])
def test_a_server_is_told_the_least_rank_that_will_do(rank, allowed):
    assert vllm.max_lora_rank(rank) == allowed


def test_a_rank_over_the_largest_has_no_server():
    assert vllm.max_lora_rank(513) is None
    assert "no rank over 512, this adapter has 513" in vllm.why_not("llama", ["down"], 513)


def test_every_family_that_vllm_refuses_is_one_of_ours():
    assert {*vllm.WITHOUT_LORA, *(name for name, _ in vllm.ONLY_HALVES)} <= FAMILIES.keys()
    assert all(role in FAMILIES[name].roles for name, role in vllm.ONLY_HALVES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_refused_or_not(family):
    reason = vllm.why_not(family, ["down"])
    assert bool(reason) == (family in ("gpt2", "gptj", "stablelm")), reason


@pytest.mark.parametrize("family", ["gpt2", "gptj", "stablelm"])
def test_the_export_for_vllm_refuses_with_the_way_out(family, tmp_path):
    edit = make_edit(tiny_model(family), deltas={1: lowrank(rank=2)})
    says = refused("vLLM 0.33.0 does not load", export_peft, edit, tmp_path / "adapter", server="vllm")
    assert vllm.WITHOUT_LORA[family] in says and "merge_checkpoint" in says and "without server= (--server)" in says
    assert not any(tmp_path.iterdir())
    assert export_peft(edit, tmp_path / "adapter").rank == 2


def test_a_matrix_that_vllm_knows_by_its_halves_alone_is_refused(tmp_path):
    both = (WeightChange(1, lowrank(2 * D_FF, D_MODEL), "gate_up"),)
    edit = make_edit(tiny_model("glm4"), changes=both)
    refused("glm4 takes no adapter of gate_up", export_peft, edit, tmp_path / "adapter", server="vllm")
    assert not vllm.why_not("phi3", ["gate_up"]) and not vllm.why_not("glm4", ["down"])


def test_the_export_for_vllm_has_its_limit(tmp_path, monkeypatch):
    edit = make_edit(tiny_model("llama"), deltas={1: lowrank(rank=9)})
    monkeypatch.setattr(vllm, "RANKS", (1, 8))
    for given in (None, 512):
        refused("rank 9, over max_rank 8", export_peft, edit, tmp_path / "a", server="vllm", max_rank=given)
    assert export_peft(edit, tmp_path / "a", server="vllm", max_rank=4, truncate=True).rank == 4
    refused("server = 'tgi': expected", export_peft, edit, tmp_path / "b", server="tgi")
