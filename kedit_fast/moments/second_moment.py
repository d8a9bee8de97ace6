"""Second moments of keys: C = E[k kᵀ] over text, for every edit layer in one pass that stops at the last of them.

k is the input of a layer's MLP down projection at each token, uncentered (Meng et al. 2022, ROME, section 3.1). The
published code makes one pass over the data for each layer; one shared pass gives the same sums.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kedit_fast.basics import checks, ranks
from kedit_fast.basics.bits import digest
from kedit_fast.basics.files import check_folder, existing_file, folders_around, reading, replace_file
from kedit_fast.basics.parts import Held, Parts, remove_parts
from kedit_fast.basics.progress import progress, scaled, stages
from kedit_fast.basics.state import own_state
from kedit_fast.basics.unfinished import RUN
from kedit_fast.jobs.moments import Moments
from kedit_fast.kernels.second_moment import fill_upper_
from kedit_fast.kernels.solve import condition
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.moments.corpus import SELF, AnyCorpus, Corpus, check_corpus, read_corpus, sampled_id
from kedit_fast.moments.published import read_published, refuse_pickled
from kedit_fast.sweep.engine import Job, sweep
from kedit_fast.sweep.kept import RunFolder, asked_of, begun, fitting
from kedit_fast.sweep.plan import free, together, too_large
from kedit_fast.sweep.runs import RunList

FORMAT = "kedit_fast.second_moment"
ROWS = 1024  # compared with their mirror images at a time
ASYMMETRY = 1e-4  # of the largest entry: what mirrored ones may differ by, for published sums were made on GPUs
# Of text for each of the d_ff features, unless told otherwise. MEMIT of 40 facts on SmolLM2 (python -m bench tokens):
# with 1.5, 2, 4, 8, 16 perplexity drifts by 3.9, 2.1, 0.93, 0.62, 0.61 %; other scores differ by noise from 2 on. Of 20
# on Gemma-3-270M, with 1.5, 4, 8, 16: by 1.8, 1.0, 0.64, 0.51 %.
TOKENS_PER_FEATURE = 8
STAGES = ("sampling text", "collecting second moments")  # as their progress calls them
BATCH_TOKENS = 16_384  # tokens a sweep; what an interrupted pass may lose
PARTS, LEAST_TOKENS = 4, 1024  # parts that less than that is cut into, and tokens that are not worth cutting


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """C = mean of k kᵀ over ``n_tokens`` tokens at one layer's mlp_key.

    matrix: [d_ff, d_ff] fp32 (from an fp64 sum where memory allows), of a mixture of experts a block each [E, width,
    width] (``blocks.py``); fingerprint: of the model; corpus: its id; dtype: the model's, while it was measured. The
    last three are None where a file does not say (published npz files).
    Raises ValueError for a matrix that is not square or not symmetric, as every mean of k kᵀ is.
    """

    matrix: Tensor
    n_tokens: int
    layer: int
    fingerprint: str | None = None
    corpus: str | None = None
    dtype: str | None = None

    def __post_init__(self):
        checks.instance("matrix", self.matrix, Tensor, "a tensor [d_ff, d_ff]")
        checks.whole("n_tokens", self.n_tokens, least=1, like=100_000)
        checks.whole("layer", self.layer, most=checks.MOST_LAYERS, like=5)
        for name in ("fingerprint", "corpus", "dtype"):
            checks.optional(checks.text, name, getattr(self, name), blank=True)
        size, apart = list(self.matrix.shape), 0.0
        if len(size) not in (2, 3) or size[-1] != size[-2]:
            raise ValueError(f"the second moment of layer {self.layer} is {size}; expected a square matrix")
        for block in self.blocks:
            for begin in range(0, size[-1], ROWS):
                rows = slice(begin, begin + ROWS)
                apart = max(apart, float((block[rows] - block[:, rows].T).abs().max()))
        if apart > ASYMMETRY * float(self.matrix.abs().max()):
            raise ValueError(
                f"the second moment of layer {self.layer} is not symmetric (mirrored entries differ by {apart:.2g}), "
                "and a mean of k kᵀ is; it is damaged or something else: collect it again"
            )

    def __repr__(self) -> str:
        model = self.fingerprint[:12] if self.fingerprint else "unknown"
        corpus = f", {self.corpus}" * bool(self.corpus)
        size = f"d_ff {sum(map(len, self.blocks))}, {self.n_tokens:,} tokens"
        return f"SecondMoment(layer {self.layer}, {size}{corpus}, model {model})"

    @property
    def blocks(self) -> Tensor:
        """[E, width, width] of the experts, or [1, d_ff, d_ff]."""
        return self.matrix if self.matrix.ndim == 3 else self.matrix[None]

    @property
    @own_state()
    def condition(self) -> float:
        """Estimated condition number; infinite where the matrix is singular (fewer tokens than d_ff)."""
        # rounding to fp32 can lift the zero eigenvalues just above zero
        few = self.n_tokens < self.matrix.shape[-1]
        return math.inf if few else max(condition(block) for block in self.blocks)

    @cached_property
    @own_state()
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """(eigenvalues [d_ff] ascending, eigenvectors [d_ff, d_ff] as columns), fp64; kept once they are known."""
        return tuple(torch.linalg.eigh(self.matrix.double()))

    def save(self, path: checks.AnyPath) -> None:
        """Writes one safetensors file, whole or not at all. A file of that name is replaced, folders are made."""
        meta = {"layer": self.layer, "n_tokens": self.n_tokens, "fingerprint": self.fingerprint}
        meta |= {"corpus": self.corpus, "dtype": self.dtype}
        with replace_file(path) as unfinished:
            # One entry: of several, safetensors writes another order each time, and equal moments make equal files.
            save_file({"matrix": self.matrix.contiguous()}, unfinished, {FORMAT: json.dumps(meta)})

    @classmethod
    @own_state()
    def load(cls, path: checks.AnyPath, layer: int | None = None) -> "SecondMoment":
        """What ``save`` wrote, or a statistics file of the rome and memit repositories (.npz; give its ``layer``).

        Raises ValueError, naming the file, for anything else.
        """
        path = checks.path("path", path)
        if path.name.endswith(".npz"):
            layer = checks.optional(checks.whole, "layer", layer, most=checks.MOST_LAYERS)
            matrix, n_tokens = read_published(path, layer)
            try:
                return cls(matrix, n_tokens, layer)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        refuse_pickled(existing_file(path, "a statistics file"))
        with reading(path, "collect these statistics again"), safe_open(path, "pt") as f:
            record = record_of(f.metadata())
            if record is not None:
                return cls(f.get_tensor("matrix"), **record)
        raise ValueError(f"{path} is not a second moment; expected what SecondMoment.save wrote, or an .npz")


def record_of(metadata: dict[str, str] | None) -> dict | None:
    """What the header of a statistics file says of its matrix; None where it is another file's."""
    metadata = metadata or {}
    text = metadata["record"] if metadata.get("format") == FORMAT else metadata.get(FORMAT)  # files of before have two
    record = None if text is None else json.loads(text)
    if text is not None and not isinstance(record, dict):
        raise TypeError("its record says no layer and no number of tokens")
    return record


