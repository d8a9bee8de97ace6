"""A door for every editor: one whose change is a memory, as somebody would write it, meets all that the package has."""

from dataclasses import dataclass

import torch

import kedit_fast as kf
from kedit_fast.edits.edit import Edit
from kedit_fast.edits.memories import MemoryChange
from kedit_fast.edits.routes import NearestRoute
from kedit_fast.facts.tokens import fact_answer, fact_tokens
from kedit_fast.jobs.collect import collect
from kedit_fast.sweep.runs import RunList, add_under
from kedit_fast.sweep.sites import Site
from tests.conftest import open_tiny, refused
from tests.tiny import tiny_model

FACTS = [
    kf.Fact("{} is in the city of", "The Eiffel Tower", "Rome", "Paris", neighborhood=["Big Ben is in the city of"]),
    kf.Fact("{} is produced by", "Toyota Camry", "Rome", "Toyota"),
]


@dataclass(frozen=True)
class Remember:
    """Where a fact's prompt ends, the last layer's row becomes the one that the head reads as the new answer."""

    radius: float = 1e-2
    scale: float = 20.0

    def edit(self, lm, facts) -> Edit:
        runs, last = RunList(), lm.n_layers - 1
        ids = [fact_tokens(lm.tokenizer, fact).ids for fact in facts]
        ends = torch.tensor([len(each) - 1 for each in ids])
        number = add_under(lm, runs, ids)
        keys = collect(lm, runs.runs(), Site.layer_out, [last], number, ends)[last]
        answers = [fact_answer(lm.tokenizer, fact)[0] for fact in facts]
        values = self.scale * lm.model.get_output_embeddings().weight.detach()[answers]
        each, radius = torch.arange(len(facts)), torch.full((len(facts),), self.radius)
        route = NearestRoute(last, keys, radius, each, Site.layer_out)
        change = MemoryChange(last, values, each, Site.layer_out)
        return Edit("remember", {"radius": self.radius}, lm.fingerprint, tuple(facts), [change], route=route)


def test_an_editor_of_ones_own_meets_all_that_the_package_has(tmp_path):
    model = tiny_model("llama")
    lm = open_tiny(model)
    edit = Remember().edit(lm, FACTS)
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    saved, report = (kf.evaluate(lm, FACTS, each) for each in (edit, loaded))
    after = report.summary()
    assert str(saved) == str(report)
    assert after["efficacy_exact"]["edited"].mean == 1 > after["efficacy_exact"]["base"].mean
    assert after["neighborhood_p_true"]["edited"].mean == after["neighborhood_p_true"]["base"].mean
    assert lm.with_edit(loaded).generate(FACTS[0].text, 1).strip() == "Rome"
    refused(r"this edit is routed.*lm\.with_edit", loaded.apply, model)
