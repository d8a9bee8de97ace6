"""Text that others wrote, on a screen or in a page: it gives a terminal no orders, and no encoding stops it."""

import codecs
import html
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, contextmanager

# What moves a cursor, sets colors or titles (C0 and C1), turns the order of letters, ends a line unseen, is half a
# character.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_ON_ONE_LINE = re.compile(_CONTROLS.pattern[:-1] + "\t\n]")
STDOUT = "standard output"  # as errors name it
PLAIN = "kedit_fast.plain"  # how a stream may encode what its encoding has not
_PLAIN = {
    "≥": ">=", "≤": "<=", "→": "->", "–": "-", "—": "-", "−": "-", "…": "...", "‖": "||", "×": "x", "±": "+-",
    "’": "'", "“": '"', "”": '"', "↵": "\\n", "⇥": "\\t",
}  # fmt: skip


def escaped(text: str, one_line: bool = False) -> str:
    """The text with its control characters written out, as Python writes them: an escape is "\\x1b".

    one_line: also line ends and tabs; elsewhere they stay
    """
    return (_ON_ONE_LINE if one_line else _CONTROLS).sub(lambda found: _written_out(found[0]), text)


def columns(rows: Sequence[Sequence[str]], right: bool = False) -> str:
    """Rows of text as lines of aligned columns. right: all but the first column stand on the right"""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    side = str.rjust if right else str.ljust
    aligned = ([row[0].ljust(widths[0]), *map(side, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def html_text(text) -> str:
    """Any value as text of a page: control characters written out, and nothing of it markup."""
    return html.escape(escaped(str(text)))


@contextmanager
def any_encoding(streams: Iterable):
    """Inside, a character that a stream's encoding lacks is written in others, and writing it is no error."""
    with ExitStack() as stack:
        for stream in streams:
            if hasattr(stream, "reconfigure"):
                stack.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors=PLAIN)
        yield


def _written_out(text: str) -> str:
    return text.encode("unicode_escape").decode()


def _plain(error):
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or _written_out(c) for c in characters), error.end


codecs.register_error(PLAIN, _plain)
