"""An editor's hyper-parameters: read from published files, checked one by one, looked up for a published model."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

from kedit_fast.basics import checks
from kedit_fast.editors.settings_files import as_number, check_known, is_yaml, read_settings
from kedit_fast.model.lm import LM

_Own = TypeVar("_Own", bound="Hyperparameters")
_Known = TypeVar("_Known", bound="_OfDepth")


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
    if TYPE_CHECKING:  # a field of every editor

        @property
        def layers(self) -> tuple[int, ...]: ...

    def __post_init__(self):
        for field in fields(self):
            value = _KINDS[field.type](field.name, getattr(self, field.name), field.name in self.POSITIVE)
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
        check_known(path, given, own, cls.__name__)
        for name in own.keys() & given.keys():
            values[name] = as_number(given[name]) if is_yaml(path) and own[name] is float else given[name]
        try:
            made = cls(**values)
            made._check_rest(given)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
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
            f"{path} holds settings of {alg_name} (alg_name), not of {cls.__name__}; expected a file of "
            f"{' or '.join(cls.ALG_NAMES)}, or the editor (--method) that this one is for"
        )

    def _check_rest(self, given: dict) -> None:
        """Raises ValueError where the rest of a file says something that this editor does not do."""


def _pairs(name: str, value, _positive: bool) -> tuple[tuple[int, int], ...]:
    wanted = "pairs of (length, n), e.g. ((10, 5),)"
    pairs = [checks.items(name, pair, wanted) for pair in checks.items(name, value, wanted)]
    if not all(len(pair) == 2 for pair in pairs):
        checks.refuse(name, value, wanted)
    whole = partial(checks.whole, name, least=1, most=10_000, like=10)
    return tuple((whole(length), whole(n)) for length, n in pairs)


# By a field's annotation: the check that its value passes; the last argument says whether it must be above 0.
_KINDS = {
    int: lambda name, value, positive: checks.whole(name, value, least=int(positive), like=20),
    int | None: lambda name, value, _: checks.optional(checks.whole, name, value, most=checks.MOST_LAYERS),
    float: lambda name, value, positive: checks.number(name, value, least=0, above=0 if positive else None),
    bool: lambda name, value, _: checks.flag(name, value),
    str: lambda name, value, _: checks.text(name, value, blank=True),
    tuple[int, ...]: lambda name, value, _: checks.layers(name, value, empty=True),
    tuple[tuple[int, int], ...]: _pairs,
}


def published(table: Mapping[str, _Known], lm: LM) -> _Known | None:
    """The editor published for this very model, or None: its name is known and its depth is that model's.

    The name alone says little: any folder can be called "gpt2-xl".
    """
    name = Path(str(lm.name)).name.lower()
    editor = next((editor for known, editor in table.items() if known.lower() == name), None)
    return editor if editor is not None and editor.v_loss_layer == lm.n_layers - 1 else None
