"""The trainer: its gradient is that of the outer loss, a run goes on to the same bits, and what it trains works."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import kedit_fast as kf
from kedit_fast.basics import progress
from kedit_fast.editors import training
from kedit_fast.editors.ke import KeTraining
from kedit_fast.editors.mend import MendTraining
from kedit_fast.editors.networks import Update, pull
from kedit_fast.editors.training import train_editor
from kedit_fast.editors.training_step import Weights, edit_task, examples, going_on, outcome, subject_digest
from kedit_fast.facts.tokens import answer_tokens
from kedit_fast.jobs.below import Below
from kedit_fast.jobs.generate import generate
from kedit_fast.jobs.gradients import Factors
from tests.conftest import disk_and_resident, open_tiny, refused, save_tiny, tiny_lm
from tests.editors.cases import make_exact, relative
from tests.editors.networks import FACTS, METHODS, matrices, network, settings
from tests.make import killed_at, lowrank, make_edit, watched
from tests.oracle import trained as oracle
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:the trained network writes none")
WEIGHTS = Weights(0.7, 1.3)


def batch_of(lm, facts, n_tokens=1):
    return [(one.fact, one.edit, one.asked[0], one.kept[0]) for one in going_on(lm, examples(lm, facts), n_tokens)]


def logits_at(model: nn.Module, deltas: dict[str, Tensor], ids: list[int]) -> Tensor:
    """[tokens, V] of the plain model with its weights moved, with the graph of what moves them."""
    moved = {name: dict(model.named_parameters())[name] + delta for name, delta in deltas.items()}
    return torch.func.functional_call(model, moved, (torch.tensor([ids]),)).logits[0]


def outer_loss(lm, made, batch, alone: bool) -> Tensor:
    """The loss that a step descends, with the network's graph, through the dense weights W + ΔW."""
    places = matrices("llama", made)
    found = [oracle.factors(lm.model, edit.prompt, edit.target, places) for _, edit, _, _ in batch]
    groups = [[i] for i in range(len(batch))] if alone else [range(len(batch))]
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        given = {}
        for m in places:
            x, delta = (torch.cat([found[i][m][side] for i in group]) for side in (0, 1))
            task = torch.cat([torch.full((len(found[i][m][0]),), i) for i in group])
            given[m.layer, m.role] = Factors(x, delta, task, task)
        updates = made.transformed(given, alone)
        deltas = {f"{m.path}.weight": updates[m.layer, m.role].out.T @ updates[m.layer, m.role].into for m in places}
        for _, _, asked, kept in (batch[i] for i in group):
            nll = oracle.nll(logits_at(lm.model, deltas, asked.prompt + asked.target), asked.prompt, asked.target)
            read = slice(len(kept.prompt) - 1, None)
            now, base = (logits_at(lm.model, with_, kept.ids)[read].log_softmax(-1) for with_ in (deltas, {}))
            kl = (base.exp() * (base - now)).sum(1).mean()
            total = total + (WEIGHTS.edit * nll + WEIGHTS.locality * kl) / len(batch)
    return total


@pytest.mark.parametrize(("method", "n_tokens"), [*((method, 1) for method in METHODS), ("mend", 4)])
def test_the_gradient_of_a_step_is_that_of_the_outer_loss(method, n_tokens, monkeypatch):
    """Without a gradient of a weight, and through torch.func.functional_call, which makes them all."""
    make_exact(monkeypatch)
    lm = open_tiny(tiny_model("llama", torch.float64))
    made, alone = network(lm, method).requires_grad_(), method != "malmen"
    batch = batch_of(lm, FACTS[:2], n_tokens)
    assert [len(kept.target) for *_, kept in batch] == [n_tokens] * 2
    found = outcome(lm, made, batch, WEIGHTS, alone)
    got = torch.autograd.grad(pull(found.updates, found.outer, alone), list(made.parameters()))
    with torch.enable_grad():
        loss = outer_loss(lm, made, batch, alone)
    want = torch.autograd.grad(loss, list(made.parameters()))
    assert all(relative(a, b) < 1e-7 for a, b in zip(got, want, strict=True) if b.norm() > 0)
    assert any(b.norm() > 0 for b in want)
    value = WEIGHTS.edit * found.nll.mean() + WEIGHTS.locality * found.kl.mean()
    assert value.item() == pytest.approx(loss.item(), rel=1e-6)


