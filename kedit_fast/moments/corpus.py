"""Text behind statistics: a file, strings, a Hugging Face data set, or text that the model samples itself.

Sampled text is kept on disk while it is made. A run that was killed goes on after the last tokens that it kept, with
the same random numbers: the text is the one that an uninterrupted run makes, unless a draw falls within rounding
between two tokens (keys and values of tokens read together differ in their last bits from those of tokens made one by
one).
"""

import hashlib
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kedit_fast.basics import checks, ranks
from kedit_fast.basics.catalog import SELF
from kedit_fast.basics.files import reading, replace_file, saying
from kedit_fast.basics.packed import unpacked
from kedit_fast.basics.warn import warn
from kedit_fast.basics.words import not_text
from kedit_fast.jobs.generate import generate

AnyCorpus = str | Path | Iterable[str]  # what ``read_corpus`` takes
WINDOW = 256  # tokens a text is cut into; attention over longer windows changes C little and costs more
LENGTH = 128  # of sampled texts: a step of generation takes one row a text, and few rows are as slow as many
EVERY = 10.0  # seconds of sampling that a killed run may lose
FORMAT = "kedit_fast.text 1"


@dataclass(frozen=True)
class Corpus:
    """Token windows and the name under which statistics remember them."""

    id: str
    windows: list[list[int]]

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.windows))


def read_corpus(lm, corpus, n_tokens: int, *, seed: int = 0, keep_dir=None) -> Corpus:
    """``n_tokens`` tokens of a corpus, in windows of at most ``WINDOW``.

    corpus: "self" (sampled from the model at temperature 1 from its start token, ``seed``; as good as Wikipedia in a
    trial, and needs no download), a text file (.txt or .txt.gz), a list of texts, or a Hugging Face data set's train
    split: "hf:NAME", "hf:NAME#CONFIG", "hf:NAME#CONFIG:COLUMN" or "hf:NAME:COLUMN" (needs the package ``datasets``).
    The column is "text" unless it is named; rows without a text in it are left out, and a warning counts them.
    keep_dir: a folder that keeps sampled text, also half of it, so that a killed run goes on there
    Ranks share the sampling; text that is there the first of them reads for all.

    Raises ValueError for a corpus that is empty or too short, for a data set that cannot be read or lacks the column
    (with those it has), FileNotFoundError for a missing file.
    """
    checks.whole("n_tokens", n_tokens, least=1, like=100_000)
    if isinstance(corpus, str) and corpus == SELF:
        return _sampled(lm, n_tokens, seed, keep_dir)
    name, windows = ranks.json_from_first(lambda: _read(lm, corpus, n_tokens))
    return Corpus(name, windows)


def _read(lm, corpus, n_tokens: int) -> tuple[str, list[list[int]]]:
    """(its id, ``n_tokens`` tokens of it in windows)."""
    name, texts = _texts(check_corpus(corpus))
    windows, left = [], n_tokens
    for window in (window for text in texts for window in windows_of(lm, text)):
        windows.append(window[:left])
        left -= len(windows[-1])
        if not left:
            break
    if isinstance(texts, _Column) and texts.n_null:
        warn(
            f"corpus {name}: {texts.n_null} of the {texts.n_rows} rows read are null in {texts.column!r} and left out",
        )
    if left:
        raise ValueError(
            f"corpus {name} holds {n_tokens - left} tokens, fewer than the {n_tokens} asked for; give more text, "
            "or ask for fewer (n_tokens=, --tokens)"
        )
    return name, windows


def check_corpus(corpus):
    """The corpus as ``read_corpus`` takes it, a list where it is texts; raises BadArgument for anything else."""
    wanted = '"self" (sampled from the model), a text file, "hf:NAME" or a list of texts'
    if isinstance(corpus, str | Path):
        return corpus if corpus == SELF or str(corpus).startswith("hf:") else checks.path("corpus", corpus, wanted)
    return checks.listed("corpus", corpus, str, wanted)


def sampled_id(seed: int) -> str:
    """The id of sampled text, before it is: with the model's fingerprint beside it, seed and length say all."""
    return f"self-seed{seed}"


