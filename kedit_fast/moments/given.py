"""The statistics behind an edit: the second moments of the keys, given or measured, checked before any work."""

import warnings
from collections.abc import Mapping
from os import PathLike

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.parts import digest
from kedit_fast.kernels.solve import MomentFactor, factor
from kedit_fast.moments.second_moment import SecondMoment, second_moments


def moments_for(lm, layers, moments, corpus, regularizer: float) -> dict[int, SecondMoment]:
    """The statistics of each layer: those given, checked, or measured over ``corpus``.

    Raises ValueError where there are neither or both, or they are another model's or layer's, of too few tokens, or not
    finite; TypeError for anything but {layer: SecondMoment}, and for a corpus that is no text. Warns of statistics that
    do not say which model they are of (published npz files).
    """
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
        _check_moment(lm, layer, moments[layer], regularizer)
    unchecked = [layer for layer in layers if moments[layer].fingerprint is None]
    if unchecked:
        warnings.warn(
            f"the second moments of layers {unchecked} do not say which model they are of (fingerprint None), so that "
            f"they belong to {lm.name} is unchecked; kedit_fast.second_moments writes it down",
            stacklevel=5,  # the line that called ``edit``
        )
    return {layer: moments[layer] for layer in layers}


def _way_out(moments) -> str:
    if isinstance(moments, SecondMoment):
        return f"; give {{{moments.layer}: moment}}"
    if isinstance(moments, Tensor):
        return "; a projection is not needed (AlphaEdit computes its own from C), SecondMoment(matrix, ...) holds a C"
    return "; SecondMoment.load reads a file" if isinstance(moments, str | PathLike) else ""


def _check_moment(lm, layer: int, m: SecondMoment, regularizer: float) -> None:
    wanted = "a SecondMoment; kedit_fast.second_moments makes them, SecondMoment(matrix, n_tokens, layer) holds one"
    checks.instance(f"moments[{layer}]", m, SecondMoment, wanted)
    if m.fingerprint is not None and m.fingerprint != lm.fingerprint:
        raise ValueError(f"the second moment of layer {layer} is of {m.fingerprint}, this model is {lm.fingerprint}")
    if m.layer != layer:
        raise ValueError(f"the second moment given for layer {layer} is of layer {m.layer}")
    if tuple(m.matrix.shape) != (lm.d_ff, lm.d_ff):
        raise ValueError(
            f"the second moment of layer {layer} is {list(m.matrix.shape)}; this model's d_ff is {lm.d_ff}"
        )
    if m.n_tokens < lm.d_ff and not regularizer:
        raise ValueError(
            f"the second moment of layer {layer} is of {m.n_tokens} tokens, fewer than d_ff = {lm.d_ff}, so it has "
            "no inverse; collect more tokens, or give the editor a regularizer such as 1e-6"
        )
    if not torch.isfinite(m.matrix).all():
        raise ValueError(f"the second moment of layer {layer} holds NaN or infinity; collect it again")


def described(moment: SecondMoment) -> dict:
    """What an edit's notes say of a layer's statistics; fingerprint None: of an unknown model."""
    return {"corpus": moment.corpus, "n_tokens": moment.n_tokens, "fingerprint": moment.fingerprint}


def factored(lm, moment: SecondMoment, weight: float, regularizer: float) -> MomentFactor:
    """Cholesky factor of weight * C on the model's device."""
    return factor(moment.matrix.to(lm.device), weight, regularizer=regularizer, n_tokens=moment.n_tokens)


def gains(factor_of_c: MomentFactor, keys: Tensor) -> Tensor:
    """g = kᵀ C⁻¹ k [n], fp64, of each key [n, d_ff]: one layer reaches g / (g + λ) of what is asked of it."""
    half = torch.linalg.solve_triangular(factor_of_c.lower, keys.double().T, upper=False)
    return half.square().sum(0) * factor_of_c.weight  # the factor is of weight * C


def digests(moments: Mapping[int, SecondMoment] | None) -> dict[int, str]:
    """{layer: digest of C}, for what has to say which statistics it was made with."""
    return {layer: digest(moment.matrix) for layer, moment in (moments or {}).items()}