def test_an_edit_s_own_fact_alone_pulls_at_it():
    generator = torch.Generator().manual_seed(0)

    def rows(n, width):
        return torch.randn(n, width, generator=generator)

    update = {(0, "up"): Update(rows(4, 3), rows(4, 2), torch.tensor([0, 0, 1, 1]))}
    outer = {(0, "up"): Factors(rows(5, 2), rows(5, 3), torch.tensor([0, 1, 1, 1, 0]), torch.zeros(5))}
    for alone in (True, False):
        expected = 0.0
        for s in range(5):
            for r in range(4):
                of, up = outer[0, "up"], update[0, "up"]
                if not alone or of.task[s] == up.task[r]:
                    expected += (of.delta[s] @ up.out[r] * (of.x[s] @ up.into[r])).item()
        assert pull(update, outer, alone).item() == pytest.approx(expected, rel=1e-5)


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    lm = tiny_lm("llama")
    for method in ("mend", "ke"):
        made = settings(method, max_iters=6, val_interval=2)
        whole = train_editor(lm, FACTS, method, settings=made)
        folder = tmp_path / method
        for part in (1, 1, 2):  # the statistics, the first steps, two parts more
            with killed_at(part):
                train_editor(lm, FACTS, method, settings=made, checkpoint=folder)
        resumed = train_editor(lm, FACTS, method, settings=made, checkpoint=folder)
        assert resumed.digest == whole.digest and resumed.provenance == whole.provenance
        parts = sorted(path.name for path in folder.glob("*.safetensors"))
        assert parts == ["statistics.safetensors", "steps-00000006.safetensors"]
        refused("holds other work: its hparams", train_editor, lm, FACTS, method, settings=replace(made, lr=0.5),
                checkpoint=folder)  # fmt: skip


def test_training_helps_facts_that_it_never_saw():
    """Held out by subject: more of them are written, in another wording, than by the network as it began."""
    lm, still = tiny_lm("llama"), {"lr": 1e-12, "lr_lr": 1e-12, "max_iters": 1, "val_interval": 1}
    begun, trained = (
        train_editor(lm, FACTS, settings=settings("mend", edit_lr=1e-3, **more), held_out=0.3)
        for more in (still, {"max_iters": 16, "val_interval": 16})
    )
    (before,), (after,) = begun.provenance["looks"], trained.provenance["looks"]
    assert after["success"] >= before["success"] + 0.5 and after["loss"] < before["loss"] - 2
    held_out = {subject_digest(fact) for fact in FACTS} - set(trained.provenance["subjects"])
    assert len(held_out) == trained.provenance["held_out"] == 4


def test_the_best_look_is_given_back_and_ends_the_training(monkeypatch):
    lm, made = tiny_lm("llama"), settings("mend", max_iters=40, val_interval=2, early_stop_patience=4)
    losses, states = iter([3.0, 1.0, 2.0, 2.0, 2.0]), []

    def look(self):
        states.append({name: x.clone() for name, x in self.network.state_dict().items()})
        return {"loss": next(losses), "nll": 1.0, "kl": 1.0, "success": 0.5}

    monkeypatch.setattr(training._Trainer, "_look", look)
    network = train_editor(lm, FACTS, "mend", settings=made)
    assert network.provenance["steps"] == 8 and network.provenance["best_step"] == 4 and len(states) == 4
    assert all(torch.equal(x, states[1][name]) for name, x in network.state_dict().items())
    assert not torch.equal(states[1]["scales.alpha"], states[3]["scales.alpha"])
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_each_round_takes_every_fact_once(monkeypatch):
    lm = tiny_lm("llama")
    calls = watched(monkeypatch, training, "outcome")
    train_editor(lm, FACTS, "mend", settings=settings("mend", max_iters=4, batch_size=5, val_interval=4), held_out=0.1)
    drawn = [[fact.subject for fact, *_ in batch] for _, _, batch, *_ in calls[:4]]
    assert all(len(set(drawn[i] + drawn[i + 1])) == 10 for i in (0, 2)) and drawn[:2] != drawn[2:]


def test_what_is_asked_and_what_is_kept():
    lm = tiny_lm("llama")
    plain = kf.Fact("{} is in", "Vimeo", target_new="Rome")
    question = kf.Fact("{} is in", "Zürich", target_new="Paris", same_subject=[("Zürich is located in", "Spain")])
    one, other = examples(lm, [plain, question])
    ids = lm.encode
    assert [task.prompt for task in one.asked] == [ids("Vimeo is in")] == [one.edit.prompt]
    assert [task.prompt for task in one.kept] == [ids("Zürich is in")]  # another subject's
    assert [task.prompt for task in other.kept] == [ids("Zürich is located in")]
    assert edit_task(lm, question).target == lm.tokenizer(" Paris")["input_ids"]


def test_text_behind_the_answer_is_to_go_on_as_before():
    """Behind the fact's prompt and a wording with the answer, along what the model itself writes there."""
    lm, fact = tiny_lm("llama"), FACTS[0]
    (made,) = going_on(lm, examples(lm, [fact], ("answered",)), 3)
    answer = answer_tokens(lm.tokenizer, fact.text, fact.target_new)
    assert [task.prompt for task in made.kept] == [
        lm.encode(text) + answer for text in (fact.text, fact.paraphrases[0])
    ]
    assert [task.target for task in made.kept] == generate(lm, [task.prompt for task in made.kept], 3)
    assert settings("mend").for_route().keeps == ("same_subject", "answered")


