"""What a model's folder (or its copy on the hub) says of itself: config, tokenizer, weights.

Read by transformers, which may not run code that comes with a model, and whose refusals are told here in words that
name the file and the way out.
"""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from kedit_fast.basics.words import json_kind
from kedit_fast.model.stored import check_complete, check_index, open_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, ADAPTER, TOKENIZER = "config.json", "adapter_config.json", "tokenizer.json"
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
        raise ValueError(f"model {str(name)!r} is a file; expected the folder that it lies in")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        _refuse_adapter(name)
        why = str(error).splitlines()[0]
        raise OSError(f"model {str(name)!r} is no folder here and not found on the Hugging Face hub: {why}") from error
    except Exception as error:  # transformers' and its checkers' own, of many types
        raise ValueError(_said(f"model {str(name)!r}", f"its {CONFIG}", error)) from error
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
        raise ValueError(_said(f"the tokenizer of {str(name)!r}", f"its {TOKENIZER}", error)) from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # of no file at all an empty one is made
        raise ValueError(_NO_TOKENIZER.format(name))
    _say_what_is_not_run(name, getattr(tokenizer, "init_kwargs", {}).get("auto_map"), type(tokenizer))
    return tokenizer


def read_model(name, classes, dtype) -> "PreTrainedModel":
    """The model with every weight from its checkpoint: transformers only logs those it had to make up."""
    check_index(Path(name))
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # both are told to us, and refused below
    try:
        model, info = classes.from_pretrained(name, dtype=dtype or "auto", trust_remote_code=False, **told)
    except SafetensorError as error:  # it does not say of which file
        for path in sorted(Path(name).glob("*.safetensors")):
            open_tensors(path)
        raise ValueError(f"a weight file of {name} is cut short or damaged ({error}); fetch it again") from error
    check_complete(
        name,
        [n for n, _ in model.named_parameters() if n in info["missing_keys"]],
        sorted(info["mismatched_keys"]),
    )
    return model


# ---- what is refused


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
    except ValueError as error:  # also what is not UTF-8
        raise ValueError(f"{file} is not JSON ({error}); fetch or save it again") from error
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


def _said(whose: str, what: str, error: Exception) -> str:
    """transformers' refusal in a line; its advice to trust code is not one that can be followed here."""
    if _needs_code(error):
        return f"{whose} {OWN_CODE}"
    return f"{whose}: {what} cannot be used ({type(error).__name__}: {' '.join(str(error).split())[:300]})"


def _say_what_is_not_run(name, auto_map, used: type) -> None:
    if auto_map:
        warnings.warn(
            f"{name} brings code of its own (auto_map), which is not run: transformers' {used.__name__} is used",
            stacklevel=2,
        )
