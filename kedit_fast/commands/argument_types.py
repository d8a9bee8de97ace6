"""What options are made of: whole numbers, lists of layers and of names; torch-free."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from contextlib import suppress

from kedit_fast.basics import checks
from kedit_fast.basics.words import did_you_mean


def option_value(check: Callable, **limits) -> Callable[[str], object]:
    """What an option's text stands for, as a check of ``checks`` takes it."""

    def parse(text: str):
        try:
            return check(
                "",
                _number(text) if check in (checks.whole, checks.seed, checks.number, checks.share) else text,
                **limits,
            )
        except checks.BadArgument as error:
            raise ArgumentTypeError(str(error)) from None

    return parse


def _number(text: str) -> float | str:
    """The number that a text writes out; the text itself where it is none."""
    for kind in (int, float):
        if len(text) < 400:  # Python reads no longer ones
            with suppress(ValueError):
                return kind(text)
    return text


positive = option_value(checks.whole, least=1)
count = option_value(checks.whole)
at_least_two = option_value(checks.whole, least=2, like=5_120)  # tokens: the first predicts the second
seed = option_value(checks.seed)
rate = option_value(checks.number, above=0)
share = option_value(checks.share)
noise = option_value(lambda name, text: (checks.noise(name, text), text)[1])
size = option_value(checks.size, least=10**6)
dtype = option_value(checks.dtype)
words = option_value(checks.text, blank=True)
# As it stands: a slash at its end says something.
path = option_value(lambda name, text: (checks.path(name, text), text)[1])


def text_such_as(example: str) -> Callable[[str], object]:
    """A text that is not blank."""
    return option_value(checks.text, like=example)


def layers(text: str) -> tuple[int, ...]:
    """The layers of "3-7", "3,5", "0-2,8" or "0-29:3" (every third)."""
    found: list[int] = []
    for part in text.split(","):
        ends, stepped, step = part.strip().partition(":")
        first, _, last = ends.partition("-")
        last, step = last or first, step if stepped else "1"
        if not (
            all(x.isdecimal() and len(x) < 20 for x in (first, last, step)) and int(first) <= int(last) and int(step)
        ):
            raise ArgumentTypeError(f"{text!r}: expected layers such as 3-7, 3,5 or 0-29:3 (every third)")
        if int(last) >= checks.MOST_LAYERS:  # before a list is made of them
            raise ArgumentTypeError(f"{text!r}: expected layers below {checks.MOST_LAYERS}, such as 3-7")
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
