"""Log-probabilities of targets on Triton: against log_softmax in float64, and gradients against autograd."""

from dataclasses import replace

import pytest
import torch

from kedit_fast.kernels import target_logprob as op
from kedit_fast.kernels.target_logprob import Head, target_logprob, target_logprob_ref
from tests.conftest import TOLERANCE, close, open_tiny, relative_error
from tests.kernels.triton import DEVICE, DTYPES, random
from tests.tiny import DISTINCT, tiny_model

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned_memory")


@pytest.fixture
def no_reference(monkeypatch):
    """The kernel computes: a test that passes by the reference says nothing."""
    monkeypatch.setattr(op, "target_logprob_ref", lambda *a, **k: pytest.fail("the reference ran"))


def head_of(n_vocab, d, dtype=torch.float32, bias=False, softcap=None, weight=None):
    """A head with a final norm; ``logits`` is made of its parts, in their dtype."""
    weight = random(n_vocab, d, dtype=dtype, seed=n_vocab) if weight is None else weight
    bias = random(n_vocab, dtype=dtype, seed=1) if bias else None

    def norm(h):
        return h * h.square().mean(-1, keepdim=True).add(1e-6).rsqrt()

    def logits(h):
        x = torch.nn.functional.linear(norm(h), weight.to(h.dtype), None if bias is None else bias.to(h.dtype))
        return x if softcap is None else torch.tanh(x / softcap) * softcap

    return Head(logits, norm, weight, bias, softcap)


def some_targets(shape, n_vocab, seed=0):
    return torch.randint(n_vocab, shape, generator=torch.Generator().manual_seed(seed))


def truth(normed, head, targets):
    """In float64 from what comes out of the norm, which is torch's."""
    bias = None if head.bias is None else head.bias.double()
    logits = torch.nn.functional.linear(normed.double(), head.weight.double(), bias)
    logits = logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap
    return logits.log_softmax(-1).gather(1, targets.to(normed.device).view(len(normed), -1)).view(targets.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "several"), [(1, None), (17, 3), (129, 1), (3, 40)])
@pytest.mark.parametrize(("n_vocab", "d", "bias", "softcap"), [(301, 48, False, None), (130, 37, True, 3.0)])
def test_against_log_softmax(n, several, n_vocab, d, bias, softcap, dtype, no_reference):
    head, h = head_of(n_vocab, d, dtype, bias, softcap), random(n, d, dtype=dtype, seed=n)
    targets = some_targets((n,) if several is None else (n, several), n_vocab)
    targets.view(-1)[-1] = n_vocab - 1
    got = target_logprob(h, head, targets, n_vocab)
    assert got.dtype == torch.float32 and got.shape == targets.shape
    close(f"{n} {several}", got, truth(head.norm(h), head, targets))


@pytest.mark.parametrize("several", [None, 3])
def test_float32_is_the_reference(several, no_reference):
    head, h = head_of(257, 40, bias=True, softcap=2.5), random(9, 40)
    targets = some_targets((9,) if several is None else (9, several), 257)
    close("reference", target_logprob(h, head, targets, 257), target_logprob_ref(h, head, targets, 257))


def test_one_part_of_the_vocabulary_or_many(monkeypatch, no_reference):
    """However the vocabulary is split, and whatever tile a target lies in."""
    from kedit_fast.kernels.triton import target_logprob as triton

    head, h = head_of(700, 32), random(5, 32)
    targets = torch.tensor([[0, 63], [64, 127], [128, 699], [640, 1], [350, 350]])
    want = truth(head.norm(h), head, targets)
    for programs in (1, 2, 3, 1000):
        monkeypatch.setattr(triton, "_PROGRAMS", programs)
        close(str(programs), target_logprob(h, head, targets, 700), want)


def test_no_rows(no_reference):
    for shape in ((0,), (0, 2)):
        h = random(0, 16).requires_grad_()
        got = target_logprob(h, head_of(33, 16), torch.empty(shape, dtype=torch.int64), 33)
        assert got.shape == shape and got.dtype == torch.float32
        got.sum().backward()
        assert h.grad.shape == (0, 16)


def test_strided_rows_and_weights(no_reference):
    whole = random(40, 66)
    head = head_of(66, 19, weight=whole[:19].T)
    h = random(19, 7).T
    targets = some_targets((7,), 66)
    close("strided", target_logprob(h, head, targets, 66), truth(head.norm(h), head, targets))
    head = head_of(40, 30, weight=whole[:, 5:35])
    h = random(7, 50)[:, 3:33]
    close("slices", target_logprob(h, head, targets % 40, 40), truth(head.norm(h), head, targets % 40))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter, on the NaN