@takes_lm
def second_moments(
    lm: LM,
    layers: Sequence[int],
    corpus: AnyCorpus = SELF,
    *,
    n_tokens: int | None = None,
    seed: int = 0,
    cache_dir: checks.AnyPath | None = None,
) -> dict[int, SecondMoment]:
    """C of each layer over ``n_tokens`` tokens of a corpus (see ``corpus.read_corpus``): {layer: SecondMoment}.

    n_tokens: default 8 d_ff. seed: of the sampled text. cache_dir: finished statistics are kept and found there, and a
    run that was killed goes on from its last ``BATCH_TOKENS`` (a quarter of the tokens, where they are fewer), to the
    same bits; matrices are then views of their files, so that five of 3.3 GB need no memory; ``statistics_folder()`` is
    the command line's and the demo's.

    Of the base model: edits that ``lm`` carries are left out, as the fingerprint says (and as published).

    One weight pass up to the last layer for each ``BATCH_TOKENS`` tokens; ranks share the tokens, and what is kept goes
    on with any number of them. Sums in fp64 where that fits ``lm.memory``, else fp32; where those of all layers do not
    fit, the text is read again for each group of layers that does. Where memory runs out, half of it is used from the
    last sums on that are kept; text that was still being sampled is then another, as good as the first.

    Raises ValueError for a layer out of range, one whose sum does not fit, a corpus that is too short, a file in
    ``cache_dir`` that is damaged or not what its name says, or statistics that another process measures there; OSError
    where ``cache_dir`` cannot be a folder, before any work.
    """
    lm, layers = replace(lm, edits=()), sorted(set(checks.layers("layers", layers, lm.n_layers)))
    n_tokens = checks.optional(checks.whole, "n_tokens", n_tokens, least=1, like=100_000)
    n_tokens = n_tokens or TOKENS_PER_FEATURE * lm.d_ff
    corpus, seed = check_corpus(corpus), checks.seed("seed", seed)
    if sum_bytes(lm) > _room(lm):
        need = sum_bytes(lm) * 4 // 3 + lm.memory - free(lm)
        raise too_large(f"the second moment of a layer of d_ff {lm.d_ff:,}", need, lm.memory)
    if cache_dir is not None:
        check_folder(checks.path("cache_dir", cache_dir))
    same = {"model": lm.fingerprint, "dtype": lm.dtype_name, "memory": lm.memory}
    ranks.agreed(same | {"layers": layers, "n_tokens": n_tokens, "seed": seed})
    asked = {"layers": layers, "corpus": digest(str(corpus)), "n_tokens": n_tokens, "seed": seed}
    text = None if corpus == SELF else read_corpus(lm, corpus, n_tokens)  # its id says whether all is there
    found = _finished(lm, layers, text.id if text else sampled_id(seed), n_tokens, cache_dir)
    if cache_dir is None:
        with stages(*STAGES), ranks.joint():
            return fitting(lm, Held(), lambda lm: _measured(lm, layers, text, n_tokens, seed, None, Held()))
    run = Path(cache_dir, f"moments-{lm.fingerprint}-{lm.dtype_name}-{digest(asked)}{RUN}")
    if found is None:
        with (
            stages(*STAGES), folders_around(run),
            begun(RunFolder(run, {}, anew=True), lambda: asked_of(lm, "second moments", (), **asked)) as keep,
        ):  # fmt: skip
            found = fitting(lm, keep, lambda lm: _measured(lm, layers, text, n_tokens, seed, Path(cache_dir), keep))
    if ranks.first():
        remove_parts(run)  # also of a run that was killed when all was saved
    return found


