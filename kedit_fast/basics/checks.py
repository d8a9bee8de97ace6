"""What an argument may be: every public function asks here, before any work, so that all refuse in the same words.

    window = whole("window", window, least=1, like=10)
    # window = 0: expected a whole number of at least 1, e.g. 10

Each check gives the value back as the package works with it (a plain int, a tuple, a Path) and raises ``BadArgument``
for any other, with the argument's name, the value, what was expected and an example. numpy's numbers are taken where
Python's are, true and false are no numbers. Free of torch and of everything else in this package but ``words``.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from numbers import Integral, Number, Real
from pathlib import Path, PurePath
from reprlib import Repr
from types import UnionType
from typing import Any, NoReturn

from kedit_fast.basics.words import ranges

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}  # short and whole
SEEDS = 2**32 - 1  # the largest that numpy's RandomState takes; torch takes it too
LARGEST = 2**53  # of a whole number without another bound: what JSON keeps exactly, and no tensor has more of anything
Kinds = type | UnionType | tuple[type, ...]  # what isinstance takes
AnyPath = str | os.PathLike[str]  # what names a file, see ``path``
MOST_LAYERS = 10_000  # no model has more; a range is looked at before it becomes a list


class BadArgument(ValueError, TypeError):
    """A value of another kind than expected, or out of range. A ValueError and a TypeError, so that either finds it."""


def whole(name: str, value, *, least: int = 0, most: int | None = None, like: int | None = None) -> int:
    """A whole number within bounds, as an int."""
    fits = _is_a(Integral, value)
    if not fits or value < least or value > (LARGEST if most is None else most):
        bounded = most is not None or (fits and value > LARGEST)
        within = f"from {least} to {LARGEST if most is None else most}" if bounded else f"of at least {least}"
        wanted = f"a whole number {within}, e.g. {least if like is None else like}"
        refuse(name, value, wanted if least != most else f"{least}, there is no other")
    return int(value)


def seed(name: str, value) -> int:
    """A number to begin random choices with."""
    return whole(name, value, most=SEEDS, like=1)


def number(
    name: str, value, *, least: float = -math.inf, above: float | None = None, most: float = math.inf, like: float = 0.5
) -> float:
    """A finite number: from ``least``, or above ``above``, to ``most``. A float, or the int that was given."""
    fits = _is_a(Real, value) and _finite(value)
    if not fits or not (least <= value <= most) or (above is not None and not value > above):
        bounds = f" above {above}" if above is not None else "" if least == -math.inf else f" of at least {least}"
        bounds += "" if most == math.inf else f"{' and' * bool(bounds)} of at most {most}"
        refuse(name, value, f"a finite number{bounds}, e.g. {like}")
    return int(value) if isinstance(value, Integral) else float(value)


def share(name: str, value, *, below_one: bool = False) -> float:
    """A number from 0 to 1, both taken unless ``below_one``."""
    if not (_is_a(Real, value) and 0 <= value <= 1) or (below_one and value == 1):
        refuse(name, value, f"a share from 0 to {'below 1' if below_one else '1'} (0.9, not 90)")
    return float(value)


def flag(name: str, value) -> bool:
    """True or False, nothing else: the text "False" would count as true."""
    if not (isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")):
        refuse(name, value, "True or False")
    return bool(value)


def text(name: str, value, *, blank: bool = False, like: str = "") -> str:
    """A string that can be encoded, not blank unless ``blank``."""
    wanted = "a text" + f", e.g. {like!r}" * bool(like)
    if not isinstance(value, str):
        refuse(name, value, wanted)
    if not blank and not value.strip():
        raise BadArgument(_said(name, f"is empty ({shown(value)}); give it {wanted}"))
    try:
        value.encode()
    except UnicodeEncodeError:
        words = f"{shown(value)} holds half a character (a surrogate); no text has one"
        raise BadArgument(_said(name, words)) from None
    return value


def choice(name: str, value, known: Iterable[str]) -> str:
    """One of the known names."""
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        refuse(name, value, f"one of {', '.join(known)}")
    return value


def choices(name: str, value, known: Iterable[str]) -> tuple[str, ...]:
    """Some of the known names, each once, in their order; one name alone is taken too."""
    known = tuple(known)
    wanted = f"some of {', '.join(known)}"
    given = [value] if isinstance(value, str) else items(name, value, wanted)
    for each in given or [value]:
        if not isinstance(each, str) or each not in known:
            refuse(name, each, wanted)
    return tuple(dict.fromkeys(given))


def path(name: str, value, wanted: str = "a path that names something", *, slash: bool = True) -> Path:
    """The path of a text or a Path, with ~ left as it is; a name of over 255 bytes is no path but a text, which no file
    system takes. slash: whether it may end in one, and so name a folder"""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        refuse(name, value, wanted)
    if max(len(part.encode(errors="replace")) for part in text.split(os.sep)) > 255 or len(text) > 4096:
        refuse(name, value, f"{wanted}, which is shorter")
    if not slash and text.endswith(("/", os.sep)):
        refuse(name, value, f"{wanted}; what ends in a slash is a folder's")
    return Path(value)


def instance(name: str, value, kinds: Kinds, wanted: str):
    """An object of a class. wanted: what it is and where one gets it, "an Edit; Edit.load reads a file"."""
    if not isinstance(value, kinds):
        refuse(name, value, wanted)
    return value


def items(name: str, value, wanted: str) -> list:
    """What a list, a tuple or anything else that is gone through holds; a text or a dict is not taken for one."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        refuse(name, value, wanted)
    return list(value)


