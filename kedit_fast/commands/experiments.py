"""What ``kedit-fast rounds`` and ``kedit-fast layers`` share: editors, statistics, pictures."""

from pathlib import Path

from ..editors import EDITORS
from ..files import replace_file
from ..moments import SecondMoment, second_moments
from ..plots import figure_png
from .inputs import check_output, find_moments, make_folder_of, statistics_folder


def check_statistics(args) -> None:
    """Raises ValueError where statistics are both given and to be measured."""
    for option in ("corpus", "tokens"):
        if args.stats and getattr(args, option) is not None:
            raise ValueError(f"--stats and --{option} are both given; --{option} is for statistics yet to be measured")


def check_method(name: str) -> None:
    """Raises ValueError for a method that no editor has."""
    if name not in EDITORS:
        raise ValueError(f"method {name!r}: expected some of {', '.join(EDITORS)}")


def statistics(args, lm, editors, layers, corpus: str) -> dict[int, SecondMoment] | None:
    """Second moments of the layers, found or measured in one pass for all of them; None where no editor reads any."""
    reading = [editor for editor in editors if editor.mom2_adjustment]
    if not reading:
        return None
    if args.stats:
        return find_moments(lm, args.stats, layers)
    if args.tokens and args.tokens < lm.d_ff and not all(editor.regularizer for editor in reading):
        raise ValueError(
            f"--tokens {args.tokens}: fewer than d_ff = {lm.d_ff}, so the statistics have no inverse; give more, or a "
            "regularizer in --hparams"
        )
    return second_moments(lm, layers, corpus, n_tokens=args.tokens, seed=args.seed, cache_dir=statistics_folder())


def check_picture(name: str | None, force: bool) -> Path | None:
    """Where a picture may be written; ValueError for a name that does not end in .png."""
    if name is None:
        return None
    path = check_output(name, force)
    if path.suffix.lower() != ".png":
        raise ValueError(f"--plot {name}: pictures are written as .png; name a file that ends so")
    return path


def write_picture(figure, path: Path) -> None:
    """The figure as PNG, whole or not at all."""
    make_folder_of(path)
    with replace_file(path) as unfinished:
        unfinished.write_bytes(figure_png(figure))


def text_of(name) -> str:
    """What a text file holds. Raises ValueError where it is not UTF-8."""
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text ({error}); expected a text file") from error
