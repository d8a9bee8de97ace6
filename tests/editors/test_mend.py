"""Trained editors against their oracle; networks and their files; what is refused; what takes their edits."""

import re
from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.editors.networks import Network, Standard, Total, Update
from kedit_fast.editors.training_step import edit_task, subject_digest
from kedit_fast.edits.edit import Edit
from kedit_fast.jobs.gradients import gradient_factors
from tests.conftest import open_tiny, refused, tiny_lm
from tests.editors.cases import left_as_it_was, make_exact, relative
from tests.editors.networks import FACTS, METHODS, expected, network
from tests.make import bits, same_bits
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:facts not written", "ignore:the edit moves")
EDITORS = {"mend": kf.Mend, "malmen": kf.Malmen, "ke": kf.Ke}


def made_by(lm, method, facts=FACTS[:3], dtype=torch.float64, **options):
    return EDITORS[method](network=network(lm, method, dtype)).edit(lm, facts, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_an_edit_equals_the_oracle(family, method, monkeypatch):
    make_exact(monkeypatch)
    lm = tiny_lm(family, torch.float64)
    edit, deltas = made_by(lm, method), expected(lm, family, network(lm, method), FACTS[:3])
    assert edit.weights.keys() == deltas.keys() and edit.method == method
    assert all(relative(edit.weights[place].dense(), deltas[place]) < 1e-8 for place in deltas)
    narrow = made_by(tiny_lm(family), method, dtype=torch.float32)
    assert all(relative(narrow.weights[place].dense(), deltas[place]) < 1e-4 for place in deltas)


@pytest.mark.parametrize("method", METHODS)
def test_independent_ones_are_those_of_each_fact_alone(method):
    lm = tiny_lm("llama", torch.float64)
    together = made_by(lm, method, independent=True)
    for i, fact in enumerate(FACTS[:3]):
        one = made_by(lm, method, [fact])
        for place, delta in one.weights.items():
            assert relative(together.only(i).weights[place].dense(), delta.dense()) < 1e-8


def test_of_several_facts_the_sum_of_theirs():
    lm = tiny_lm("llama", torch.float64)
    for method in ("mend", "ke"):
        together, ones = made_by(lm, method), [made_by(lm, method, [fact]) for fact in FACTS[:3]]
        for place, delta in together.weights.items():
            assert relative(delta.dense(), sum(one.weights[place].dense() for one in ones)) < 1e-10


def test_before_training_it_is_a_step_down_the_standardized_gradient():
    lm = tiny_lm("llama", torch.float64)
    made = kf.Mend(network=network(lm, "mend", noise=0.0))
    edit, task = made.edit(lm, FACTS[:1]), edit_task(lm, FACTS[0])
    others = [edit_task(lm, fact) for fact in FACTS[4:]]
    found, usual = (gradient_factors(lm, tasks, made.network.places).factors for tasks in ([task], others))
    for place, delta in edit.weights.items():
        sides = []
        for rows, all_rows in ((found[place].x, usual[place].x), (found[place].delta, usual[place].delta)):
            sides.append((rows - all_rows.mean(0)) / all_rows.std(0))
        assert relative(delta.dense(), -1e-2 * sides[1].T @ sides[0]) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_a_network_computes_where_its_parameters_are(method):
    """Factors come from where the model is: an edit on a GPU reads a network from its file, on the CPU."""
    lm = tiny_lm("llama", torch.float32)
    elsewhere = network(lm, method, torch.float32)
    tasks = [edit_task(lm, fact) for fact in FACTS[:2]]
    found = gradient_factors(lm, tasks, elsewhere.places).factors
    elsewhere.to("meta")
    for alone in (False, True):
        for update in elsewhere.transformed(found, alone).values():
            assert update.out.device.type == update.into.device.type == "meta"


def test_statistics_are_those_of_all_rows_at_once():
    rows = 3 + 100 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:, 2] = 5.0
    standard = Standard(7)
    for part in rows.split([1, 0, 20, 29]):
        standard.observe(part)
    assert int(standard.n) == 50 and torch.allclose(standard.mean, rows.mean(0), rtol=1e-12)
    std = rows.std(0)
    std[2] = 1e-3 * std.mean()  # one that never moves is no signal
    assert torch.allclose(standard.std, std, rtol=1e-10)
    assert torch.allclose(standard(rows.float()), ((rows - rows.mean(0)) / std).float(), atol=1e-4)
    assert standard.size.item() == pytest.approx(
        (rows.var(0, correction=0) + rows.mean(0) ** 2).mean().sqrt().item(), rel=1e-10
    )


def test_many_rows_become_the_matrix():
    generator = torch.Generator().manual_seed(0)
    updates = [
        Update(torch.randn(n, 6, generator=generator), torch.randn(n, 4, generator=generator), torch.arange(n))
        for n in (1, 2, 9, 1)
    ]
    dense = sum(update.out.T @ update.into for update in updates)
    for keeps_rows, many, kind in ((False, 4, "Dense"), (True, 4, "LowRank"), (False, 1, "LowRank")):
        total = Total((6, 4), keeps_rows)
        for update in updates[:many]:
            total.add(update)
        delta, task = total.made()
        assert type(delta).__name__ == kind and (task is not None) is keeps_rows
        assert torch.allclose(delta.dense(), dense if many == 4 else updates[0].out.T @ updates[0].into, atol=1e-5)


