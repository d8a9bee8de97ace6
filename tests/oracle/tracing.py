"""Causal tracing, one forward a cell (Meng et al. 2022, section 2), and the two rivals of the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from tests.oracle.access import changing, embedding, first, layers, paths, site_module

Change = tuple[nn.Module, Callable[[Tensor], Tensor]]
SITES = {"state": "layer_out", "mlp": "mlp", "attn": "attn_out"}


def restored_layers(kind: str, layer: int, window: int, n_layers: int) -> range:
    """Layers restored for one cell: itself, or a window that is cut at the ends of the model and never shifted."""
    if kind == "state":
        return range(layer, layer + 1)
    return range(max(0, layer - window // 2), min(n_layers, layer + (window + 1) // 2))


def draw_noise(seed: int, samples: int, n_tokens: int, width: int) -> Tensor:
    """Gaussian draws [samples, tokens, d] float64 of numpy's RandomState: sample-major, then token, then feature."""
    return torch.from_numpy(numpy.random.RandomState(seed).randn(samples, n_tokens, width))


def trace_oracle(
    model: nn.Module,
    input_ids: Sequence[int] | Tensor,
    subject_span: tuple[int, int],
    kind: str,
    *,
    window: int = 10,
    samples: int = 10,
    noise: float = 0.1,
    seed: int = 1,
    answer: int | None = None,
    severed: str | None = None,
    metric: str = "prob",
    corrupt_ids: Sequence[int] | Tensor | None = None,
) -> dict[str, Any]:
    """Restoration scores of one fact and one kind, by one whole forward a cell, as the published code is structured.

    Row 0 of every batch is the clean run, the others are corrupted; in a cell the corrupted rows get the clean row's
    value at one token. The same draws serve all cells.

    kind: state (a block's output), mlp or attn (those modules' outputs in `window` layers around the cell's).
    noise: multiplies the draws; added to the token embedding's output at the subject, rounded once to its dtype.
    answer: token id; None takes the clean run's most probable one.
    severed: mlp or attn; those modules' outputs at the restored token keep the corrupted run's values in all layers.
        Differs: both passes get the same noise; the published code draws anew in the second.
    metric: prob (mean over draws of p) or logprob (mean over draws of log p, nats).
    corrupt_ids: the tokens of another subject's prompt, of equal length, in place of noise: one corrupted row.
    Returns: p_clean and p_corrupted (float, in the metric), scores [T, L] (in the logits' dtype), answer (int).
    """
    embed = embedding(model)
    clean = torch.as_tensor(input_ids, device=model.device).flatten()
    if corrupt_ids is None:
        batch = clean.repeat(samples + 1, 1)
        corruption = [(embed, _add_noise(subject_span, noise, samples, seed))]
    else:
        batch = torch.stack([clean, torch.as_tensor(corrupt_ids, device=clean.device).flatten()])
        corruption = []

    with torch.inference_mode():
        clean_logits = model(clean.repeat(len(batch), 1)).logits[0, -1]
        answer = int(clean_logits.argmax()) if answer is None else answer
        kept = _corrupted_values(model, batch, corruption, severed)

        def score(changes: list[Change]) -> Tensor:
            with changing(corruption + changes):
                return _metric(model(batch).logits[1:, -1], answer, metric).mean()

        n_layers = len(layers(model))
        scores = torch.empty(len(clean), n_layers, dtype=clean_logits.dtype, device=clean_logits.device)
        for token in range(len(clean)):
            frozen = [(module, _restore(token, values)) for module, values in kept]
            for layer in range(n_layers):
                window_layers = restored_layers(kind, layer, window, n_layers)
                restored = [(site_module(model, at, SITES[kind]), _restore(token)) for at in window_layers]
                scores[token, layer] = score(restored + frozen)
        return dict(
            p_clean=float(_metric(clean_logits[None], answer, metric)),
            p_corrupted=float(score([])),
            scores=scores,
            answer=answer,
        )


published_loop = trace_oracle  # the published way of tracing, as a rival to time


def _metric(logits: Tensor, answer: int, metric: str) -> Tensor:
    """p or log p of the answer [rows], from logits [rows, vocabulary]."""
    measure = {"prob": torch.softmax, "logprob": torch.log_softmax}[metric]
    return measure(logits, dim=-1)[:, answer]


def _add_noise(span: tuple[int, int], noise: float, samples: int, seed: int) -> Callable[[Tensor], Tensor]:
    """Corrupt rows 1.. of an embedding output: the sum is taken in float64 and rounded once."""
    begin, end = span

    def corrupt(hidden: Tensor) -> Tensor:
        draws = draw_noise(seed, samples, end - begin, hidden.shape[-1]).to(hidden.device)
        hidden = hidden.clone()
        hidden[1:, begin:end] = (hidden[1:, begin:end].double() + noise * draws).to(hidden.dtype)
        return hidden

    return corrupt


