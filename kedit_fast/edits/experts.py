"""A change of one expert's down projection, as a change of the wide projection that a mixture's experts are."""

import torch

from kedit_fast.basics import checks
from kedit_fast.edits.changes import WeightChange
from kedit_fast.edits.deltas import Delta, Dense, LowRank, check_fits


def expert_change(lm, layer: int, expert: int, delta: Delta) -> WeightChange:
    """Δ [d, width] of expert ``expert`` of a layer. Raises ValueError for a model without experts, an expert or a layer
    that it does not have, and for another shape."""
    if lm.n_experts < 2:
        raise ValueError(f"a {lm.config.model_type} model has no experts; WeightChange(layer, delta) is of its layers")
    expert = checks.whole("expert", expert, most=lm.n_experts - 1, like=0)
    d, wide = lm.shape_of("down")
    width = wide // lm.n_experts
    check_fits(delta, (d, width), f"layer {layer}, expert {expert}")
    mine = slice(expert * width, (expert + 1) * width)
    if isinstance(delta, LowRank):
        v = torch.zeros(wide, delta.rank, dtype=delta.v.dtype, device=delta.v.device)
        v[mine] = delta.v
        whole: Delta = LowRank(delta.u, v)
    else:
        whole = Dense(torch.zeros(d, wide, dtype=delta.delta.dtype, device=delta.delta.device))
        whole.delta[:, mine] = delta.delta
    change = WeightChange(layer, whole)
    change.check(lm)
    return change
