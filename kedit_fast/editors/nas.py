"""NAS: norm-anchor scaling (Liu et al. 2026, Norm Anchors Make Model Edits Last, arXiv:2602.02543).

Edit after edit, values and weights drive each other's norms up until the model breaks. MEMIT's z is the residual stream
before the MLP and what the MLP is to write there, z = (h - v₀) + v*. Here v* is brought to a norm a of the model as it
was; one that is far beyond it is not written at all:

    z = (h - v₀) + a v* / ‖v*‖           v* = v₀ + δ
    z = h                                where ‖v*‖ > 2 a
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kedit_fast.editors.editor import Work
from kedit_fast.editors.located import Prompts
from kedit_fast.editors.memit import Memit
from kedit_fast.jobs.values import Values
from kedit_fast.model.lm import LM
from kedit_fast.sweep.sites import Site

TRIMMED = 0.05  # of the norms, the largest, that a mean leaves out (published)
FAR = 2.0  # times a


@dataclass(frozen=True)
class Nas(Memit):
    """NAS: MEMIT whose values are brought to the norm that values had before any edit.

    MEMIT's hyper-parameters, and

    anchor: a; 0: the mean of ‖v*‖ over the facts of this edit, without the largest twentieth. Published: over 1,000
        facts on the model without edits. An edit's ``provenance["anchor"]`` is what those on top of it are to be given
    """

    anchor: float = 0.0

    METHOD: ClassVar = "nas"
    ALG_NAMES: ClassVar[dict[str, dict]] = {"NAS": {}}

    def values(self, lm: LM, prompts: Prompts, top: int, work: Work, name: str) -> tuple[Values, dict]:
        """MEMIT's z, anchored; a, and how many facts are left as they were."""
        found, about = super().values(lm, prompts, top, work, name)
        out = prompts.read(lm, averaged={}, bare={Site.mlp_out: top}).bare[Site.mlp_out]
        start = lm.into_stream(top, out)
        change, norms = anchored(start, found.values.double() - found.initial.double(), self.anchor)
        about |= {"anchor": norms.anchor, "skipped": int(norms.far.sum())}
        return replace(found, values=(found.initial.double() + change).to(found.values.dtype)), about


@dataclass(frozen=True)
class Norms:
    """a, and which facts [n] were too far from it to be written."""

    anchor: float
    far: Tensor


def anchored(start: Tensor, change: Tensor, anchor: float = 0.0) -> tuple[Tensor, Norms]:
    """The change [n, d] that brings v₀ + ``change`` to the norm ``anchor``, 0 where it is too far. start: v₀ [n, d]"""
    v = start + change
    norms = v.norm(dim=1)
    anchor = anchor or trimmed_mean(norms)
    far = norms > FAR * anchor
    return torch.where(far[:, None], 0.0, v * (anchor / norms)[:, None] - start), Norms(anchor, far)


def trimmed_mean(norms: Tensor) -> float:
    """Their mean without the largest ``TRIMMED`` of them."""
    return norms.sort().values[: len(norms) - int(TRIMMED * len(norms))].mean().item()