def _measured(
    lm, layers, text: Corpus | None, n_tokens: int, seed: int, cache_dir: Path | None, keep
) -> dict[int, SecondMoment]:
    """The statistics of all layers, of a text, or, for None, of one that has yet to be sampled."""
    text = text or read_corpus(lm, SELF, n_tokens, seed=seed, keep_dir=getattr(keep.own, "folder", None))
    groups = list(layer_groups(lm, layers))
    made: dict[int, SecondMoment] = {}
    with progress("collecting second moments (tokens)", text.n_tokens * len(groups)) as bar:
        for number, group in enumerate(groups, 1):
            found = _finished(lm, group, text.id, n_tokens, cache_dir)
            made |= found or _collected(lm, group, text, cache_dir, keep, bar)
            bar.advance(number * text.n_tokens - bar.done)  # where a group had been kept
    return made


def layer_groups(lm, layers: Sequence[int]) -> Iterator[list[int]]:
    """Layers whose sums fit the memory together, in fp32 at least; the text is read once for each group."""
    return together(layers, lambda layer: sum_bytes(lm), _room(lm))


def sum_bytes(lm) -> int:
    """Bytes of a layer's sum in fp32."""
    return 4 * math.prod(lm.moment_shape)


def _room(lm) -> int:
    """Bytes that sums may take beside the sweep that fills them."""
    return free(lm) // 4 * 3


def _collected(lm, layers, text: Corpus, cache_dir: Path | None, keep, bar) -> dict[int, SecondMoment]:
    """Of some layers, in one pass over the text."""
    sums = _Sums(lm, layers, text, cache_dir, keep)
    held = sum(total.nbytes for total in sums.by_layer.values())
    bar.resume(sums.n_done)
    for batch in together(text.windows[sums.n_windows :], len, batch_tokens(text.n_tokens)):
        mine, runs, advance = ranks.mine([*map(len, batch)]), RunList(), scaled(bar.advance, sum(map(len, batch)))
        for i in mine:
            runs.add(batch[i])
        with ranks.joint():
            if mine:
                jobs: list[Job] = [Moments(lm, sums.by_layer)]
                sweep(lm, runs.runs(), jobs, last_layer=max(layers), held=held, advance=advance)
        sums.advance(batch)
    return sums.finish()