def _restore(token: int, values: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Write the clean row's value at one token, or the rows' own of another run, into the corrupted rows."""

    def restore(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[1:, token] = hidden[0, token] if values is None else values[1:, token]
        return hidden

    return restore


def _corrupted_values(
    model: nn.Module, batch: Tensor, corruption: list[Change], severed: str | None
) -> list[tuple[nn.Module, Tensor]]:
    """The severed modules, each with its output [rows, T, d] in the corrupted run; none if nothing is severed."""
    if severed is None:
        return []
    modules = [site_module(model, layer, SITES[severed]) for layer in range(len(layers(model)))]
    kept: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda hidden: kept.setdefault(module, hidden.clone())

    with changing(corruption + [(module, keep(module)) for module in modules]):
        model(batch)
    return list(kept.items())


# --- the simple rival ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def batched_loop(
    model: nn.Module,
    input_ids: Sequence[int] | Tensor,
    subject_span: tuple[int, int],
    kind: str,
    *,
    window: int = 10,
    samples: int = 10,
    noise: float = 0.1,
    seed: int = 1,
    answer: int | None = None,
) -> dict[str, Any]:
    """The same scores by one batch a layer, as a careful user would write it: a rival to time.

    All positions from the subject on and all draws go up in one batch, from the corrupted run's stored input of the
    first layer that differs, through the layers above only; the head sees the last position only. Before the subject
    a cell is the corrupted run's score. Returns what `trace_oracle` returns.
    """
    clean = torch.as_tensor(input_ids, device=model.device).flatten()
    corrupt = _add_noise(subject_span, noise, samples, seed)
    calls, inputs, outputs, contributions = _record(model, clean, kind, samples, corrupt)
    clean_logits = _head(model, outputs[-1][:1, -1])[0]
    answer = int(clean_logits.argmax()) if answer is None else answer
    p_corrupted = _metric(_head(model, outputs[-1][1:, -1]), answer, "prob").mean()

    blocks = layers(model)
    scores = p_corrupted.repeat(len(clean), len(blocks))
    positions = torch.arange(subject_span[0], len(clean), device=clean.device).repeat_interleave(samples)
    rows = torch.arange(len(positions), device=clean.device)

    def put(value: Tensor) -> Callable[[Tensor], Tensor]:
        """Write the clean value [T, d] at each row's own position."""

        def change(hidden: Tensor) -> Tensor:
            hidden[rows, positions] = value[positions]
            return hidden

        return change

    for layer in range(len(blocks)):
        if kind == "state":
            start, changes = layer + 1, []
            hidden = put(outputs[layer][0])(outputs[layer][1:].repeat(len(rows) // samples, 1, 1))
        else:
            restored = restored_layers(kind, layer, window, len(blocks))
            start = restored.start
            hidden = inputs[start][1:].repeat(len(rows) // samples, 1, 1)
            changes = [(site_module(model, at, SITES[kind]), put(contributions[at][0])) for at in restored]
        with changing(changes):
            for block, (args, kwargs) in zip(blocks[start:], calls[start:], strict=True):
                hidden = first(block(hidden, *args, **kwargs))
        p = _metric(_head(model, hidden[:, -1]), answer, "prob")
        scores[subject_span[0] :, layer] = p.view(-1, samples).mean(1)
    p_clean = float(_metric(clean_logits[None], answer, "prob"))
    return dict(p_clean=p_clean, p_corrupted=float(p_corrupted), scores=scores, answer=answer)


def _record(
    model: nn.Module, clean: Tensor, kind: str, samples: int, corrupt: Callable[[Tensor], Tensor]
) -> tuple[list[tuple], list[Tensor], list[Tensor], list[Tensor]]:
    """One forward of the clean and the corrupted runs: each block's other arguments, input, output and contribution.

    A text has no padding, so masks and position tables of one row serve a batch of any size.
    """
    calls: list[tuple] = []
    inputs: list[Tensor] = []
    kept: dict[str, list[Tensor]] = {"layer_out": [], SITES[kind]: []}

    def one_row(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one_row(item) for item in value)
        return value[:1] if isinstance(value, Tensor) else value

    def before(block: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        rest = {name: one_row(value) for name, value in kwargs.items() if name != "hidden_states"}
        calls.append((tuple(one_row(value) for value in args[1:]), rest))

    def keep(site: str) -> Callable[[Tensor], Tensor]:
        def change(hidden: Tensor) -> Tensor:
            kept[site].append(hidden)
            return hidden

        return change

    blocks = range(len(layers(model)))
    watched = [(site_module(model, at, site), keep(site)) for at in blocks for site in kept]
    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in layers(model)]
    try:
        with changing([(embedding(model), corrupt), *watched]):
            model(clean.repeat(samples + 1, 1), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return calls, inputs, kept["layer_out"], kept[SITES[kind]]


def _head(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits [rows, vocabulary] of last-layer outputs [rows, d], with the family's soft cap."""
    logits = model.get_output_embeddings()(model.get_submodule(paths(model).norm)(hidden))
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
