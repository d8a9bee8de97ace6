"""Second moments of gradients: B = E[g gᵀ] over text, the other half of a matrix's curvature beside C = E[k kᵀ].

g is the gradient of a text's summed -log p with respect to the output of a layer's down projection, at each token that
a token follows. C ⊗ B is then the K-FAC approximation (Martens and Grosse 2015, arXiv:1503.05671) of the Fisher matrix
of the down projection: exactly of it in expectation where the text is sampled from the model, the empirical one else.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kedit_fast.basics.state import wide
from kedit_fast.jobs.gradients import GradientTask, gradient_packs
from kedit_fast.model.lm import LM
from kedit_fast.moments.corpus import SELF, AnyCorpus, read_corpus
from kedit_fast.sweep.plan import too_large


def gradient_moments(
    lm: LM, layers: Sequence[int], corpus: AnyCorpus = SELF, *, n_tokens: int, seed: int = 0
) -> dict[int, Tensor]:
    """{layer: B [d, d]}, fp32 (fp64 of an fp64 model) from an fp64 sum, on the CPU, with the edits that ``lm`` carries.

    corpus, n_tokens, seed: as in ``read_corpus``. A forward and a backward sweep, cut by memory. Raises ValueError for
    a corpus that is too short, and where the sums leave no room.
    """
    sums = {layer: torch.zeros(lm.d_model, lm.d_model, dtype=torch.float64) for layer in layers}
    held = sum(total.nbytes for total in sums.values())
    if held > lm.memory // 2:
        raise too_large(f"the moments of gradients of {len(layers)} layers", 2 * held, lm.memory)
    windows = [window for window in read_corpus(lm, corpus, n_tokens, seed=seed).windows if len(window) > 1]
    if not windows:
        raise ValueError(
            f"no text of two tokens or more among the {n_tokens} asked for, and a token that none follows has no "
            "gradient; ask for more (gradient_tokens=)"
        )
    tasks = [GradientTask(window[:1], window[1:], f"text {i}") for i, window in enumerate(windows, 1)]
    length = torch.tensor([len(task.target) for task in tasks], dtype=torch.float64)
    for pack in gradient_packs(lm, tasks, [(layer, "down") for layer in layers], held=held):
        for (layer, _), made in pack.factors.items():
            g = made.delta.cpu().double() * length[made.task, None]  # of the sum over a text's tokens
            sums[layer].addmm_(g.T, g)
    return {layer: (total / length.sum()).to(wide(lm.dtype)) for layer, total in sums.items()}
