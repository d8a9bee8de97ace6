"""One self-contained HTML page: paragraphs, tables, pictures. It needs no network, no script and no other file.

A page is a list of ``Section``s, a section a list of blocks: a string is a paragraph, the others are the classes
below and ``heat_map.HeatMap``. All text is escaped: facts hold quotes, ampersands and angle brackets.

``before_after_table`` lays out what an edit changed, the prompts it must not change beside the ones it must.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

from kedit_fast.basics.files import write_text
from kedit_fast.basics.printing import html_text
from kedit_fast.pictures.figure import figure_alt, figure_png, png_html
from kedit_fast.pictures.heat_map import HeatMap, map_style
from kedit_fast.pictures.style import STYLE

TONES = ("", "good", "bad", "neutral")
ROLES = ("edit", "paraphrase", "neighbor")
WEAKENED = 0.5  # a neighbor whose answer keeps less than this share of its probability counts as weakened

# Also "0.018 → 0.970", "0.5 [0.4, 0.6]", "12 %", "1.2e-05", "–": what lines up on the right of a column.
_NUMERIC = re.compile(r"–|(?=.*\d)[\d\s.,:%×±→<>≥≤+\-−–e()\[\]]+")


@dataclass(frozen=True)
class Cell:
    """A table cell with a tone: "good", "bad", "neutral" or "" (none). Color repeats what the text must say.

    hint: shown where a pointer rests on it
    """

    value: Any
    tone: str = ""
    hint: str = ""

    def __post_init__(self):
        if self.tone not in TONES:
            raise ValueError(f"cell tone {self.tone!r}: expected one of {', '.join(map(repr, TONES))}")


@dataclass(frozen=True)
class Table:
    """Rows of values or ``Cell``s under headers; the first column names its row. Numbers stand on the right.

    Floats are shown to three decimals (give a string for another form), None and NaN as a dash.
    Raises ValueError for a row of another length than the headers.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.headers):
                raise ValueError(f"table row {row!r} has {len(row)} cells under {len(self.headers)} headers")


@dataclass(frozen=True)
class Picture:
    """PNG bytes or a matplotlib Figure, with a caption; alt: what it shows, in words (default: the figure's own)."""

    image: Any
    caption: str = ""
    alt: str = ""


@dataclass(frozen=True)
class Details:
    """Blocks behind a line that opens them; print shows them open. open: whether they are to begin with"""

    summary: str
    blocks: Sequence[Any]
    open: bool = False


@dataclass(frozen=True)
class Section:
    """A heading and its blocks: strings (paragraphs), ``Table``, ``Picture``, ``HeatMap``, ``Details``."""

    heading: str
    blocks: Sequence[Any] = ()


def write_report(path, title: str, first_line: str, sections: Iterable[Section]) -> None:
    """Write the page, whole or not at all; a file of that name is replaced.

    first_line: the first text of the body, above the title: what model this was measured on, for instance
    Raises TypeError for a block of unknown type, ValueError for bytes that are no PNG; then nothing is written.
    """
    write_text(path, render_report(title, first_line, sections))


def render_report(title: str, first_line: str, sections: Iterable[Section]) -> str:
    """The page as text; arguments as in ``write_report``."""
    body = "\n".join(_section(section) for section in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n'
        # The browser itself holds the page to what it carries.
        f'<meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{html_text(title)}</title>\n<style>{STYLE}{map_style(body)}</style>\n</head>\n"
        f'<body>\n<p class="first-line">{html_text(first_line)}</p>\n<h1>{html_text(title)}</h1>\n'
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


# ---- what an edit changed


@dataclass(frozen=True)
class Change:
    """One prompt before and after an edit: the probabilities of its old and its new answer.

    role: "edit" (the fact itself), "paraphrase", or "neighbor" (a prompt that must keep its old answer)
    p_old, p_new: (before, after); None or NaN where not measured
    """

    prompt: str
    old: str
    p_old: tuple[float | None, float | None]
    new: str
    p_new: tuple[float | None, float | None]
    role: str = "edit"

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} of {self.prompt!r}: expected one of {', '.join(ROLES)}")

    @property
    def outcome(self) -> Cell:
        """In words, for a fact or paraphrase: written (the new answer is the likelier one afterwards) or not written.

        For a neighbor: damaged (the new answer overtook its own), weakened (its own lost over half of its
        probability), kept, or not known before (the new answer was the likelier one already).
        """
        (old_before, old_after), (new_before, new_after) = (map(_probability, p) for p in (self.p_old, self.p_new))
        if any(p != p for p in (old_before, old_after, new_before, new_after)):
            return Cell("not measured", "neutral")
        if self.role != "neighbor":
            return Cell("written", "good") if new_after > old_after else Cell("not written", "bad")
        if new_before >= old_before:
            return Cell("not known before", "neutral")
        if new_after >= old_after:
            return Cell("damaged", "bad")
        return Cell("weakened", "bad") if old_after < WEAKENED * old_before else Cell("kept", "good")


class KnownNeighbors(NamedTuple):
    """The n neighbors that kept to their own answer before an edit, counted by what the edit did to them.

    p_old: mean probability of their own answers over these prompts, (before, after); NaN for n = 0
    """

    n: int
    damaged: int
    weakened: int
    kept: int
    p_old: tuple[float, float]


def known_neighbors(rows: Iterable[Change]) -> KnownNeighbors:
    """What an edit did to the neighbors among these prompts; those not known before or not measured are left out."""
    known = [c for c in rows if c.role == "neighbor" and c.outcome.tone != "neutral"]
    outcomes = [c.outcome.value for c in known]
    n = len(known)
    p_old = tuple(sum(c.p_old[i] for c in known) / n if n else math.nan for i in (0, 1))
    return KnownNeighbors(n, *map(outcomes.count, ("damaged", "weakened", "kept")), p_old)


