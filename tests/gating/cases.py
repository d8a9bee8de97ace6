"""A tiny model, a fact, a suite, and edits of known quality: one that fits, one that does nothing, one that wrecks."""

import torch

from kedit_fast.edits.deltas import Dense, LowRank
from kedit_fast.edits.edit import Edit
from kedit_fast.facts.fact import Fact
from kedit_fast.gating import Suite, Thresholds
from kedit_fast.gating.policy import EditPolicy
from kedit_fast.gating.questions import Sizes
from kedit_fast.gating.suite import Question
from kedit_fast.jobs.collect import collect
from kedit_fast.sweep.runs import RunList, add_sequences
from kedit_fast.sweep.sites import Site
from tests.conftest import open_tiny
from tests.tiny import D_FF, D_MODEL, tiny_model

LAYER = 3  # the last: an edit there changes the next token and nothing before it
FACT = Fact(
    "{} is located in the city of",
    "Big Ben",
    "Rome",
    "Paris",
    paraphrases=("Big Ben is in", "The headquarters of Big Ben is in", "Because Big Ben is in"),
    neighborhood=("The Eiffel Tower is located in the city of", "The Eiffel Tower is in"),
    same_subject=("Big Ben plays the",),
)
OTHERS = (
    "The capital of Spain is", "The mother tongue of Thomas Joannes is", "Toyota Camry is produced by",
    "Miles Davis plays the", "Beats Music is owned by", "Vimeo is",
)  # fmt: skip
TEXT = "Thelonious Monk plays the piano. Zürich is located in Switzerland."
SUITE = Suite(specificity=tuple(map(Question, OTHERS)), text=(TEXT,), name="own")
LIMITS = dict(
    min_probes=4, min_paraphrases=3, min_specificity_prompts=9, min_text_tokens=10, policy=EditPolicy(max_growth=10.0)
)  # fmt: skip
SIZES = Sizes(max_new_tokens=2, context_tokens=40)


def make_lm(**options):
    return open_tiny(tiny_model("llama", **options))


def limits(**changes):
    return Thresholds(**LIMITS | changes)


def judged(gate, lm, edit, suite=SUITE, **options):
    """The gate with the limits and sizes of this file, and no facts but the suite's."""
    options = {"thresholds": limits(), "sizes": SIZES, "builtin": False} | options
    return gate(lm, edit, suite, **options)


def make_edit(lm, deltas, fact=FACT, **changes):
    return Edit("by hand", {}, lm.fingerprint, (fact,), deltas, **changes)


def keys_of(lm, sequences, every_token=False):
    """Keys [n, d_ff] of the last layer at each sequence's last token, or at all its tokens."""
    runs = RunList()
    number = add_sequences(runs, sequences, owner=-1)
    places = [(i, p) for i, ids in enumerate(sequences) for p in range(0 if every_token else len(ids) - 1, len(ids))]
    run = number[torch.tensor([i for i, _ in places])]
    pos = torch.tensor([p for _, p in places])
    return collect(lm, runs.runs(), Site.mlp_key, [LAYER], run, pos)[LAYER]


def good_edit(lm, fact=FACT, also=(), size=200.0):
    """Answers every wording of the fact, and changes nothing at the prompts and the text that the suite asks for.

    Least squares over keys: each wording's key goes to the new answer's row of the head, the answer's own to that of a
    full stop, all others to 0. Exact, as there are fewer keys than features.
    also: (prompt, answer or None) that are answered too, or held
    """
    wordings = [lm.encode(prompt) for prompt in (fact.text, *fact.paraphrases)]
    ids = [one_token(lm, text) for text in (" " + fact.target_new, ".")]
    held = keys_of(lm, [lm.encode(p) for p in (*fact.neighborhood, *fact.same_subject, *OTHERS)])
    extra = keys_of(lm, [lm.encode(prompt) for prompt, _ in also]) if also else held[:0]
    text = keys_of(lm, [lm.encode(TEXT)], every_token=True)
    moved = keys_of(lm, wordings + [[*prompt, ids[0]] for prompt in wordings])
    keys = torch.cat([moved, extra, held, text]).double()
    assert len(keys) <= D_FF
    values = torch.zeros(len(keys), D_MODEL, dtype=torch.float64)
    targets = [*([ids[0]] * len(wordings)), *([ids[1]] * len(wordings))]
    targets += [None if answer is None else one_token(lm, " " + answer) for _, answer in also]
    head = lm.model.get_output_embeddings().weight.detach().double()
    for i, token in enumerate(targets):
        if token is not None:
            values[i] = size * head[token] / head[token].norm()
    return make_edit(lm, {LAYER: Dense(torch.linalg.lstsq(keys, values).solution.T.float())}, fact)


def one_token(lm, text):
    (token,) = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    return token


def nothing(lm):
    return make_edit(lm, {LAYER: LowRank(torch.zeros(D_MODEL, 1), torch.zeros(D_FF, 1))})


def wreck(lm, scale=20.0):
    generator = torch.Generator().manual_seed(0)
    return make_edit(lm, {1: Dense(scale * torch.randn(D_MODEL, D_FF, generator=generator))})
