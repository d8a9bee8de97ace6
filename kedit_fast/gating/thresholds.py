"""What an edit must reach before it ships, and the verdict on one measured value."""

import math
from dataclasses import dataclass, field, fields

from kedit_fast.basics import checks
from kedit_fast.basics.files import DAMAGE, read_object
from kedit_fast.basics.intervals import Interval
from kedit_fast.basics.words import counted, reason
from kedit_fast.gating.policy import EditPolicy

MEASURES = ("generated", "exact", "success")
PASS, FAIL, REPORTED, NOT_MEASURED = "pass", "fail", "reported", "not measured"


@dataclass(frozen=True)
class Thresholds:
    """The limits of a gate; shares from 0 to 1. None: measured and reported, but nothing depends on it.

    measure: when a wording counts as answered. "generated": what the model writes on, greedily, says target_new and
        not target_true; "exact": every token of target_new is the likeliest; "success": P(new) > P(true), as
        CounterFact counts it, which is met long before a user sees the new answer
    confident: the 95 % interval's worse end must meet a limit, not the value alone (of 50 probes that takes all 50)
    min_answered over at least min_probes wordings of the facts: their own prompts and their paraphrases
        (``evaluate``'s efficacy is another thing: P(new) > P(true) on the facts' own prompts alone)
    min_generalization over at least min_paraphrases paraphrases, which the edit was not made with
    max_specificity_drop over at least min_specificity_prompts other prompts: the share that lost its answer
    max_perplexity_drift over at least min_text_tokens predicted tokens: perplexity after / before - 1; a fall passes
    min_other_form: share of the facts' wordings answered in the form they were not edited in: in a chat, or plainly
    min_portability: questions whose answer follows from the edit
    max_leak, max_leak_doubt, max_leak_context, max_leak_language: share of canaries that say the old answer
    min_retention: share of the facts of earlier edits, in a chain, that are still answered
    policy: limits on number of facts, norm growth and drift of the whole chain, an EditPolicy (in a file an object)

    Raises ValueError for a limit that makes no sense.
    """

    measure: str = "generated"
    confident: bool = False
    min_answered: float = 0.90
    min_probes: int = 50
    min_generalization: float | None = 0.85
    min_paraphrases: int = 30
    max_specificity_drop: float | None = 0.02
    min_specificity_prompts: int = 500
    max_perplexity_drift: float | None = 0.005
    min_text_tokens: int = 1_000
    min_other_form: float | None = None
    min_portability: float | None = None
    max_leak: float | None = 0.0
    max_leak_doubt: float | None = None
    max_leak_context: float | None = None
    max_leak_language: float | None = None
    min_retention: float | None = 0.90
    policy: EditPolicy = field(default_factory=EditPolicy)

    def __post_init__(self):
        checks.choice("measure", self.measure, MEASURES)
        checks.flag("confident", self.confident)
        checks.instance("policy", self.policy, EditPolicy, "an EditPolicy")
        for name in COUNTS:
            checks.whole(f"threshold {name}", getattr(self, name), least=1, like=50)
        checks.share("threshold min_answered", self.min_answered)
        for name in SHARES:
            checks.optional(checks.share, f"threshold {name}", getattr(self, name))

    @classmethod
    def from_json(cls, path: checks.AnyPath) -> "Thresholds":
        """The thresholds of a JSON object with some of these fields ("policy" an object too); others keep their
        defaults. Raises ValueError, naming the file, for an unknown field or a limit that makes no sense."""
        record = read_object(path, "an object with named thresholds")
        try:
            if not isinstance(record.get("policy", {}), dict):
                raise ValueError("expected an object with named thresholds")
            known = {f.name for f in fields(cls)}, {f.name for f in fields(EditPolicy)}
            unknown = [*(set(record) - known[0]), *(set(record.get("policy", {})) - known[1])]
            if unknown:
                raise ValueError(f"unknown fields {', '.join(sorted(unknown))}; known: {', '.join(sorted(known[0]))}")
            return cls(**record | {"policy": EditPolicy(**record.get("policy", {}))})
        except DAMAGE as error:
            raise ValueError(f"{path}: {reason(error)}") from error

    def missing(self, facts: int, wordings: int, paraphrases: int, prompts: int, old: int) -> list[str]:
        """What has to be added before these limits can be met: a sentence for each kind of probe there is too few of.

        facts: edited ones; wordings of them, paraphrases among those; prompts that must keep their answer;
            old: facts whose old answer is known
        """
        said = []
        held = self.min_generalization is not None
        more = max(self.min_probes - wordings, self.min_paraphrases - paraphrases if held else 0)
        if more > 0:
            needed = f", {paraphrases:,} of them paraphrases ({self.min_paraphrases:,} needed)" if held else ""
            each = f", about {math.ceil(more / facts):,} a fact" if facts > 1 else ""
            said.append(
                f"{_TOO_FEW}: add {counted(more, 'paraphrase')}{each}; there {_are(wordings, 'wording')} of the "
                f"facts ({self.min_probes:,} needed){needed}"
            )
        more = self.min_specificity_prompts - prompts
        if more > 0 and self.max_specificity_drop is not None:
            said.append(
                f"{_TOO_FEW}: add {counted(more, 'prompt')} that must keep their answer (neighbors, other "
                f"relations of the subjects, anything else); there {_are(prompts, 'prompt')} "
                f"({self.min_specificity_prompts:,} needed)"
            )
        if not old and self.max_leak is not None:
            said.append(
                "no fact says its old answer, and the canary looks for that in what the model writes: add target_true "
                "(what the model says now), or take null for max_leak (--thresholds)"
            )
        return said


