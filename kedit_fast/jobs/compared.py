"""A model of a family that no test of this package covers, against its own forward: what opens must be right."""

from dataclasses import replace

import torch
from torch import Tensor

from kedit_fast.jobs.collect import Collect
from kedit_fast.model.family import TESTED, peculiarities, projection
from kedit_fast.model.seam import eval_mode
from kedit_fast.model.source import DEFAULT_MEMORY
from kedit_fast.sweep.engine import sweep
from kedit_fast.sweep.runs import RunList
from kedit_fast.sweep.sites import Site

# Longer than a sentence, so that attention has something to get wrong; words that every vocabulary has.
TEXT = (
    "The Eiffel Tower is in the city of Paris. The capital of Italy is Rome, and the capital of Spain is Madrid. "
    "In 1889 it was the tallest building of the world; today there are many that are taller, most of them in Asia."
)
# Relative difference that rounding may bring about: through some hundred layers, with room to spare.
ALLOWED = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


@torch.no_grad()
def check_own_logits(lm) -> None:
    """Compares a short text's logits, through a sweep and through the model's own forward, where no test has done so;
    and looks whether what a down projection gives is what the residual stream gets, as MEMIT takes it.

    Raises ValueError where they differ or the family's entry does not fit the model. Cost: two weight passes; nothing
    for a tested family. What begins beyond the text (a longer sliding window) is not seen.
    """
    model_type = lm.model.config.model_type
    if model_type in TESTED and type(lm.model).__module__.partition(".")[0] == "transformers":
        return
    said = f"model family {model_type!r} is covered by no test of kedit_fast, and "
    odd = "; ".join(peculiarities(lm.model.config))
    lm = replace(lm, memory=max(lm.memory, DEFAULT_MEMORY))  # the text needs next to nothing of it
    try:
        for layer in range(lm.n_layers):
            projection(lm.model, layer)
        ids = lm.encode(TEXT)[: lm.longest or None]
        off = _distance(lm, lm.head(_rows(lm, ids, lm.n_layers - 1)), _own_logits(lm, ids))
        turned = 0.0 if lm.family.post_norm else _turned(lm, ids)
    except Exception as error:  # whatever a module that is not as its entry says raises
        raise ValueError(f"{said}its entry does not fit this model: {odd or error}") from error
    if off:
        raise ValueError(
            f"{said}its logits through a sweep differ from the model's own by {off:.1%} of their size, so traces and "
            "edits would be wrong: " + (odd or "its forward does something around the layers that the entry leaves out")
        )
    if turned:
        raise ValueError(
            f"{said}what its down projection gives is changed before the residual stream gets it, by {turned:.1%} of "
            "its size, so edits would be wrong: name the norm in between as the entry's post_norm; a factor has no name"
        )


def _distance(lm, got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, or 0 where rounding explains it; NaN counts as a distance."""
    got, want = got.double().cpu(), want.double().cpu()
    distance = ((got - want).norm() / want.norm()).item()
    return 0.0 if distance <= ALLOWED.get(lm.dtype, ALLOWED[torch.bfloat16]) else distance


def _own_logits(lm, ids: list[int]) -> Tensor:
    with eval_mode(lm.model), lm.source.in_place():
        return lm.model(input_ids=torch.tensor([ids], device=lm.device), use_cache=False).logits[0]


def _rows(lm, ids: list[int], layer: int, *jobs) -> Tensor:
    """The text's hidden states [T, d] after a layer."""
    runs = RunList()
    run = runs.add(ids).expand(len(ids))
    top = Collect(Site.layer_out, [layer], run, torch.arange(len(ids)))
    sweep(lm, runs.runs(), [*jobs, top], last_layer=layer)
    return top.values[layer]


def _turned(lm, ids: list[int]) -> float:
    """How far a change of the first layer's mlp_out is from what it does to the layer's output."""
    plain = _rows(lm, ids, 0)
    draw = torch.Generator().manual_seed(0)
    change = torch.randn(lm.d_model, generator=draw) * plain.float().square().mean().sqrt().cpu()
    return _distance(lm, _rows(lm, ids, 0, _Change(change)) - plain, change.expand_as(plain))


class _Change:
    """A job that adds ``by`` [d] to what the down projection of layer 0 gives."""

    def __init__(self, by: Tensor):
        self.by = by

    def sites(self, layer):
        return (Site.mlp_out,) if layer == 0 else ()

    def reads(self, layer):
        return None

    def at(self, site, layer, x, call):
        return x + self.by.to(x)
