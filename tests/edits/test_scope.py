"""The scope classifier: what it learns, where its threshold is, what its route makes of prompts."""

from dataclasses import replace

import pytest
import torch
from sklearn.metrics import roc_auc_score

import kedit_fast as kf
from kedit_fast.edits.changes import PromptChange
from kedit_fast.edits.edit import Edit, digest
from kedit_fast.edits.scope import Scope, ScopeRoute, auc, best_threshold, scope_features, unnamed
from tests.conftest import close, refused, tiny_lm

SETTINGS = {"layer": 1, "rank": 8, "steps": 100, "lr": 0.01, "seed": 0}
SUBJECTS = ("Big Ben", "Toyota Camry", "Big Ben")
BLANKS = ("it is in the city of", "it is produced by", "it was built by")


def toy(n=80, d=60, kinds=4):
    """Rows of which six numbers tell a kind, the others nothing; all pairs of them; their kinds."""
    draw = torch.Generator().manual_seed(0)
    kind = torch.arange(n) % kinds
    rows = 2 * torch.randn(n, d, generator=draw)
    rows[:, :6] = torch.randn(kinds, 6, generator=draw)[kind] + 0.1 * torch.randn(n, 6, generator=draw)
    rows = rows * torch.linspace(0.1, 9, d) + 5  # of no common size, and far from 0
    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    return rows, pairs[pairs[:, 0] != pairs[:, 1]], kind


def test_it_learns_what_makes_two_prompts_alike():
    """On rows that it was not trained on; the same numbers each time."""
    rows, pairs, kind = toy()
    same = kind[pairs[:, 0]] == kind[pairs[:, 1]]
    seen = (pairs < 60).all(1)
    held = (pairs >= 60).all(1)
    scope = Scope.fit(rows, pairs[seen], same[seen], **SETTINGS)
    scores = scope.on_pairs(rows, pairs[held])
    learned = auc(scores[same[held]], scores[~same[held]])
    standardized = torch.nn.functional.normalize((rows - rows.mean(0)) / rows.std(0), dim=-1)
    plain = (standardized[pairs[held, 0]] * standardized[pairs[held, 1]]).sum(-1)
    assert learned > 0.95 > 0.8 > auc(plain[same[held]], plain[~same[held]])
    again = Scope.fit(rows, pairs[seen], same[seen], **SETTINGS)
    assert torch.equal(scope.weight, again.weight) and scope.slope == again.slope
    matrix = scope.scores(scope.rows(rows), scope.rows(rows))
    close("pairs", matrix[pairs[held, 0], pairs[held, 1]], scores)
    refused(
        "learned from pairs that ask the same and pairs that do not",
        Scope.fit,
        rows,
        pairs,
        torch.ones_like(same),
        **SETTINGS,
    )


def test_auc_and_threshold_are_what_they_say():
    draw = torch.Generator().manual_seed(1)
    inside, outside = torch.rand(40, generator=draw) + 0.3, torch.rand(90, generator=draw).round(decimals=1)
    labels = [1] * 40 + [0] * 90
    assert auc(inside, outside) == pytest.approx(roc_auc_score(labels, torch.cat([inside, outside]).tolist()))
    assert auc(inside, inside) == 0.5
    at = best_threshold(inside, outside)

    def right(threshold):
        return (inside >= threshold).float().mean() + (outside < threshold).float().mean()

    assert right(at).item() == pytest.approx(max(right(t).item() for t in torch.linspace(-0.1, 1.4, 3001).tolist()))
    assert 0.2 < best_threshold(torch.tensor([0.3, 0.4]), torch.tensor([0.1, 0.2])) < 0.3


def test_a_subject_gives_place_to_it():
    assert unnamed("BIG  BEN is near Big Ben", "Big Ben") == "it is near it"
    assert unnamed("The Iowan city", "Rome") is None


def routed(lm):
    """Entries of one subject and of another, and a scope that learned nothing: alike is what is spelled so."""
    rows = scope_features(lm, BLANKS, 1)
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(16, rows.shape[1], generator=draw)
    scope = Scope(1, weight, rows.mean(0), rows.std(0) + 0.1, 10.0, -9.0, threshold=0.5)
    route = ScopeRoute(scope, SUBJECTS, scope.rows(rows), torch.arange(3))
    facts = [kf.Fact(blank.replace("it", "{}", 1), s, "Rome") for blank, s in zip(BLANKS, SUBJECTS, strict=True)]
    texts = PromptChange([f"{fact.text} Rome. " for fact in facts], [()] * 3, owners=torch.arange(3))
    return Edit("scoped", {}, lm.fingerprint, facts, [texts], route=route)


ASKED = [
    "Big Ben is in the city of",
    "big ben was built by",
    "Paris is in the city of",
    "Toyota Camry is in the city of",
]


def test_a_prompt_is_in_the_scope_of_what_it_names_and_asks(tmp_path):
    lm = tiny_lm("llama")
    edit = routed(lm)
    assert edit.route.choose(lm, [*ASKED, lm.encode("Toyota Camry is produced by")]).tolist() == [0, 2, -1, -1, 1]
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert digest(loaded) == digest(edit) and torch.equal(loaded.route.choose(lm, ASKED), edit.route.choose(lm, ASKED))
    view = lm.with_edit(loaded)
    texts = [view.generate(prompt, 3) for prompt in ASKED]
    assert texts[0] == lm.generate("Big Ben is in the city of Rome. " + ASKED[0], 3)
    assert texts[2:] == lm.generate(ASKED[2:], 3) and view.generate(ASKED, 3) == texts
    fewer = edit.without(0)
    assert lm.with_edit(fewer).owners(ASKED).tolist() == [-1, 1, -1, -1]
    assert lm.with_edit(fewer).top_tokens(ASKED[0]) == lm.top_tokens(ASKED[0])
    assert fewer.without(0).without(0).route.choose(lm, ASKED).tolist() == [-1] * 4


def test_what_does_not_fit_is_refused():
    lm = tiny_lm("llama")
    route = routed(lm).route
    refused(r"rows of a scope's entries: expected \[3, 16\], got \[2, 16\]", replace, route, rows=route.rows[:2])
    refused("shift, scale: expected", replace, route.scope, shift=route.scope.shift[:3])
    refused("expected finite fp32", replace, route.scope, weight=route.scope.weight.double())
    refused("this model has layers 0 to 3", replace(route, scope=replace(route.scope, layer=7)).check, lm)
    thin = replace(route.scope, weight=torch.ones(16, 8), shift=torch.ones(8), scale=torch.ones(8))
    refused("keys of width 8, this model's layer_out has 48", replace(route, scope=thin).check, lm)
