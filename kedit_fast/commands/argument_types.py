"""What options are made of: whole numbers, lists of layers and of names; torch-free."""

from argparse import ArgumentTypeError
from collections.abc import Iterable
from difflib import get_close_matches


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(1, text)


def count(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(0, text)


def layers(text: str) -> tuple[int, ...]:
    """The layers of "3-7", "3,5", "0-2,8" or "0-29:3" (every third)."""
    found = []
    for part in text.split(","):
        ends, stepped, step = part.strip().partition(":")
        first, _, last = ends.partition("-")
        last, step = last or first, step if stepped else "1"
        if not (all(x.isdecimal() for x in (first, last, step)) and int(first) <= int(last) and int(step)):
            raise ArgumentTypeError(f"{text!r}: expected layers such as 3-7, 3,5 or 0-29:3 (every third)")
        found += range(int(first), int(last) + 1, int(step))
    return tuple(dict.fromkeys(found))


def list_of(*known: str):
    """Some of the known names, with commas between."""

    def parse(text: str) -> tuple[str, ...]:
        parts = names(text)
        if not set(parts) <= set(known):
            meant = did_you_mean(next(part for part in parts if part not in known), known)
            raise ArgumentTypeError(f"{text!r}: expected some of {','.join(known)}{meant}")
        return parts

    return parse


def names(text: str) -> tuple[str, ...]:
    """Names with commas between."""
    return tuple(part.strip() for part in text.split(","))


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """What a message ends with where ``text`` is nearly one of the known names, or one of their words; else ""."""
    known = list(known)
    named = {word: name for name in reversed(known) for word in name.split()} | {name: name for name in known}
    close = get_close_matches(text, named, n=1, cutoff=0.6)
    return f"; did you mean {named[close[0]]}?" if close else ""


def _at_least(least: int, text: str) -> int:
    value = int(text) if text.removeprefix("-").isdecimal() else None
    if value is None or value < least:
        raise ArgumentTypeError(f"{text!r}: expected a whole number of at least {least}")
    return value