def windows_of(lm, text: str) -> list[list[int]]:
    """A text's tokens in windows of ``WINDOW``, or of what the model has positions for (special tokens only at the
    text's start)."""
    size = lm.window(WINDOW)
    ids = lm.tokenizer(text, truncation=False, verbose=False)["input_ids"]
    return [ids[i : i + size] for i in range(0, len(ids), size)]


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
            with unpacked(path) if path.suffix == ".gz" else open(path, "rb") as file:
                text = file.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"corpus {str(corpus)!r}: {not_text(error)}; expected UTF-8 text or its .gz") from error
        except (OSError, ValueError) as error:
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


# ---- sampled text


def _sampled(lm, n_tokens: int, seed: int, keep_dir) -> Corpus:
    folder = None if keep_dir is None else Path(keep_dir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return Corpus(sampled_id(seed), sampled_windows(lm, n_tokens, lm.window(LENGTH), seed, folder))


def sampled_windows(lm, n_tokens: int, length: int, seed: int, folder: Path | None = None) -> list[list[int]]:
    """``n_tokens`` tokens in texts of ``length``, the last may be shorter, each from the model's start token on.

    folder: keeps the texts, whole and half; it has to exist. Raises ValueError for a tokenizer without start and end
    token, and for a file there that is damaged.
    """
    start = lm.tokenizer.bos_token_id
    start = lm.tokenizer.eos_token_id if start is None else start
    if start is None:
        raise ValueError("this tokenizer has neither a start nor an end token to sample text from; give a corpus")
    n = -(-n_tokens // length)
    kept = _Kept(lm, n, length, seed, folder)
    texts = [[start, *ids] for ids in kept.ids.tolist()]
    left = length - 1 - kept.ids.shape[1]
    if left:
        made = generate(
            lm, texts, left, temperature=1.0, repetition_penalty=1, draw=kept.draw, stop=False,
            after=kept.keep_now_and_then, label="sampling text for statistics",
        )  # fmt: skip
        kept.keep(made)
        texts = [text + more for text, more in zip(texts, made, strict=True)]
    texts[-1] = texts[-1][: n_tokens - length * (n - 1)]
    return texts


class _Kept:
    """The tokens so far and the state of the random numbers behind them, in a file where there is a folder: the first
    rank's, who reads it for all.

    ids: [n, tokens so far] int64, without the start token; draw: the generator for those to come; path: the file
    """

    def __init__(self, lm, n: int, length: int, seed: int, folder: Path | None):
        self.ids, self.draw = torch.zeros(n, 0, dtype=torch.int64), torch.Generator().manual_seed(seed)
        self.path: Path | None = None
        self._last = time.monotonic()
        if folder is not None:
            name = f"text-{lm.fingerprint}-{lm.dtype_name}-self-seed{seed}-{n}x{length}.safetensors"
            self.path = path = folder / name
            held = ranks.from_first(lambda: self._read(n, length, lm.n_vocab) if path.exists() else {})
            if held:
                self.ids = held["ids"]
                self.draw.set_state(held["state"])

    def _read(self, n: int, length: int, n_vocab: int) -> dict[str, Tensor]:
        """{"ids", "state"} of the file."""
        with reading(self.path, "delete it to sample the text anew"), safe_open(self.path, "pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ValueError("it is another file")
            ids = file.get_tensor("ids").long()
            if ids.ndim != 2 or len(ids) != n or ids.shape[1] >= length or bool(((ids < 0) | (ids >= n_vocab)).any()):
                raise ValueError(f"its tokens are {list(ids.shape)}, or none of this model")
            state = file.get_tensor("state")
            torch.Generator().set_state(state)  # raises for one that is none
            return {"ids": ids, "state": state}

    def keep_now_and_then(self, made: list[list[int]]) -> None:
        """Keeps the tokens made after ``ids`` once some time has passed since the last."""
        if time.monotonic() - self._last > EVERY:
            self.keep(made)

    def keep(self, made: list[list[int]]) -> None:
        if self.path is None or not ranks.first():
            return
        ids = torch.cat([self.ids, torch.tensor(made)], 1).int()
        tensors = {"ids": ids, "state": self.draw.get_state()}
        with (
            saying("the tokens before it stay, the same call goes on there"),
            replace_file(self.path) as to,
        ):
            save_file(tensors, to, {"format": FORMAT})
        self._last = time.monotonic()
