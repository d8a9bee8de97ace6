"""Experts: the stacked matrices of a mixture-of-experts layer, seen as one wide down projection.

A row that is sent to experts j with weights g_j gets Σ_j g_j W_j k_j. That is W̃ k̃, with the matrices one beside the
other, W̃ = [W_1 … W_E], and the routed keys one behind the other, k̃ = [g_1 k_1 … g_E k_E], 0 where a row is not sent.
So a layer of E experts has one "down" projection [d, E · width], and its keys are as wide.
"""

from torch import Tensor, nn


def is_experts(module: nn.Module) -> bool:
    """Whether a module keeps the matrices of all experts in one tensor."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, Tensor) and down.ndim == 3


def n_experts(module: nn.Module) -> int:
    """Of a layer's experts module."""
    return len(module.down_proj)


def stacked(module: nn.Module) -> Tensor:
    """The down projections as a view [E, d, width]: gpt_oss stores [E, width, d]."""
    return module.down_proj.mT if module.is_transposed else module.down_proj


def as_wide(module: nn.Module) -> Tensor:
    """W̃ [d, E · width]: a copy, or a view where the layout allows one."""
    return stacked(module).transpose(0, 1).flatten(1)


def as_stacked(module: nn.Module, weight: Tensor) -> Tensor:
    """W̃ [d, E · width] in the layout of the module's parameter: a view."""
    each = weight.view(len(weight), n_experts(module), -1).transpose(0, 1)
    return each.mT if module.is_transposed else each


def routed_keys(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """k̃ [rows, E · width] of rows x [rows, d] that are sent to experts ``index`` [rows, k] with ``weights`` [rows, k].

    Takes the up projections once more, of each row's own experts.
    """
    down = stacked(module)
    keys = x.new_zeros(len(x), len(down), down.shape[2])
    for expert in index.unique().tolist():
        row, place = (index == expert).nonzero(as_tuple=True)
        up = module.gate_up_proj[expert]
        both = x[row] @ (up if module.is_transposed else up.T)
        if module.has_bias:
            both = both + module.gate_up_proj_bias[expert]
        keys[row, expert] = (module._apply_gate(both) * weights[row, place, None]).to(x.dtype)
    return keys.flatten(1)


def routes(keys: Tensor, n: int) -> Tensor:
    """[rows, n] bool: the experts that rows of routed keys [rows, n · width] are sent to."""
    return (keys.view(len(keys), n, -1) != 0).any(2)
