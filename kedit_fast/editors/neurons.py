"""Knowledge neurons, rewritten, erased or amplified (Dai et al. 2022, Knowledge Neurons in Pretrained Transformers,
arXiv:2104.08696, sections 3 and 5).

The neurons by which the model says its answer o are found by integrated gradients (``jobs/neurons.py``). The column of
the down projection that belongs to a neuron is what it says, its value slot w_i:

    rewrite   w_i += ‖w_i‖ (-λ₁ e(o) / ‖e(o)‖ + λ₂ e(o*) / ‖e(o*)‖)
    erase     w_i  = 0        suppress: the same, a neuron that is 0 and one that says nothing are one
    amplify   w_i *= 2
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.editors.editor import Editor, Work, Written
from kedit_fast.edits.changes import WeightChange
from kedit_fast.edits.deltas import FLOATS, LowRank, as_smallest, storable
from kedit_fast.facts.fact import Fact
from kedit_fast.facts.tokens import fact_answer
from kedit_fast.facts.wordings import wordings
from kedit_fast.jobs.neurons import NeuronSettings, Wordings, attribute, chosen
from kedit_fast.model.family import projection
from kedit_fast.model.lm import LM, takes_lm

FACTORS = {"erase": -1.0, "suppress": -1.0, "amplify": 1.0}  # what is added of the column itself


@dataclass(frozen=True)
class KnowledgeNeurons(Editor):
    """Knowledge neurons: finds the few that give a fact's answer, and rewrites, erases or amplifies them.

    Hyper-parameters under their published names where they have one; ``edit`` does the work.

    layers: where neurons are looked for; none: in all
    mode: "rewrite" (to target_new), "erase", "suppress" or "amplify" what the model says now
    steps: m, points of the integral; adaptive_threshold: t, of a wording's largest attribution
    refine: whether a neuron has to be shared by more than the share p of the wordings (the prompt, and phrasings)
    common: of the other facts of a relation, the share from which on a neuron is not one fact's
    lambda1, lambda2: how much of the old answer's row of the head is taken out of a value slot, and of the new one's
        put in, in lengths of the slot
    source: where these settings come from, for whoever reads the edit

    The old answer is the fact's target_true, else the model's own likeliest token.

    Differs: answers of several tokens go by the rows of their first ones, since neurons speak at the prompt's last
    token (published for one token; the ROME paper's baseline adds up all, unscaled); the head's rows where it is not
    tied to the embedding; erased are each fact's own neurons (published: the 20 that most facts of a relation share).
    """

    layers: tuple[int, ...] = ()
    mode: str = "rewrite"
    steps: int = 20
    adaptive_threshold: float = 0.2
    refine: bool = True
    p: float = 0.4
    common: float = 0.1
    lambda1: float = 1.0
    lambda2: float = 8.0
    source: str = "given"

    METHOD: ClassVar = "kn"
    ALG_NAMES: ClassVar[dict[str, dict]] = {"KN": {}}
    IN_FILES: ClassVar = dict.fromkeys(("lr_scale", "n_toks"), lambda value: {})  # the published code reads neither
    POSITIVE: ClassVar[tuple[str, ...]] = ("steps",)
    STAGES: ClassVar = ("integrating over keys",)
    NEEDS_SUBJECT: ClassVar = False
    NEEDS_NEW: ClassVar = False
    NEEDS_CONTEXTS: ClassVar = False
    mom2_adjustment: ClassVar = False
    GENTLER: ClassVar[str] = "change fewer neurons (a larger adaptive_threshold), or by smaller lambda1 and lambda2"
    UNREAD: ClassVar = dict.fromkeys(
        ("moments", "corpus", "contexts"), "knowledge neurons are found by prompts alone; leave it out"
    )

    def __post_init__(self):
        super().__post_init__()
        checks.choice("mode", self.mode, ("rewrite", *FACTORS))
        for name in ("adaptive_threshold", "p", "common"):
            checks.number(name, getattr(self, name), least=0, most=1, like=0.4)

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "KnowledgeNeurons":
        """The published settings, which are the same for all models."""
        return cls(layers=tuple(range(lm.n_layers)), source="published for all models")

    def check(self, lm: LM) -> None:
        """Raises ValueError for layers that the model does not have, and for packed weights, which have no columns."""
        checks.layers("layers", self.layers, lm.n_layers, empty=True)
        for layer in self._layers(lm):
            if (dtype := projection(lm.model, layer).weight.dtype) not in FLOATS:
                raise ValueError(f"columns of W are edited, and the weights of layer {layer} are packed ({dtype})")

    def check_facts(self, facts: Sequence[Fact]) -> None:
        """Raises ValueError for a fact without a new answer where one is to be written."""
        for fact in facts:
            if self.mode == "rewrite" and fact.target_new is None:
                raise ValueError(f"fact {fact.label} has no target_new; mode 'rewrite' needs the answer to write")

    def _layers(self, lm: LM) -> tuple[int, ...]:
        return self.layers or tuple(range(lm.n_layers))

    def settings(self, lm: LM) -> NeuronSettings:
        """How the neurons are found."""
        share = self.p if self.refine else None
        return NeuronSettings(self._layers(lm), self.steps, self.adaptive_threshold, share, self.common)

    def write(self, work: Work) -> Written:
        """The neurons of all facts, then their columns."""
        lm, how = work.lm, self.settings(work.lm)
        asked = [Wordings(*wordings(lm.tokenizer, fact, fact.phrased())) for fact in work.facts]
        found = attribute(lm, asked, how, work.keep)
        neurons = chosen(asked, found, how)
        if not any(map(len, neurons)):
            raise ValueError(
                "no fact has neurons of its own that enough of its wordings share; lower p or adaptive_threshold, "
                "raise common, or say refine=False"
            )
        old = [one.answers[0][0] for one in found]
        layer = torch.cat(neurons) // lm.d_ff
        owner = torch.arange(len(neurons)).repeat_interleave(torch.tensor([len(mine) for mine in neurons]))
        changes = []
        for i in layer.unique().tolist():
            mine = layer == i
            changes.append(self._change(work, i, torch.cat(neurons)[mine] % lm.d_ff, owner[mine], old))
        notes = {change.layer: {"neurons": int((layer == change.layer).sum())} for change in changes}
        about: dict[str, Any] = {"neurons": [len(mine) for mine in neurons]}
        about["p_old"] = [round(one.p[0].item(), 5) for one in found]
        return Written(changes, layers=notes, about=about)

    def _change(self, work: Work, layer: int, neuron: Tensor, owner: Tensor, old: list[int]) -> WeightChange:
        """Of the columns of one layer: neuron, owner [r], old: the first token of each fact's old answer."""
        lm = work.lm
        if self.mode != "rewrite" and not work.independent:
            neuron, owner = neuron.unique(), None
        slots = columns(lm, layer, neuron)
        if self.mode == "rewrite":
            assert owner is not None
            new = [fact_answer(lm.tokenizer, fact)[0] for fact in work.facts]
            toward = self.lambda2 * _direction(lm, new) - self.lambda1 * _direction(lm, old)
            added = slots.norm(dim=0) * toward[owner].T
        else:
            added = FACTORS[self.mode] * slots
        one_hot = torch.zeros(lm.d_ff, len(neuron), dtype=added.dtype)
        one_hot[neuron, torch.arange(len(neuron))] = 1
        delta = LowRank(storable(added, lm.dtype), storable(one_hot, lm.dtype))
        if work.independent:
            return WeightChange(layer, delta, owners=owner)
        return WeightChange(layer, as_smallest(delta))


def columns(lm, layer: int, neuron: Tensor) -> Tensor:
    """[d, r] columns of a layer's down projection with the edits that the model carries, fp64."""
    found = lm.source.weight(layer, "down").detach()[:, neuron.to(lm.device)].double().cpu()
    for edit in lm.edits:
        if (below := edit.weights.get((layer, "down"))) is not None:
            found = found + below.dense()[:, neuron].double().cpu()
    return found


def _direction(lm, tokens: list[int]) -> Tensor:
    """[n, d] the head's row of each token, of length 1."""
    rows = lm.model.get_output_embeddings().weight.detach()[torch.tensor(tokens, device=lm.device)].double().cpu()
    return rows / rows.norm(dim=1, keepdim=True)
