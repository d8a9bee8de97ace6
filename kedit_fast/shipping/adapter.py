"""An edit as a LoRA adapter: a folder that PEFT, and servers of PEFT adapters, load beside untouched base weights.

    export_peft(edit, "eiffel-in-rome")               # adapter_config.json, adapter_model.safetensors, kedit_fast.json
    load_peft(hf_model, "eiffel-in-rome")             # refuses another base model than the edit's
    PeftModel.from_pretrained(hf_model, "eiffel-in-rome")     # PEFT by itself, which cannot know

LoRA adds (alpha / r) B A to a weight. With B = u, A = vᵀ and alpha = r that is Δ = u vᵀ, nothing approximated. It is
also the way to ship an edit for a quantized base model, whose packed weights cannot be written.

PEFT has no limits. vLLM takes ranks up to its ``max_lora_rank``, and not every family: ``vllm`` has the rules. It holds
the factors in the model's own dtype, so there an edit of a bfloat16 model is rounded twice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor, nn

from kedit_fast.basics import checks
from kedit_fast.basics.files import check_format, named, read_object, reading
from kedit_fast.basics.folders import check_new_folder, new_folder, sha256_of, write_json
from kedit_fast.basics.state import own_state
from kedit_fast.basics.warn import warn
from kedit_fast.edits.changes import only_weights
from kedit_fast.edits.compose import compose
from kedit_fast.edits.deltas import Delta, Dense, LowRank
from kedit_fast.edits.edit import Edit, digest, edit_list
from kedit_fast.model.family import auto_class, family_of, is_conv1d, projection, refuse_experts, text_config
from kedit_fast.model.fingerprint import family_name, fingerprint
from kedit_fast.model.lm import LM
from kedit_fast.model.opening import named_folder
from kedit_fast.shipping import vllm
from kedit_fast.shipping.merge import checkpoint_fingerprint

if TYPE_CHECKING:
    from peft import PeftModel

MAX_RANK = vllm.RANKS[-1]
EXACT = 1e-6  # relative error below which factors count as the delta itself: rounding of an fp32 delta
WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "kedit_fast.json"
FORMAT, VERSION = "kedit_fast.peft", 1


@dataclass(frozen=True)
class Adapter:
    """What ``export_peft`` wrote.

    folder: where; rank: r, the same for all; ranks: {layer: factors that are not padding}, {"5 up": ...} of another
    matrix than the down projection; errors: {layer: ‖Δ - what is kept of it‖ / ‖Δ‖}; base: its name, "" for none
    """

    folder: Path
    rank: int
    ranks: dict[int | str, int]
    errors: dict[int | str, float]
    base: str = ""


@own_state()
def export_peft(
    edits: Edit | Sequence[Edit],
    folder: checks.AnyPath,
    *,
    model: LM | nn.Module | str | Path | None = None,
    max_rank: int | None = MAX_RANK,
    truncate: bool = False,
    server: str | None = None,
    check_fingerprint: bool = True,
) -> Adapter:
    """Writes an edit, or a chain of edits as their sum, as a LoRA adapter folder; whole or not at all.

    edits: none of them independent; folder: new or empty
    model: the base: an LM or a loaded Hugging Face model, or the name that the adapter shall give as its base: a
        folder, a hub id, "smollm2"; None: the module paths follow from the fingerprint, no name is given. A model or a
        folder is checked against the edit's fingerprint; of a folder with packed weights (quantized) the family, number
        of layers and width alone, with a warning; a hub id is not looked up. PEFT's Auto classes load the base by that
        name, so a model's folder is named by its absolute path, from wherever it was opened; an adapter that goes to
        another machine wants a hub id.
    max_rank: the largest r that whoever loads the adapter can take; None for PEFT, which has no limit
    truncate: cut a delta of a larger rank to the nearest one of ``max_rank`` (SVD; the error is in the result and in
        kedit_fast.json). A low-rank delta is cut by QR of its factors and SVD of r x r; a dense one is decomposed
        whole, which is slow: O(d² d_ff) in fp64.
    server: "vllm": refuse what a vLLM server does not load (families, matrices, ranks); None: what PEFT loads
    check_fingerprint: False for a base that is meant to differ, a fine-tuned copy

    A delta of more factors than ``max_rank`` whose numerical rank fits is exact and needs no ``truncate``.
    Factors are fp32. Raises ValueError, with nothing written, for an independent edit, another base model, edits that
    do not follow each other, an edit that changes nothing, a rank over the limit, and what the server does not load.
    """
    edits, truncate = tuple(edit_list(edits)), checks.flag("truncate", truncate)
    max_rank = checks.optional(checks.whole, "max_rank", max_rank, least=1, like=64)
    server = checks.optional(checks.choice, "server", server, ("vllm",))
    check_new_folder(folder)
    _check_edits(edits)
    total = compose(edits)
    base, name = _base_of(total, model, checks.flag("check_fingerprint", check_fingerprint))
    family = family_of(base.config)
    refuse_experts(family, "an adapter has no factors for stacked experts: serve the edit with lm.with_edit(edit)")
    if server:
        max_rank = vllm.checked(max_rank, base.config, [role for _, role in total.weights])
    cut = {place: _within(place[0], delta, max_rank, truncate) for place, delta in total.weights.items()}
    rank = max(delta.rank for delta, _ in cut.values())
    if not rank:
        raise ValueError("this edit changes nothing: its deltas have no factors, and an adapter needs a rank")
    tensors, paths = {}, {}
    for (layer, role), (delta, _) in cut.items():
        path = paths[layer, role] = f"{family.layers}.{layer}.{family.roles[role]}"
        u, v = _balanced(delta)
        tensors[f"base_model.model.{path}.lora_A.weight"] = _padded(v, rank).T.contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = _padded(u, rank)
    ranks = {_named(*place): delta.rank for place, (delta, _) in cut.items()}
    errors = {_named(*place): error for place, (_, error) in cut.items()}
    with new_folder(folder) as unfinished:
        with named(unfinished / WEIGHTS):  # save_file would tell its failures in an error of its own, without errno
            (unfinished / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        write_json(unfinished / CONFIG, _config(name, rank, list(paths.values()), is_conv1d(projection(base, 0))))
        write_json(unfinished / RECORD, _record(edits, unfinished / WEIGHTS, ranks, errors))
    return Adapter(Path(folder), rank, ranks, errors, name)


@own_state()
def load_peft(hf_model: nn.Module, folder: checks.AnyPath, *, check_fingerprint: bool = True) -> "PeftModel":
    """``PeftModel.from_pretrained(hf_model, folder)`` for the model that the edit was made for; needs the peft package.

    Load the adapter of a base in 4 bits (bitsandbytes NF4) before the model's first forward. Measured with
    bitsandbytes 0.50 on the CPU, that forward packs the weights anew, and an adapter loaded after it gives garbage: the
    new answer had probability 0.00 in place of 0.99. A base in 8 bits was right in both orders.

    check_fingerprint: False for a model whose weights are meant to differ: a quantized or fine-tuned copy
    Raises ValueError for another base model, and for a folder that ``export_peft`` did not write or that has changed.
    """
    from peft import PeftModel

    check_adapter(folder, hf_model if check_fingerprint else None)
    return PeftModel.from_pretrained(hf_model, str(folder), trust_remote_code=False)


def check_adapter(folder, hf_model: nn.Module | None = None) -> dict:
    """The record of an adapter that ``export_peft`` wrote (kedit_fast.json): its edits, facts and fingerprint.

    hf_model: raises ValueError unless this is the model that the edit was made for
    """
    folder = checks.path("folder", folder)
    if hf_model is not None:
        checks.instance("hf_model", hf_model, nn.Module, "a loaded Hugging Face model")
    path = folder / RECORD
    if not path.exists():
        raise ValueError(f"{folder} has no {RECORD}; expected an adapter folder that export_peft wrote")
    with reading(path, "expected what export_peft wrote"):
        record = read_object(path, "what export_peft writes")
        check_format(record, FORMAT, version=VERSION)
        expected, made_for = record["sha256"], record["fingerprint"]
    if sha256_of(folder / WEIGHTS) != expected:
        raise ValueError(f"{folder / WEIGHTS} is not the file that was exported; export the edit again")
    if hf_model is not None and (found := fingerprint(hf_model)) != made_for:
        raise ValueError(
            f"this adapter was made for model {made_for}, this is {found}; load the model that the edit was made for, "
            "or, for a quantized or fine-tuned copy of it, pass check_fingerprint=False"
        )
    return record


def _named(layer: int, role: str) -> int | str:
    """A matrix by its layer, and by its role where that is not the usual one."""
    return layer if role == "down" else f"{layer} {role}"


# ---- the base model


def _check_edits(edits):
    for edit in edits:
        only_weights(edit, "an adapter acts on every text")
    if not any(edit.layers for edit in edits):
        raise ValueError("this edit changes nothing: it has no deltas")


def _base_of(edit: Edit, model, check: bool) -> tuple[nn.Module, str]:
    """(a model with the base's module paths, the base's name), after the checks that a model or its folder allows."""
    if model is None or isinstance(model, str | Path):
        name = _loadable(str(model or ""))
        if name is None:
            raise ValueError(f"model {str(model)!r}: no model's folder; give a folder with config.json, or a hub id")
        if check and edit.fingerprint and name and (Path(name) / "config.json").is_file():
            _check_folder(edit.fingerprint, Path(name))
        return _skeleton(edit.fingerprint), name
    checks.instance("model", model, nn.Module | LM, "what open_model gives, a loaded model, a folder or a hub id")
    base = model if isinstance(model, nn.Module) else model.model
    found = fingerprint(base) if isinstance(model, nn.Module) else model.fingerprint
    if check and edit.fingerprint and found != edit.fingerprint:
        raise ValueError(_another(edit.fingerprint, "this", found))
    for layer, role in edit.weights:
        projection(base, layer, role)
    return base, _loadable(getattr(base.config, "_name_or_path", None) or "") or ""


def _check_folder(made_for: str, folder: Path) -> None:
    """Raises ValueError unless the folder's model is the one that an edit was made for; of weights that cannot be read
    as they are it compares what the configuration says, and warns."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    try:
        found = checkpoint_fingerprint(folder)
    except ValueError as error:  # quantized, or pickled
        inner = text_config(config)
        found, made = f"{config.model_type}-{inner.num_hidden_layers}-{inner.hidden_size}", made_for.rsplit("-", 1)[0]
        if found != made:
            raise ValueError(_another(made_for, str(folder), f"{found}-...")) from error
        warn(
            f"{folder} is a {found} as the edit's model is, and that it has its weights is unchecked: {error}",
        )
    else:
        if found != made_for:
            raise ValueError(_another(made_for, str(folder), found))


