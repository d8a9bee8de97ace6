"""Small edits of the tiny models, for the tests of what makes, keeps or applies edits."""

from contextlib import contextmanager

import pytest
import torch

from kedit_fast.basics.parts import Parts
from kedit_fast.edits.changes import WeightChange
from kedit_fast.edits.deltas import Dense, LowRank
from kedit_fast.edits.edit import Edit
from kedit_fast.facts.fact import Fact
from kedit_fast.model.fingerprint import fingerprint
from tests.tiny import D_FF, D_MODEL

TOWER = Fact(prompt="{} is in the city of", subject="The Eiffel Tower", target_new="Rome", target_true="Paris", id="t")
FACTS = (
    Fact(
        prompt="{} is in the city of",
        subject="The Eiffel Tower",
        target_new="Rome",
        target_true="Paris",
        paraphrases=("Where is The Eiffel Tower? In",),
        neighborhood=("The Louvre is in the city of",),
        same_subject=("The Eiffel Tower is made of",),
        id="7",
        provenance={"who": "Zoë", "why": "test"},
    ),
    Fact(prompt="{} plays the", subject="Miles Davis", target_new="piano", id="8"),
)


def lowrank(d=D_MODEL, d_ff=D_FF, rank=2, seed=0, scale=0.3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in (d, d_ff))
    return LowRank((u * scale).to(dtype), v.to(dtype))


def make_edit(model=None, deltas=None, owners=None, **changes):
    n = len(FACTS)
    deltas = {2: lowrank(seed=2), 1: Dense(lowrank(seed=1).dense())} if deltas is None else deltas
    owned = deltas if owners is None else [WeightChange(i, delta, owners=owners.get(i)) for i, delta in deltas.items()]
    fields = dict(
        method="memit",
        hparams={"layers": (1, 2), "mom2_update_weight": 15_000, "v_lr": 0.1},
        fingerprint=fingerprint(model) if model is not None else "",
        facts=FACTS,
        changes=owned,
        values=torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(3)),
        keys={1: torch.randn(n, D_FF, generator=torch.Generator().manual_seed(4)).bfloat16()},
        contexts=[["{}"], ["So. {}", "Nö. {}"]],
        provenance={"who": "a test", "fit": {1: 0.25}},
    )
    return Edit(**fields | changes)


def owned_edit(model=None):
    owners = {1: torch.tensor([1, 0]), 2: torch.tensor([0, 0])}
    return make_edit(model, deltas={1: lowrank(seed=1), 2: lowrank(seed=2)}, owners=owners)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model, before):
    after = model.state_dict()
    return before.keys() == after.keys() and all(
        after[name].dtype == tensor.dtype and torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8))
        for name, tensor in before.items()
    )


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[5, 17, 23, 42]])).logits


class Broken(Exception):
    """What a test throws."""


def watched(monkeypatch, owner, name, break_at=(), error=Broken, after=False):
    """The arguments of all calls of ``owner.name`` from now on. Those numbered in ``break_at``, from 1, raise: before
    they do their work, or after it."""
    function, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) in break_at and not after:
            raise error("broken by a test")
        made = function(*args, **kwargs)
        if len(calls) in break_at:
            raise error("broken by a test")
        return made

    monkeypatch.setattr(owner, name, call)
    return calls


class Killed(BaseException):
    """A run ends as by kill -9: no handler of errors sees it, but for blocks that clean up."""


@contextmanager
def killed_at(n: int):
    """Inside, the run of kept work dies when its ``n``-th part, from 1, is written."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        watched(patch, Parts, "write", break_at=(n,), error=Killed, after=True)
        yield
