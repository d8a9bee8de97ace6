"""What the modules of a block compute by our own ops for the length of a sweep: products, norms, activations.

Hugging Face's blocks call their modules as before, and hooks on them see the same. On a GPU a new GELU is eight kernels
as it is written, and one here: of a trace of GPT-2-XL's shape a third of the time (``python -m bench counts``).

A module of another type, or one that somebody gave a forward of its own, goes on as it does. Left as they are, too:
rotary embeddings and the residual adds, which blocks compute in their own code, between modules.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kedit_fast.kernels.dispatch import backend_for
from kedit_fast.kernels.linear import linear
from kedit_fast.kernels.pointwise import gated, rms_norm
from kedit_fast.model.family import Family, layers_of

# Activations by what transformers and torch call their types.
SPELLED_OUT = ("NewGELUActivation", "FastGELUActivation")  # in ops of torch, one after the other
GELU_TANH = (*SPELLED_OUT, "GELUTanh", "PytorchGELUTanh")
ACTS = {"SiLU": "silu", "SiLUActivation": "silu"} | dict.fromkeys(GELU_TANH, "gelu_tanh")


@contextmanager
def own_forwards(model: nn.Module, family: Family) -> Iterator[None]:
    """The model's modules with our forwards; theirs are back after it, always.

    (A TorchFunctionMode would do the same for products and cost 4 % of a trace.)
    """
    replaced = []
    try:
        for module, forward in _forwards(model, family):
            if "forward" not in vars(module):
                replaced.append(module)
                module.forward = MethodType(forward, module)
        yield
    finally:
        put_back(lambda: [vars(module).pop("forward", None) for module in replaced])


def put_back(undo: Callable[[], object]) -> None:
    """All of it, also where Ctrl-C comes in the middle."""
    try:
        undo()
    except KeyboardInterrupt:
        undo()
        raise


def _forwards(model: nn.Module, family: Family) -> Iterator[tuple[nn.Module, Callable]]:
    from transformers.pytorch_utils import Conv1D

    embedding = model.get_input_embeddings().weight
    if embedding.dtype == torch.float64:  # Llama's norms are fp32 whatever the model is, and an oracle's too
        return
    products: dict[type, Callable] = {}
    if backend_for("linear", embedding.device, embedding.dtype) != "reference":
        products = {nn.Linear: _linear, Conv1D: _conv1d}
    norm = _rms_norm(family)
    for module in model.modules():
        kind = type(module)
        if kind in products:
            yield module, products[kind]
        elif kind.__name__ in SPELLED_OUT and _is_theirs(module):
            yield module, _gelu_tanh
        elif family.fused and kind.__name__.endswith("RMSNorm") and _is_theirs(module):
            yield module, norm
    if family.fused and (family.mlp_gate or family.mlp_gate_up):
        for layer in layers_of(model):
            mlp = layer.get_submodule(family.mlp)
            act = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
            if type(act).__name__ in ACTS and _is_theirs(mlp) and _is_theirs(act) and not is_watched(act):
                yield mlp, _gated_mlp(family, ACTS[type(act).__name__])


def _is_theirs(module: nn.Module) -> bool:
    """Whether it computes what transformers or torch wrote: another's may be something else by the same name, and so
    may a forward that somebody gave the class."""
    kind, wrote = type(module), ("transformers.", "torch.nn.")
    return kind.__module__.startswith(wrote) and kind.forward.__module__.startswith(wrote)


def is_watched(module: nn.Module) -> bool:
    """Whether hooks stand on it, or it has a forward of its own: it has to be called, then."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(module) or any(getattr(module, name) for name in hooks)


def _linear(self, x: Tensor) -> Tensor:
    return linear(x, self.weight, self.bias)


def _conv1d(self, x: Tensor) -> Tensor:
    return linear(x, self.weight, self.bias, in_out=True)


def _gelu_tanh(self, x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _rms_norm(family: Family) -> Callable:
    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype != x.dtype:  # some give the weight's dtype then, some x's
            return type(self).forward(self, x)
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        return rms_norm(x, self.weight, eps, offset=family.norm_offset)

    return forward


def _gated_mlp(family: Family, act: str) -> Callable:
    """down(act(gate(x)) up(x)), the projections called as modules: hooks stand on them."""
    gate, up, down, both = (
        path and path.rpartition(".")[2]
        for path in (family.mlp_gate, family.mlp_up, family.mlp_down, family.mlp_gate_up)
    )

    def forward(self, x: Tensor) -> Tensor:
        parts = getattr(self, both)(x).chunk(2, -1) if both else (getattr(self, gate)(x), getattr(self, up)(x))
        return getattr(self, down)(gated(*parts, act))

    return forward
