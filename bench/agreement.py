"""Whether ours is what a rival computes, and where two fp32 ways differ whether rounding did it: both against fp64."""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

import kedit_fast as kf
from bench.common import CheckFailed
from bench.published import Loop
from kedit_fast.editors.located import Prompts
from kedit_fast.facts.fact import Fact
from kedit_fast.jobs.values import Values, ValueSettings, optimize_values
from tests.oracle.values import Value

VALUE_TOLERANCE = 1e-4  # of a value, relative to its norm
FP64_TOLERANCE = 1e-6  # of two ways in fp64, where rounding to fp32 drove them further apart than it may
AS_EXACT = 10  # our fp32 result is no further from the fp64 one than this many times the rival's is

Result = TypeVar("Result")


class Ways(NamedTuple):
    """Two fp32 ways to one result. apart: from each other; ours, rival: from the fp64 result; fp64: the two ways in
    fp64 from each other. The last three are None where nobody asked"""

    apart: float
    ours: float | None = None
    rival: float | None = None
    fp64: float | None = None


def check_ways(
    what: str,
    ours: Result,
    rival: Result,
    distance: Callable[[Result, Result], float],
    tolerance: float,
    exact: Callable[[], Result],
    rival_exact: Callable[[], Result],
    always: bool = False,
) -> Ways:
    """Raises CheckFailed where two fp32 results are further apart than ``tolerance`` and it is not rounding: in fp64
    they agree, and ours is as near to the fp64 result as the rival's.

    exact, rival_exact: the result of our way and of the rival's in fp64, made where they are needed; always: how far
    both are from ours in fp64 is told anyway
    """
    apart = distance(ours, rival)
    if apart <= tolerance and not always:
        return Ways(apart)
    truth = exact()
    off, its = distance(ours, truth), distance(rival, truth)
    if apart <= tolerance:
        return Ways(apart, off, its)
    difference = distance(truth, rival_exact())
    if not (difference <= FP64_TOLERANCE and off <= AS_EXACT * its):
        raise CheckFailed(
            f"{what} differs by {apart:.1e} in fp32 (allowed {tolerance:g}), and by {difference:.1e} in fp64 (allowed "
            f"{FP64_TOLERANCE:g}); our fp32 one is {off:.1e} from the fp64 one, the rival's {its:.1e} (allowed "
            f"{AS_EXACT} times as much): it is not rounding"
        )
    return Ways(apart, off, its, difference)


def as_fp64(lm):
    """The same model in fp64: its weights widened, none drawn anew."""
    return kf.open_model(copy.deepcopy(lm.model).double(), tokenizer=lm.tokenizer)


class Agreement(NamedTuple):
    """Of our values and the loop's. difference: the largest, relative to a value's norm; fp64: the largest of those
    values again in fp64 that differ by more than VALUE_TOLERANCE, None where there are none"""

    difference: float
    fp64: float | None


def check_values(
    facts, rivals: Sequence[Value], values: Tensor, steps: Tensor, in_fp64: Callable[[Fact, Tensor, Tensor], float]
) -> Agreement:
    """Raises CheckFailed where iterations differ by more than one, or values do and not by rounding; where iterations
    differ by one, the loss stood at the threshold and values an update apart are not compared.

    in_fp64: takes (fact, our value, the loop's) and gives the difference of values when both are made in fp64; asked
        where they differ in fp32, for twenty steps amplify rounding (of CounterFact's 9459 by 1e8), and raises where it
        is not rounding
    """
    differences, again = [0.0], []
    for i, rival in enumerate(rivals):
        if abs(int(steps[i]) - rival.n_iterations) > 1:
            raise CheckFailed(f"value of {facts[i].label}: {int(steps[i])} iterations, the loop's {rival.n_iterations}")
        if int(steps[i]) == rival.n_iterations:
            differences.append(relative(values[i], rival.value))
            if not math.isfinite(differences[-1]):
                raise CheckFailed(f"value of {facts[i].label} is not finite, ours or the loop's")
            if differences[-1] > VALUE_TOLERANCE:
                again.append(in_fp64(facts[i], values[i], rival.value))
    return Agreement(max(differences), max(again, default=None))


def fp64_difference(lm, loop: Loop, settings: ValueSettings, fact: Fact, ours: Tensor, rival: Tensor) -> float:
    """Relative difference of the fact's value when both are made by ``lm``, in fp64. Raises CheckFailed where it is not
    small, or where our fp32 value is much further from it than the loop's.

    ours, rival: the fp32 values
    """
    wide, layer, site = dataclasses.replace(loop, lm=lm), settings.layer, settings.site.name
    return check_ways(
        f"value of {fact.label}",
        ours,
        rival,
        relative,
        VALUE_TOLERANCE,
        exact=lambda: our_values(lm, [fact], loop.groups, settings).values[0],
        rival_exact=lambda: wide.value(fact, layer, site).result.value,
    ).fp64


def our_values(lm, facts: Sequence[Fact], groups: list[list[str]], settings: ValueSettings) -> Values:
    """Values of the facts in these contexts."""
    return optimize_values(lm, Prompts.of(lm, facts, groups).value_tasks(lm), settings)


def relative(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of ``want``."""
    return float((got.double() - want.double()).norm() / want.double().norm())
