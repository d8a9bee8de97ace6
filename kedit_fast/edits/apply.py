"""Write an edit into a Hugging Face model's weights, and take it out again bit for bit.

Everything is checked before the first write, an error or an interrupt in the middle puts back what was written, and
``undo`` restores kept copies only onto exactly the bits that were written: a model is never left half edited.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kedit_fast.basics.state import own_state
from kedit_fast.edits.changes import only_weights
from kedit_fast.edits.deltas import FLOATS, Delta, Dense, check_fits, edited_weight
from kedit_fast.edits.erasures import BiasChange
from kedit_fast.model.experts import is_experts
from kedit_fast.model.family import as_out_in, is_conv1d, projection, weight_name, write_out_in
from kedit_fast.model.fingerprint import fingerprint
from kedit_fast.model.loaded import defined_in, is_offloaded, is_shard, refuse_peft

if TYPE_CHECKING:
    from kedit_fast.edits.edit import Edit

QUANTIZERS = (  # packages whose modules or tensors hold packed weights
    "aqlm",
    "auto_gptq",
    "awq",
    "bitsandbytes",
    "compressed_tensors",
    "gptqmodel",
    "hqq",
    "optimum",
    "torchao",
)
BENEATH = "an edit beneath an adapter is not the one that was made"


class Applied:
    """An edit that is written into a model; a context manager that undoes it at the end, also after an exception.

    Keeps a copy of each touched weight in host memory until undone. An edit whose handle is dropped stays.
    """

    def __init__(self, edit: Edit, kept: list[_Kept]):
        self.edit, self.undone, self._kept = edit, False, tuple(kept)
        self._begun = False  # an undo got as far as the first weight

    @own_state()
    def undo(self) -> None:
        """Put the touched weights back, bit for bit and in place. Does nothing the second time.

        Raises ValueError, and changes nothing, if a touched weight no longer has the bits that this edit wrote:
        another edit was written over it and has to be undone first, or it was changed otherwise.
        """
        for kept in self._kept:
            kept.check(self._begun)
        self._begun = True
        for kept in reversed(self._kept):
            kept.restore()
        self.undone, self._kept = True, ()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exception) -> None:
        self.undo()

    def __repr__(self):
        return f"Applied({self.edit!r}, {'undone' if self.undone else 'written'})"


@dataclass(frozen=True)
class _Kept:
    """What undo needs of one weight: its copy [out, in] on the CPU, and the digest of what was written over it."""

    name: str
    module: nn.Module
    original: Tensor
    written: bytes

    def check(self, begun):
        found = _digest(as_out_in(self.module))
        # An undo that was interrupted and runs again finds some weights restored already. Only then: another edit
        # written over this one may by itself lead back to the original bits.
        if found != self.written and not (begun and found == _digest(self.original)):
            raise ValueError(
                f"{self.name} no longer holds what this edit wrote, so nothing was undone. "
                "Undo the edits that were applied after this one first; if the weight was changed otherwise "
                "(training, a cast to another dtype), reload the model"
            )

    def restore(self):
        _write(self.module, self.original)


class _Bias(nn.Module):
    """A projection's bias as a module whose weight [out, 1] is a view of it. Raises ValueError where there is none."""

    def __init__(self, module, name):
        super().__init__()
        if getattr(module, "bias", None) is None:
            raise ValueError(f"{name}: this model has none; serve the edit with lm.with_edit(edit)")
        self.weight = nn.Parameter(module.bias.detach()[:, None], requires_grad=False)


@own_state()
def apply_edit(edit: Edit, model: nn.Module, *, check_fingerprint: bool = True) -> Applied:
    """Write W + Δ into the projections of a Hugging Face model, in place; -> handle with ``undo()``.

    The sum is made in fp64 and rounded to the weight's dtype (what that costs: ``written_delta``). Flags, hooks and
    storage of the parameters stay as they are. Cost: a host copy of each touched weight, kept until undone.

    check_fingerprint: False to write into a model that the edit was not made for, or one that another edit has
        already changed.
    Raises TypeError if ``model`` is no torch module; ValueError, with nothing written, if the edit is an independent
    one, was made for another model or does not fit, and for weights that are not finite or cannot be written in place:
    offloaded or meta, DTensor, quantized, PEFT-wrapped, parametrized, sharing memory with another weight.
    An exception or interrupt while writing restores what was written, then goes on up.
    """
    places = _checked(edit, model, check_fingerprint)
    kept: list[_Kept] = []
    with ExitStack() as restoring:  # goes on to the next weight where restoring one is interrupted in its turn
        for name, (module, delta) in places.items():
            weight = as_out_in(module)
            edited = edited_weight(weight, delta)
            if not torch.isfinite(edited).all():
                raise ValueError(
                    f"{name}: W + Δ is beyond the range of {weight.dtype}; load the model in bfloat16 or float32"
                )
            # Kept before it is written: an interrupt between the two restores equal bits.
            kept.append(_Kept(name, module, weight.detach().to("cpu", copy=True), _digest(edited)))
            restoring.callback(kept[-1].restore)
            _write(module, edited)
        applied = Applied(edit, kept)
        restoring.pop_all()
    return applied


