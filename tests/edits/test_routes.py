"""Routed edits: an entry acts on the prompts that the route gives it, on whatever follows them, and on nothing else."""

from dataclasses import dataclass, replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.editors.written import not_written
from kedit_fast.edits.changes import PromptChange, WeightChange
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.edits.routes import NearestRoute, Route, ids_of, prompt_features, text_of
from kedit_fast.evaluation.probes import probe, read_edited, read_probes
from kedit_fast.evaluation.written import write_probes
from kedit_fast.jobs.score import text_logprobs
from kedit_fast.sweep.sites import Site
from tests.conftest import close, open_tiny, refused, tiny_lm
from tests.make import FACTS, lowrank, make_edit, owned_edit
from tests.shipping.checkpoints import save_checkpoint
from tests.tiny import D_FF, D_MODEL, tiny_model

HIT, OTHER, MISS = FACTS[0].text, FACTS[1].text, "The mother tongue of Danielle Darrieux is"
ASKED = [HIT, MISS, OTHER, HIT, "Big Ben was born in"]
ENTRY = [0, -1, 1, 0, -1]


def routed(lm, radius=1e-3, layer=1, **changes):
    """Entry i acts where a prompt ends as fact i's does: factors of layer 2, whose entries are not in order."""
    keys = prompt_features(lm, [HIT, OTHER], layer, Site.layer_out)
    route = NearestRoute(layer, keys, torch.full((2,), radius), torch.arange(2), Site.layer_out)
    delta = WeightChange(2, lowrank(seed=5, rank=3), owners=torch.tensor([1, 0, 1]))
    fields = dict(method="routed", hparams={}, fingerprint=lm.fingerprint, facts=FACTS, changes=[delta], route=route)
    return Edit(**fields | changes)


def plainly(edit, entry):
    """An entry as an edit that acts on all prompts."""
    return replace(edit, route=None).only(entry)


@dataclass(frozen=True, eq=False)
class Named(Route):
    """A prompt's entry is the first whose name it holds."""

    names: tuple[str, ...]
    entry: torch.Tensor

    @property
    def n_entries(self):
        return len(self.names)

    def _choose(self, lm, prompts):
        held = [[i for i, name in enumerate(self.names) if name in text_of(lm, p)] for p in prompts]
        return torch.tensor([found[0] if found else -1 for found in held])

    def take(self, entries, entry, facts):
        return replace(self, names=tuple(self.names[i] for i in entries.tolist()), entry=entry)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_what_a_route_sees_is_what_the_model_has(family):
    """Rows of the last token and means over tokens, against Hugging Face's own forward."""
    lm = tiny_lm(family, torch.float64)
    measured = prompt_features(lm, ASKED, 2, Site.layer_out, every=True, measure=lambda rows: rows[:, :3].square())
    last = prompt_features(lm, [ids_of(lm, p) for p in ASKED], 2, Site.layer_out)
    for i, prompt in enumerate(ASKED):
        with torch.no_grad():
            rows = lm.model(torch.tensor([lm.encode(prompt)]), output_hidden_states=True).hidden_states[3][0]
        close("last", last[i], rows[-1])
        close("measured", measured[i], rows[:, :3].square().mean(0))


@pytest.mark.parametrize("beside", [False, True])
def test_a_mixed_batch_is_each_prompt_alone_and_a_miss_is_the_base_run(beside):
    """Read, written and asked; ordinary edits beside a routed one act on all."""
    lm = open_tiny(tiny_model("llama"))
    ordinary = [make_edit(lm.model, values=None, keys={})] * beside
    edit, other = routed(lm), lm
    for each in ordinary:
        other = lm.with_edit(each)
    view = lm.with_edit(edit) if not beside else lm.with_edit(routed(other)).with_edit(ordinary[0])
    assert view.owners(ASKED).tolist() == [entry if entry >= 0 else (1 << 40 if beside else -1) for entry in ENTRY]
    by_entry = {i: other.with_edit(plainly(edit, i)) for i in (0, 1)} | {-1: other}
    probes = [probe(lm, text, ["Rome", "cheese boat"], likeliest=True, n_written=3) for text in ASKED]
    base, edited = read_probes(view, probes)
    for i, (one, entry) in enumerate(zip(probes, ENTRY, strict=True)):
        alone = read_edited(by_entry[entry], [one])[0]
        close(f"probe {i}", torch.tensor(edited[i].p), torch.tensor(alone.p))
        close(f"alone {i}", torch.tensor(read_probes(view, [one])[1][0].p), torch.tensor(alone.p))
        assert edited[i].top == alone.top
        assert (edited[i] == base[i]) == (entry < 0 and not beside)
    close("edited alone", *(torch.tensor([a.p for a in some]) for some in (read_edited(view, probes), edited)))
    written = write_probes(view, probes)
    assert written == view.generate(ASKED, 3) == [by_entry[e].generate(p, 3) for p, e in zip(ASKED, ENTRY, strict=True)]
    assert written[0] != lm.generate(HIT, 3)
    assert [t for t, _ in view.top_tokens(HIT)] == [t for t, _ in by_entry[0].top_tokens(HIT)]
    lens = kf.logit_lens(view, FACTS)
    for i in (0, 1):
        close("lens", lens.after.p_new[i], kf.logit_lens(by_entry[i], FACTS[i]).after.p_new[0])