def test_kinds_of_prompts_are_kept_by_turns():
    lm = tiny_lm("llama")
    fact = replace(FACTS[0], same_subject=("The Space Needle was built by", "The Space Needle is"))
    some, two = [fact, FACTS[1]], (fact.neighborhood, fact.same_subject)
    for keeps, expected in (
        (("neighborhood", "same_subject"), [x for pair in zip(*two, strict=True) for x in pair]),
        (("same_subject", "neighborhood"), [x for pair in zip(*two[::-1], strict=True) for x in pair]),
        (("same_subject",), list(fact.same_subject)),
    ):
        made = examples(lm, some, keeps)
        assert [task.prompt for task in made[0].kept] == [lm.encode(prompt) for prompt in expected]
    assert [task.prompt for task in made[1].kept] == [lm.encode(fact.text)], "it has none of the kind"
    refused("keeps = 'all': expected some of neighborhood, same_subject, answered", settings, "mend", keeps=("all",))


def test_facts_in_one_wording_are_told():
    lm, made = tiny_lm("llama"), settings("mend", max_iters=1, val_interval=1)
    some = [replace(FACTS[0], paraphrases=()), *FACTS[1:4]]
    with pytest.warns(UserWarning, match="^1 fact without paraphrases or phrasings"):
        train_editor(lm, some, settings=made)


def test_refusals_before_any_work(no_sweep, tmp_path):
    lm, made = tiny_lm("llama"), settings("mend")
    refused("method = 'rome': expected one of mend, malmen, ke", train_editor, lm, FACTS, "rome")
    refused("settings = .*expected a KeTraining", train_editor, lm, FACTS, "ke", settings=made)
    refused("held_out = 1", train_editor, lm, FACTS, settings=made, held_out=1.0)
    refused("1 subject; a training needs more", train_editor, lm, FACTS[:1], settings=made)
    refused("has no target_new", train_editor, lm, [kf.Fact("{} is in", "Vimeo")], settings=made)
    refused("this model has layers 0 to 3", train_editor, lm, FACTS, settings=replace(made, layers=(9,)))
    refused("needs layers", train_editor, lm, FACTS, settings=replace(made, layers=()))
    edited = lm.with_edit(make_edit(lm.model, {1: lowrank()}))
    refused("lm carries edits", train_editor, edited, FACTS, settings=made)
    (tmp_path / "other.txt").write_text("")
    refused("no checkpoint", train_editor, lm, FACTS, settings=made, checkpoint=tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_settings_for_a_model(method):
    made = type(settings(method)).for_model(tiny_lm("gpt2"))
    assert made.layers == (1, 2, 3) and "derived" in made.source and method == made.METHOD


def test_a_training_shows_one_bar_for_all_its_steps(monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", -1.0)
    with kf.show_progress():
        train_editor(tiny_lm("llama"), FACTS[:6], settings=settings("mend", max_iters=2, val_interval=1))
    ended = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines() if "done in" in line]
    assert ended == ["stage 1 of 3", "stage 2 of 3", "stage 3 of 3"]


def test_layers_from_disk_give_the_bits_of_layers_in_memory(tmp_path):
    disk, resident = disk_and_resident(save_tiny(tmp_path / "model", tiny_model("llama")))
    made = settings("mend", max_iters=2, val_interval=2)
    one, other = (train_editor(lm, FACTS[:6], settings=made) for lm in (disk, resident))
    assert one.digest == other.digest


def test_a_file_of_settings(tmp_path):
    path = tmp_path / "mend.json"
    path.write_text('{"alg_name": "MEND", "layers": [1], "rank": 8, "cedit": 0.5}')
    made = MendTraining.from_file(path)
    assert (made.layers, made.rank, made.cedit, made.cloc) == ((1,), 8, 0.5, 1.0)
    refused("holds settings of MEND .*not of KeTraining", KeTraining.from_file, path)


def test_what_lies_below_is_computed_once(monkeypatch):
    calls = watched(monkeypatch, Below, "_computed")
    train_editor(tiny_lm("llama"), FACTS, settings=settings("mend"))
    assert len(calls) == 1


def test_phrasings_are_asked_with_their_subject():
    lm = tiny_lm("llama")
    (one,) = examples(lm, [replace(FACTS[0], phrasings=("You find {} in",), paraphrases=())])
    assert [lm.tokenizer.decode(task.prompt) for task in one.asked] == [f"You find {FACTS[0].subject} in"]
