"""What a model's folder (or its copy on the hub) holds: config, tokenizer, weights.

Transformers reads them whole, may not run code that comes with a model, and its refusals are told here in words that
name the file and the way out. ``Checkpoint`` reads one tensor at a time.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from kedit_fast.basics.files import file_in, reading
from kedit_fast.basics.warn import warn
from kedit_fast.basics.words import brief, counted, json_kind, reason
from kedit_fast.model.stored_tensors import StoredTensor, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, ADAPTER, TOKENIZER = "config.json", "adapter_config.json", "tokenizer.json"
INDEX = "model.safetensors.index.json"
OWN_CODE = (
    "is made by code of its own (auto_map), and code that comes with a model is never run here; take a copy of it that "
    "transformers knows by itself"
)


def read_config(name):
    """transformers' config of a model, by its folder or its hub id.

    Raises ValueError for an adapter, a config that is none (with the line where it ends to be JSON) or that needs code
    of its own; OSError where there is nothing of that name.
    """
    import transformers

    folder = Path(name)
    if folder.is_dir():
        _check_folder(folder)
    elif folder.is_file():
        raise ValueError(f"model {str(name)!r} is a file; expected a model's folder, such as a weight file lies in")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        _refuse_adapter(name)
        why = str(error).splitlines()[0]
        raise OSError(
            f"model {str(name)!r} is no folder here, and the Hugging Face hub does not give it: {why}"
        ) from error
    except Exception as error:  # transformers' and its checkers' own, of many types
        raise ValueError(said_by(f"model {str(name)!r}", f"its {CONFIG}", error)) from error
    _refuse_adapter(name)
    _say_what_is_not_run(name, getattr(config, "auto_map", None), type(config))
    return config


_NO_TOKENIZER = (
    f"{{}} has no {TOKENIZER}, and kedit_fast needs a fast tokenizer; copy it from where the model came from "
    "(tokenizer.save_pretrained writes it), or give open_model tokenizer="
)


def read_tokenizer(name):
    """The tokenizer beside a model. Raises ValueError where it is missing, damaged or needs code of its own."""
    import transformers

    for file in (Path(name) / TOKENIZER, Path(name) / "tokenizer_config.json"):
        if file.is_file():
            _json_object(file)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:
        if Path(name).is_dir() and not (Path(name) / TOKENIZER).exists() and not _needs_code(error):
            raise ValueError(_NO_TOKENIZER.format(name)) from error
        raise ValueError(said_by(f"the tokenizer of {str(name)!r}", f"its {TOKENIZER}", error)) from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # of no file at all an empty one is made
        raise ValueError(_NO_TOKENIZER.format(name))
    _say_what_is_not_run(name, getattr(tokenizer, "init_kwargs", {}).get("auto_map"), type(tokenizer))
    return tokenizer


def read_model(name, classes, dtype) -> "PreTrainedModel":
    """The model with every weight from its checkpoint: transformers only logs those it had to make up."""
    if (index := Path(name) / INDEX).is_file():
        _read_index(index)  # refuses one that names files outside the folder, before anything reads them
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # both are told to us, and refused below
    try:
        model, info = classes.from_pretrained(name, dtype=dtype or "auto", trust_remote_code=False, **told)
    except SafetensorError as error:  # it does not say of which file
        for path in sorted(Path(name).glob("*.safetensors")):
            stored_tensors(path)
        why = brief(str(error))
        raise ValueError(f"a weight file of {name} is cut short or damaged ({why}); fetch it again") from error
    check_complete(
        name,
        [n for n, _ in model.named_parameters() if n in info["missing_keys"]],
        sorted(info["mismatched_keys"]),
    )
    return model


# ---- what is refused


def refuse_model(folder, wanted: str) -> None:
    """Raises ValueError for the folder of a model or an adapter, where ``wanted`` is expected."""
    for file, what in ((ADAPTER, "an adapter's"), (CONFIG, "a model's")):
        if (Path(folder) / file).is_file():
            raise ValueError(f"{folder} is {what} folder (it has {file}); expected {wanted}")


def _check_folder(folder: Path) -> None:
    _refuse_adapter(folder)
    file = folder / CONFIG
    if not file.exists():
        raise ValueError(f"{folder} has no {CONFIG}; expected a model's folder, as save_pretrained makes it")
    config = _json_object(file)
    if "model_type" not in config:
        raise ValueError(f"{file} names no model_type; expected a transformers model's config")


def _json_object(file: Path) -> dict:
    """The object that a JSON file holds. Raises ValueError, with the line, for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:  # also what is not UTF-8
        raise ValueError(f"{file} is not JSON ({reason(error)}); fetch or save it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds {json_kind(found)}; expected an object")
    return found


