"""An editor's hyper-parameters: checked one by one, looked up for a published model, read from published files (JSON as
the ROME and MEMIT repositories have them, YAML as EasyEdit does).
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from kedit_fast.basics import checks
from kedit_fast.basics.files import existing_file
from kedit_fast.basics.warn import warn
from kedit_fast.basics.words import brief, json_kind, reason
from kedit_fast.model.lm import LM

_Own = TypeVar("_Own", bound="Hyperparameters")
_Known = TypeVar("_Known", bound="_OfDepth")

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
    "calculate_objective_value", "model_name_or_path", "data_path", "save_model_dir",
}  # fmt: skip
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class _OfDepth(Protocol):
    """What was published for a model; v_loss_layer: its last layer."""

    @property
    def v_loss_layer(self) -> int | None: ...


@dataclass(frozen=True)
class Hyperparameters:
    """An editor's fields under their published names: each checked by its kind, read from published files.

    Raises ValueError, naming the field and its value, for a value of another kind than the field's.
    """

    POSITIVE: ClassVar[tuple[str, ...]] = ()
    ALG_NAMES: ClassVar[dict[str, dict]] = {}  # what files call the method, and the fields that this sets
    IN_FILES: ClassVar[dict[str, Callable[[Any], dict]]] = {}  # {a name that is no field: the fields that it sets}
    CHECKS: ClassVar[dict[str, Callable[[Any], Any]]] = {}  # {a field of a kind of its own: what takes its value}
    if TYPE_CHECKING:  # a field of every editor

        @property
        def layers(self) -> tuple[int, ...]: ...

    def __post_init__(self):
        for field in fields(self):
            value, check = getattr(self, field.name), self.CHECKS.get(field.name)
            value = check(value) if check else _KINDS[field.type](field.name, value, field.name in self.POSITIVE)
            object.__setattr__(self, field.name, value)
        layers = getattr(self, "layers", ())
        if len(set(layers)) < len(layers):
            checks.refuse("layers", layers, "each layer once")

    def check_layers(self, lm: LM) -> None:
        """Raises ValueError where there are no layers to edit, or the model lacks one."""
        if not self.layers:
            raise ValueError(f"{type(self).__name__} needs layers; {type(self).__name__}.for_model(lm) derives them")
        checks.layers("layers", self.layers, lm.n_layers)

    @classmethod
    def from_file(cls: type[_Own], path: checks.AnyPath) -> _Own:
        """The editor of a published hyper-parameter file, JSON or EasyEdit's YAML, or of one of the same form.

        What it holds besides (module paths, the model's name, device, P_loc) is not used, and a warning says so in one
        line. Raises ValueError, with the path, for the settings of another method, for a field that this editor lacks,
        and for a value that the field does not take.
        """
        path = checks.path("path", path)
        given, own = read_settings(path), {f.name: f.type for f in fields(cls)}
        values = cls._implied(path, given.get("alg_name"))
        for name in cls.IN_FILES.keys() & given.keys():
            values |= cls._from(path, name, given.pop(name))
        check_known(path, given, own, cls.__name__)
        for name in own.keys() & given.keys():
            values[name] = as_number(given[name]) if is_yaml(path) and own[name] is float else given[name]
        try:
            made = cls(**values)
            made._check_rest(given)
        except ValueError as error:
            raise ValueError(f"{path}: {reason(error)}") from error
        return made

    from_json = from_file

    @classmethod
    def _implied(cls, path, alg_name) -> dict:
        """The fields that a method's name in a file sets. Raises ValueError for another method's."""
        if alg_name is None:
            return {}
        for known, values in cls.ALG_NAMES.items():
            if str(alg_name).casefold() == known.casefold():
                return dict(values)
        raise ValueError(
            f"{path} holds settings of {brief(str(alg_name))} (alg_name), not of {cls.__name__}; expected a file of "
            f"{' or '.join(cls.ALG_NAMES)}, or the editor (--method) that this one is for"
        )

    @classmethod
    def _from(cls, path, name: str, value) -> dict:
        """The fields that a name of ``IN_FILES`` sets. Raises ValueError, with the path, for what is not done here."""
        try:
            return cls.IN_FILES[name](value)
        except ValueError as error:
            raise ValueError(f"{path}: {name} = {checks.shown(value)}: {reason(error)}") from error

    def _check_rest(self, given: dict) -> None:
        """Raises ValueError where the rest of a file says something that this editor does not do."""


def _pairs(name: str, value, _positive: bool) -> tuple[tuple[int, int], ...]:
    wanted = "pairs of (length, n), e.g. ((10, 5),)"
    pairs = [checks.items(name, pair, wanted) for pair in checks.items(name, value, wanted)]
    if not all(len(pair) == 2 for pair in pairs):
        checks.refuse(name, value, wanted)
    whole = partial(checks.whole, name, least=1, most=10_000, like=10)
    return tuple((whole(length), whole(n)) for length, n in pairs)


def _texts(name: str, value, _positive: bool) -> tuple[str, ...]:
    return tuple(checks.text(name, one) for one in checks.items(name, value, 'texts, e.g. ("{} is known for",)'))


# By a field's annotation: the check that its value passes; the last argument says whether it must be above 0.
_KINDS = {
    int: lambda name, value, positive: checks.whole(name, value, least=int(positive), like=20),
    int | None: lambda name, value, _: checks.optional(checks.whole, name, value, most=checks.MOST_LAYERS),
    float: lambda name, value, positive: checks.number(name, value, least=0, above=0 if positive else None),
    bool: lambda name, value, _: checks.flag(name, value),
    str: lambda name, value, _: checks.text(name, value, blank=True),
    tuple[int, ...]: lambda name, value, _: checks.layers(name, value, empty=True),
    tuple[tuple[int, int], ...]: _pairs,
    tuple[str, ...]: lambda name, value, _: tuple(checks.listed(name, value, str, "a list of names", empty=True)),
    tuple[str, ...]: _texts,
}


def published(table: Mapping[str, _Known], lm: LM, cls: type | None = None) -> Any:
    """The editor published for this very model, or None: its name is known and its depth is that model's.

    The name alone says little: any folder can be called "gpt2-xl".
    cls: a method built on the one that the table is of; it takes over these settings
    """
    name = Path(str(lm.name)).name.lower()
    editor: Any = next((editor for known, editor in table.items() if known.lower() == name), None)
    if editor is None or editor.v_loss_layer != lm.n_layers - 1:
        return None
    if cls is None or isinstance(editor, cls):
        return editor
    return cls(**vars(editor) | {"source": f"{editor.method}'s, {editor.source}"})


# ---- files


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
            if any(isinstance(name, list) for name in names):
                raise ValueError(f"a name that is none in line {node.start_mark.line + 1}")
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
        raise ValueError(f"{path}: {editor} has no field {brief(str(strange))}; it has {', '.join(sorted(fields))}")
    said = [name for name in unused if name not in MODULES and name != "alg_name"]
    if said:
        said += ["module paths (they follow from the model)"] * any(name in MODULES for name in unused)
        projection = "; the projection of P_loc is computed from the statistics" * ("P_loc" in unused)
        warn(f"{path}: not used: {', '.join(said)}{projection}")
