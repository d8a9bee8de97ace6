"""Numbers in sentences, and what errors say."""

import json
from collections.abc import Iterable, Sequence
from difflib import get_close_matches


def counted(n: int, noun: str) -> str:
    """1 fact, 2 facts, 1,000 facts."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def sized(n_bytes: float) -> str:
    """Bytes as people say them: 141 GB, 1.71 GB, 25 MB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:,.0f} {unit}" if n_bytes >= 100 * size else f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes / 1e3:.3g} kB"


def first_few(items: Iterable[str], most: int, between: str = "; ") -> str:
    """The first of them, and how many there are besides: "a; b; and 3 more"."""
    items = list(items)
    more = [f"and {len(items) - most:,} more"] if len(items) > most else []
    return between.join(items[:most] + more)


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """What a message ends with where ``text`` is nearly one of the known names, or one of their words; else ""."""
    known = list(known)
    named = {word: name for name in reversed(known) for word in name.lower().split()}
    named |= {name.lower(): name for name in known}
    close = get_close_matches(text.lower(), named, n=1, cutoff=0.6)
    return f"; did you mean {named[close[0]]}?" if close else ""


def json_kind(value) -> str:
    """What a value is in a JSON file."""
    kinds = {
        type(None): "null",
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def short(value) -> str:
    """A value's JSON, for a sentence."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def brief(text: str) -> str:
    """A sentence in which a value of a file stands, which can be of any length: its beginning and its end."""
    return text if len(text) <= 600 else f"{text[:400]} ... {text[-150:]}"


def reason(error: Exception) -> str:
    """What is wrong with a file's contents, of the error that reading them gave; Python's own words say nothing to whom
    the file belongs to."""
    text = brief(str(error))
    if isinstance(error, UnicodeDecodeError):
        return not_text(error)
    if isinstance(error, KeyError):
        return f"it lacks {brief(repr(error.args[0]))}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if text.startswith("Exceeds the limit"):
        return "a number in it has thousands of digits"
    if "unexpected keyword argument" in text or "required positional argument" in text:
        return "it has not the fields that it should"
    of_python = type(error) in (TypeError, AttributeError, IndexError) or isinstance(error, ArithmeticError)
    of_python |= text.startswith(_PYTHONS)
    return "a part of it is of another kind than expected" if of_python else text


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out; torch has several of no type of their own for it."""
    text = str(error)
    of_torch = type(error).__name__ == "OutOfMemoryError" or any(words in text for words in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and of_torch)


_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate", "DefaultCPUAllocator: not enough memory", "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED",
)  # fmt: skip

# How ValueErrors of Python and numpy begin that are raised where a value of another kind is worked with.
_PYTHONS = (
    "could not convert", "invalid literal", "not enough values", "too many values", "setting an array", "can only",
    "dictionary update",
)  # fmt: skip


def not_text(error: UnicodeDecodeError) -> str:
    """Why a file is no text, without Python's words."""
    return f"not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x})"


def ranges(numbers: Sequence[int]) -> str:
    """[3, 4, 5, 8] as "3-5, 8"."""
    groups: list[list[int]] = []
    for each in numbers:
        if groups and each == groups[-1][-1] + 1:
            groups[-1][1:] = [each]
        else:
            groups.append([each])
    return ", ".join("-".join(map(str, group)) for group in groups)
