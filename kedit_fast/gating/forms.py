"""The forms in which an edit ships, and which the gate judges: written in a dtype, and quantized again after that.

An edit as computed is fp32 factors; what a user runs is a checkpoint. Written in bf16, every change under half a step
of its weight is gone; quantized to 4 bits, most single weights do not move at all, and whether enough of them do is
what the gate has to see.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kedit_fast.edits.changes import WeightChange, only_weights, refuse_independent
from kedit_fast.edits.deltas import FLOATS, Dense, difference, edited_weight, grown
from kedit_fast.edits.edit import Edit
from kedit_fast.model.overlaid import Overlaid

Weights = dict[tuple[int, str], tuple[Tensor, Tensor]]  # {(layer, role): (before, after)}

BITS = {"int8": 8, "int4": 4}
GROUP = 128  # weights that share a scale: what AWQ, GPTQ and llama.cpp's larger formats use, or a multiple of it


@torch.no_grad()
def quantized_weight(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """Q(W) [d, d_ff] as a dequantizing kernel reads it: rounded to the nearest of 2^bits - 1 steps, symmetric.

    For each group of ``group`` inputs of one output: s = max |w| / (2^(bits-1) - 1), Q(w) = s · round(w / s). Computed
    in fp32, given in the weight's dtype. The last group of a row may be shorter.
    Published quantizers choose rounding by data and lose less; this is the plain one, so an edit that survives it will
    survive those. Raises ValueError for bits outside 2 to 8 or a group below 1.
    """
    if not 2 <= bits <= 8 or group < 1:
        raise ValueError(f"expected 2 to 8 bits and a group of at least 1, got {bits} and {group}")
    highest = 2 ** (bits - 1) - 1
    parts = []
    for part in weight.float().split(group, dim=1):
        scale = part.abs().amax(1, keepdim=True) / highest
        scale = scale.where(scale > 0, 1.0)  # a group of zeros stays one
        parts.append((part / scale).round() * scale)
    return torch.cat(parts, 1).to(weight.dtype)


@torch.no_grad()
def chain_deltas(lm, edits, dtype: torch.dtype) -> Weights:
    """{(layer, role): (W, W after all edits in order)} [out, in] in dtype; each edit is rounded before the next is
    written."""
    weights: Weights = {}
    for edit in edits:
        for place, delta in edit.weights.items():
            if place not in weights:
                weight = lm.source.weight(*place).detach().to(dtype)
                weights[place] = weight, weight
            weight, now = weights[place]
            weights[place] = weight, edited_weight(now, delta)
    return weights


def growth(weights: Weights) -> dict[int, float]:
    """{layer: ‖W' - W‖ / ‖W‖} of its matrix that grew most; Frobenius norms summed in fp64."""
    return grown({at: (difference(after, w).norm(), Dense(w).norm()) for at, (w, after) in weights.items()})


def view_of_written(lm, edits, weights: Weights):
    """``lm`` with the whole chain as one edit, whose deltas are what was really written."""
    return lm.with_edit(_as_one(edits, {at: difference(after, before) for at, (before, after) in weights.items()}))


def view_of_quantized(lm, edits, weights: Weights, bits: int, group: int = GROUP):
    """``lm`` whose edited matrices are Q(W), with Q(W') - Q(W) as the edit.

    The base compared with is quantized too, as the model in service is: against the unquantized one the quantization's
    own damage would be counted as the edit's. All other weights stay as they are; the edit does not touch them.
    Raises ValueError where weights are read from disk layer by layer.
    """
    if not lm.source.in_memory:
        raise ValueError("a requantized edit is judged with the weights in memory; open the model without memory=")
    before, deltas = {}, {}
    for place, pair in weights.items():
        before[place], after = (quantized_weight(weight, bits, group) for weight in pair)
        deltas[place] = difference(after, before[place])
    # with_edit compares fingerprints, which read the weights: the edit was made for the unquantized ones
    view = lm.with_edit(_as_one(edits, deltas))
    return replace(view, source=Overlaid(lm.source, before))


def is_served(edit: Edit) -> bool:
    """Whether an edit acts beside the weights, or on some prompts alone: it ships as it is."""
    return edit.route is not None or not all(isinstance(change, WeightChange) for change in edit.changes)


def check_form(lm, edits, written: torch.dtype | None) -> None:
    """Raises ValueError for edits that cannot be judged as one model: independent ones, a base whose weights are not
    plain floats, an edit of another model."""
    for edit in edits:
        what = "the gate judges one model in the form in which it ships"
        if written is None:
            refuse_independent(edit, what)
        else:
            only_weights(edit, what, "judge it as it is served, beside the weights: written=None (--written none)")
        lm.with_edit(edit)  # of this model, layers that it has
        for (layer, role), delta in edit.weights.items():
            weight = lm.source.weight(layer, role)
            if written is not None and (weight.dtype not in FLOATS or tuple(weight.shape) != delta.shape):
                raise ValueError(
                    f"layer {layer}'s {role} projection holds {list(weight.shape)} {weight.dtype}, where an edit of "
                    f"{list(delta.shape)} cannot be written; judge it as an adapter: written=None (--written none)"
                )


def _as_one(edits, deltas: dict[tuple[int, str], Dense]) -> Edit:
    last = edits[-1]
    facts = tuple(fact for edit in edits for fact in edit.facts)
    changes = tuple(WeightChange(layer, delta, role) for (layer, role), delta in deltas.items())
    return Edit(" + ".join(dict.fromkeys(edit.method for edit in edits)), {}, last.fingerprint, facts, changes)