def _another(made_for: str, what: str, found: str) -> str:
    return (
        f"the edit was made for model {made_for}, {what} is {found}; name its own base model, or, if that is meant (a "
        "fine-tuned copy), pass check_fingerprint=False (--force)"
    )


def _loadable(name: str) -> str | None:
    """The name by which ``from_pretrained`` finds a model from any working directory: of a folder its absolute path.

    A name that is no folder here is kept, a hub id or a path of another machine; None for a relative path ("./llama",
    "~/llama") that leads to no model.
    """
    name = str(named_folder(name))  # loaders of adapters do not know those that have one here
    folder = Path(name).expanduser()
    if name and (folder / "config.json").is_file():
        return str(folder.absolute())
    return None if name.startswith((".", "~")) else name


def _skeleton(made_for: str) -> nn.Module:
    """A model of the family that a fingerprint names, with one layer and no weights: its modules tell their types."""
    import transformers

    name = family_name(made_for)
    if not name:
        raise ValueError("this edit does not say for which model it was made: export_peft(edit, folder, model=...)")
    config = transformers.AutoConfig.for_model(name)
    inner = text_config(config)
    inner.num_hidden_layers = 1
    if getattr(inner, "layer_types", None):
        inner.layer_types = inner.layer_types[:1]
    with torch.device("meta"):
        return auto_class(family_of(config)).from_config(config, trust_remote_code=False)


