"""Files of hyper-parameters: JSON as the ROME and MEMIT repositories publish them, YAML as EasyEdit does."""

import json
import re
import warnings
from collections.abc import Collection
from pathlib import Path

from kedit_fast.basics.files import existing_file
from kedit_fast.basics.words import json_kind, reason

# What follows from the model: where its modules are.
MODULES = {
    "rewrite_module_tmp", "layer_module_tmp", "mlp_module_tmp", "attn_module_tmp", "ln_f_module", "lm_head_module",
    "rewrite_module_tmps",
}  # fmt: skip
# What is given otherwise (the model, the device, statistics), or belongs to other ways to compute the same.
ELSEWHERE = {
    "layer_selection", "mom2_dataset", "mom2_n_samples", "mom2_dtype", "model_name", "alg_name", "stats_dir", "device",
    "max_length", "model_parallel", "model_class", "tokenizer_class", "tokenizer_name", "fp16", "bf16", "batch_size",
    "P_loc", "max_new_tokens", "use_chat_template", "evaluation_type", "enable_thinking", "cache_dir",
}  # fmt: skip
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def read_settings(path) -> dict:
    """{name: value} of a .yaml or .yml file, or of a JSON file of any other name. Nothing but data is read.

    Raises ValueError, naming the file, where it is neither or names a thing twice.
    """
    yaml = is_yaml(path)
    try:
        text = existing_file(path, "a hyper-parameter file").read_text(encoding="utf-8")
        given = _yaml(text) if yaml else json.loads(text)
    except (ValueError, RecursionError) as error:
        why = " ".join(reason(error).split())
        raise ValueError(
            f"{path} is not {'YAML' if yaml else 'JSON'} ({why}); expected a hyper-parameter file, .json or .yaml"
        ) from error
    if not isinstance(given, dict):
        kind = "YAML" if yaml else "JSON"
        raise ValueError(f"{path} holds {json_kind(given)} in {kind}; expected an object of hyper-parameters")
    return given


def is_yaml(path) -> bool:
    """Whether a file is YAML, by its name."""
    return Path(path).suffix.lower() in (".yaml", ".yml")


def _yaml(text: str):
    import yaml

    class Plain(yaml.SafeLoader):
        """Data alone; without aliases, by which a short file grows without end, and with each name once."""

        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"an alias in line {self.peek_event().start_mark.line + 1}; write the value out")
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            names = [key.value for key, _ in node.value]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{twice[0]!r} is there twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Plain)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def as_number(value):
    """A text such as "5e-4", which YAML reads as one for want of a point, as the number that was meant."""
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value.strip()) else value


def check_known(path, given: Collection[str], fields: Collection[str], editor: str) -> None:
    """Says in one line what of a file is not used. fields: of this editor.

    Raises ValueError for a name that is neither a field nor known to be given otherwise: a setting without effect would
    look like one.
    """
    unused = [name for name in given if name not in fields]
    strange = sorted(str(name) for name in unused if name not in MODULES | ELSEWHERE)
    if strange:
        raise ValueError(f"{path}: {editor} has no field {strange}; it has {', '.join(sorted(fields))}")
    said = [name for name in unused if name not in MODULES and name != "alg_name"]
    if said:
        said += ["module paths (they follow from the model)"] * any(name in MODULES for name in unused)
        projection = "; the projection of P_loc is computed from the statistics" * ("P_loc" in unused)
        warnings.warn(f"{path}: not used: {', '.join(said)}{projection}", stacklevel=3)
