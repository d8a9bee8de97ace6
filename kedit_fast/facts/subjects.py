"""Where a subject stands in a prompt: as it is spelled, or in one place where it is spelled alike.

Alike is: another case, curly quotes for straight ones, composed or decomposed letters (NFC, NFD), other white space,
marks that are not seen. Two texts that look the same and are not alike (a Cyrillic а for a Latin a) are told apart by
their code points.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator

QUOTES = str.maketrans("‘’‚‛ʼ′“”„‟″‐‑", "''''''\"\"\"\"\"--")  # one kind of quote, prime and hyphen for all
# Words of these scripts stand without spaces between them; beginnings of Unicode names.
UNSPACED = (
    "CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC", "BOPOMOFO", "FULLWIDTH", "HALFWIDTH", "YI SYLLABLE", "THAI", "LAO",
    "KHMER", "MYANMAR", "TIBETAN",
)  # fmt: skip
LETTERS = 3  # that subjects are looked up by
MOST = 5  # code points shown of two texts that look the same


def as_template(text: str, subject: str) -> tuple[str, str]:
    """(text with "{}" where the subject stands, the subject as the text spells it).

    The first place where it is a whole word, else the first place; where it is nowhere as spelled, the one place where
    it is alike. A text that already is a template (one "{}") is given back as it is.
    Raises ValueError where the subject is absent, or alike in several places.
    """
    if "{}" in text:
        return text, subject
    if not subject.strip():
        raise ValueError(f"the subject is empty ({subject!r}); give what the prompt {text!r} is about")
    found = (match.span() for match in re.finditer(re.escape(subject), text))
    spans = [(b, e) for b, e in found if not _is_mark(text[e : e + 1])]  # with a mark behind it, it is another letter
    spans = (_whole_words(text, spans) or spans)[:1] or places_alike(text, subject)
    if len(spans) != 1:
        raise ValueError(_absent(text, subject, spans))
    ((begin, end),) = spans
    return text[:begin] + "{}" + text[end:], text[begin:end]


def is_named(text: str, subject: str) -> bool:
    """Whether a text holds a subject, as it is spelled or alike."""
    return subject in text or bool(places_alike(text, subject))


def folded(text: str) -> str:
    """Text for comparing: what is alike becomes equal; one space between words, none around them."""
    return "".join(letter for letter, _ in _letters(text)).strip()


def places_alike(text: str, subject: str) -> list[tuple[int, int]]:
    """Half-open spans of text that are alike to the subject: those that are whole words, or if there are none, all."""
    letters, wanted = _letters(text), folded(subject)
    whole = "".join(letter for letter, _ in letters)
    spans = []
    at = whole.find(wanted) if wanted else -1
    while at >= 0:
        before, mine, after = letters[:at], letters[at : at + len(wanted)], letters[at + len(wanted) :]
        # Whole characters of the text, with their marks: not one s of ß, nor the e of a decomposed é.
        cut = (before and before[-1][1] == mine[0][1]) or (after and after[0][1] == mine[-1][1])
        if not cut and not (after and _is_mark(after[0][0])):
            places = [place for _, place in mine]
            spans.append((min(places), max(places) + 1))
        at = whole.find(wanted, at + 1)
    return _whole_words(text, spans) or spans


def _whole_words(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(b, e) for b, e in spans if not _is_word(text[max(0, b - 1) : b]) and not _is_word(text[e : e + 1])]


def _letters(text: str) -> list[tuple[str, int]]:
    """(letter, its place in the text): without case, decomposed, marks in their canonical order, single spaces."""
    letters: list[tuple[str, int]] = []
    for place, char in enumerate(text):
        if unicodedata.category(char) == "Cf":  # joiners and marks of direction: not seen
            continue
        for letter in unicodedata.normalize("NFD", char.translate(QUOTES).casefold()):
            if letter.isspace():
                if letters and letters[-1][0] == " ":
                    continue
                letter = " "
            letters.append((letter, place))
            rank, at = unicodedata.combining(letter), len(letters) - 1
            while rank and at and unicodedata.combining(letters[at - 1][0]) > rank:
                letters[at - 1], letters[at] = letters[at], letters[at - 1]
                at -= 1
    return letters


def _is_word(char: str) -> bool:
    return re.match(r"\w", char) is not None


def _is_mark(char: str) -> bool:
    return bool(char) and unicodedata.combining(char) > 0


def unspaced(char: str) -> bool:
    """Whether a character is of a script whose words stand without spaces between them."""
    return bool(char) and unicodedata.name(char, "").startswith(UNSPACED)


def _in_word(before: str, after: str) -> bool:
    """Whether the end of one text and the beginning of the next are inside a word."""
    ends = before[-1:], after[:1]
    return all(map(_is_word, ends)) and not any(map(unspaced, ends))


class Names:
    """Finds which texts name one of many subjects: they hold it between ends of words, whatever the case. "Io" is not
    in "Iowa"; in scripts without spaces any place will do.

    Subjects are looked up by their first letters, so 10,000 of them cost a text no more than 10.
    """

    def __init__(self, subjects: Iterable[str | None]):
        spelled = {subject.strip().casefold() for subject in subjects if subject and subject.strip()}
        self._by_start: dict[str, list[str]] = {}
        for subject in spelled:
            self._by_start.setdefault(subject[:LETTERS], []).append(subject)
        self._lengths = sorted(set(map(len, self._by_start)))  # of the shortest subjects too

    def in_text(self, text: str) -> bool:
        """Whether the text names any of the subjects."""
        return any(True for _ in self._places(text.casefold()))

    def named(self, text: str) -> set[str]:
        """Those of the subjects, without case, that the text names, and not only inside a longer one of them: "New
        York" names no "York"."""
        places = [(at, at + len(subject), subject) for at, subject in self._places(text.casefold())]
        return {
            subject
            for begin, end, subject in places
            if not any(b <= begin and end <= e and e - b > end - begin for b, e, _ in places)
        }

    def _places(self, text: str) -> Iterator[tuple[int, str]]:
        for at in range(len(text)):
            for n in self._lengths:
                for subject in self._by_start.get(text[at : at + n], ()):
                    end = at + len(subject)
                    cut = _in_word(text[max(0, at - 1) : at], subject) or _in_word(subject, text[end : end + 1])
                    if text.startswith(subject, at) and not cut:
                        yield at, subject


