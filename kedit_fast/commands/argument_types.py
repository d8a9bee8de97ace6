"""What options are made of: whole numbers, lists of layers and of names; torch-free."""

from argparse import ArgumentTypeError


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
            raise ArgumentTypeError(f"{text!r}: expected some of {','.join(known)}")
        return parts

    return parse


def names(text: str) -> tuple[str, ...]:
    """Names with commas between."""
    return tuple(part.strip() for part in text.split(","))


def _at_least(least: int, text: str) -> int:
    value = int(text) if text.removeprefix("-").isdecimal() else None
    if value is None or value < least:
        raise ArgumentTypeError(f"{text!r}: expected a whole number of at least {least}")
    return value