# ---- factors


def _within(layer: int, delta: Delta, max_rank: int | None, truncate: bool) -> tuple[LowRank, float]:
    """(the delta in at most ``max_rank`` factors, its relative error)."""
    limit = max_rank or min(delta.shape)
    if isinstance(delta, LowRank) and (max_rank is None or delta.rank <= max_rank):
        return delta, 0.0
    left, sizes, right = _singular(delta)
    # what is left out with r factors, for r from 0 to all, relative
    lost = torch.cat([sizes.square().flip(0).cumsum(0).flip(0), sizes.new_zeros(1)]).sqrt()
    lost = lost / lost[0].clamp(min=torch.finfo(lost.dtype).tiny)
    rank = int((lost > EXACT).sum())
    if rank > limit and not truncate:
        raise ValueError(
            f"layer {layer}: the delta has rank {rank}, over max_rank {limit}. kedit_fast.merge_checkpoint (kedit-fast "
            f"merge without --peft) writes it into a checkpoint as it is; truncate=True (--truncate) keeps the nearest "
            f"delta of rank {limit} (relative error {lost[limit]:.2g}); max_rank=None (--max-rank none) suits PEFT, "
            "which has no limit"
        )
    rank = min(rank, limit)
    root = sizes[:rank].sqrt()
    return LowRank(left[:, :rank] * root, right[:, :rank] * root), float(lost[rank])