def test_the_prompt_alone_decides_and_what_follows_keeps_it():
    """A prompt's answers, one token or more, are read under the entry of the prompt; a text is a prompt by itself."""
    lm = tiny_lm("llama")
    edit = routed(lm)
    view, always = lm.with_edit(edit), lm.with_edit(plainly(edit, 0))
    longer = HIT + " Rome"  # ends elsewhere: no entry's
    assert view.owners([longer]).tolist() == [-1] and view.top_tokens(longer) == lm.top_tokens(longer)
    read = read_edited(view, [probe(lm, HIT, ["Rome is in the city"])])[0]
    assert read.p == read_edited(always, [probe(lm, HIT, ["Rome is in the city"])])[0].p
    texts = [lm.encode(HIT), lm.encode(MISS), lm.encode(longer)]
    base, edited = text_logprobs(view, texts)
    close("a text that ends as a fact's prompt", edited[0], text_logprobs(always, texts)[1][0])
    assert torch.equal(base[1], edited[1]) and torch.equal(base[2], edited[2])


def test_of_several_keys_the_nearest_counts_and_only_within_its_radius():
    lm = tiny_lm("llama")
    route = routed(lm).route
    for shift, radius, chosen in [
        ((0.02, 0.01), (9.0, 9.0), 1),
        ((0.02, 0.01), (9.0, 0.01), -1),
        ((0, 1), (0.1, 0), 0),
    ]:
        keys = route.keys[:1] + torch.tensor(shift)[:, None]
        near = replace(route, keys=keys, radius=torch.tensor(radius, dtype=keys.dtype))
        assert near.choose(lm, [HIT]).tolist() == [chosen]
    assert route.take(*[torch.arange(0)] * 3).choose(lm, ASKED).tolist() == [-1] * 5


def test_texts_of_entries_stand_before_the_prompts_that_the_route_gives_them():
    lm = tiny_lm("llama")
    texts = ("The Eiffel Tower is in Rome. ", "Miles Davis plays the piano. ")
    change = PromptChange(texts, ((), ()), owners=torch.arange(2))
    edit = Edit("texts", {}, "", FACTS, [change], route=Named(("Eiffel", "Davis"), torch.arange(2)))
    view, asked = lm.with_edit(edit), ["Miles Davis was", "Big Ben was", "The Eiffel Tower was"]
    read = [texts[1] + asked[0], asked[1], texts[0] + asked[2]]
    assert view.generate(asked, 3) == [lm.generate(text, 3) for text in read]
    probes = [probe(lm, text, ["Rome"], likeliest=True, n_written=3) for text in asked]
    (base, edited), alone = read_probes(view, probes), read_edited(lm, [probe(lm, text, ["Rome"]) for text in read])
    close("read", torch.tensor([a.p for a in edited]), torch.tensor([a.p for a in alone]))
    assert base[1] == edited[1] and write_probes(view, probes) == [lm.generate(text, 3) for text in read]
    assert kf.evaluate(lm, FACTS, edit, text="Big Ben is in London.").perplexity[0] > 0
    assert lm.with_edit(edit.without(0)).generate(asked, 3)[2] == lm.generate(asked[2], 3)


def test_each_probe_is_routed_by_its_own_prompt():
    """So an evaluation tests the scope: paraphrases that the route misses keep the base model's answers."""
    lm = tiny_lm("llama")
    edit = routed(lm)
    report = kf.evaluate(lm, FACTS, edit, text="Big Ben is in London. " * 3, generate=2)
    always = kf.evaluate(lm, FACTS[0], plainly(edit, 0))
    close("efficacy", report.edited["p_new"][:1], always.edited["p_new"])
    assert report.edited["p_new"][0] != report.base["p_new"][0] and not torch.equal(
        always.edited["paraphrase_p_new"], always.base["paraphrase_p_new"]
    )
    for name in ("paraphrase_p_new", "same_subject_p_top"):
        assert torch.equal(report.edited[name].nan_to_num(9), report.base[name].nan_to_num(9))
    assert report.perplexity[0] == report.perplexity[1]
    assert report.generations[1][2] == lm.with_edit(plainly(edit, 1)).generate(OTHER, 2)


