"""Where the sweep plugs into Hugging Face's blocks: one attention function, put in place for the length of a sweep.

The function is registered through transformers' attention interface and finds its pack in a context variable, since
extra keyword arguments do not reach it in every family. A family whose blocks never ask the interface (gptj) gets it
on the attention instance.
"""

import math
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache
from threading import RLock
from weakref import WeakKeyDictionary

import torch

from kedit_fast.basics.warn import warn
from kedit_fast.basics.words import counted
from kedit_fast.model.family import Family, layers_of, text_config
from kedit_fast.model.fused import own_forwards, put_back

NAME = "kedit_fast"
_call: ContextVar = ContextVar("kedit_fast_attention_call", default=None)
_ready: ContextVar[tuple] = ContextVar("kedit_fast_prepared_models", default=())  # inside ``prepared``
_locks: WeakKeyDictionary = WeakKeyDictionary()  # {model: of the thread that sweeps it}
# Keywords that transformers' blocks pass along and that change nothing in what attention computes.
HARMLESS = {"position_ids", "use_cache", "output_router_logits", "output_attentions", "cache_position", "is_causal"}


def _attention(
    module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
    s_aux=None, **rest,
):  # fmt: skip
    """transformers' signature: query [1, H, rows, D] -> ([1, rows, H, D], None)."""
    attend = _call.get()
    if attend is None:
        raise RuntimeError(f"attention {NAME!r} ran outside a sweep; set the model's attention implementation back")
    unknown = {name for name, given in rest.items() if given is not None and name not in HARMLESS}
    if unknown or attention_mask is not None:
        raise ValueError(
            f"{type(module).__name__} passes {sorted(unknown) or 'a mask'} to attention, which a sweep would ignore"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = attend(
        *(x.squeeze(0).transpose(0, 1) for x in (query, key, value)),  # [0] would be filled up with zeros going back
        scale=scale,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


@cache
def _register() -> None:
    """Makes the function known to transformers. With the first sweep, for importing these takes two seconds, which
    reading a file or a folder of edits needs not wait for."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)


@contextmanager
def attend_with(attend):
    """Blocks called inside use ``attend(query [rows, H, D], key, value, scale=, window=, softcap=, sinks=)``."""
    token = _call.set(attend)
    try:
        yield
    finally:
        _call.reset(token)


@contextmanager
def prepared(model, family: Family):
    """The model as a sweep needs it: eval mode, frozen, no autocast, our attention and our forwards; put back after
    it, always. Inside another of the same model it is that one's: each walks through all modules, which for a step of z
    was a fourth of what the host does. Another thread waits: what is put in place, its forwards would run too."""
    if any(model is each for each in ready()):
        yield
        return
    with _ours(model), among((*ready(), model)), _prepared(model, family):
        yield


def _ours(model):
    """The lock of a model: for the thread alone that holds it."""
    held = _locks.get(model)
    return held if held is not None else _locks.setdefault(model, RLock())  # of two at once the first is taken by both


def ready() -> tuple:
    """The models that are prepared around this."""
    return _ready.get()


@contextmanager
def among(models: tuple):
    """Inside these are prepared: by the thread that waits for this one, autograd's."""
    token = _ready.set(models)
    try:
        yield
    finally:
        _ready.reset(token)


@contextmanager
def _prepared(model, family: Family):
    _register()
    embedding = model.get_input_embeddings().weight
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(embedding.device.type, enabled=False))
        stack.enter_context(own_forwards(model, family))
        stack.enter_context(eval_mode(model))
        stack.enter_context(_without(model.parameters(), "requires_grad"))
        if family.attention == "_attn":
            stack.enter_context(_own_attn(model, family))
        else:
            config = text_config(model.config)
            stack.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation_internal)
            config._attn_implementation_internal = NAME
            if family.experts and config._experts_implementation == "batched_mm":  # copies matrices for every row
                stack.callback(setattr, config, "_experts_implementation_internal", "batched_mm")
                config._experts_implementation_internal = "eager"
        _report_foreign_hooks(model)
        yield


def eval_mode(model):
    """The model in eval mode; put back after it."""
    return _without(model.modules(), "training")


@contextmanager
def frozen(model):
    """The model without gradients for its parameters; flags are put back. A prepared one is. Nothing goes back down
    inside: autograd's thread would wait for this one."""
    if any(model is each for each in ready()):
        yield
        return
    with _ours(model), _without(model.parameters(), "requires_grad"):
        yield


@contextmanager
def _without(things, flag: str):
    flagged = [thing for thing in things if getattr(thing, flag)]
    try:
        for thing in flagged:
            setattr(thing, flag, False)
        yield
    finally:
        put_back(lambda: [setattr(thing, flag, True) for thing in flagged])


@contextmanager
def _own_attn(model, family):
    """gptj: the block calls ``self._attn(query, key, value, mask)``, [1, H, rows, D] in and out."""
    modules = [layer.get_submodule(family.attn) for layer in layers_of(model)]

    def own(query, key, value, attention_mask=None, *, module):
        out, weights = _attention(module, query, key, value, attention_mask, scaling=1 / math.sqrt(query.shape[-1]))
        return out.transpose(1, 2).to(value.dtype), weights

    if replaced := [module for module in modules if "_attn" in vars(module)]:
        raise RuntimeError(f"{type(replaced[0]).__name__}._attn is already replaced on this model")
    try:
        for module in modules:
            module._attn = lambda *args, module=module: own(*args, module=module)
        yield
    finally:
        put_back(lambda: [vars(module).pop("_attn", None) for module in modules])


def _report_foreign_hooks(model):
    hooked = [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    if hooked:
        warn(
            f"hooks of others stand on {counted(len(hooked), 'module')} of this model (first: "
            f"{hooked[0] or 'the model'}); they run in sweeps too",
        )
