"""Log-probabilities of targets against log_softmax in float64."""

import pytest
import torch

from kedit_fast.kernels import target_logprob as kernel
from kedit_fast.kernels.target_logprob import target_logprob, target_logprob_ref
from tests.conftest import close
from tests.kernels import normal

V, D = 101, 19
HEAD = normal(V, D, seed=9)


def head_of(dtype):
    return lambda h: h @ HEAD.to(dtype).T


def rows(n, dtype, scale=2.0):
    return (scale * normal(n, D, seed=n)).to(dtype)


def truth(h, head, targets):
    return head(h).double().log_softmax(-1).gather(1, targets.view(len(h), -1)).view(targets.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 17, 129])
@pytest.mark.parametrize("several", [None, 1, 3])
def test_against_log_softmax(n, several, dtype):
    h, head = rows(n, dtype), head_of(dtype)
    shape = (n,) if several is None else (n, several)
    targets = torch.randint(V, shape, generator=torch.Generator().manual_seed(n))
    got = target_logprob(h, head, targets, V)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.dtype == wide and got.shape == targets.shape
    close(f"{n} {several}", got, truth(h, head, targets))  # logits as they are: nothing is lost behind the head
    assert torch.equal(target_logprob_ref(h, head, targets, V), got)


def test_rows_a_few_at_a_time(monkeypatch):
    h, targets, seen = rows(17, torch.float32), torch.arange(17), []

    def head(part):
        seen.append(len(part))
        return part @ HEAD.float().T

    monkeypatch.setattr(kernel, "LOGITS", 4 * V + 1)
    close("parts", target_logprob(h, head, targets, V), truth(h, head_of(torch.float32), targets))
    assert seen == [4, 4, 4, 4, 1]
    monkeypatch.setattr(kernel, "LOGITS", 1)
    close("one row", target_logprob(h, head, targets, V), truth(h, head_of(torch.float32), targets))


def test_no_rows():
    for shape in ((0,), (0, 2)):
        got = target_logprob(rows(0, torch.float32), head_of(torch.float32), torch.empty(shape, dtype=torch.int64), V)
        assert got.shape == shape and got.dtype == torch.float32


def test_large_logits_do_not_overflow():
    h, targets = rows(5, torch.float32, scale=1e4), torch.arange(5)
    got = target_logprob(h, head_of(torch.float32), targets, V)
    assert torch.isfinite(got).all()
    close("large", got, truth(h, head_of(torch.float32), targets))


@pytest.mark.parametrize("several", [None, 2])
def test_gradients(several, monkeypatch):
    monkeypatch.setattr(kernel, "LOGITS", 3 * V)
    targets = torch.arange(8) if several is None else torch.arange(16).view(8, 2)
    up, grads = targets + 1.0, []
    for op in (lambda *a: target_logprob(*a, V), truth):
        h = rows(8, torch.float32).requires_grad_()
        (op(h, head_of(torch.float32), targets).double() * up).sum().backward()
        grads.append(h.grad)
    close("gradient", *grads)
