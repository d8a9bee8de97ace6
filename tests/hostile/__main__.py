"""``python -m tests.hostile [PART ...]``: hostile inputs to the command line and the functions, with a verdict each.

Prints what is wrong, line by line, and the count by verdict; exit status 1 where anything is wrong. On a tiny model,
and the real demo model where it is here; minutes on one core.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.hostile import commands, damage, options
from tests.hostile.doors import doors, things
from tests.hostile.judge import WRONG, Case, Found, judge


def arguments(folder: Path) -> list[Case]:
    """Every argument of every public function with every value that is none."""
    made = []
    for door in doors(folder):
        for argument in door.arguments:
            for i, value in enumerate(door.wrong(argument)):
                call = lambda door=door, argument=argument, value=value: _drawn(door.call(**{argument: value}))  # noqa: E731
                made.append(Case(f"{door.name}({argument}={type(value).__name__} {i})", call))
    return made


def _drawn(made):
    """The first of an iterator, whose work may wait for it."""
    return next(made) if hasattr(made, "__next__") else made


PARTS = {
    "options": options.cases, "arguments": arguments, **damage.PARTS, "commands": commands.cases,
}  # fmt: skip


def run(folder: Path, parts=tuple(PARTS), every: int = 1) -> list[Found]:
    """Verdicts on the cases of some parts, or on one in ``every``."""
    found = []
    for name in parts:
        mine = folder / name
        mine.mkdir(parents=True, exist_ok=True)
        for case in PARTS[name](mine)[::every]:
            found.append(judge(case, mine, things().model))
    return found


def main() -> int:
    parts = sys.argv[1:] or list(PARTS)
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for part in parts:
            of_part = run(Path(folder), [part])
            print(f"{part:18} {counted(of_part)}", flush=True)
            for each in of_part:
                if each.verdict == WRONG:
                    print(f"  wrong: {each.case}: {each.words}", flush=True)
            found += of_part
    print(f"in all {counted(found)}")
    return 1 if any(each.verdict == WRONG for each in found) else 0


def counted(found: list[Found]) -> str:
    counts = Counter(each.verdict for each in found)
    return f"{len(found):5} hostile inputs: {', '.join(f'{n} {verdict}' for verdict, n in sorted(counts.items()))}"


if __name__ == "__main__":
    sys.exit(main())
