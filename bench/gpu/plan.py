"""The parts of a visit in order of worth, and how a command's seconds are shared among them."""

from collections.abc import Sequence
from dataclasses import dataclass

FIRST, SECOND = 480.0, 180.0  # seconds of a visit's two commands
START = 20.0  # of the process: Python, torch, transformers, CUDA
END = 10.0  # until what hangs is killed and the summary is written


@dataclass(frozen=True)
class Part:
    """name: its kind, and after the first dash what of it; seconds: its share of ``FIRST``; least: too few to begin."""

    name: str
    seconds: float
    least: float


# By arithmetic and by what one core did; no GPU has timed them yet.
PARTS = (
    Part("machine", 25, 8),
    Part("smoke", 50, 15),
    Part("trace-llama-3-8b", 80, 25),
    Part("trace-gpt2-xl", 50, 20),
    Part("values", 40, 20),
    Part("memit", 60, 40),
    Part("larger", 85, 50),
    Part("kernels", 35, 10),
    Part("tests", 25, 15),
)


def ends(parts: Sequence[Part], budget: float) -> list[float]:
    """Seconds after the command's begin at which each part has to be over.

    Shares are stretched or shrunk to the budget. What a part leaves is the next ones' gain, what a fresh process takes
    their loss: ends do not move, so the whole keeps to the budget whatever happens.
    """
    each = max(budget - START - END, 0.0) / sum(part.seconds for part in parts)
    found, end = [], START
    for part in parts:
        end += each * part.seconds
        found.append(end)
    return found