def _checked(edit, model, check_fingerprint) -> dict[str, tuple[nn.Module, Delta]]:
    """{what people call it: (projection, its Δ)}, after every check that needs no write."""
    changes = only_weights(edit, "weights that are written act on every text", beside=(BiasChange,))
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"apply writes into a Hugging Face model (torch.nn.Module), got {type(model).__name__}; "
            "lm.with_edit(edit) shows an LM edited without writing"
        )
    refuse_peft(model, "the model", BENEATH)
    places = {
        f"layer {c.layer}'s {c.role.replace('_', ' and ')} projection": (projection(model, c.layer, c.role), c.delta)
        for c in changes
    }
    shifts = [c for c in edit.changes if isinstance(c, BiasChange)]
    biases = {
        f"the bias of layer {c.layer}'s {c.role.replace('_', ' and ')} projection": (
            projection(model, c.layer, c.role), Dense(c.delta[:, None])
        )
        for c in shifts
    }  # fmt: skip
    for name, (module, _) in (places | biases).items():
        _check_writable(module, name)
    places |= {name: (_Bias(module, name), delta) for name, (module, delta) in biases.items()}
    _check_unshared(model, places)
    for name, (module, delta) in places.items():
        _check_values(name, as_out_in(module).detach(), delta)
    if check_fingerprint and (found := fingerprint(model)) != edit.fingerprint:
        raise ValueError(
            f"the edit was made for model {edit.fingerprint or '(not said)'}, this is {found}; "
            "if that is meant (another edit is applied already, or a fine-tuned copy), pass check_fingerprint=False"
        )
    return places


def _check_values(name, weight, delta):
    check_fits(delta, weight.shape, name)
    if not torch.isfinite(weight).all():  # of the edit, Edit itself has seen to it
        raise ValueError(f"{name}: the model's weight holds NaN or infinity; nothing was written")


def _check_writable(module, name):
    """Raises ValueError unless the module is a plain projection whose weight is a plain tensor in memory."""
    refuse_peft(module, name, BENEATH)
    kind = type(module)
    weight = module._parameters.get(weight_name(module))
    packed = weight is not None and weight.dtype not in FLOATS
    if packed or defined_in(module, QUANTIZERS) or (weight is not None and defined_in(weight, QUANTIZERS)):
        raise ValueError(
            f"{name} is quantized ({kind.__module__}.{kind.__name__}, {getattr(weight, 'dtype', 'no weight')}): "
            "load the model without quantization, use lm.with_edit(edit), which leaves the weights as they are, or "
            "kf.export_peft(edit, folder), an adapter beside the packed weights"
        )
    if not (kind is nn.Linear or is_conv1d(module) or is_experts(module)):
        raise ValueError(
            f"{name} is a {kind.__module__}.{kind.__name__}; only nn.Linear and Conv1D are known to use their weight "
            "as it stands. Remove what wraps it (parametrizations too), or use lm.with_edit(edit)"
        )
    if weight is None:
        raise ValueError(f"{name} has no weight parameter (packed, or computed from others): undo that first")
    if weight.is_meta or is_offloaded(module):
        raise ValueError(
            f"{name} is offloaded or on the meta device, a write would be lost; load the model with a device_map "
            "that keeps it in memory, or use kedit_fast.open_model(path, memory=...).with_edit(edit)"
        )
    if type(weight) is not nn.Parameter:
        sharded = ", a shard of which lies here" if is_shard(weight) else ""
        raise ValueError(
            f"{name} has a {type(weight).__name__} for weight{sharded}; gather it into a plain tensor "
            "(full_tensor()), or apply the edit before the model is wrapped"
        )


def _check_unshared(model, places):
    """Raises ValueError if an edited weight lies in memory that another parameter reads too."""
    plain = [
        (name, parameter.device, *_span(parameter))
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if type(parameter) is nn.Parameter and not parameter.is_meta
    ]
    for name, (module, _) in places.items():
        parameter = module.get_parameter(weight_name(module))
        begin, end = _span(parameter)
        device = parameter.device
        names = [each for each, where, first, last in plain if where == device and first < end and begin < last]
        if len(names) > 1:
            raise ValueError(
                f"{name} shares its memory: {', '.join(names)} would change together. "
                "Give it its own first: module.weight = torch.nn.Parameter(module.weight.detach().clone())"
            )


def _span(tensor):
    """[begin, end) of the addresses that a tensor reads. Not its storage: one file's weights may be in one storage."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return (begin, begin + (last + 1) * tensor.element_size()) if tensor.numel() else (0, 0)


def _digest(tensor):
    """Of shape, dtype and bits; whatever the device and the strides. Empty for a weight that holds no data."""
    if tensor.is_meta:
        return b""
    bits = tensor.detach().to("cpu").contiguous().view(torch.uint8)
    head = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    digest = hashlib.blake2b(head)
    digest.update(bits.numpy())
    return digest.digest()


def _write(module, weight):
    """Copy [out, in] values into the module's own storage; views and the optimizer's references stay valid."""
    target = module.get_parameter(weight_name(module))
    with torch.inference_mode() if target.is_inference() else torch.no_grad():
        write_out_in(module, weight)