# ---- files


@pytest.mark.parametrize("method", METHODS)
def test_a_file_gives_the_same_network(method, tmp_path):
    lm = tiny_lm("llama")
    made = network(lm, method, torch.float32)
    made.provenance = {"steps": 3}
    made.save(tmp_path / "net.safetensors")
    found = Network.load(tmp_path / "net.safetensors")
    assert type(found) is type(made) and found.digest == made.digest and found.provenance == {"steps": 3}
    found.save(tmp_path / "again.safetensors")
    assert (tmp_path / "net.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    one, other = (EDITORS[method](network=net).edit(lm, FACTS[:1]) for net in (made, tmp_path / "net.safetensors"))
    assert all(torch.equal(one.weights[p].dense(), other.weights[p].dense()) for p in one.weights)
    assert one.hparams["network"] == made.digest == one.provenance["network"]["digest"]


def test_what_is_no_network_is_refused(tmp_path):
    lm, path = tiny_lm("llama"), tmp_path / "net.safetensors"
    refused("no such file; expected a network", Network.load, path, error=FileNotFoundError)
    made_by(lm, "mend", dtype=torch.float32).save(tmp_path / "edit.safetensors")
    refused("is a safetensors file but no network; expected a network", kf.Mend, network=tmp_path / "edit.safetensors")
    network(lm, "ke").save(path)
    refused("is a network of ke, and mend needs its own", kf.Mend, network=str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("is cut short or no safetensors file", Network.load, path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("damaged network|cut short", Network.load, path)
    refused("network = 5: expected a network for mend, of kf.train_editor", kf.Mend, network=5)


def test_a_network_is_for_its_model():
    lm, other = tiny_lm("llama"), open_tiny(tiny_model("llama", seed=1))
    editor = kf.Mend(network=network(lm, "mend", torch.float32))
    refused(f"was trained for {re.escape(lm.fingerprint)} and the model is", editor.edit, other, FACTS[:1])
    refused(r"Mend needs a network= .*train one: kf.train_editor\(lm, facts, 'mend'\)", kf.Mend().edit, lm, FACTS[:1])
    assert kf.Mend.for_model(lm) == kf.Mend() and editor.layers == (1, 3)
    refused("this network changes", replace, editor, layers=(2,))
    for name, value in (("moments", {}), ("contexts", ["{}"]), ("checkpoint", "parts")):
        refused(f"{name} = .*leave it out", editor.edit, lm, FACTS[:1], **{name: value})


def test_subjects_that_were_trained_on_are_told():
    lm = tiny_lm("llama")
    made = network(lm, "mend", torch.float32)
    made.provenance = {"subjects": [subject_digest(FACTS[0])]}
    with pytest.warns(UserWarning, match="1 subject of these facts: the network was trained on them"):
        edit = kf.Mend(network=made).edit(lm, FACTS[:2])
    assert edit.provenance["network"]["subjects"] == 1


def test_phrasings_are_not_read():
    lm, editor = tiny_lm("llama"), kf.Mend(network=network(tiny_lm("llama"), "mend", torch.float32))
    phrased = replace(FACTS[0], phrasings=("{} lies in",))
    with pytest.warns(UserWarning, match="phrasings of 1 fact are not read"):
        edit = editor.edit(lm, phrased)
    assert edit.weights.keys() == (plain := editor.edit(lm, FACTS[0]).weights).keys()
    assert all(torch.equal(delta.dense(), plain[place].dense()) for place, delta in edit.weights.items())


# ---- what takes the edits


@pytest.mark.parametrize("method", METHODS)
def test_saved_applied_undone(method, tmp_path):
    lm = open_tiny(tiny_model("llama"))
    edit, before = made_by(lm, method, dtype=torch.float32), bits(lm.model)
    edit.save(tmp_path / "edit.safetensors")
    again = Edit.load(tmp_path / "edit.safetensors")
    prompts = [fact.text for fact in FACTS[:3]]
    served = [lm.with_edit(again).top_tokens(prompt) for prompt in prompts]
    with edit.apply(lm.model):
        written = [lm.top_tokens(prompt) for prompt in prompts]
    assert same_bits(lm.model, before)
    for one, other in zip(served, written, strict=True):
        assert [token for token, _ in one] == [token for token, _ in other]
        assert torch.allclose(torch.tensor([p for _, p in one]), torch.tensor([p for _, p in other]), atol=1e-4)


def test_on_top_of_another():
    """Its factors are those of the model as the edits before it have it."""
    lm = tiny_lm("llama", torch.float64)
    first = made_by(lm, "mend", FACTS[:1])
    second = made_by(lm, "mend", FACTS[1:2], previous=first)
    alone = made_by(lm, "mend", FACTS[1:2])
    assert relative(second.weights[1, "up"].dense(), alone.weights[1, "up"].dense()) > 1e-6
    found = gradient_factors(lm.with_edit(first), [edit_task(lm, FACTS[1])], network(lm, "mend").places).factors
    made = network(lm, "mend").transformed(found, alone=False)
    assert relative(second.weights[1, "up"].dense(), made[1, "up"].out.T @ made[1, "up"].into) < 1e-10


def test_the_model_is_left_as_it_was():
    with left_as_it_was() as lm:
        made_by(lm, "mend", dtype=torch.float32)
