"""The visit to a GPU: seconds that add up, what is lost when something goes wrong, what a profile says, a dry run."""

import gzip
import json
import sys
import time
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bench import common, flows
from bench.__main__ import main
from bench.common import Figure
from bench.gpu import plan, session, visit, watch
from bench.gpu.book import BEST, LOG, SUMMARY, Book, summary
from bench.gpu.plan import END, FIRST, PARTS, SECOND, START, Part, ends
from bench.gpu.readings import Profile, short
from kedit_fast.sweep import engine

CPU = torch.device("cpu")


@pytest.fixture
def book(tmp_path):
    made = Book(tmp_path, "cpu", commit="abc1234")
    made.begin("machine")
    return made


# ---- the seconds of a command


@pytest.mark.parametrize(("budget", "names"), [(FIRST, [part.name for part in PARTS]), (SECOND, ["kernels", "tests"])])
def test_the_seconds_of_a_command_add_up(budget, names):
    parts = [part for part in PARTS if part.name in names]
    assert [part.name for part in parts] == names
    found = ends(parts, budget)
    shares = [end - before for before, end in zip([START, *found[:-1]], found, strict=True)]
    assert found[-1] + END == pytest.approx(budget)
    assert all(share >= part.least for part, share in zip(parts, shares, strict=True))


def test_the_shares_of_the_first_command_are_what_the_table_says():
    assert START + sum(part.seconds for part in PARTS) + END == FIRST
    assert FIRST <= 480 and SECOND <= 180
    assert visit.GRACE < END, "what hangs last is killed within the budget"


def test_parts_are_known_and_named():
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert {part.name.partition("-")[0] for part in PARTS} == {*session.PARTS, "tests"}
    assert {part.name for part in PARTS if part.name.startswith("trace-")} == {f"trace-{m}" for m in flows.MODELS}


# ---- processes

# Answers as ``session.serve`` does, by what the part is called.
FAKE = """
import json, os, sys, time
out = os.fdopen(int(sys.argv[-1]), "w")
for line in sys.stdin:
    part = json.loads(line)["part"]
    print("asked for", part, flush=True)
    if part == "crash":
        os.abort()
    if part == "hang":
        import faulthandler, signal
        faulthandler.register(signal.SIGUSR1)
        print("hanging", flush=True)
        time.sleep(60)
    out.write(json.dumps({"how": f"done in {os.getpid()}", "usable": part != "spoil"}) + "\\n")
    out.flush()
"""


@pytest.fixture
def visited(tmp_path):
    """Visits with fake processes: how the parts ended, by name."""
    start = partial(visit.Process, [sys.executable, "-c", FAKE], visit.environment(), tmp_path / LOG)

    def ended(parts, budget):
        ends = visit.visit(parts, budget, start, lambda seconds: f"done: {seconds:.0f} s")
        return {one.name: one.how for one in ends}

    return ended


@pytest.fixture
def at_once(monkeypatch):
    """No time to start and to end."""
    for module, name in ((plan, "START"), (visit, "START"), (plan, "END")):
        monkeypatch.setattr(module, name, 0.0)
    monkeypatch.setattr(visit, "GRACE", 0.1)


def test_what_goes_wrong_ends_its_own_part_alone(visited, at_once, tmp_path):
    log = tmp_path / LOG
    names = ["first", "second", "crash", "third", "spoil", "fourth", "fifth", "tests"]
    ended = visited([Part(name, 10, 1) for name in names], 80)
    assert list(ended) == names
    assert ended["crash"] == "crashed with signal SIGABRT; see log.txt"
    assert ended["first"] == ended["second"] != ended["third"] == ended["spoil"] != ended["fourth"] == ended["fifth"]
    assert ended["tests"] in ("done: 80 s", "done: 79 s", "done: 78 s"), "what earlier parts leave is the later ones'"
    assert log.read_text(encoding="utf-8").count("asked for") == 7


def test_what_hangs_is_killed_in_its_time_and_says_where_it_stood(visited, at_once, tmp_path):
    began = time.monotonic()
    ended = visited([Part("hang", 1, 0.5), Part("after", 20, 0)], 21)
    assert time.monotonic() - began < 15
    assert ended["hang"].startswith("killed 0.1 s after its time") and ended["after"].startswith("done in")
    assert 'File "<string>", line 13' in (tmp_path / LOG).read_text(encoding="utf-8")


def test_a_part_that_has_too_little_time_is_not_begun(visited, at_once):
    ended = visited([Part("large", 10, 10), Part("small", 10, 1)], 15)
    assert ended["large"] == "skipped: 7 s were left, it needs 10" and ended["small"].startswith("done")


