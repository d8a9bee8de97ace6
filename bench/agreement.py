"""Whether our values are the published loop's, and where they differ whether rounding did it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from bench.common import CheckFailed
from bench.published import Loop
from kedit_fast.editors.common import Prompts
from kedit_fast.facts import Fact
from kedit_fast.jobs.values import Values, ValueSettings, optimize_values
from tests.oracle.values import Value

VALUE_TOLERANCE = 1e-4  # of a value, relative to its norm
FP64_TOLERANCE = 1e-6  # the same in fp64, of a value that rounding to fp32 drove further apart
AS_EXACT = 10  # our fp32 value is no further from the fp64 one than this many times the loop's fp32 value is


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
    theirs = dataclasses.replace(loop, lm=lm).value(fact, settings.layer, settings.site.name).result.value
    exact = our_values(lm, [fact], loop.groups, settings).values[0]
    difference, off, its = relative(exact, theirs), relative(ours, exact), relative(rival, theirs)
    if not (difference <= FP64_TOLERANCE and off <= AS_EXACT * its):
        raise CheckFailed(
            f"value of {fact.label} differs by more than {VALUE_TOLERANCE:g} in fp32, and by {difference:.1e} in fp64 "
            f"(allowed {FP64_TOLERANCE:g}); our fp32 value is {off:.1e} from the fp64 one, the loop's {its:.1e} "
            f"(allowed {AS_EXACT} times as much): it is not rounding"
        )
    return difference


def our_values(lm, facts: Sequence[Fact], groups: list[list[str]], settings: ValueSettings) -> Values:
    """Values of the facts in these contexts."""
    return optimize_values(lm, Prompts.of(lm, facts, groups).value_tasks(lm), settings)


def relative(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of ``want``."""
    return float((got.double() - want.double()).norm() / want.double().norm())
