"""Edits of a real model: what they must change, and what they must not.

One function judges them all, and it must find what editors do that wreck the model.
"""

import random
from dataclasses import replace

import pytest

import kedit_fast as kf
from kedit_fast.facts import OWN_FACTS

pytestmark = pytest.mark.smollm2

CONTEXTS = [["{}"], ["The day was long. {}", "Because of this, many people came to see it. {}"]]
# Neither on facts nor in their form.
PROSE = """
The rain had stopped before morning, and the road to the village was covered with leaves. She put the basket down at
the door, knocked twice and waited. Nobody came. Through the window she could see that the fire had gone out, that the
chairs stood where they had always stood, and that somebody had left a letter on the table. It was not like him to
leave without a word. She walked around the house, past the old well and the apple trees, and called his name. A dog
answered from the other side of the river. When she came back, the door was open, and the letter was gone.

To make a simple soup, cut two onions and a carrot into small pieces and cook them slowly in a little oil. Add a liter
of water, salt, pepper and a handful of rice, and let it cook for twenty minutes. If you like, add some lemon juice and
fresh herbs at the end. The soup is better on the next day, but it should be kept in a cold place and heated only once.
"""


@pytest.fixture(scope="module")
def facts():
    """(four to edit, of different relations; others that share no subject with them), from the package's own file."""
    known = kf.load_facts(OWN_FACTS)
    edited = [replace(fact, neighborhood=fact.neighborhood[:4]) for fact in (known[0], known[1], known[3], known[8])]
    others = [replace(fact, paraphrases=(), neighborhood=(), same_subject=()) for fact in known[20:60:2]]
    return edited, others


@pytest.fixture(scope="module")
def moments(smollm2, facts):
    """Statistics over true sentences on other subjects than the edited ones."""
    edited = {fact.subject for fact in facts[0]}
    sentences = [
        f"{prompt} {fact.target_true}."
        for fact in kf.load_facts(OWN_FACTS)
        for prompt in (fact.text, *fact.paraphrases, *fact.neighborhood)
        if fact.subject not in edited
    ]
    random.Random(0).shuffle(sentences)
    return kf.second_moments(smollm2, kf.Memit.for_model(smollm2).layers, [" ".join(sentences)], n_tokens=3 * 1536)


def reports(lm, facts, edit):
    """(report on the edited facts, with the prose; report on the others)."""
    edited, others = facts
    edited = [fact for fact in edited if fact in edit.facts]
    return kf.evaluate(lm, edited, edit, text=PROSE), kf.evaluate(lm, others, edit)