def test_a_fresh_process_must_fit_in_too(visited):
    first, second = visited([Part("crash", 1, 0), Part("late", 1, 5)], START + END + 4).values()
    assert first.startswith("crashed") and second == "skipped: 24 s were left, it needs 25"


# ---- one part in its process


def test_errors_and_what_was_left_out_are_said(book, monkeypatch):
    def part(asked):
        asked.trying("one", lambda: torch.zeros(2)[5])
        asked.book.add(Figure("case", "time", 1.0, "s"))
        assert asked.has(-1, "two") and not asked.has(1e9, "three")
        raise ValueError("four\nlines")

    made = session.Session(CPU, True, (16,), book)
    monkeypatch.setattr(session, "import_module", lambda name: SimpleNamespace(smoke=part))
    answer = session.run_part(made, "smoke", time.monotonic() + 5)
    assert answer.usable
    assert answer.how.startswith("failed: one: IndexError: ") and answer.how.endswith("; no time for three")
    assert "; ValueError: four;" in answer.how
    assert [figure.case for _, figure in book.rows()] == ["case"]


def test_a_device_that_does_not_answer_spoils_the_process(book, monkeypatch):
    def lost(*args, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(session, "import_module", lambda name: SimpleNamespace(smoke=lambda asked: None))
    made = session.Session(CPU, True, (16,), book)
    assert session.run_part(made, "smoke", float("inf")) == ("done", True)
    monkeypatch.setattr(torch, "ones", lost)
    assert session.run_part(made, "smoke", float("inf")) == ("done", False)
    with pytest.raises(IndexError):
        made.trying("an op", lambda: torch.zeros(2)[5])


def test_each_figure_is_in_its_file_when_it_is_made(book):
    book.notes = ["random numbers."]
    book.add(Figure("machine", BEST, 700.0, "TFLOP/s"))
    ((row, figure),) = common.read_rows(book.path)
    assert figure.value == 700 and row["bench"] == "gpu machine" and row["commit"] == "abc1234"
    assert row["notes"] == "random numbers." and float(row["peak_gflops"]) == 700_000
    again = Book(book.folder, "cpu")
    again.begin("smoke")
    again.tell("case", [("time", 1.0, "s"), ("rate", 2.0, "GB/s")], n=3, marks={"rate": ">= 3"})
    rows = common.read_rows(book.path)
    assert len(rows) == 3 and float(rows[2][0]["peak_gflops"]) == 700_000, "a later process knows the machine's peak"
    text = summary(again, [("machine", "done", 3.2), ("smoke", "failed: a|b", 1.0)], dry=False)
    assert "| smoke | failed: a/b | 1 |" in text and "| rate | 2.0 GB/s (missed ≥ 3) |" in text
    assert text.index("## gpu machine") < text.index("random numbers.") < text.index("## gpu smoke")


# ---- tests on the device


@pytest.mark.parametrize(
    ("text", "status", "how"),
    [
        ("a PASSED [ 1%]\nb SKIPPED (x)\n2 passed", 0, "done: 1 passed, 1 skipped"),
        ("a SKIPPED (x)\n1 skipped", 0, "failed (status 0): 1 skipped"),
        ("[gw0] [ 50%] PASSED a\n[gw1] [ 99%] FAILED b\n", 1, "failed (status 1): 1 passed, 1 failed"),
        ("a PASSED [ 1%]\nb ", -9, "stopped: 1 passed, the others not run"),
        ("no such option", 4, "failed (status 4): nothing"),
    ],
)
def test_the_end_of_the_tests_is_read(text, status, how):
    assert visit.tests_ended(text, status) == how


def test_the_tests_are_those_that_take_a_device():
    command = visit.tests_command(dry=False)
    assert "tests/kernels/triton" in command and "tests/kernels/test_cusolver.py" in command
    assert visit.environment()["TRITON_INTERPRET"] == "0" and visit.environment()["HF_HUB_OFFLINE"] == "1"


# ---- what a profile says


def event(cat, name, begin, end, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": 9, "tid": tid, "ts": begin, "dur": end - begin, "args": args}


def launched(n, kernel, call, gpu, cat="kernel", **args):
    """A host call at ``call`` µs and what it made the GPU do from ``gpu[0]`` to ``gpu[1]``."""
    return [
        event("cuda_runtime", "cudaLaunchKernel", call, call + 1, correlation=n),
        event(cat, kernel, *gpu, tid=7, correlation=n, **args),
    ]


EVENTS = [
    event("user_annotation", "block", 0, 100),
    event("user_annotation", "attention", 20, 50),
    event("user_annotation", "Optimizer.step", 25, 26),
    event("cpu_op", "aten::mm", 5, 10, **{"Input Dims": [[64, 32], [32, 16]]}),
    event("cpu_op", "aten::addmm", 60, 70, **{"Input Dims": [[16], [64, 32], [32, 16], [], []]}),
    event("cpu_op", "aten::add", 75, 80, **{"Input Dims": [[64, 16], [64, 16]]}),
    *launched(1, "void gemm", 6, (10, 30)),
    *launched(2, "void at::native::add", 76, (90, 100)),
    *launched(3, "void gemm", 61, (80, 90)),
    *launched(4, "attend", 30, (25, 45)),  # beside the first, on another stream
    *launched(5, "Memcpy HtoD (Pageable -> Device)", 110, (115, 120), cat="gpu_memcpy", bytes=3_000_000),
    event("cuda_runtime", "cudaStreamSynchronize", 121, 141, correlation=6),
    {"ph": "M", "name": "process_name"},
    {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 1},
]


def test_the_readings_of_a_profile():
    read = Profile(EVENTS, 200e-6, {"block", "attention"}).readings()
    totals = {name: value for name, value, _ in read["totals"]}
    assert totals["GPU busy"] == pytest.approx(60e-6) and totals["GPU idle share"] == pytest.approx(70)
    assert (totals["launches"], totals["copies and fills"], totals["host waits for the GPU"]) == (4, 1, 1)
    assert totals["host waiting"] == pytest.approx(20e-6)
    assert totals["Memcpy HtoD (Pageable -> Device)"] == 3
    phases = {name: value for name, value, _ in read["time by phase"]}
    assert phases == pytest.approx(
        {
            "block, host": 70e-6, "block, GPU": 40e-6, "block, launches": 3,
            "attention, host": 30e-6, "attention, GPU": 20e-6, "attention, launches": 1,
            "the rest, GPU": 5e-6, "the rest, launches": 1,
        }
    )  # fmt: skip
    assert read["kernels"][0] == ("gemm (2 times)", pytest.approx(0.03), "ms")
    flop = 2 * 64 * 32 * 16
    assert read["products"] == [("[64, 32] [32, 16] (2 times, 0.0 ms)", pytest.approx(1e-6 * 2 * flop / 30), "TFLOP/s")]


def test_products_of_batches_and_backward_threads():
    events = [
        event("cpu_op", "aten::bmm", 5, 10, tid=2, **{"Input Dims": [[3, 8, 4], [3, 4, 2]]}),
        event("cuda_driver", "cuLaunchKernelEx", 6, 7, tid=2, correlation=1),
        event("kernel", "b", 8, 12, tid=7, correlation=1),
        *launched(2, "of another thread", 6, (12, 90)),
    ]
    ((name, rate, _),) = Profile(events, 1e-4, ()).by_shape()
    assert name.startswith("3 x [8, 4] [4, 2] (1 times") and rate == pytest.approx(1e-6 * 2 * 3 * 8 * 4 * 2 / 4)
    assert Profile(events, 1e-4, ()).by_phase() == []


def test_names_of_kernels_are_cut_to_what_a_table_bears():
    assert short("void at::native::(anonymous namespace)::gather<float>(int)") == "gather<float>(int)"
    assert len(short("x" * 200)) == 90


# ---- what is watched


@pytest.fixture
def traced():
    """A tiny model's way to trace, and its facts."""
    return flows.opened(flows.dry("llama-3-8b", CPU))


def test_calls_have_the_size_that_is_asked_for(traced, monkeypatch):
    ours, facts = traced
    block, sizes = engine.Pack._block, []

    def seen(pack, layer, h, call, *args, **options):
        sizes.append(len(call.index))
        return block(pack, layer, h, call, *args, **options)

    monkeypatch.setattr(engine.Pack, "_block", seen)
    usual = ours(facts)[0].p_restored
    largest = max(sizes)
    sizes.clear()
    with watch.call_rows(16):
        small = ours(facts)[0].p_restored
    assert max(sizes) <= 24 < largest
    assert abs(small - usual).max() < 1e-6


def test_waits_are_counted_by_the_package_s_lines(traced, monkeypatch):
    """A stand-in for a GPU warns as torch does: in the last layer's head, and where rows begin."""
    ours, facts = traced
    head, begin, modes = engine.through, engine.branch_rows, []

    def warning(run):
        def work(*args):
            if modes and modes[-1] == "warn":
                warnings.warn(watch.SYNCHRONIZES, stacklevel=1)
            return run(*args)

        return work

    monkeypatch.setattr(engine, "through", warning(head))
    monkeypatch.setattr(engine, "branch_rows", warning(begin))
    monkeypatch.setattr(watch, "print_nothing", modes.append)
    before = warnings.showwarning
    with watch.waits(CPU, 1) as one:
        ours(facts[:1])
    with watch.waits(CPU) as everywhere:
        ours(facts[:1])
    assert warnings.showwarning is before and modes[-1] == "default"
    assert {place.partition(":")[0] for place in one} == {"sweep/engine.py"}
    assert {place.rpartition(" ")[2] for place in one} == {"_block", "run"}
    assert one.keys() < everywhere.keys() and one.total() < everywhere.total()


@pytest.mark.parametrize(("largest", "kept"), [(10**6, 2001), (1000, 1), (10, 0)])
def test_a_trace_too_large_to_bring_back_is_kept_without_its_operators(largest, kept, monkeypatch, tmp_path, capsys):
    events = [event("cpu_op", f"aten::{hash(str(i))}", i, i + 1) for i in range(2000)]
    path = tmp_path / "values.json.gz"
    monkeypatch.setattr(watch, "LARGEST", largest)
    watch.keep_trace(json.dumps({"deviceProperties": [], "traceEvents": [*events, EVENTS[0]]}).encode(), path)
    assert path.exists() == bool(kept)
    if kept:
        found = json.loads(gzip.decompress(path.read_bytes()))
        assert len(found["traceEvents"]) == kept and found["traceEvents"][-1] == EVENTS[0]
    else:
        assert "values.json.gz: not kept" in capsys.readouterr().out


# ---- the whole


def test_without_a_gpu_nothing_is_run(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["gpu", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().out.startswith("no GPU here: nothing was run")
    assert not (tmp_path / "out").exists()
    for wrong in (["--parts", "nothing"], ["--call-rows", "0"], ["--call-rows", "many"]):
        with pytest.raises(SystemExit):
            visit.main(["--out", str(tmp_path), "--dry-run", *wrong])


def test_a_dry_run_goes_through_every_part(tmp_path):
    """In this process, which has loaded what a part needs."""
    book = Book(tmp_path, "cpu")
    made = session.Session(CPU, True, visit.CALL_ROWS, book)
    threads = torch.get_num_threads()
    for part in PARTS[:-1]:
        assert session.run_part(made, part.name, time.monotonic() + 100) == ("done", True), part.name
    assert torch.get_num_threads() == threads
    cases = {(row["bench"], figure.case) for row, figure in book.rows()}
    assert {bench for bench, _ in cases} == {f"gpu {part.name}" for part in PARTS[:-1]}
    for bench, words in {
        "gpu machine": ("copies of 256 MB", "launches", "product, gpt-j / 64, [64] to [256]"),
        "gpu smoke": ("attention trace fp16 (reference)", "tiny gpt2, cpu to CPU"),
        "gpu trace-llama-3-8b": ("16 rows a call", ": waits in layer 1", ": totals", ": time by phase", ": products"),
        "gpu trace-gpt2-xl": ("64 rows a call", ": time by phase"),
        "gpu values": ("z, gpt-j, 3 facts, 5 steps", ": waits in layer", ": waits in all", ": time by phase"),
        "gpu memit": ("MEMIT, gpt-j, 2 facts, 5 steps", "MEMIT, gpt-j, 3 facts, 5 steps"),
        "gpu larger": ("a model larger than its memory", "MEMIT, larger than memory, 3 facts", "trace, larger"),
        "gpu kernels": ("solve, llama-3-8b / 64, fp64, reference",),
    }.items():
        for word in words:
            assert any(word in case for of, case in cases if of == bench), (bench, word)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {book.path.name, "trace-llama-3-8b.json.gz", "trace-gpt2-xl.json.gz", "values.json.gz"}


def test_the_command_runs_parts_in_a_process_and_the_tests_in_another(tmp_path, capsys):
    assert main(["gpu", "--out", str(tmp_path), "--dry-run", "--parts", "machine", "tests", "--commit", "abc1234"]) == 0
    said = capsys.readouterr().out
    assert "machine" in said and "done: " in said and "skipped" not in said
    assert "| machine | done |" in (tmp_path / SUMMARY).read_text(encoding="utf-8")
    assert "best fp64 product" in (tmp_path / LOG).read_text(encoding="utf-8")
    (path,) = tmp_path.glob("*.csv")
    ((command, commit),) = {(row["command"], row["commit"]) for row, _ in common.read_rows(path)}
    assert command == "python -m bench gpu --budget 480 --dry-run --parts machine tests" and commit == "abc1234"