def batch_tokens(n_tokens: int) -> int:
    """Tokens a sweep of each rank, for all of them: the same for weights in memory and on disk, whose sums are then the
    same bits. Little work is cut as well, to keep parts."""
    n = ranks.n_ranks()
    return min(BATCH_TOKENS * n, max(LEAST_TOKENS * n, n_tokens // PARTS))


def _name(lm, layer, corpus_id, n_tokens) -> str:
    text = re.sub(r"[^\w.=-]+", "_", corpus_id)  # "hf:owner/name" is no file name
    return f"moment-{lm.fingerprint}-{lm.dtype_name}-layer{layer}-{text}-{n_tokens}.safetensors"


def _finished(lm, layers, corpus_id, n_tokens, cache_dir):
    """The statistics of all layers, if they are in the cache (of ranks: the first one's)."""
    if cache_dir is None or corpus_id is None:
        return None
    paths = {layer: Path(cache_dir, _name(lm, layer, corpus_id, n_tokens)) for layer in layers}
    if not ranks.json_from_first(lambda: all(path.exists() for path in paths.values())):
        return None

    def load(path: Path, *wanted) -> SecondMoment:
        moment = SecondMoment.load(path)
        if (moment.n_tokens, moment.layer, moment.fingerprint, moment.corpus, moment.dtype) != wanted:
            raise ValueError(f"{path} is not what its name says; delete it")
        return moment

    about = {layer: (n_tokens, layer, lm.fingerprint, corpus_id, lm.dtype_name) for layer in layers}
    return {layer: _from_first(partial(load, path, *about[layer]), *about[layer]) for layer, path in paths.items()}


def _from_first(make: Callable[[], SecondMoment], *about) -> SecondMoment:
    """What ``make`` gives on the first rank, on all of them; about: its other fields, in order."""
    made: list[SecondMoment] = []

    def matrix() -> dict[str, Tensor]:
        made.append(make())
        return {"matrix": made[0].matrix}

    found = ranks.from_first(matrix)
    return made[0] if made else SecondMoment(found["matrix"], *about)


class _Sums:
    """Running sums of all layers, with a checkpoint where there is a cache: the first rank's, whom the others give."""

    def __init__(self, lm, layers, text: Corpus, cache_dir: Path | None, keep):
        self._lm, self._text, self._dir = lm, text, cache_dir
        # in memory they would be held twice
        self._keep = keep.own if isinstance(keep.own, Parts) and ranks.first() else None
        wide = 2 * sum_bytes(lm) * len(layers) <= free(lm) // 2
        dtype = torch.float64 if wide else torch.float32
        self.by_layer = {i: torch.zeros(lm.moment_shape, dtype=dtype, device=lm.device) for i in layers}
        self._name = f"sums-{digest(layers, text.id)}"
        self.n_windows = ranks.json_from_first(self._resume)
        self.n_done = sum(len(w) for w in self._text.windows[: self.n_windows])

    def _resume(self) -> int:
        """Takes up kept sums; how many windows they are of."""
        kept = self._keep.find(self._name) if self._keep is not None else None
        if kept is None:
            return 0
        for layer, total in self.by_layer.items():
            total.copy_(kept[str(layer)])
        return int(kept["windows"])

    def advance(self, batch) -> None:
        self.n_windows += len(batch)
        self.n_done += sum(map(len, batch))
        if self._dir is None or self.n_windows == len(self._text.windows):
            return
        for total in self.by_layer.values():
            ranks.summed_on_first_(total)
        if self._keep is not None:
            sums = {str(i): total for i, total in self.by_layer.items()}
            self._keep.write(self._name, sums | {"windows": torch.tensor(self.n_windows)})

    def finish(self) -> dict[int, SecondMoment]:
        made = {}
        for layer in list(self.by_layer):
            total, lm = self.by_layer.pop(layer), self._lm
            ranks.summed_on_first_(total)
            about = (self.n_done, layer, lm.fingerprint, self._text.id, lm.dtype_name)

            def moment(total=total, about=about) -> SecondMoment:
                for block in total.div_(self.n_done).view(-1, *total.shape[-2:]):
                    fill_upper_(block)
                return SecondMoment(total.float().cpu(), *about)

            made[layer] = _from_first(moment, *about)
            del total, moment
            if self._dir is not None and ranks.first():
                path = self._dir / _name(lm, layer, self._text.id, self.n_done)
                made[layer].save(path)
                made[layer] = SecondMoment.load(path)  # its matrix is then a view of the file, not memory
        return made