# ---- why a subject is not in a prompt


def _absent(text: str, subject: str, spans: list[tuple[int, int]]) -> str:
    if spans:
        spelled = ", ".join(f"{text[b:e]!r}{_points(text[b:e])}" for b, e in spans[:MOST])
        return (
            f"subject {subject!r}{_points(subject)} is not in prompt {text!r} as it is spelled, and alike in "
            f"{len(spans)} places ({spelled}); put {{}} in the one that is meant"
        )
    alike = _lookalike(text, subject)
    return f"subject {subject!r} not in prompt {text!r}{alike}; the prompt needs the subject or one {{}}"


def _points(text: str) -> str:
    points = [f"U+{ord(char):04X}" for char in text if not char.isascii()]
    return f" ({' '.join(points[:MOST])}{' ...' * (len(points) > MOST)})" if points else ""


def _lookalike(text: str, subject: str) -> str:
    """Which characters differ, where a part of the text looks much like the subject; "" where none does."""
    n = len(subject)
    windows = (text[at : at + n] for at in range(len(text) - n + 1))
    nearest = max(windows, key=lambda part: sum(a == b for a, b in zip(part, subject, strict=True)), default="")
    differ = [(a, b) for a, b in zip(nearest, subject, strict=False) if a != b]
    if not differ or len(differ) > min(MOST, n / 2) or all(a.isascii() and b.isascii() for a, b in differ):
        return ""
    told = "; ".join(f"{_named(a)} there, {_named(b)} in the subject" for a, b in dict.fromkeys(differ))
    return f", where {nearest!r} looks like it: {told}"


def _named(char: str) -> str:
    return f"U+{ord(char):04X} {unicodedata.name(char, '')}".rstrip()
