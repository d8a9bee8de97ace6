"""SERAC: pairs of prompts that ask the same, a classifier learned from them, and a memory that can be taken apart."""

from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.editors import serac
from kedit_fast.editors.serac import HELD_OUT, Pair, pairs_of
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.edits.scope import auc, scope_features
from tests.conftest import refused, tiny_lm
from tests.editors.test_ike import FACTS, fact_file

pytestmark = pytest.mark.filterwarnings("ignore:facts not written")
EDITOR = kf.Serac(layer=1, steps=40, lr=0.01)
SAYINGS = {  # {relation: ways to ask for it}
    "place": ("{} is in the city of", "{} is located in", "In which city is {}? It is in", "The city of {} is"),
    "maker": ("{} is produced by", "{} is owned by", "The headquarters of {} is", "{} is born of"),
    "sport": ("{} plays the", "{} plays the sport of", "The sport of {} is", "The trumpet of {} is"),
}
SUBJECTS = (
    "Vimeo",
    "Monk",
    "Toyota",
    "France",
    "LeBron",
    "Zürich",
    "Apple",
    "Spain",
    "Italy",
    "Japan",
    "Paris",
    "Rome",
)


def examples(n=12, **changes) -> list[kf.Fact]:
    """Facts of three relations, each asked in two of its ways, and what else is asked of their subjects."""
    made = []
    for i, subject in enumerate(SUBJECTS[:n]):
        relation = list(SAYINGS)[i % 3]
        ways, other = SAYINGS[relation], SAYINGS[list(SAYINGS)[(i + 1) % 3]]
        made.append(
            kf.Fact(ways[i % 2], subject, "piano", "Paris", [ways[2 + i % 2].replace("{}", subject)], ["Big is"],
                    [other[i % 4].replace("{}", subject)], provenance={"relation_id": relation}) 
        )  # fmt: skip
    return [replace(fact, **changes) for fact in made]


def test_pairs_are_what_asks_the_same_and_what_does_not():
    place, maker = {"relation_id": "place"}, {"relation_id": "maker"}
    asked = ["Where is Rome? In", "It lies in"], ["Paris is in"], ["Rome was built"]
    one = kf.Fact("{} is in", "Rome", "x", "y", *asked, provenance=place)
    two = kf.Fact("{} lies in", "France", "x", "y", provenance=place)
    three = kf.Fact("{} was made by", "Toyota", "x", "y", ["Who made Toyota? It was"], provenance=maker)
    four = kf.Fact("{} is", "Monk", "x", "y", same_subject=["Monk was"])  # of no known relation
    found = set(pairs_of([one, two, three, four]))
    same = [("it is in", "Where is it? In"), ("it is in", "it lies in"), ("it lies in", "it is in"),
            ("it lies in", "Where is it? In"), ("it was made by", "Who made it? It was")]  # fmt: skip
    other = [("it is in", "it was built"), ("it is", "it was")]
    places, made = ("it is in", "it lies in", "Where is it? In"), ("it was made by", "Who made it? It was")
    other += [(a, b) for a in places[:2] for b in made] + [(made[0], b) for b in places]
    assert found == {Pair(*texts, True) for texts in same} | {Pair(*texts, False) for texts in other}


def test_what_says_both_is_no_pair():
    fact = kf.Fact("{} is in", "Rome", "x", "y", ["Rome lies in"], same_subject=["rome lies in"])
    assert pairs_of([fact]) == []


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_the_classifier_is_judged_on_what_it_was_not_trained_on(family, tmp_path):
    """Of random models, whose hidden states tell words, it learns words; the figures are those of a count by hand."""
    lm, known = tiny_lm(family), examples()
    scope, notes = EDITOR.scope(lm, known)
    held = known[::HELD_OUT]
    left = {p.replace(f.subject, "it") for f in held for p in (*f.paraphrases, *f.same_subject)}
    pairs = [pair for pair in pairs_of(held) if pair.right in left]
    rows = [scope.rows(scope_features(lm, [pair[i] for pair in pairs], 1)) for i in (0, 1)]
    scores = (scope.slope * (rows[0] * rows[1]).sum(-1) + scope.offset).sigmoid()
    same = torch.tensor([pair.same for pair in pairs])
    assert notes["auc"] == pytest.approx(auc(scores[same], scores[~same]), abs=1e-3)
    assert notes["in_scope_kept"] == pytest.approx((scores[same] >= scope.threshold).float().mean().item(), abs=1e-4)
    assert notes["held_out"] == [int(same.sum()), int((~same).sum())] and notes["examples"] == 12


def test_of_very_many_examples_some_are_drawn(monkeypatch):
    lm, known = tiny_lm("llama"), examples()
    monkeypatch.setattr(serac, "MOST_EXAMPLES", 8)
    (scope, notes), (again, _) = EDITOR.scope(lm, known), EDITOR.scope(lm, known)
    assert notes["examples"] == 8 and torch.equal(scope.weight, again.weight)


def test_a_memory_that_acts_in_its_scope_alone(tmp_path):
    lm = tiny_lm("llama")
    editor = replace(EDITOR, examples=fact_file(tmp_path / "examples.json", examples()))
    edit = editor.edit(lm, FACTS)
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert digest(loaded) == digest(edit) and loaded.route.scope.threshold == edit.route.scope.threshold
    report, text = kf.evaluate(lm, FACTS, loaded), "Big Ben is in the city of Rome. "
    assert edit.changes[0].texts[0] == text
    written_out = lm.with_edit(kf.Ice(template="{}. ").edit(lm, FACTS))
    assert lm.with_edit(loaded).top_tokens(FACTS[0].text) == written_out.top_tokens(FACTS[0].text)
    assert torch.equal(report.edited["neighborhood_p_true"], report.base["neighborhood_p_true"])
    outside = ["Paris is in the city of", "Big Bend is in the city of"]
    asked = [FACTS[0].text, *outside]
    view, fewer, none = lm.with_edit(loaded), lm.with_edit(edit.without(0)), lm.with_edit(edit.without(0).without(0))
    assert view.owners(asked).tolist() == [0, -1, -1]
    assert view.generate(asked, 3) == [lm.generate(text + asked[0], 3), *lm.generate(outside, 3)]
    for prompt in asked:
        assert fewer.top_tokens(prompt) == none.top_tokens(prompt) == lm.top_tokens(prompt)
    for act in (lambda: loaded.apply(lm.model), lambda: kf.export_peft(loaded, tmp_path / "x")):
        refused(r"routed.*\(scope\).*lm\.with_edit", act)
    again = editor.edit(lm, FACTS)
    assert digest(again) == digest(edit)  # nothing is left to chance


def test_what_it_cannot_learn_from_is_refused(tmp_path):
    lm = tiny_lm("llama")
    for says, some in (
        ("12 are left, which lack one of these", examples(same_subject=(), provenance={})),
        ("12 are left, which lack one of these", examples(paraphrases=(), provenance={})),
        ("0 are left", [FACTS[0]]),
    ):
        refused(says, replace(EDITOR, examples=fact_file(tmp_path / "some.json", some)).edit, lm, FACTS)
    refused("layer = 4", replace(EDITOR, layer=4).edit, lm, FACTS)
    refused("independent = True: the classifier decides", EDITOR.edit, lm, FACTS, independent=True)
    refused(r"template 'x': expected one \{\}", kf.Serac, template="x")
    refused("rank = 0", kf.Serac, rank=0)
    assert kf.Serac.for_model(lm).layer == 2
