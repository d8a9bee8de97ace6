"""What fits together: the one place where items are cut into groups that the memory holds."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def together(
    items: Iterable[T], size: Callable[[T], float], most: float, count: int | None = None
) -> Iterator[list[T]]:
    """Consecutive items whose sizes add up to ``most`` at most, and no more than ``count`` of them; one that is too
    large stands alone. No items make no group."""
    group: list[T] = []
    held = 0.0
    for item in items:
        n = size(item)
        if group and (held + n > most or len(group) == count):
            yield group
            group, held = [], 0.0
        group.append(item)
        held += n
    if group:
        yield group


def too_large(what: str, need: int, memory: int) -> str:
    """The message for something that does not fit the memory however it is cut. The need is rounded up, the memory
    down: a need said in the memory's own figure would tell nothing."""
    return (
        f"{what} needs {math.ceil(need / 1e7) / 100:.2f} GB and memory allows {memory // 10**7 / 100:.2f} GB; give "
        "open_model a larger memory=, or shorten the text"
    )