def before_after_table(rows: Iterable[Change]) -> Table:
    """A row for each prompt, edited facts first, neighbors last, and a caption that counts both."""
    rows = sorted(rows, key=lambda change: ROLES.index(change.role))
    headers = ["prompt", "probe"]
    for answer in ("old", "new"):
        headers += [f"{answer} answer", f"p({answer}) before → after"]
    cells = [(c.prompt, c.role, c.old, _arrow(c.p_old), c.new, _arrow(c.p_new), c.outcome) for c in rows]
    return Table([*headers, "outcome"], cells, _counts(rows))


def _counts(rows: Sequence[Change]) -> str:
    """Successes and damage, counted; the mean probability because a count alone hides neighbors that nearly fell."""
    parts = []
    for role, name in (("edit", "facts"), ("paraphrase", "paraphrases")):
        outcomes = [c.outcome.value for c in rows if c.role == role]
        if outcomes:
            parts.append(f"{outcomes.count('written')} of {len(outcomes)} {name} written")
    neighbors = [c for c in rows if c.role == "neighbor"]
    known = known_neighbors(neighbors)
    if known.n:
        parts.append(
            f"of {known.n} neighbors known before: {known.damaged} damaged, {known.weakened} weakened, {known.kept} "
            f"kept; mean p(old) over these prompts {_arrow(known.p_old)}"
        )
    elif neighbors:
        parts.append(f"none of {len(neighbors)} neighbors known before or measured")
    else:
        parts.append("no neighbors measured")
    return "; ".join(parts) + "."


def _arrow(pair) -> str:
    return " → ".join(_shown(_probability(p)) for p in pair)


def _probability(value) -> float:
    return float("nan") if value is None else float(value)


# ---- blocks


def _section(section: Section) -> str:
    if not isinstance(section, Section):
        raise TypeError(f"expected a Section, got {type(section).__name__}; wrap blocks in Section(heading, [...])")
    return f"<section>\n<h2>{html_text(section.heading)}</h2>\n{fragment(section.blocks)}\n</section>"


def fragment(blocks) -> str:
    """The blocks of a section as HTML, without the page around them."""
    return "\n".join(map(_block, [blocks] if isinstance(blocks, str) else blocks))


def _block(block) -> str:
    if isinstance(block, str):
        return f"<p>{html_text(block)}</p>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Picture):
        return _picture(block)
    if isinstance(block, HeatMap):
        return block.markup()
    if isinstance(block, Details):
        opened = " open" * block.open
        return f"<details{opened}>\n<summary>{html_text(block.summary)}</summary>\n{fragment(block.blocks)}\n</details>"
    raise TypeError(f"cannot lay out a {type(block).__name__}; expected a string, Table, Picture, HeatMap or Details")


def explained(rows: Iterable[Sequence[Any]]) -> list[Details]:
    """What the hints of the rows' first cells say, for where no pointer rests; nothing where there are none."""
    said = {first.value: first.hint for first, *_ in rows if first.hint}
    return [Details("What each line is", [Table(("line", "what it is"), list(said.items()))])] if said else []


def _table(table: Table) -> str:
    cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in table.rows]
    texts = [[_shown(cell.value) for cell in row] for row in cells]
    columns = list(zip(*texts, strict=True)) or [()] * len(table.headers)
    right = [bool(column) and all(_NUMERIC.fullmatch(text) for text in column) for column in columns]
    head = "".join(
        f'<th scope="col"{_classes("number" * r)}>{html_text(header)}</th>'
        for header, r in zip(table.headers, right, strict=True)
    )
    lines = [f"<thead><tr>{head}</tr></thead>", "<tbody>"]
    for row, row_texts in zip(cells, texts, strict=True):
        line = ""
        for i, (cell, text) in enumerate(zip(row, row_texts, strict=True)):
            classes = _classes("number" * right[i], cell.tone)
            column = table.headers[i]
            tag, scope = ("th", ' scope="row"') if i == 0 else ("td", f' data-column="{html_text(column)}"')
            hint = f' title="{html_text(cell.hint)}"' if cell.hint else ""
            line += f"<{tag}{scope}{classes}{hint}>{html_text(text)}</{tag}>"
        lines.append(f"<tr>{line}</tr>")
    caption = f"<caption>{html_text(table.caption)}</caption>\n" if table.caption else ""
    # Focusable, so that a table wider than the page can be scrolled by keyboard.
    label = html_text(table.caption or "table")
    start = f'<div class="table" role="region" tabindex="0" aria-label="{label}">\n<table>\n{caption}'
    return start + "\n".join(lines) + "\n</tbody>\n</table>\n</div>"


def _classes(*names: str) -> str:
    names = [name for name in names if name]
    return f' class="{" ".join(names)}"' if names else ""


def _picture(picture: Picture) -> str:
    is_png = isinstance(picture.image, (bytes, bytearray))
    alt = picture.alt or (picture.caption if is_png else figure_alt(picture.image)) or "figure"
    image = png_html(bytes(picture.image) if is_png else figure_png(picture.image), alt)
    caption = f"\n<figcaption>{html_text(picture.caption)}</figcaption>" if picture.caption else ""
    return f"<figure>\n{image}{caption}\n</figure>"


def _shown(value) -> str:
    """A cell's text: floats to three decimals, or "<0.001" where that would show nothing."""
    if value is None or value != value:
        return "–"
    if isinstance(value, bool) or not isinstance(value, Real):
        return str(value)
    if isinstance(value, Integral):
        return f"{int(value):,}"
    return "<0.001" if 0 < value < 0.0005 else f"{value:.3f}"
