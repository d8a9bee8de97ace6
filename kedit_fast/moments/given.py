"""The statistics behind an edit: the second moments of the keys, given or measured, checked before any work."""

import math
from collections.abc import Mapping, Sequence
from os import PathLike

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.bits import digest
from kedit_fast.basics.warn import warn
from kedit_fast.kernels.solve import MomentFactor, factor
from kedit_fast.moments.blocks import Blocks
from kedit_fast.moments.second_moment import ROWS, SecondMoment, second_moments
from kedit_fast.sweep.plan import too_large


def moments_for(lm, layers, moments, corpus, regularized: bool, need: int = 0) -> dict[int, SecondMoment]:
    """The statistics of each layer: those given, checked, or measured over ``corpus``.

    need: bytes that the layers are solved in (``check_room``)
    Raises ValueError where there are neither or both, or they are another model's or layer's, of too few tokens, or not
    finite; TypeError for anything but {layer: SecondMoment}, and for a corpus that is no text. Warns of statistics that
    do not say which model they are of (published npz files).
    """
    check_room(lm, need)
    if moments is None:
        if corpus is None:
            raise ValueError(
                "an edit needs second moments of the keys: give moments=kedit_fast.second_moments(...), or corpus= "
                '("self" samples text from the model), or mom2_adjustment=False to go without'
            )
        moments = second_moments(lm, layers, corpus)
    elif corpus is not None:
        raise ValueError("moments= and corpus= are both given; give one: corpus= is what moments are measured over")
    checks.instance("moments", moments, Mapping, f"{{layer: SecondMoment}}{_way_out(moments)}")
    for layer in layers:
        if layer not in moments:
            raise ValueError(f"no second moment for layer {layer}; given for {sorted(moments, key=str)}")
        _check_moment(lm, layer, moments[layer], regularized)
    unchecked = [layer for layer in layers if moments[layer].fingerprint is None]
    if unchecked:
        warn(
            f"the second moments of layers {unchecked} do not say which model they are of (fingerprint None), so that "
            f"they belong to {lm.name} is unchecked; kedit_fast.second_moments writes it down",
        )
    return {layer: moments[layer] for layer in layers}


def _way_out(moments) -> str:
    if isinstance(moments, SecondMoment):
        return f"; give {{{moments.layer}: moment}}"
    if isinstance(moments, Tensor):
        return "; a projection is not needed (AlphaEdit computes its own from C), SecondMoment(matrix, ...) holds a C"
    return "; SecondMoment.load reads a file" if isinstance(moments, str | PathLike) else ""


def _check_moment(lm, layer: int, m: SecondMoment, regularized: bool) -> None:
    wanted = "a SecondMoment; kedit_fast.second_moments makes them, SecondMoment(matrix, n_tokens, layer) holds one"
    checks.instance(f"moments[{layer}]", m, SecondMoment, wanted)
    if m.fingerprint is not None and m.fingerprint != lm.fingerprint:
        raise ValueError(f"the second moment of layer {layer} is of {m.fingerprint}, this model is {lm.fingerprint}")
    if m.layer != layer:
        raise ValueError(f"the second moment given for layer {layer} is of layer {m.layer}")
    if tuple(m.matrix.shape) != lm.moment_shape:
        of_experts = f", {lm.moment_shape[-1]} of each of {lm.n_experts} experts" * (lm.n_experts > 1)
        raise ValueError(
            f"the second moment of layer {layer} is {list(m.matrix.shape)}; this model's d_ff is {lm.d_ff}{of_experts}"
        )
    if m.n_tokens < lm.moment_shape[-1] and not regularized:
        raise ValueError(
            f"the second moment of layer {layer} is of {m.n_tokens} tokens, fewer than d_ff = {lm.d_ff}, so it has "
            "no inverse; collect more tokens, or give the editor a regularizer such as 1e-6"
        )
    if not all(torch.isfinite(rows).all() for rows in m.matrix.split(ROWS)):  # beside a matrix of gigabytes
        raise ValueError(f"the second moment of layer {layer} holds NaN or infinity; collect it again")


def described(moment: SecondMoment) -> dict:
    """What an edit's notes say of a layer's statistics; fingerprint None: of an unknown model."""
    return {"corpus": moment.corpus, "n_tokens": moment.n_tokens, "fingerprint": moment.fingerprint}


def factored(
    lm, moment: SecondMoment, weight: float, regularizer: float = 0.0, earlier: Sequence[Tensor] = ()
) -> MomentFactor:
    """Cholesky factor of weight * C, and of what the keys [n, d_ff] of earlier edits add to it, KₚᵀKₚ: on the model's
    device where its memory has room for it, else on the host."""
    where = _where(lm)
    kept = torch.cat([keys.to(where, torch.float64) for keys in earlier]) if len(earlier) else None
    return factor(moment.matrix.to(where), weight, kept=kept, regularizer=regularizer, n_tokens=moment.n_tokens)


def system(
    lm, moment: SecondMoment, weight: float, regularizer: float = 0.0, earlier: Sequence[Tensor] = ()
) -> MomentFactor | Blocks:
    """``factored``, or the blocks of a mixture of experts."""
    if moment.matrix.ndim == 2:
        return factored(lm, moment, weight, regularizer, earlier)
    where = _where(lm)
    none = torch.zeros(0, lm.d_ff, dtype=torch.float64, device=where)
    kept = torch.cat([none, *(keys.to(none) for keys in earlier)])
    mean = moment.matrix.diagonal(dim1=1, dim2=2).double().mean().item()
    return Blocks(moment.matrix.to(where), weight, regularizer * mean, kept)


def _where(lm) -> torch.device:
    return lm.device if factor_bytes(lm) <= lm.memory else torch.device("cpu")


def factor_bytes(lm) -> int:
    """Bytes of a layer's factor on the model's device, and of the second moment where it has to be brought there."""
    return (8 + 4 * (lm.device.type != "cpu")) * math.prod(lm.moment_shape)


def check_room(lm, need: int = 0) -> None:
    """Raises ValueError, with the bytes needed, where a layer cannot be solved in the model's memory, nor elsewhere.

    need: bytes that the editor says; a factor's at least
    """
    need = max(need, factor_bytes(lm))
    if lm.device.type == "cpu" and need > lm.memory:
        raise too_large(f"solving a layer of d_ff {lm.d_ff:,}", need, lm.memory)


def gains(factor_of_c: MomentFactor | Blocks, keys: Tensor) -> Tensor:
    """g = kᵀ C⁻¹ k [n], fp64, of each key [n, d_ff]: one layer reaches g / (g + λ) of what is asked of it."""
    if isinstance(factor_of_c, Blocks):
        return factor_of_c.gains(keys)
    rows = keys.to(factor_of_c.lower.device, torch.float64)
    half = torch.linalg.solve_triangular(factor_of_c.lower, rows.T, upper=False)
    return half.square().sum(0) * factor_of_c.weight  # the factor is of weight * C


def digests(moments: Mapping[int, SecondMoment] | None) -> dict[int, str]:
    """{layer: digest of C}, for what has to say which statistics it was made with."""
    return {layer: digest(moment.matrix) for layer, moment in (moments or {}).items()}
