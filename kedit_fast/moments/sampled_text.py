"""Text for statistics that the model samples itself, kept on disk while it is made.

A run that was killed goes on after the last tokens that it kept, with the same random numbers: the text is the one that
an uninterrupted run makes, unless a draw falls within rounding between two tokens (keys and values of tokens read
together differ in their last bits from those of tokens made one by one).
"""

import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kedit_fast.basics.files import reading, replace_file, saying
from kedit_fast.jobs.generate import generate

FORMAT = "kedit_fast.text 1"
LENGTH = 128  # many short texts: a step of generation takes one row a text, and few rows are as slow as many
EVERY = 10.0  # seconds of work that a killed run may lose


def sampled_windows(
    lm, n_tokens: int, length: int, seed: int, folder: Path | None = None
) -> tuple[list[list[int]], Path | None]:
    """(``n_tokens`` tokens in texts of ``length``, the last may be shorter, each from the model's start token on; the
    file that holds them).

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
            lm, texts, left, temperature=1.0, draw=kept.draw, stop=False, after=kept.keep_now_and_then,
            label="sampling text for statistics",
        )  # fmt: skip
        kept.keep(made)
        texts = [text + more for text, more in zip(texts, made, strict=True)]
    texts[-1] = texts[-1][: n_tokens - length * (n - 1)]
    return texts, kept.path


class _Kept:
    """The tokens so far and the state of the random numbers behind them, in a file where there is a folder.

    ids: [n, tokens so far] int64, without the start token; draw: the generator for those to come; path: the file
    """

    def __init__(self, lm, n: int, length: int, seed: int, folder: Path | None):
        self.ids, self.draw = torch.zeros(n, 0, dtype=torch.int64), torch.Generator().manual_seed(seed)
        self.path = None
        self._last = time.monotonic()
        if folder is not None:
            self.path = folder / f"text-{lm.fingerprint}-{lm.dtype_name}-self-seed{seed}-{n}x{length}.safetensors"
            if self.path.exists():
                self._read(n, length, lm.n_vocab)

    def _read(self, n: int, length: int, n_vocab: int) -> None:
        with reading(self.path, "delete it to sample the text anew"), safe_open(self.path, "pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ValueError("it is another file")
            ids = file.get_tensor("ids").long()
            if ids.ndim != 2 or len(ids) != n or ids.shape[1] >= length or bool(((ids < 0) | (ids >= n_vocab)).any()):
                raise ValueError(f"its tokens are {list(ids.shape)}, or none of this model")
            self.draw.set_state(file.get_tensor("state"))
            self.ids = ids

    def keep_now_and_then(self, made: list[list[int]]) -> None:
        """Keeps the tokens made after ``ids`` once some time has passed since the last."""
        if time.monotonic() - self._last > EVERY:
            self.keep(made)

    def keep(self, made: list[list[int]]) -> None:
        if self.path is None:
            return
        ids = torch.cat([self.ids, torch.tensor(made)], 1).int()
        tensors = {"ids": ids, "state": self.draw.get_state()}
        with (
            saying("the tokens before it stay, the same call goes on there"),
            replace_file(self.path) as to,
        ):
            save_file(tensors, to, {"format": FORMAT})
        self._last = time.monotonic()
