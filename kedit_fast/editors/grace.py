"""GRACE: Aging with GRACE, Lifelong Model Editing with Discrete Key-Value Adaptors (Hartvigsen et al. 2023,
arXiv:2211.11031).

A codebook beside one layer's down projection, whose weights stay as they are. A key is the input k of the projection at
the last token of a fact's prompt, with a radius ε; its value takes the place of the projection's output there:

    h = V_i  where i is the nearest key and ‖k - K_i‖ <= ε_i,  else h = W k        (section 3)

Facts come one after the other. One whose key is farther than ε_i + ε_init from the nearest gets a key of its own; a
nearer one of the same answer widens that key's radius to reach it (expand), one of another answer halves the distance
between the two (split). Values are found by Adam; all of them in shared sweeps, for none sees another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.state import wide
from kedit_fast.editors.editor import Editor, Found, Work, Written
from kedit_fast.editors.hyperparameters import published
from kedit_fast.editors.memory import MEMORY_UNREAD, layers_of, one_layer, only
from kedit_fast.edits.memories import MemoryChange
from kedit_fast.edits.routes import NearestRoute, distances, prompt_features
from kedit_fast.facts.tokens import fact_answer, fact_tokens
from kedit_fast.jobs.values import ValueSettings, ValueTask, optimize_values
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.sweep.sites import Site

UNBOUNDED = 1e9  # ‖δ‖ / ‖start‖: nothing holds a value near where it began
SPLIT = 1e-5  # by which a split leaves the older key short of the middle (published)
# eps**0.75 of a dtype is what a row moves by, of its length, when it is computed beside others: 6e-6 in fp32.
ROUNDING = 0.75


@dataclass(frozen=True)
class Grace(Editor):
    """GRACE: a codebook in a layer; a prompt whose key is near enough to a fact's gets the fact's value.

    Hyper-parameters under their published names; ``edit`` does the work.

    layers: one; edit_lr, n_iter: of Adam on a value; eps: ε_init, the radius of a new key
    eps_expand: "coverage": an expanded radius reaches the new key; replacement: "replace_last": the row of the prompt's
        last token; val_init: "warm": a value begins as the row that it replaces. The only ones there are here
    source: where these settings come from, for whoever reads the edit

    Differs: the prompt alone is looked at, once, where the published code looks again at each token that is written;
    a value is done below 0.05 nats; it begins warm where published files begin at random numbers; a split narrows the
    older radius and never widens it; an expanded radius reaches beyond the new key by what rounding moves a row.
    """

    layers: tuple[int, ...] = ()
    edit_lr: float = 1.0
    n_iter: int = 100
    eps: float = 1.0
    eps_expand: str = "coverage"
    replacement: str = "replace_last"
    val_init: str = "warm"
    source: str = "given"

    METHOD: ClassVar = "grace"
    ALG_NAMES: ClassVar = {"GRACE": {}}
    POSITIVE: ClassVar[tuple[str, ...]] = ("edit_lr", "n_iter")
    IN_FILES: ClassVar = {
        "inner_params": layers_of, "dist_fn": only("euc"), "val_train": only("sgd"), "val_reg": only("None", None),
        "reg": only("early_stop"), "num_pert": lambda _: {}, "dropout": only(0, 0.0),
    }  # fmt: skip
    STAGES: ClassVar = ("reading keys", "optimizing values")
    NEEDS_SUBJECT: ClassVar = False  # it reads prompts and targets alone
    NEEDS_CONTEXTS: ClassVar = False
    mom2_adjustment: ClassVar = False
    UNREAD: ClassVar = MEMORY_UNREAD

    def __post_init__(self):
        if self.val_init == "cold":  # of published files
            object.__setattr__(self, "val_init", "warm")
        super().__post_init__()
        for name, value in (("eps_expand", "coverage"), ("replacement", "replace_last"), ("val_init", "warm")):
            checks.choice(name, getattr(self, name), [value])
        one_layer(self)

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "Grace":
        """Published settings where there are some for this model, else derived ones; ``source`` says which.

        Derived: two thirds of the depth. On SmolLM2-135M ten facts at layers 10, 20 and 25 are all said (P(new) 0.97,
        in 4 to 15 steps, ε 0.5), and none of their paraphrases (0.001): keys of these are farther (median 7.4 at layer
        10, 21.6 at 25) than the nearest other fact's (3.9 and 12.8), so no radius tells them apart.
        """
        known = published(PUBLISHED, lm)
        if known is not None:
            return cls(layers=(known.layer,), n_iter=known.n_iter, source=f"published for {known.name}")
        return cls(layers=(2 * lm.n_layers // 3,), source=f"derived for {lm.n_layers} layers")

    def write(self, work: Work) -> Written:
        """Keys of all prompts in one sweep, the codebook, then the values of its entries together. A phrasing comes
        behind its fact, with a key of its own where it needs one."""
        lm, facts, (layer,) = work.lm, work.facts, self.layers
        asked = [(i, one) for i, fact in enumerate(facts) for one in (fact, *fact.phrased())]
        prompts = [list(fact_tokens(lm.tokenizer, one).ids) for _, one in asked]
        targets = [fact_answer(lm.tokenizer, one) for _, one in asked]
        rounding = torch.finfo(lm.dtype).eps ** ROUNDING
        rows = prompt_features(lm, prompts, layer, Site.mlp_key)
        book = codebook(rows, targets, self.eps, rounding, [i for i, _ in asked])
        tasks = [
            ValueTask([prompts[i]], [len(prompts[i]) - 1], [targets[i]], prompts[i], asked[i][1].label)
            for i in book.made_by
        ]
        found = optimize_values(lm, tasks, self._value_settings(lm), work.keep)
        whose = torch.tensor([i for i, _ in asked])
        own = torch.tensor([place for place, (i, one) in enumerate(asked) if one is facts[i]])
        entry, values = book.entry[own], found.values.cpu().to(lm.dtype)
        keys, radius = book.keys.to(lm.dtype), book.radius.to(wide(lm.dtype))
        return Written(
            [MemoryChange(layer, values, torch.arange(len(values)), Site.mlp_out)],
            Found.of(*(getattr(found, name)[entry] for name in ("steps", "loss", "nll"))),
            layers={layer: {"entries": len(values), "expanded": len(asked) - len(values), "split": book.n_split}},
            route=NearestRoute(layer, keys, radius, entry, Site.mlp_key, whose[book.made_by]),
        )

    def _value_settings(self, lm) -> ValueSettings:
        return ValueSettings(
            layer=self.layers[0], site=Site.mlp_out, lr=self.edit_lr, steps=self.n_iter + 1, weight_decay=0.0,
            kl_factor=0.0, clamp=UNBOUNDED, loss_layer=lm.n_layers - 1,
        )  # fmt: skip


class Codebook(NamedTuple):
    """keys [m, width], radius [m]; entry [n]: of each prompt; made_by [m]: the prompt that each key is of; n_split:
    prompts that halved a distance."""

    keys: Tensor
    radius: Tensor
    entry: Tensor
    made_by: list[int]
    n_split: int


def codebook(rows: Tensor, labels: Sequence, eps: float, rounding: float = 0.0, whose: Sequence[int] = ()) -> Codebook:
    """The codebook of prompts that come one after the other (algorithm 1). rows: [n, width]; labels: [n], equal where
    two have one answer; eps: ε_init; rounding: of a row, relative to its length, when it is computed anew: a prompt
    that widened a radius would else lie on its very edge, in it or out of it with what is asked beside it; whose: [n]
    the fact of each, its own prompt before its phrasings: these join no other fact's key, which may be taken out"""
    made_by: list[int] = []
    radius: list[float] = []
    entry: list[int] = []
    n_split = 0
    away = distances(rows, rows)
    for i, label in enumerate(labels):
        least, nearest = min(((float(away[i, j]), m) for m, j in enumerate(made_by)), default=(math.inf, -1))
        is_near = nearest >= 0 and least <= eps + radius[nearest]
        agrees = is_near and label == labels[made_by[nearest]]
        if agrees and (not whose or whose[i] == whose[made_by[nearest]] or i == whose.index(whose[i])):
            radius[nearest] = max(radius[nearest], least + rounding * float(rows[i].norm()))
            entry.append(nearest)
            continue
        parts = is_near and not agrees
        if parts:
            radius[nearest], n_split = min(radius[nearest], least / 2 - SPLIT), n_split + 1
        entry.append(len(made_by))
        made_by.append(i)
        radius.append(least / 2 if parts else eps)
    return Codebook(rows[made_by], torch.tensor(radius, dtype=rows.dtype), torch.tensor(entry), made_by, n_split)


class _Known(NamedTuple):
    """What was published for a model. v_loss_layer: its last layer, by which ``published`` tells it from namesakes."""

    name: str
    v_loss_layer: int
    layer: int
    n_iter: int = 50


# edit_lr 1, eps 1 for all. gpt2-xl's codebook stands beside another matrix (c_fc of layer 35).
PUBLISHED = {
    known.name: known
    for known in (
        _Known("gpt-j-6B", 27, 25, 200), _Known("Llama-2-7b-hf", 31, 27), _Known("Llama-3.2-3B-Instruct", 27, 27),
        _Known("Qwen2.5-7B", 27, 18),
    )
}  # fmt: skip