def _singular(delta: Delta) -> tuple[Tensor, Tensor, Tensor]:
    """(left [d, k], singular values [k] descending, right [d_ff, k]) of a delta, fp64. Low rank is never multiplied
    out: with u = Q S and v = P T (QR), Δ = Q (S Tᵀ) Pᵀ, and only S Tᵀ [r, r] is decomposed."""
    if isinstance(delta, Dense):
        left, sizes, right = torch.linalg.svd(delta.delta.cpu().double(), full_matrices=False)
        return left, sizes, right.T
    (q, s), (p, t) = (torch.linalg.qr(factor.cpu().double()) for factor in (delta.u, delta.v))
    left, sizes, right = torch.linalg.svd(s @ t.T)
    k = len(sizes)
    return q @ left[:, :k], sizes, p @ right.T[:, :k]


def _balanced(delta: LowRank) -> tuple[Tensor, Tensor]:
    """u [d, r], v [d_ff, r] in fp32 with columns of like norms: a server may hold them in fp16, whose range is short.

    Each column is scaled by a power of two and its partner by the inverse, so no product changes in any bit.
    """
    u, v = delta.u.detach().cpu().double(), delta.v.detach().cpu().double()
    sizes = torch.stack([u.norm(dim=0), v.norm(dim=0)])
    shift = torch.where((sizes > 0).all(0), (sizes[1] / sizes[0]).log2() / 2, 0.0).round()
    return (u * torch.exp2(shift)).float(), (v * torch.exp2(-shift)).float()


def _padded(factor: Tensor, rank: int) -> Tensor:
    return nn.functional.pad(factor, (0, rank - factor.shape[1])).contiguous()


# ---- files


def _config(base: str, rank: int, paths: list[str], transposed: bool) -> dict:
    """adapter_config.json. fan_in_fan_out: weights are stored [in, out] (GPT-2's Conv1D)."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": paths,
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False, "modules_to_save": None,
        "inference_mode": True,
    }  # fmt: skip


def _record(edits, weights: Path, ranks: dict, errors: dict) -> dict:
    made = [
        {
            "method": edit.method,
            "hparams": edit.hparams,
            "facts": [fact.to_record() for fact in edit.facts],
            "provenance": edit.provenance,
            "digest": digest(edit),
        }
        for edit in edits
    ]
    return {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": edits[0].fingerprint,
        "ranks": ranks,
        "relative_errors": {layer: error for layer, error in errors.items() if math.isfinite(error)},
        "sha256": sha256_of(weights),
        "edits": made,
    }
