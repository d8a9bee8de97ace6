"""When to stop editing a model and retrain it: limits on the number of edits and on what they have done to it.

Every edit moves the weights of the same few layers. The first hundreds fit beside each other; then earlier facts fade,
ordinary text gets less likely, and the weights' norm runs away shortly before the model collapses (Gupta et al. 2024,
"Model editing at scale leads to gradual and catastrophic forgetting"; Yang et al. 2024, "The butterfly effect of model
editing"). No single number tells when, so four are watched and the one closest to its limit decides.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

from kedit_fast.basics import checks
from kedit_fast.basics.words import counted

CONTINUE, CLOSE, STOP = "continue", "close to a limit", "stop"


@dataclass(frozen=True)
class EditPolicy:
    """Limits for all edits of one model together.

    max_facts: facts written since the model was trained
    max_growth: ‖ΔW‖ / ‖W‖ of any edited down projection (Frobenius norms, ΔW of the whole chain); 20 facts by MEMIT
        move SmolLM2-135M's most changed layer by 0.16, a large model's by far less
    max_drift: relative rise of perplexity
    min_retention: share of the earlier edits' facts that still hold
    warn_at: share of a limit that is spent when an advice says "close to a limit"

    The numbers are cautious defaults, not laws: how much a model bears depends on its size and on the editor.
    Raises ValueError for limits that make no sense.
    """

    max_facts: int = 1_000
    max_growth: float = 0.5
    max_drift: float = 0.02
    min_retention: float = 0.9
    warn_at: float = 0.7

    def __post_init__(self):
        checks.whole("policy max_facts", self.max_facts, least=1, like=1_000)
        for name in ("max_growth", "max_drift"):
            checks.number(f"policy {name}", getattr(self, name), above=0, like=0.02)
        for name in ("min_retention", "warn_at"):
            checks.share(f"policy {name}", getattr(self, name), below_one=True)


@dataclass(frozen=True)
class Advice:
    """What the policy says. level: CONTINUE, CLOSE or STOP; spent: {what: share of its limit}; sentence: in words."""

    level: str
    spent: dict[str, float]
    sentence: str

    @property
    def stop(self) -> bool:
        return self.level == STOP


def advise(
    n_facts: int,
    growth: Mapping[int, float],
    drift: float | None = None,
    retention: float | None = None,
    policy: EditPolicy | None = None,
) -> Advice:
    """Whether to go on editing a model that n_facts facts were written into.

    growth: {layer: ‖ΔW‖ / ‖W‖} of the whole chain of edits; drift: relative change of perplexity, a fall counts as
    none; retention: share of earlier facts that still hold; None: not measured, and not judged. A NaN is over its
    limit: what cannot be computed any more is the strongest sign.
    """
    policy = EditPolicy() if policy is None else checks.instance("policy", policy, EditPolicy, "an EditPolicy")
    checks.whole("n_facts", n_facts, like=20)
    checks.instance("growth", growth, Mapping, "{layer: ‖ΔW‖ / ‖W‖}, e.g. {5: 0.1}")
    for name, value in (("drift", drift), ("retention", retention), *((f"growth[{i}]", x) for i, x in growth.items())):
        checks.optional(checks.instance, name, value, Real, "a number")
    layer = max(growth, key=lambda i: math.inf if math.isnan(growth[i]) else growth[i], default=None)
    read = {"facts": (n_facts / policy.max_facts, f"{counted(n_facts, 'fact')} of at most {policy.max_facts:,}")}
    if layer is not None:
        text = f"weights of layer {layer} moved by {growth[layer]:.2%} of at most {policy.max_growth:.2%}"
        read["growth"] = (growth[layer] / policy.max_growth, text)
    if drift is not None:
        text = f"perplexity {drift:+.2%} of at most +{policy.max_drift:.2%}"
        read["drift"] = (drift / policy.max_drift if math.isnan(drift) else max(drift, 0.0) / policy.max_drift, text)
    if retention is not None:
        text = f"{retention:.1%} of the earlier facts still hold, at least {policy.min_retention:.1%} should"
        read["retention"] = ((1 - retention) / (1 - policy.min_retention), text)
    spent = {name: math.inf if math.isnan(share) else share for name, (share, _) in read.items()}
    over = [read[name][1] for name, share in spent.items() if share > 1]
    if over:
        return Advice(STOP, spent, f"Stop editing and retrain (or merge into training data): {'; '.join(over)}.")
    nearest = max(spent, key=lambda name: spent[name])
    level = CLOSE if spent[nearest] >= policy.warn_at else CONTINUE
    start = "Close to a limit, plan a retraining" if level == CLOSE else "Editing may go on"
    return Advice(level, spent, f"{start}: {read[nearest][1]} ({spent[nearest]:.0%} of this limit spent).")
