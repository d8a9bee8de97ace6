"""A model of a family that no test of this package covers, against its own forward: what opens must be right."""

from dataclasses import replace

import torch
from torch import Tensor

from kedit_fast.jobs.collect import Collect
from kedit_fast.model.experts import routed_keys
from kedit_fast.model.family import TESTED, as_out_in, peculiarities, projection, unnamed
from kedit_fast.model.seam import attend_with, eval_mode, prepared
from kedit_fast.model.source import DEFAULT_MEMORY
from kedit_fast.sweep.engine import sweep
from kedit_fast.sweep.runs import RunList, add_sequences
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
    and looks whether the residual stream gets what MEMIT takes it to get of the down projection.

    A second text, which leaves the first one half way, lies in the same pack: blocks that mix rows anywhere but in
    attention, or that count them to know positions, give it other logits. Windows longer than the text are seen by what
    the blocks hand to attention.

    Raises ValueError where they differ or the family's entry does not fit the model. Cost: four weight passes; nothing
    for a tested family.
    """
    model_type = lm.model.config.model_type
    if model_type in TESTED and type(lm.model).__module__.partition(".")[0] == "transformers":
        return
    said = f"model family {model_type!r} is covered by no test of kedit_fast, and "
    odd = "; ".join([*peculiarities(lm.model.config), *unnamed(lm.model.config)])
    lm = replace(lm, memory=max(lm.memory, DEFAULT_MEMORY))  # the text needs next to nothing of it
    try:
        for layer in range(lm.n_layers):
            projection(lm.model, layer)
        texts = _texts(lm)
        own = torch.cat([_own_logits(lm, ids) for ids in texts])
        off = _distance(lm, lm.head(_rows(lm, texts, lm.n_layers - 1)), own)
        unseen = "" if off else _unseen_window(lm)
        turned = _turned(lm, texts)
        unrouted = _unrouted(lm, texts) if lm.family.experts else 0.0
    except Exception as error:  # whatever a module that is not as its entry says raises
        raise ValueError(f"{said}its entry does not fit this model: {odd or error}") from error
    if off:
        raise ValueError(
            f"{said}its logits through a sweep differ from the model's own by {off:.1%} of their size, so traces and "
            "edits would be wrong: " + (odd or "its forward does something around the layers that the entry leaves out")
        )
    if unseen or peculiarities(lm.model.config):
        raise ValueError(f"{said}traces and edits of longer texts would be wrong: {unseen or odd}")
    if unrouted:
        raise ValueError(
            f"{said}the routed keys of its experts do not give what the experts give, by {unrouted:.1%} of its size: "
            "they are not those that model/experts.py knows, and edits would be wrong"
        )
    if turned:
        raise ValueError(
            f"{said}what its down projection gives is not what its entry says that the residual stream gets, by "
            f"{turned:.1%} of its size, so edits would be wrong: name the norm in between as the entry's post_norm, a "
            "factor as its residual_scale" + f" ({odd})" * bool(odd)
        )


def _texts(lm) -> list[list[int]]:
    """The text, and a shorter one that goes on otherwise from its middle."""
    ids = lm.encode(TEXT)[: lm.longest or None]
    half = len(ids) // 2
    return [ids, ids[:half] + ids[1 : half // 2]]


def _unseen_window(lm) -> str:
    """Which layer's sliding window its block does not hand to attention, or hands to it unsaid; "" where none."""
    seen: list[int | None] = []

    def record(query, key, value, *, window=None, **how):
        seen.append(window)
        return torch.zeros_like(query)

    x = torch.zeros(1, 1, lm.d_model, dtype=lm.dtype, device=lm.device)
    kwargs = {"attention_mask": None, "position_ids": torch.zeros(1, 1, dtype=torch.int64, device=lm.device)}
    with prepared(lm.model, lm.family), attend_with(record):
        lm.source.expect(range(lm.n_layers))
        for layer in range(lm.n_layers):
            rotary = lm.rotary(layer, 1)
            positions = {} if rotary is None else {"position_embeddings": tuple(table[None] for table in rotary)}
            lm.source.call(layer, x, kwargs | positions)
    config = lm.config
    width = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if width else "full_attention"] * lm.n_layers
    for layer, (kind, given) in enumerate(zip(kinds, seen, strict=True)):
        wanted = width if kind == "sliding_attention" else None
        if given != wanted:
            return (
                f"the config of layer {layer} says {kind.replace('_', ' ')}, a window of {wanted}, and its block hands "
                f"a window of {given} to attention"
            )
    return ""


def _distance(lm, got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, or 0 where rounding explains it; NaN counts as a distance."""
    got, want = got.double().cpu(), want.double().cpu()
    distance = ((got - want).norm() / want.norm()).item()
    return 0.0 if distance <= ALLOWED.get(lm.dtype, ALLOWED[torch.bfloat16]) else distance


def _own_logits(lm, ids: list[int]) -> Tensor:
    with eval_mode(lm.model), lm.source.in_place():
        return lm.model(input_ids=torch.tensor([ids], device=lm.device), use_cache=False).logits[0]


def _rows(lm, texts: list[list[int]], layer: int, *jobs) -> Tensor:
    """The texts' hidden states [rows, d] after a layer, one text behind the other."""
    return _read(lm, texts, Site.layer_out, layer, *jobs)


def _read(lm, texts: list[list[int]], site: Site, layer: int, *jobs) -> Tensor:
    """Rows [n, width] of all tokens of the texts, in one pack."""
    runs = RunList()
    number = add_sequences(runs, texts).tolist()
    places = [(run, pos) for run, ids in zip(number, texts, strict=True) for pos in range(len(ids))]
    read = Collect(site, [layer], *torch.tensor(places).unbind(1))
    sweep(lm, runs.runs(), [*jobs, read], last_layer=layer)
    return read.values[layer]


def _turned(lm, texts: list[list[int]]) -> float:
    """How far what a change of the first layer's mlp_out does to the layer's output is from what the entry says."""
    plain, out = _rows(lm, texts, 0), _read(lm, texts, Site.mlp_out, 0)
    draw = torch.Generator().manual_seed(0)
    change = torch.randn(lm.d_model, generator=draw) * out.float().square().mean().sqrt().cpu()
    wanted = lm.into_stream(0, out + change.to(out)) - lm.into_stream(0, out)
    return _distance(lm, _rows(lm, texts, 0, _Change(change)) - plain, wanted)


def _unrouted(lm, texts: list[list[int]]) -> float:
    """How far W̃ k̃ of the first layer (and the experts' biases) is from what its experts give."""
    module, seen = projection(lm.model, 0), []
    hook = module.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    try:
        with lm.source.in_place(), eval_mode(lm.model):
            lm.model(input_ids=torch.tensor([texts[0]], device=lm.device), use_cache=False)
    finally:
        hook.remove()
    (x, index, weights), out = seen[0]
    got = routed_keys(module, x, index, weights) @ as_out_in(module).T
    if module.has_bias:
        got = got + (weights[..., None] * module.down_proj_bias[index]).sum(1)
    return _distance(lm, got, out)


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
