"""The policy: which limit is spent, and what it says."""

import math

import pytest

from kedit_fast.gating.policy import CLOSE, CONTINUE, STOP, EditPolicy, advise

POLICY = EditPolicy(max_facts=100, max_growth=0.1, max_drift=0.02, min_retention=0.9, warn_at=0.7)


@pytest.mark.parametrize(
    "n, growth, drift, retention, level, says",
    [
        (10, {3: 0.009}, 0.001, 0.995, CONTINUE, "10 facts of at most 100"),
        (100, {3: 0.01}, None, None, CLOSE, "100 facts of at most 100"),
        (101, {3: 0.01}, None, None, STOP, "101 facts of at most 100"),
        (10, {3: 0.01, 5: 0.11}, None, None, STOP, "layer 5 moved by 11.00%"),
        (10, {}, 0.03, None, STOP, "perplexity +3.00%"),
        (10, {}, -0.03, None, CONTINUE, "10 facts"),
        (10, {}, None, 0.85, STOP, "85.0% of the earlier facts"),
        (10, {}, None, 0.92, CLOSE, "92.0% of the earlier facts"),
        (10, {3: math.nan, 4: 0.5}, None, None, STOP, "layer 3"),
        (10, {}, math.nan, None, STOP, "perplexity"),
        (10, {}, math.inf, None, STOP, "perplexity"),
        (10, {}, None, math.nan, STOP, "earlier facts"),
    ],
)
def test_advice(n, growth, drift, retention, level, says):
    advice = advise(n, growth, drift, retention, POLICY)
    assert advice.level == level and says in advice.sentence and advice.stop == (level == STOP)


def test_every_limit_that_is_passed_is_named():
    advice = advise(500, {1: 0.3}, 0.5, 0.1, POLICY)
    assert advice.sentence.count(";") == 3 and set(advice.spent) == {"facts", "growth", "drift", "retention"}
    assert advice.spent["facts"] == 5 and advice.spent["retention"] == pytest.approx(9)


@pytest.mark.parametrize("field, value", [("max_facts", 0), ("max_growth", -1), ("min_retention", 1), ("warn_at", 2)])
def test_limits_that_make_no_sense(field, value):
    with pytest.raises(ValueError, match=field):
        EditPolicy(**{field: value})
