"""Whether a reader did right by a mutated file, and the run over many of them."""

import os
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.fuzz.mutate import SECRET, of_bytes
from tests.fuzz.readers import Reader
from tests.hostile.judge import FOREIGN

SECONDS = 10  # that a reader may take for one file, of the processor's time; most take a thousandth
BYTES = 256  # times the file's size: a list of JSON's empty objects takes some 30 times its text, and is made twice
BESIDE = 64 << 20  # bytes besides: what is loaded when it is first needed
LONGEST = 2_000  # characters of a message

_opened: list[str] = []  # while a reader is watched: paths outside that were opened
_watching = False


class TooLong(BaseException):
    """No Exception, which a reader may take for something else."""


def _watch(event: str, args: tuple) -> None:
    if _watching and event == "open" and SECRET in str(args[0]) and "mutated" not in str(args[0]):
        _opened.append(str(args[0]))


sys.addaudithook(_watch)


@dataclass
class Count:
    """What came of a reader's inputs: wrong: {what: how often}, kept: {what: (seed, its file)}."""

    inputs: int = 0
    taken: int = 0
    refused: Counter = field(default_factory=Counter)  # by the error's type
    wrong: Counter = field(default_factory=Counter)
    kept: dict = field(default_factory=dict)
    seconds: float = 0.0


def held() -> int:
    """The bytes that this process holds, from which ``most_held`` counts anew; 0 where a system does not say."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def most_held() -> int:
    """The most bytes that it has held since."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TooLong inside once so much of the processor's time is used."""

    def stop(*_):
        raise TooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def verdict(reader: Reader, path: Path) -> tuple[str, str]:
    """("taken" | "refused" | "wrong", the error's type or what is wrong) of the file at a path."""
    global _watching
    size, before, error = path.stat().st_size, held(), None
    _opened.clear()
    _watching = True
    try:
        with warnings.catch_warnings(), limited(SECONDS):
            warnings.simplefilter("ignore")
            reader.read(path)
    except (Exception, TooLong) as raised:
        error = raised
    finally:
        _watching = False
    if _opened:
        return "wrong", "opened a file that it names"
    if before and (grown := most_held() - before) > BYTES * size + BESIDE:
        return "wrong", f"held more than {grown >> 26 << 6} MB for it"
    if error is None:
        return "taken", ""
    fault = fault_of(error, reader, path)
    return ("wrong", fault) if fault else ("refused", type(error).__name__)


def fault_of(error: BaseException, reader: Reader, path: Path) -> str:
    """What is wrong with how a file was refused; "" for nothing."""
    said = str(error)
    if isinstance(error, TooLong):
        return f"took more than {SECONDS} s"
    if not isinstance(error, ValueError | TypeError | OSError):
        return f"{type(error).__name__}: {said[:80]!r}"
    if reader.named and path.name not in said and str(path.parents[reader.name.count("/")]) not in said:
        return f"{type(error).__name__} that does not name it: {said[:80]!r}"
    if len(said) > LONGEST:
        return f"{type(error).__name__} of {len(said)} characters"
    of_system = isinstance(error, OSError) and error.filename  # of which the command line says "file: what is wrong"
    foreign = next((words for words in FOREIGN if words in said and not (of_system or reader.quotes)), None)
    return f"not in words that help: {foreign!r}" if foreign else ""


def seeds_of(reader: Reader, folder: Path) -> list[tuple[Path, bytes]]:
    """(path, its bytes) of every file that a reader takes."""
    folder.mkdir(parents=True)
    reader.made(folder)
    found = [each / reader.name for each in sorted(folder.iterdir()) if (each / reader.name).is_file()]
    assert found, f"{reader.name}: nothing to mutate"
    return [(path, path.read_bytes()) for path in found]


def mutated(reader: Reader, data: bytes, rng: Random) -> bytes:
    """A file once mutated, or several times; its bytes alone, where it has lost its structure."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        try:
            data = rng.choice(reader.mutations)(data, rng)
        except Exception:
            data = of_bytes(data, rng)
    return data


def run(name: str, reader: Reader, folder: Path, seeds: Iterator[int], until: float = float("inf")) -> Count:
    """What comes of a reader's inputs, one for each seed; stops once ``time.monotonic()`` is ``until``."""
    files, count, began = seeds_of(reader, folder / name), Count(), time.monotonic()
    for path, _ in files:
        assert verdict(reader, path) == ("taken", ""), f"{name}: {path} is not taken as it is"
    for seed in seeds:
        if time.monotonic() > until:
            break
        rng = Random(f"{name} {seed}")
        path, good = rng.choice(files)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = mutated(reader, good, rng)
        path.write_bytes(data)
        said, why = verdict(reader, path)
        count.inputs += 1
        count.taken += said == "taken"
        if said == "refused":
            count.refused[why] += 1
        elif said == "wrong":
            count.wrong[why] += 1
            count.kept.setdefault(why, (seed, data))
    count.seconds = time.monotonic() - began
    return count


def limit_memory(more: int) -> None:
    """Lets this process have so many bytes of addresses more: whoever asks for more gets a MemoryError, as wrong."""
    if os.path.exists("/proc/self/statm"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + more, resource.RLIM_INFINITY))