def place(name: str, value, n: int, what: str) -> int:
    """A place among n of something, counted from 0; what: these are, for the refusal where there are none."""
    if n == 0:
        raise BadArgument(_said(name, f"= {value!r}: there are no {what}"))
    return whole(name, value, most=n - 1)


def listed(name: str, value, kinds: Kinds, wanted: str, *, empty: bool = False, alone: bool = True) -> list:
    """Objects of a class, as a list; one object alone is a list of one, unless not ``alone``.

    wanted: as in ``instance``, "Facts; load_facts reads a file"
    """
    if isinstance(value, kinds) and alone:
        return [value]
    found = items(name, value, wanted)
    for each in found:
        if not isinstance(each, kinds):
            refuse(name, each, wanted)
    if not found and not empty:
        raise BadArgument(_said(name, f"is empty; expected {wanted}"))
    return found


def layers(name: str, value, n_layers: int | None = None, *, empty: bool = False) -> tuple[int, ...]:
    """Layers, each a whole number that the model has (``n_layers``, where it is known), in their order."""
    most = (MOST_LAYERS if n_layers is None else n_layers) - 1
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        refuse(name, value, "layers, whole numbers of at least 0, e.g. (3, 5)")
    found = tuple(islice(value, MOST_LAYERS + 1))
    for each in found:
        if not (_is_a(Integral, each) and 0 <= each <= most) or len(found) > MOST_LAYERS:
            whole_ones = all(_is_a(Integral, i) and 0 <= i < 10**9 for i in found)
            said = ranges(found) if whole_ones else shown(found)
            raise BadArgument(_said(name, f"= {said}: {_layers_there(n_layers)}"))
    if not found and not empty:
        raise BadArgument(_said(name, "is empty; expected layers, e.g. (3, 5)"))
    return tuple(map(int, found))


def _layers_there(n_layers: int | None) -> str:
    if n_layers is None:
        return f"expected layers, whole numbers from 0 to {MOST_LAYERS - 1}, e.g. (3, 5)"
    if not n_layers:
        return "this model has no layers"
    return f"this model has {f'layers 0 to {n_layers - 1}' if n_layers > 1 else 'layer 0 alone'}"


def size(name: str, value, *, least: int = 1) -> int:
    """Bytes: a whole number, or a text with a unit. least: 10**6 where somebody types it, for a bare 8 is not 8GB"""
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    n = value if _is_a(Integral, value) else None
    if isinstance(value, str):
        given = value.strip().upper()
        unit = next((u for u in sorted(units, key=len, reverse=True) if given.endswith(u)), "")
        try:
            n = float(given.removesuffix(unit)) * units.get(unit, 1)
        except ValueError:
            n = None
    if n is None or not least <= n < 2**60:  # NaN is not either
        bound = "of at least 1MB" if least >= 10**6 else "above 0"
        refuse(name, value, f"a size {bound}: bytes, or a text with KB, MB, GB or TB, e.g. '8GB'")
    return int(n)


def dtype(name: str, value) -> str:
    """The whole name of a dtype that models are computed in; of a torch dtype or its name, also a short one."""
    text = str(value).removeprefix("torch.")
    if isinstance(value, bytes) or DTYPES.get(text, text) not in DTYPES.values():
        refuse(name, value, f"one of {', '.join(DTYPES.values())}")
    return DTYPES.get(text, text)


def noise(name: str, value) -> tuple[str, float]:
    """How a subject is corrupted: ("gaussian", level) of a number, ("subjects", factor) of "s3", ("uniform",
    half-width) of "u0.1"."""
    kind, level = "", value
    if isinstance(value, str):
        kind = value[:1] if value[:1] in ("s", "u") else ""
        try:
            level = float(value.removeprefix(kind))
        except ValueError:
            level = -1.0
    if not (_is_a(Real, level) and _finite(level) and level >= 0):
        refuse(name, value, 'a number from 0 on, "s3" (3 standard deviations of the subjects) or "u0.1" (uniform)')
    return {"": "gaussian", "s": "subjects", "u": "uniform"}[kind], float(level)


def optional(check: Callable, name: str, value, *rest, **limits) -> Any:
    """The value as ``check`` gives it, or None."""
    if value is None:
        return None
    try:
        return check(name, value, *rest, **limits)
    except BadArgument as error:
        raise BadArgument(f"{error}, or None") from None


def refuse(name: str, value, wanted: str) -> NoReturn:
    """Raises BadArgument: of this name, this value is not ``wanted``."""
    raise BadArgument(_said(name, "= " * bool(name) + f"{shown(value)}: expected {wanted}"))


def shown(value) -> str:
    """A value for a message: short, of objects the class alone, nothing that a terminal would act on."""
    return _REPR.repr(value)


def _said(name: str, words: str) -> str:
    return f"{name} {words}" if name else words


def _is_a(kind: type, value) -> bool:
    """Whether a value is a number of a kind; true and false are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _finite(value) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


class _Short(Repr):
    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 80
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = 6

    def repr_instance(self, x, level):
        if isinstance(x, Number | PurePath | range | bytes | type | None) or type(x).__name__ in ("dtype", "device"):
            return repr(x)[: self.maxother]
        return f"<{type(x).__name__}>"

    def repr_int(self, x, level):
        # Python refuses to write out thousands of digits
        return repr(x) if abs(x) < 10**40 else f"a number of about {int(x.bit_length() * 0.30103) + 1} digits"


_REPR = _Short()
