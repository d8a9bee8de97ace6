"""Edits of a real model: what they must change, and what they must not.

One function judges them all, and it must find what wrecks a model or writes nothing.
"""

import random
from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.edits.deltas import LowRank
from kedit_fast.facts.fact import OWN_FACTS

pytestmark = pytest.mark.smollm2

CONTEXTS = [["{}"], ["The day was long. {}"]]
# 1,024 tokens have no inverse of their own; they, twelve steps and one context are what a test has time for.
SHORT = {"v_num_grad_steps": 12, "regularizer": 0.01}
N_TOKENS = 1024
# Neither on facts nor in their form.
PROSE = """
The rain had stopped before morning, and the road to the village was covered with leaves. She put the basket down at
the door, knocked twice and waited. Nobody came. Through the window she could see that the fire had gone out, that the
chairs stood where they had always stood, and that somebody had left a letter on the table.

To make a simple soup, cut two onions and a carrot into small pieces and cook them slowly in a little oil. Add a liter
of water, salt, pepper and a handful of rice, and let it cook for twenty minutes.
"""


@pytest.fixture(scope="module")
def facts():
    """(three to edit, of different relations; others that share no subject with them), from the package's own file."""
    known = kf.load_facts(OWN_FACTS)
    edited = [
        replace(fact, paraphrases=fact.paraphrases[:1], neighborhood=fact.neighborhood[:2])
        for fact in (known[0], known[3], known[8])
    ]
    others = [replace(fact, paraphrases=(), neighborhood=(), same_subject=()) for fact in known[20:60:7]]
    return edited, others


@pytest.fixture(scope="module")
def edits(smollm2, facts):
    """{method: edit}: ROME writes the first fact, MEMIT all three. Statistics over true sentences on other subjects,
    kept nowhere."""
    subjects = {fact.subject for fact in facts[0]}
    sentences = [
        f"{prompt} {fact.target_true}."
        for fact in kf.load_facts(OWN_FACTS)
        for prompt in (fact.text, *fact.paraphrases, *fact.neighborhood)
        if fact.subject not in subjects
    ]
    random.Random(0).shuffle(sentences)
    rome, memit = (replace(kf.EDITORS[name].for_model(smollm2), **SHORT) for name in ("rome", "memit"))
    layers = {*rome.layers, *memit.layers}
    moments = kf.second_moments(smollm2, layers, [" ".join(sentences)], n_tokens=N_TOKENS)
    return {
        "rome": rome.edit(smollm2, facts[0][:1], moments=moments, contexts=CONTEXTS),
        "memit": memit.edit(smollm2, facts[0], moments=moments, contexts=CONTEXTS),
    }


def complaints(lm, facts, edit) -> set[str]:
    """What is wrong with a model that carries an edit; empty for a good one."""
    edited = [fact for fact in facts[0] if fact in edit.facts]
    report = kf.evaluate(lm, [*edited, *facts[1]], edit, text=PROSE)
    on, off = slice(len(edited)), slice(len(edited), None)

    def mean(name, which, side="edited"):
        return getattr(report, side)[name][which].nanmean().item()

    def kept(name, which):
        return mean(name, which) / mean(name, which, "base")

    good = {
        "not written": mean("p_new", on) >= 0.85,
        "not in other words": mean("paraphrase_p_new", on) >= 0.5,
        "other facts lost": abs(kept("p_true", off) - 1) < 0.06,
        "neighbors lost": kept("known_neighbors_p_true", on) >= 0.7,
        # Measured: half of them go on as before, for both methods. A known weakness of theirs, no aim.
        "subject lost": mean("same_subject_same_top", on) >= 0.4,
        "language lost": abs(report.drift) < 0.03,
    }
    return {name for name, is_good in good.items() if not is_good}


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_an_edit_writes_its_facts_and_leaves_the_rest(method, smollm2, facts, edits):
    assert complaints(smollm2, facts, edits[method]) == set()


def test_values_come_nearer_layer_by_layer(edits):
    """MEMIT's ||z - h|| on a trained Llama, whose layers do not answer a change with anything."""
    notes = edits["memit"].provenance["layers"]
    missing = [notes[str(layer)]["missing"] for layer in edits["memit"].layers]
    assert missing == sorted(missing, reverse=True) and missing[-1] < 0.8 * missing[0]


def times(factor):
    return lambda layer, delta: (layer, LowRank(factor * delta.u, delta.v))


def at_random(layer, delta):
    """Of the same norm."""
    generator = torch.Generator().manual_seed(layer)
    made = LowRank(*(torch.randn(factor.shape, generator=generator) for factor in (delta.u, delta.v)))
    return layer, LowRank(made.u * (delta.norm() / made.norm()), made.v)


def layers_up(n):
    return lambda layer, delta: (layer + n, delta)


UNWRITTEN = {"not written", "not in other words"}
HARM = {"other facts lost", "neighbors lost", "language lost"}


@pytest.mark.parametrize(
    ("method", "change", "found"),
    [
        ("rome", times(20), {"neighbors lost", "language lost"}),  # written nevertheless; 5 times is still no harm
        ("memit", times(5), HARM),
        ("memit", times(20), UNWRITTEN | HARM | {"subject lost"}),
        ("memit", at_random, UNWRITTEN),
        ("memit", layers_up(10), UNWRITTEN),
        ("rome", layers_up(-3), UNWRITTEN),
    ],
    ids=["rome x20", "memit x5", "memit x20", "random", "memit at the wrong layers", "rome at the wrong layer"],
)
def test_what_is_no_good_edit_is_found(method, change, found, smollm2, facts, edits):
    """Each complaint is heard at least once, so none of them is deaf."""
    edit = edits[method]
    wrecked = replace(edit, changes=dict(change(layer, delta) for layer, delta in edit.deltas.items()), keys={})
    assert found <= complaints(smollm2, facts, wrecked)