_TOO_FEW = "too few probes to pass whatever is found"
COUNTS = ("min_probes", "min_paraphrases", "min_specificity_prompts", "min_text_tokens")
SHARES = tuple(f.name for f in fields(Thresholds) if f.name[:4] in ("min_", "max_") and f.name not in COUNTS)


@dataclass(frozen=True)
class Check:
    """One measured value and its verdict.

    name: what was measured; form: of which form of the edit; value, low, high: with its 95 % interval (NaN: none);
    n: what it was measured over, counted: of what, in words, and required: how many there must be; limit: None where
    nothing depends on it; rises: whether the value must reach the limit (else it must not exceed it); confident: the
    worse end of the interval is held against the limit; note: what a reader must know
    """

    name: str
    form: str
    value: float
    low: float
    high: float
    n: int
    limit: float | None = None
    required: int = 1
    rises: bool = True
    confident: bool = False
    note: str = ""
    counted: str = ""

    @classmethod
    def of(cls, name: str, form: str, found: Interval, **rest) -> "Check":
        return cls(name, form, found.mean, found.low, found.high, found.n, **rest)

    @property
    def verdict(self) -> str:
        """PASS or FAIL where there is a limit, else REPORTED or NOT_MEASURED. Too few probes fail."""
        if self.limit is None:
            return REPORTED if self.n else NOT_MEASURED
        return FAIL if self.reason else PASS

    @property
    def reason(self) -> str:
        """Why the check failed, each reason there is; "" where it did not."""
        if self.limit is None:
            return ""
        needed = max(1, self.required)
        too_few = f"{self.n:,} found, at least {needed:,} needed" if self.n < needed else ""
        return "; ".join(filter(None, (too_few, self._missed() if self.n else "")))

    def _missed(self) -> str:
        """How the value misses the limit; "" where it does not."""
        assert self.limit is not None  # else nobody asks
        judged = (self.low if self.rises else self.high) if self.confident else self.value
        # Not the other way round: NaN fails.
        if judged >= self.limit if self.rises else judged <= self.limit:
            return ""
        if math.isnan(judged):
            return "no interval over so few" if self.confident and not math.isnan(self.value) else "is not a number"
        end = "" if judged == self.value else " (the interval's worse end)"
        return f"{judged:.2%}{end} is {'below' if self.rises else 'above'} {self.limit:.2%}"

    @property
    def failed(self) -> bool:
        return self.verdict == FAIL


def _are(n: int, what: str) -> str:
    return f"{'is' if n == 1 else 'are'} {counted(n, what)}"