def test_large_logits_do_not_overflow_and_nan_stays_in_its_row(no_reference):
    head = head_of(70, 16, weight=random(70, 16) * 1e4)
    h, targets = random(5, 16), torch.arange(5)
    h[3] = torch.nan
    got, want = target_logprob(h, head, targets, 70), truth(head.norm(h), head, targets)
    fine = torch.tensor([0, 1, 2, 4])
    close("large", got[fine], want[fine])
    assert got.isnan().tolist() == [False, False, False, True, False]


def test_a_target_outside_of_the_vocabulary_is_nan(no_reference):
    got = target_logprob(random(3, 16), head_of(70, 16), torch.tensor([[69, 70], [-1, 0], [127, 128]]), 70)
    assert got.isnan().tolist() == [[False, True], [True, False], [True, True]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("several", [None, 3])
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, 3.0)])
def test_gradients(several, bias, softcap, dtype, monkeypatch, no_reference):
    """In parts of the vocabulary, against autograd of float64; behind the norm, whose own rounding is torch's."""
    from kedit_fast.kernels.triton import target_logprob as triton

    monkeypatch.setattr(triton, "_GRADIENTS", 17 * 128)
    n_vocab, d, n = 301, 37, 17
    head = replace(head_of(n_vocab, d, dtype, bias, softcap), norm=lambda h: h)
    targets = some_targets((n,) if several is None else (n, several), n_vocab)
    up = torch.arange(1.0, 1 + targets.numel(), device=DEVICE).view(targets.shape)
    grads = []
    for rule in (lambda x: target_logprob(x, head, targets, n_vocab), lambda x: truth(head.norm(x), head, targets)):
        h = random(n, d, dtype=dtype, seed=3).to(dtype if not grads else torch.float64).requires_grad_()
        (rule(h) * up).sum().backward()
        grads.append(h.grad)
    assert grads[0].dtype == dtype
    close("gradient", *grads)


def test_gradients_pass_through_the_norm_and_add_up(no_reference):
    head, targets, grads = head_of(90, 24), some_targets((4, 2), 90), []
    for rule in (lambda x: target_logprob(x, head, targets, 90), lambda x: truth(head.norm(x), head, targets)):
        h = random(4, 24).requires_grad_()
        (rule(h).double().exp().sum() + h.square().sum()).backward()
        grads.append(h.grad)
    close("gradient", *grads)


def test_only_plain_frozen_heads_are_fused(monkeypatch):
    monkeypatch.setattr(op, "target_logprob_ref", lambda *a: "reference")
    h, targets, weight = random(2, 16), torch.tensor([1, 2]), random(33, 16).requires_grad_()
    assert target_logprob(h, head_of(33, 16).logits, targets, 33) == "reference"
    assert target_logprob(h, head_of(33, 16, torch.float16), targets, 33) == "reference"
    assert target_logprob(h, head_of(33, 16, weight=weight), targets, 33) == "reference", "the weight wants a gradient"
    with torch.no_grad():
        assert target_logprob(h, head_of(33, 16, weight=weight), targets, 33) != "reference"


@pytest.mark.parametrize("family", DISTINCT)
def test_the_head_of_every_family(family, no_reference):
    """The parts that ``fusable_head`` names are the whole of ``head``."""
    lm = open_tiny(tiny_model(family).to(DEVICE))
    h = random(5, lm.d_model, seed=4).to(lm.device)
    targets = some_targets((5,), lm.n_vocab)
    with torch.no_grad():
        head = lm.fusable_head
        assert isinstance(head, Head)
        close(family, target_logprob(h.to(lm.dtype), head, targets, lm.n_vocab),
              target_logprob_ref(h.to(lm.dtype), lm.head, targets, lm.n_vocab))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_wrong_number_is_seen(dtype):
    """Each mistake leaves the tolerance by far: a tile of the vocabulary left out, no cap, no bias, the next target."""
    from kedit_fast.kernels.triton import target_logprob as triton

    n_vocab, d = 400, 32
    head, h = head_of(n_vocab, d, dtype, bias=True, softcap=4.0), random(17, d, dtype=dtype)
    targets = some_targets((17,), 256)
    normed, many = head.norm(h), targets[:, None].to(DEVICE)
    parts = [head.weight, head.bias, head.softcap]
    want = truth(normed, head, targets)[:, None]
    close("right", triton.target_logprob(normed, *parts, many), want)
    for name, wrong, asked in (
        ("last tile left out", [head.weight[:384], head.bias[:384], head.softcap], many),
        ("no cap", [head.weight, head.bias, None], many),
        ("no bias", [head.weight, None, head.softcap], many),
        ("next target", parts, many + 1),
    ):
        error = relative_error(triton.target_logprob(normed, *wrong, asked), want)
        assert error > 10 * TOLERANCE[torch.float32], f"{name}: {error}"