def _refuse_adapter(name) -> None:
    """transformers would look for the base that an adapter names and put the adapter on it."""
    from transformers.utils import find_adapter_config_file

    here = Path(name).is_dir()
    if not (Path(name) / ADAPTER).exists() if here else find_adapter_config_file(str(name)) is None:
        return
    raise ValueError(
        f"model {str(name)!r} is an adapter (it has an {ADAPTER}), not a model; merge it into its base first: "
        "peft.AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(folder), or, where "
        "it was made of an edit, kedit-fast merge with that edit"
    )


def _needs_code(error: Exception) -> bool:
    return "trust_remote_code" in str(error)


def said_by(whose: str, what: str, error: Exception) -> str:
    """transformers' refusal in a line; its advice to trust code is not one that can be followed here."""
    if _needs_code(error):
        return f"{whose} {OWN_CODE}"
    return f"{whose}: {what} cannot be used ({type(error).__name__}: {' '.join(str(error).split())[:300]})"


def _say_what_is_not_run(name, auto_map, used: type) -> None:
    if auto_map:
        warn(
            f"{name} brings code of its own (auto_map), which is not run: transformers' {used.__name__} is used",
        )


# ---- tensors


class Checkpoint:
    """The tensors of a safetensors checkpoint folder, by the model's parameter names."""

    def __init__(self, folder: Path, prefix: str = "", stored_as: tuple[tuple[str, str], ...] = ()):
        self.folder, self._prefix, self._stored_as = Path(folder), prefix, stored_as
        self._read: dict[str, dict[str, StoredTensor]] = {}  # by file, whose header is read when it is first asked for
        self._file_of = self._index()

    def _index(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.exists():
            return _read_index(index)
        single = self.folder / "model.safetensors"
        if not single.exists():
            raise FileNotFoundError(
                f"{self.folder} has neither model.safetensors nor its index; reading layers from disk needs a "
                "safetensors checkpoint (save_pretrained writes one)"
            )
        return dict.fromkeys(self.tensors(single.name), single.name)

    def tensors(self, file: str) -> dict[str, StoredTensor]:
        """{name: where it lies} of one of the files, in the order of their bytes; its header is read once."""
        if file not in self._read:
            self._read[file] = {tensor.name: tensor for tensor in stored_tensors(self.folder / file)}
        return self._read[file]

    def has(self, name: str) -> bool:
        """Whether a parameter is in the checkpoint."""
        return self._name(name) is not None

    def _name(self, name: str) -> str | None:
        short = name.removeprefix(self._prefix + ".")  # base models are saved without the head's prefix
        others = [there + name.removeprefix(here) for here, there in self._stored_as if name.startswith(here)]
        return next((n for n in (name, short, *others) if n in self._file_of), None)

    def stored(self, name: str) -> StoredTensor:
        """Where a parameter lies. Raises ValueError where the files lack it."""
        stored = self._name(name)
        if stored is None:
            raise ValueError(f"{self.folder} has no tensor {name!r}; is it a checkpoint of this model?")
        file = self._file_of[stored]
        if stored not in self.tensors(file):
            raise ValueError(f"{self.folder / INDEX} says that {file} has the tensor {stored!r}, which it has not")
        return self.tensors(file)[stored]

    @property
    def files(self) -> list[str]:
        """Names of the files that hold tensors, sorted."""
        return sorted(set(self._file_of.values()))

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensor files."""
        return sum((self.folder / file).stat().st_size for file in self.files)


def _read_index(index: Path) -> dict[str, str]:
    """{tensor: file}, each the plain name of a file beside the index."""
    with reading(index, "fetch the checkpoint again"):
        found = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        for file in dict.fromkeys(found.values()):
            file_in(index.parent, file, index)
        return found


def check_complete(folder, missing, mismatched) -> None:
    """Raises ValueError for parameters that a checkpoint lacks, or has in another shape.

    missing: their names, in the model's order; mismatched: (name, shape in the checkpoint, the model's shape)
    """
    if missing:
        raise ValueError(f"{folder} lacks {counted(len(missing), 'tensor')} of this model, {missing[0]!r} first")
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise ValueError(
            f"{folder}: tensor {name!r} is {list(stored)}, its config.json says {list(wanted)}; "
            "the checkpoint's files do not belong together"
        )
