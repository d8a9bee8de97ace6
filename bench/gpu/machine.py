"""What the card itself does: products by shape and rows, copies, launches, which backend each op has; and every op."""

import time

import torch

from bench import kernels
from bench.common import CheckFailed, Figure, Stopwatch
from bench.gpu.book import BEST
from bench.gpu.session import Session
from bench.shapes import SHAPES
from kedit_fast.kernels.dispatch import IMPLEMENTATIONS, backend_for

MODELS = ("llama-3-8b", "gpt2-xl", "gpt-j")
ROWS = (256, 2048, 8192, 16_384, 32_768)
SQUARE = {torch.bfloat16: 8192, torch.float16: 8192, torch.float32: 4096, torch.float64: 4096}
COPIES = {"256 MB": 256 << 20, "64 KB": 64 << 10}
NAMES = kernels.NAMES


def machine(session: Session) -> None:
    """Peaks first, then whether each op is on the backend it should be. Raises CheckFailed where one is not."""
    watch = Stopwatch(session.device, seconds=0.002 if session.dry else 0.1, least=3)
    session.book.notes = ["random numbers, a cold cache; a copy's rate counts its bytes once, on the device twice."]
    squares(session, watch)
    copies(session, watch)
    launches(session)
    products(session, watch)
    backends(session)


def squares(session: Session, watch: Stopwatch) -> None:
    """Square products by dtype."""
    for dtype, size in SQUARE.items():
        side = 64 if session.dry else size
        a, b = (torch.randn(side, side, device=session.device).to(dtype) for _ in range(2))
        rate = 1e-12 * 2 * side**3 / watch(lambda a=a, b=b: torch.matmul(a, b)).low
        metric = BEST if dtype == torch.bfloat16 else f"best {NAMES[dtype]} product"
        session.book.add(Figure("machine", metric, rate, "TFLOP/s"))


def products(session: Session, watch: Stopwatch) -> None:
    """The MLP's two products and the attention's, in bf16, at the models' widths, by the rows of a call."""
    for name in MODELS:
        shape = SHAPES[name].smaller(64 if session.dry else 1)
        for inner, columns in ((shape.d, shape.d_ff), (shape.d_ff, shape.d), (shape.d, shape.d)):
            weight = torch.randn(columns, inner, device=session.device).bfloat16()
            rows = []
            for n in (8, 16) if session.dry else ROWS:
                x = torch.randn(n, inner, device=session.device).bfloat16()
                seconds = watch(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight)).middle
                rows.append((f"{n} rows", 1e-12 * 2 * n * inner * columns / seconds, "TFLOP/s"))
            session.book.tell(f"product, {shape.name}, [{inner}] to [{columns}]", rows)


def copies(session: Session, watch: Stopwatch) -> None:
    """Over the bus from pinned and pageable memory, and on the device."""
    pins = (True, False) if session.device.type == "cuda" else (False,)
    for size, n in COPIES.items():
        n = n >> 10 if session.dry else n
        there, too = (torch.randint(100, (n,), dtype=torch.int8, device=session.device) for _ in range(2))
        rows = [("on the device", 2e-9 * n / watch(lambda a=there, b=too: a.copy_(b)).middle, "GB/s")]
        for pin in pins:
            here = torch.randint(100, (n,), dtype=torch.int8, pin_memory=pin)
            kind = "pinned" if pin else "pageable"
            rows += [
                (
                    f"to it, {kind}",
                    1e-9 * n / watch(lambda a=there, b=here: a.copy_(b, non_blocking=True)).middle,
                    "GB/s",
                ),
                (f"from it, {kind}", 1e-9 * n / watch(lambda a=here, b=there: a.copy_(b)).middle, "GB/s"),
            ]
        session.book.tell(f"copies of {size}", rows)


def launches(session: Session, n: int = 2000) -> None:
    """What the host needs for a launch, and for a number that it waits for."""
    x, n = torch.ones(16, device=session.device), 20 if session.dry else n
    rows = []
    for name, work in (("an op", lambda: x.add_(1)), ("a number read", lambda: float(x[0]))):
        work()
        began = time.perf_counter()
        for _ in range(n):
            work()
        float(x[0])
        rows.append((f"host time of {name}", 1e6 * (time.perf_counter() - began) / n, "µs"))
    session.book.tell("launches", rows)


def backends(session: Session) -> None:
    """Raises CheckFailed where an op is not on the first backend that has it for this device and dtype."""
    wrong, kind = [], session.device.type
    for op, implementations in IMPLEMENTATIONS.items():
        for dtype in kernels.NAMES:
            offered = [each for each in implementations if kind == each.device and dtype in each.dtypes]
            runs, wanted = (
                backend_for(op, session.device, dtype),
                offered[0].backend if offered else "reference",
            )
            print(f"{op}, {NAMES[dtype]}: {runs}", flush=True)
            if runs != wanted:
                why = offered[0].why_not() or offered[0].why_not_chosen()
                wrong.append(f"{op} in {NAMES[dtype]} runs on {runs}, not {wanted}: {why}")
    # on the CPU an op may well have no backend here: no compiler, no interpreter, another processor
    if wrong and kind == "cuda":
        raise CheckFailed("; ".join(wrong))


def kernels_of_models(session: Session) -> None:
    """Every op of ``bench.kernels``, model by model, each figure kept when it is made."""
    plan = kernels.Plan.of(session.device, session.dry, until=session.until, lenient=True)
    measured = kernels.measure(plan, session.book.add)
    failed, late = ([note for note in measured.notes if note.startswith(word)] for word in ("FAILED", "NOT RUN"))
    print(*measured.notes, sep="\n")
    session.failed += failed
    session.left_out += late
