"""MEND: a network turns the gradient of one edit into an edit (Mitchell et al. 2022, arXiv:2110.11309).

With the standardized factors z_t = [x_t; δ_t] of a matrix W_m at the tokens t of the edit, and a network that matrices
of one shape share (eq. 2 and 3 of the paper), two residual blocks of low rank:

    [x̃_t; δ̃_t] = g(z_t),   h <- h + max(s_m ∘ (U V h + b) + t_m, 0)
    ΔW_m = -α_m Σ_t δ̃_t x̃_tᵀ

Before training g is the identity: a step down the standardized gradient. Trained (``training.py``) on

    cedit · NLL(y | x', W + ΔW) + cloc · KL(p_W || p_{W+ΔW})        x': a paraphrase of the edit's prompt
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from kedit_fast.editors.networks import Network, Residual, Update
from kedit_fast.editors.trained import Trained
from kedit_fast.editors.training_settings import Training
from kedit_fast.jobs.gradients import Factors, Place
from kedit_fast.model.lm import LM, takes_lm


class MendNetwork(Network):
    """g for each shape of matrix, and α_m."""

    METHOD: ClassVar = "mend"
    LATE: ClassVar = False

    def __init__(self, fingerprint: str, shapes: Mapping[Place, tuple[int, int]], settings: dict):
        super().__init__(fingerprint, shapes, settings)
        generator = torch.Generator().manual_seed(settings["seed"])
        sharing: dict[tuple[int, int], list[Place]] = {}
        for place, shape in self.shapes.items():
            sharing.setdefault(shape, []).append(place)
        self.matrix = {place: i for places in sharing.values() for i, place in enumerate(places)}
        self.nets = nn.ModuleDict(
            {
                f"{out}x{width}": nn.ModuleList(
                    Residual(out + width, settings["rank"], len(places), generator, self.LATE)
                    for _ in range(settings["n_hidden"] + 1)
                )
                for (out, width), places in sharing.items()
            }
        )
        self.scales = nn.ParameterDict({"alpha": nn.Parameter(torch.full((len(shapes),), settings["edit_lr"]))})

    def transformed(self, factors: Mapping[Place, Factors], alone: bool) -> dict[Place, Update]:
        """ΔW = -α Σ_t δ̃_t x̃_tᵀ; of several facts the sum of theirs."""
        made = {}
        for place, found in factors.items():
            x, delta = self.pseudo(place, found)
            made[place] = Update(-self.scale("alpha", place) * delta, x, found.task)
        return made

    def pseudo(self, place: Place, found: Factors) -> tuple[Tensor, Tensor]:
        """x̃ [t, in] and δ̃ [t, out]."""
        out, width = self.shapes[place]
        z = torch.cat(self.standardized(place, found), 1)
        for block in cast(nn.ModuleList, self.nets[f"{out}x{width}"]):
            z = block(z, self.matrix[place])
        return z.split([width, out], 1)

    def scale(self, name: str, place: Place) -> Tensor:
        """A number of the matrix's own."""
        return self.scales[name][self.places.index(place)]


@dataclass(frozen=True)
class MendTraining(Training):
    """``Training``'s hyper-parameters, and

    rank: of U V (published 1,920, where x and δ together have 8,000 entries); n_hidden: residual blocks but one
    edit_lr: α_m before training
    """

    rank: int = 1920
    n_hidden: int = 1
    edit_lr: float = 1e-4

    METHOD: ClassVar = "mend"
    ALG_NAMES: ClassVar[dict[str, dict]] = {"MEND": {}}
    NETWORK: ClassVar = MendNetwork
    POSITIVE: ClassVar[tuple[str, ...]] = (*Training.POSITIVE, "rank", "edit_lr")

    @classmethod
    @takes_lm
    def for_model(cls, lm: LM) -> "MendTraining":
        """For a training of minutes instead of the published days.

        ``python -m bench trained --rows MEND``: SmolLM2, 270 facts, 240 steps in 3 minutes of one core, the best look
        at step 180: of 50 subjects never seen, one edit each, P(new) is 0.54 and 0.55 on paraphrases (S 68), neighbors
        keep 61 % of P(true). Ten facts summed up break the model, as is known of MEND: put single edits behind a route
        (``kf.routed``).
        """
        return cls(**cls.derived(lm), rank=min(256, lm.d_model))


@dataclass(frozen=True)
class Mend(Trained):
    """MEND: a trained network turns the gradient of a fact into an edit.

    The editor: its one setting is the network, see ``Trained``.
    """

    METHOD: ClassVar = "mend"
    ALG_NAMES: ClassVar[dict[str, dict]] = {"MEND": {}}
    NETWORK: ClassVar = MendNetwork
