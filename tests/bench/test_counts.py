"""What a flow asks of a GPU is counted, and the prediction follows from the counts."""

from dataclasses import replace

import pytest

from bench import counts
from tests.pretend_cuda import LEAST, PRODUCTS, Counts


def test_a_prediction_is_the_longer_of_device_and_host_and_what_waiting_costs():
    seen = Counts()
    seen.launch("mm", nbytes=1000, flop=int(PRODUCTS))  # a second
    seen.launch("add", n=10)
    for _ in range(2):
        seen.wait("item")
    flow = counts.Flow("a flow", "gpt-j", 3, counts.trace, ">= 60")
    for host, seconds in ((0.5, 1.0 + 10 * LEAST), (4.0, 4.0)):
        shown = {figure.metric: figure for figure in counts.figures(flow, seen, [5, 15], host)}
        assert shown["share of peak, predicted"].value == pytest.approx(100 / (seconds + 2 * counts.WAIT))
        assert shown["share of peak, predicted"].met == (host < 1) and shown["block calls"].value == 2
    assert shown["launches of a call"].value == 5.5 and shown["rows of a call"].value == 10
    assert {figure.case for figure in shown.values()} == {"a flow, 3 facts"}


@pytest.mark.parametrize("flow", {flow.name: flow for flow in counts.FLOWS}.values(), ids=lambda flow: flow.name)
def test_a_large_model_is_counted_without_its_numbers(flow):
    """A few layers of full width; each of its matrices is multiplied by in each block call."""
    measured = counts.measure(replace(flow, n=1), layers=9 if flow.model == "gpt-j" else 2)
    shown = {figure.metric: figure.value for figure in measured.figures}
    assert shown["block calls"] > 1 and shown["launches of a call"] > 10 and shown["host"] > 0
    assert 0 < shown["share of peak, predicted"] < shown["share of peak, device alone"] < 100