def test_it_is_saved_and_taken_apart_fact_by_fact(tmp_path):
    lm = tiny_lm("llama")
    edit = routed(lm)
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert repr(loaded) == repr(edit) and "routed (nearest)" in repr(edit) and digest(loaded) == digest(edit)
    assert digest(edit) != digest(replace(edit, route=replace(edit.route, radius=edit.route.radius * 2)))
    for made, owners in ((loaded, [0, 1]), (loaded.only(0), [0, -1]), (loaded.only(1), [-1, 0])):
        assert lm.with_edit(made).owners([HIT, OTHER]).tolist() == owners
    assert digest(loaded.without(0)) == digest(loaded.only(1))
    only = lm.with_edit(loaded.only(1))
    assert only.generate([HIT, OTHER], 3) == [lm.generate(HIT, 3), lm.with_edit(edit).generate(OTHER, 3)]
    shared = replace(edit, route=replace(edit.route, entry=torch.tensor([1, 1])))
    refused("shares its entry with others", shared.only, 0)
    refused("in weights, from which none can be left out", make_edit().without, 0)
    assert loaded.only(0).without(0).facts == ()


def test_what_is_known_of_facts_goes_with_them():
    lm = tiny_lm("llama")
    known = {"written": {"written": [True, False], "says": ["a", "b"]}, "found": {"steps": [3, 4]}, "tokens": [5, 6]}
    one = {"written": {"written": [False], "says": ["b"]}, "found": {"steps": [4]}, "tokens": [6]}
    other = {"layers": {"2": [1, 2]}, "who": "me"}  # two numbers, and not of facts
    edit = routed(lm, provenance=known | other, values=torch.eye(2, D_MODEL), keys={2: torch.eye(2, D_FF)})
    for made in (edit.without(0), edit.only(1), replace(owned_edit(), provenance=known | other).only(1)):
        assert made.provenance == one | other
    assert not_written(edit.without(0)) == [FACTS[1]] and not_written(edit.without(1)) == []
    assert torch.equal(edit.without(0).values, edit.values[1:]) and torch.equal(edit.only(1).keys[2], edit.keys[2][1:])


def test_what_cannot_take_it_says_so_and_what_instead(tmp_path):
    model = tiny_model("llama")
    lm = open_tiny(model)
    edit = routed(lm)
    save_checkpoint(tmp_path / "base")
    for meet in (
        lambda: edit.apply(model),
        lambda: kf.export_peft(edit, tmp_path / "adapter"),
        lambda: kf.merge_checkpoint(tmp_path / "base", edit, tmp_path / "merged"),
        lambda: kf.compose([edit, make_edit(model)]),
        lambda: lm.with_edit(edit, written=torch.bfloat16),
    ):
        refused(r"this edit is routed.*lm\.with_edit", meet)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
    refused(r"this edit is routed.*judge it as it is served.*written=None", kf.gate, lm, edit, written=torch.float32)
    with pytest.warns(UserWarning, match="too few probes"):
        judged = kf.gate(lm, edit, sizes=kf.gating.questions.Sizes(max_new_tokens=2, context_tokens=9))
    assert judged.checks[0].form == "served" and judged.meta["growth"] == {}
    history, again = kf.EditHistory(tmp_path / "edits"), replace(edit, facts=edit.facts[::-1])
    history.add(edit)
    refused("one routed edit acts on a model at a time", history.add, again.without(0), check_chain=False)
    refused("decides at each prompt", kf.trace, lm.with_edit(edit), FACTS)
    refused("decides at each prompt", kf.Ft(layers=(1,)).edit, lm, FACTS, previous=edit)
    refused("one routed edit acts on a model at a time", lm.with_edit(edit).with_edit, again)
    refused("beside no independent ones", lm.with_edit(edit).with_edit, owned_edit(model))


def test_a_prompt_of_no_tokens_is_refused():
    view = tiny_lm("llama").with_edit(routed(tiny_lm("llama")))
    for prompts in ("", ["", HIT], [HIT, ""]):
        refused("a prompt of no tokens", view.generate, prompts, 2)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(radius=torch.ones(3)), r"expected \[m, width\] and \[m\], got \[2, 48\] and \[3\]"),
        (dict(radius=torch.full((2,), torch.nan)), "expected finite floats"),
        (dict(layer=-1), "a whole number from 0"),
        (dict(site="nowhere"), "'nowhere' is not a valid Site"),
        (dict(entry=torch.tensor([0])), "one for each of 2 facts; got"),
        (dict(entry=torch.tensor([0, 2])), r"expected 0 to 1, got \[0, 2\]"),
        (dict(facts=torch.tensor([0, 2])), r"a route's facts: expected 0 to 1, got \[0, 2\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused(wrong, says):
    edit = routed(tiny_lm("llama"))
    refused(says, lambda: replace(edit, route=replace(edit.route, **wrong)))


def test_a_route_for_another_model_is_refused():
    lm = tiny_lm("llama")
    edit = routed(lm)
    narrow = replace(edit, route=NearestRoute(1, torch.zeros(2, D_FF), torch.ones(2), torch.arange(2), Site.layer_out))
    refused(f"keys of width {D_FF}, this model's layer_out has {D_MODEL}", lm.with_edit, narrow)
    refused("a routed edit's changes have owners", replace, edit, changes=[WeightChange(2, lowrank())])
    refused(
        "expected fact indices 0 to 1",
        replace,
        edit,
        changes=[WeightChange(2, lowrank(rank=1), owners=torch.tensor([2]))],
    )
