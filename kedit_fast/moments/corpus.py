"""Text behind statistics: a file, strings, a Hugging Face data set, or text that the model samples itself."""

import gzip
import hashlib
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kedit_fast.basics import checks
from kedit_fast.basics.words import not_text

SELF = "self"
AnyCorpus = str | Path | Iterable[str]  # what ``read_corpus`` takes
WINDOW = 256  # tokens a text is cut into; attention over longer windows changes C little and costs more


@dataclass(frozen=True)
class Corpus:
    """Token windows and the name under which statistics remember them; kept: the file that holds sampled ones."""

    id: str
    windows: list[list[int]]
    kept: Path | None = None

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.windows))


def read_corpus(lm, corpus, n_tokens: int, *, seed: int = 0, keep_dir=None) -> Corpus:
    """``n_tokens`` tokens of a corpus, in windows of at most ``WINDOW``.

    corpus: "self" (sampled from the model at temperature 1 from its start token, ``seed``; as good as Wikipedia in a
    trial, and needs no download), a text file (.txt or .txt.gz), a list of texts, or a Hugging Face data set's train
    split: "hf:NAME", "hf:NAME#CONFIG", "hf:NAME#CONFIG:COLUMN" or "hf:NAME:COLUMN" (needs the package ``datasets``).
    The column is "text" unless it is named; rows without a text in it are left out, and a warning counts them.
    keep_dir: a folder that keeps sampled text, also half of it, so that a killed run goes on there; whoever needs the
        text no longer deletes ``Corpus.kept``

    Raises ValueError for a corpus that is empty or too short, for a data set that cannot be read or lacks the column
    (with those it has), FileNotFoundError for a missing file.
    """
    checks.whole("n_tokens", n_tokens, least=1, like=100_000)
    if isinstance(corpus, str) and corpus == SELF:
        return _sampled(lm, n_tokens, seed, keep_dir)
    name, texts = _texts(check_corpus(corpus))
    windows, left = [], n_tokens
    for window in (window for text in texts for window in windows_of(lm, text)):
        windows.append(window[:left])
        left -= len(windows[-1])
        if not left:
            break
    if isinstance(texts, _Column) and texts.n_null:
        warnings.warn(
            f"corpus {name}: {texts.n_null} of the {texts.n_rows} rows read are null in {texts.column!r} and left out",
            stacklevel=2,
        )
    if left:
        raise ValueError(
            f"corpus {name} holds {n_tokens - left} tokens, fewer than the {n_tokens} asked for; give more text"
        )
    return Corpus(name, windows)


def check_corpus(corpus):
    """The corpus as ``read_corpus`` takes it, a list where it is texts; raises BadArgument for anything else."""
    wanted = '"self" (sampled from the model), a text file, "hf:NAME" or a list of texts'
    if isinstance(corpus, str | Path):
        return corpus if corpus == SELF or str(corpus).startswith("hf:") else checks.path("corpus", corpus, wanted)
    return checks.listed("corpus", corpus, str, wanted)


def known_id(corpus, seed: int) -> str | None:
    """The id of a corpus, where it is known before the text is read (sampled text: with the model's fingerprint beside
    it, seed and length say all)."""
    return f"self-seed{seed}" if isinstance(corpus, str) and corpus == SELF else None


def windows_of(lm, text: str) -> list[list[int]]:
    """A text's tokens in windows of ``WINDOW``, or of what the model has positions for (special tokens only at the
    text's start)."""
    size = lm.window(WINDOW)
    ids = lm.tokenizer(text, truncation=False, verbose=False)["input_ids"]
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def _sampled(lm, n_tokens: int, seed: int, keep_dir) -> Corpus:
    from kedit_fast.moments.sampled_text import LENGTH, sampled_windows

    folder = None if keep_dir is None else Path(keep_dir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    windows, kept = sampled_windows(lm, n_tokens, lm.window(LENGTH), seed, folder)
    return Corpus(str(known_id(SELF, seed)), windows, kept)


def _texts(corpus) -> tuple[str, Iterable[str]]:
    if isinstance(corpus, str) and corpus.startswith("hf:"):
        return corpus, _data_set(corpus)
    if isinstance(corpus, str | Path):
        path = Path(corpus)
        if not path.is_file():
            raise FileNotFoundError(
                f"corpus {str(corpus)!r}: no such file; give a text file, a list of texts, 'self' or 'hf:NAME'"
            )
        try:
            raw = path.read_bytes()
            text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"corpus {str(corpus)!r}: {not_text(error)}; expected UTF-8 text or its .gz") from error
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"corpus {str(corpus)!r} cannot be read ({error}); expected UTF-8 text or its .gz"
            ) from error
        return f"{path.name}-{_digest(text)}", iter([text])
    return f"texts-{_digest(chr(0).join(corpus))}", iter(corpus)


def _data_set(name: str) -> "_Column":
    """The texts of "hf:NAME[#CONFIG][:COLUMN]"."""
    parts = re.fullmatch(r"hf:([^#:]+)(?:#([^#:]+))?(?::([^#:]+))?", name)
    if parts is None:
        raise ValueError(f"corpus {name!r}: expected hf:NAME, hf:NAME#CONFIG, hf:NAME:COLUMN or hf:NAME#CONFIG:COLUMN")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"corpus {name} needs the package `datasets` (pip install 'kedit-fast[datasets]')") from None
    try:
        rows = load_dataset(parts[1], parts[2], split="train", streaming=True, trust_remote_code=False)
    except Exception as error:  # of many types; a missing configuration is told with those there are
        raise ValueError(f"corpus {name} cannot be read: {' '.join(str(error).split())[:500]}") from error
    return _Column(name, parts[3] or "text", rows)


class _Column:
    """The texts of one column of a data set, row by row; counts the rows that hold none."""

    def __init__(self, name: str, column: str, rows):
        self.name, self.column, self.rows = name, column, rows
        self.n_rows = self.n_null = 0

    def __iter__(self) -> Iterator[str]:
        for row in self.rows:
            self.n_rows += 1
            text = self._of(row)
            self.n_null += text is None
            if text is not None and text.strip():
                yield text

    def _of(self, row: dict) -> str | None:
        if self.column not in row:
            whole = self.name.removesuffix(f":{self.column}")
            raise ValueError(
                f"corpus {self.name} has no column {self.column!r}; it has {', '.join(map(repr, row))}: choose one, "
                f"{whole}:{next(iter(row), 'COLUMN')}"
            )
        text = row[self.column]
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"corpus {self.name}: column {self.column!r} holds a {type(text).__name__} in row {self.n_rows}; "
                f"expected texts; its columns are {', '.join(map(repr, row))}"
            )
        return text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
