"""A command's run, kept beside its result until that is written: the same command goes on after it was killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kedit_fast.basics import ranks
from kedit_fast.basics.files import folders_around, written_file, written_through
from kedit_fast.basics.parts import OtherWork, check_checkpoint, check_free, remove_parts
from kedit_fast.basics.unfinished import has_run, run_folder
from kedit_fast.sweep.kept import RunFolder


def run_of(args, *outputs: Path | None) -> RunFolder | None:
    """Where the run is kept that writes these files: beside the first one that is a file, or where ``--checkpoint``
    says; None for a run that writes none.

    Raises as ``check_checkpoint``, before any work.
    """
    files = [written_file(path).absolute() for path in outputs if path is not None and not written_through(path)]
    if args.checkpoint is not None:
        folder = check_checkpoint(os.path.expanduser(args.checkpoint))
    elif files:
        folder = run_folder(files[0])
    else:
        return None
    return RunFolder(folder, {"files": [str(path) for path in files]}, args.force)


@contextmanager
def kept(run: RunFolder | None) -> Iterator[RunFolder | None]:
    """``checkpoint=`` for a block that does the work and writes its result: the run is removed when it ends.

    After an error what is done stays. Raises ValueError where an unfinished run of other work is there, or a run is at
    work, before any file of it is touched; a KeyboardInterrupt says how to go on.
    """
    if run is None:
        yield None
        return
    with ranks.joint():
        check_free(run.folder)
    with folders_around(run.folder):
        try:
            yield run
        except OtherWork as error:
            raise ValueError(
                f"{run.folder} keeps an unfinished run: {error.differs}; give the same command again to go on with it, "
                "--force to begin anew, or name another file"
            ) from error
        except KeyboardInterrupt:
            if not has_run(run.folder):
                raise KeyboardInterrupt("no part of the work was done yet, so nothing is kept") from None
            raise KeyboardInterrupt(f"what is done is in {run.folder}; the same command goes on") from None
        for is_turn in (ranks.first(), not ranks.first()):  # each host may have the folder for itself
            with ranks.joint():
                if is_turn:
                    remove_parts(run.folder)
