"""``python -m tests.fuzz --minutes 10 [--reader NAME] [--seed N]``: mutated files, on and on, and a table of what came.

Exit status 1 where anything is wrong: the files are then in --keep, and a line says how each was made.
"""

import argparse
import os
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

from tests.fuzz.judge import Count, limit_memory, run
from tests.fuzz.readers import READERS

MEMORY = "/dev/shm"  # files of an hour there cost a disk nothing
ADDRESSES = 1 << 30  # bytes that a reader may ask for beside what the process has when it begins


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for all readers together")
    parser.add_argument("--inputs", type=int, help="a reader at most (default: as many as the time allows)")
    parser.add_argument("--reader", choices=tuple(READERS), action="append", help="again for more (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the first input; they are numbered on from it")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-wrong"), help="folder for files that were read wrongly")
    args = parser.parse_args(argv)
    names = args.reader or list(READERS)
    limit_memory(ADDRESSES)
    print(
        f"{'reader':22}{'inputs':>9}{'taken':>9}{'refused':>9}{'wrong':>7}{'a second':>10}  errors by kind", flush=True
    )
    found = {}
    with tempfile.TemporaryDirectory(prefix="mutated-", dir=MEMORY if os.path.isdir(MEMORY) else None) as folder:
        for name in names:
            until = time.monotonic() + 60 * args.minutes / len(names)
            seeds = count(args.seed) if args.inputs is None else iter(range(args.seed, args.seed + args.inputs))
            found[name] = run(name, READERS[name], Path(folder), seeds, until)
            print(row(name, found[name]), flush=True)
            for number, (what, (seed, data)) in enumerate(found[name].kept.items()):
                args.keep.mkdir(parents=True, exist_ok=True)
                kept = args.keep / f"{name.replace(' ', '-')}-{number}-{Path(READERS[name].name).name}"
                kept.write_bytes(data)
                print(f"  wrong, {found[name].wrong[what]} times: {what} (--reader {name!r} --seed {seed}): {kept}")
    print(row("all", in_all(found.values())))
    return 1 if any(each.wrong for each in found.values()) else 0


def row(name: str, each: Count) -> str:
    refused = each.refused.total()
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in each.refused.most_common())
    rate = each.inputs / each.seconds if each.seconds else 0
    return f"{name:22}{each.inputs:9,}{each.taken:9,}{refused:9,}{each.wrong.total():7,}{rate:10,.0f}  {kinds}"


def in_all(counts) -> Count:
    made = Count()
    for each in counts:
        made.inputs, made.taken, made.seconds = (
            made.inputs + each.inputs,
            made.taken + each.taken,
            made.seconds + each.seconds,
        )
        made.refused.update(each.refused)
        made.wrong.update(each.wrong)
    return made


if __name__ == "__main__":
    sys.exit(main())
