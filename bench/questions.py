"""The questions that the pages of bench/results answer: which benchmarks answer each, in which words, by which bars.

Every figure in an answer or a picture is one of the rows; words stand here, figures never.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bench.common import Figure


@dataclass(frozen=True)
class Shown:
    """Figures of one metric of a benchmark: those of the cases in which ``cases`` is found.

    short: what is left out of a case's name; best: said as the largest of them, by name, and not as their range
    label: the metric's name beside other bars
    """

    bench: str
    metric: str
    cases: str = ""
    short: str = ""
    best: bool = False
    label: str = ""

    def of(self, figures: Sequence[tuple[str, Figure]]) -> dict[str, Figure]:
        """{case, shortened: its figure} among (bench, figure) pairs."""
        return {
            re.sub(self.short, "", figure.case) if self.short else figure.case: figure
            for bench, figure in figures
            if bench == self.bench and figure.metric == self.metric and re.search(self.cases, figure.case)
        }


@dataclass(frozen=True)
class Says:
    """A sentence of an answer, with a {} for each of ``shown``; left out where there are no figures of one of them."""

    text: str
    shown: tuple[Shown, ...]


@dataclass(frozen=True)
class Bars:
    """A panel of a picture: a bar for each case and metric. ranked: the largest first, instead of in the rows' order"""

    title: str
    shown: tuple[Shown, ...]
    ranked: bool = False


@dataclass(frozen=True)
class Question:
    """A page: its file's name, what is asked, the benchmarks whose tables it has, the answer, the picture."""

    name: str
    asked: str
    benches: tuple[str, ...]
    says: tuple[Says, ...]
    bars: tuple[Bars, ...]


_AT_ONCE = {"cases": ", n = 100$", "short": ", n = 100$"}
_ALONE = {"cases": ", n = 1$", "short": ", n = 1$"}
_REPORT = {"cases": "^report: .*, n = 100$", "short": "^report: |, n = 100$"}
_MEMIT = {"cases": r"^[^:]+ \(\d+\), memit$", "short": r" \(\d+\), memit$"}
_TO_LOOP = "ratio to the published loop"
_STRIDED = "mean rank correlation with the exact trace"
_RANKED = "mean rank correlation"
_ADDMM = "native, {}: ratio to torch.addmm, fp32"
_TOKENS = "each token the likeliest"
_WRITTEN = "in what is written"
_IN_WORDS = "P(new), paraphrases"
_PARTS = ("moments", "trace", "memit", "evaluation")
_MLP = "mlp, last subject token: largest effect, of the total"
_IN_CHAT = "asked: chat, P(new)"

QUESTIONS = (
    Question(
        "tracing", "How fast is tracing, and what do cheaper traces get wrong?",
        ("trace", "attribution", "strided", "replaced", "neurons"),
        (
            Says("An exact trace is {} as fast as the published loop, with the same values.",
                 (Shown("trace", _TO_LOOP),)),
            Says("Strided traces do {} of its work and rank cells as it does to a correlation of {}.",
                 (Shown("strided", "rows x layers, share of the exact trace's"), Shown("strided", _STRIDED))),
            Says("An estimate from one backward pass is {} as fast as the loop, at a correlation of {}.",
                 (Shown("attribution", _TO_LOOP), Shown("attribution", _RANKED))),
            Says("With another subject in place of noise RelP ranks cells to {}, GradDrop to {}; every second layer, "
                 "for half of the work, to {} for states and windows of ten.",
                 (Shown("replaced", f"RelP: {_RANKED}"), Shown("replaced", f"GradDrop: {_RANKED}"),
                  Shown("replaced", f"one layer in 2: {_RANKED}", "^state|of 10$"))),
        ),
        (
            Bars("times as fast as the published loop", (Shown("trace", _TO_LOOP),)),
            Bars("the estimate, times as fast as it", (Shown("attribution", _TO_LOOP),)),
            Bars("strided traces, rank correlation with the exact trace", (Shown("strided", _STRIDED),)),
            Bars("the estimate, the same", (Shown("attribution", _RANKED),)),
        ),
    ),
    Question(
        "editing", "How fast is editing?", ("values", "solve", "gradients", "kernels"),
        (
            Says("Values and edits are {} as fast as the published loops, with the same result.",
                 (Shown("values", _TO_LOOP),)),
            Says("MEMIT's solve is {} as fast as torch's Cholesky factorization, {} where the factor is kept.",
                 (Shown("solve", "once: ratio to torch Cholesky"),
                  Shown("solve", "cached factor: ratio to torch Cholesky"))),
            Says("Gradients of many facts are {} as fast as autograd, fact by fact.",
                 (Shown("gradients", "ratio to the loop"),)),
        ),
        (
            Bars("times as fast as the published loop", (Shown("values", _TO_LOOP),)),
            Bars("solves, times as fast as torch's Cholesky factorization", (
                Shown("solve", "once: ratio to torch Cholesky", label="once"),
                Shown("solve", "cached factor: ratio to torch Cholesky", label="factor kept"),
            )),
            Bars("gradients, times as fast as the loop", (Shown("gradients", "ratio to the loop"),)),
        ),
    ),
    Question(
        "covariance", "How fast is the covariance, and how many tokens does it need?", ("second_moment", "tokens"),
        (
            Says("Adding keys to the second moment is {} as fast as torch.addmm, {} with bf16 keys.",
                 (Shown("second_moment", _ADDMM.format("fp64 sum")),
                  Shown("second_moment", _ADDMM.format("bf16 keys")))),
            Says("Over the numbers of tokens that were tried, MEMIT's paraphrase score is {} and its neighborhood "
                 "score {}.", (Shown("tokens", "paraphrase"), Shown("tokens", "neighborhood"))),
        ),
        (
            Bars("times as fast as torch.addmm", (
                Shown("second_moment", _ADDMM.format("fp64 sum"), label="fp32 keys, fp64 sum"),
                Shown("second_moment", _ADDMM.format("bf16 keys"), label="bf16 keys"),
            )),
            Bars("MEMIT's scores by tokens of text, %", (
                Shown("tokens", "paraphrase"), Shown("tokens", "neighborhood"))),
        ),
    ),
    Question(
        "editors", "How good is each editor?", ("edit", "editors"),
        (
            Says("Of a hundred facts edited at once the highest S is that of {}; of one fact at a time, {}.",
                 (Shown("editors", "S", **_AT_ONCE, best=True), Shown("editors", "S", **_ALONE, best=True))),
            Says("S is the harmonic mean of how often the new answer is the likelier one at the fact (ES), of the same "
                 "in other words (PS), and of how often neighbors keep theirs (NS). Over the editors, PS at a hundred "
                 "facts is {}, NS {}.",
                 (Shown("editors", "PS", **_AT_ONCE), Shown("editors", "NS", **_AT_ONCE))),
        ),
        (Bars("S, a hundred facts at once, %", (Shown("editors", "S", **_AT_ONCE),), ranked=True),),
    ),
    Question(
        "wordings", "Does an edit hold in other words, and in a chat?", ("phrasings", "trained", "forms"),
        (
            Says("Asked in other words, P(new) of a hundred facts edited at once is highest with {}.",
                 (Shown("phrasings", _IN_WORDS, **_REPORT, best=True),)),
            Says("Facts that were edited as plain sentences have P(new) = {} as such and {} in a chat; edited in the "
                 "chat's form, {} there.",
                 (Shown("forms", "asked: plain, P(new)", "^edited: plain$"),
                  Shown("forms", _IN_CHAT, "^edited: plain$"), Shown("forms", _IN_CHAT, "^edited: chat$"))),
        ),
        (
            Bars("P(new) in other words, a hundred facts at once", (Shown("phrasings", _IN_WORDS, **_REPORT),), True),
            Bars("P(new) in a chat", (Shown("forms", _IN_CHAT),)),
        ),
    ),
    Question(
        "readings", "How far apart are the readings of a benchmark?", ("benchmarks",),
        (
            Says("Of the new answers that MEMIT wrote, {} of the tokens (by benchmark) are the likeliest behind the "
                 "right ones before them; what the model writes by itself has the answer in {}.",
                 (Shown("benchmarks", _TOKENS, **_MEMIT), Shown("benchmarks", _WRITTEN, **_MEMIT))),
            Says("Asked whether it is A or B, in both orders, the edited model chooses it in {}; one that says "
                 "the same letter whatever it is asked has 50 %.",
                 (Shown("benchmarks", "chosen of A and B", **_MEMIT),)),
            Says("In what Gemma-3-270M writes {} of MEMIT's answers stand.",
                 (Shown("benchmarks", _WRITTEN, "^gemma3: .*, memit$"),)),
        ),
        (Bars("the new answer, MEMIT, %", (
            Shown("benchmarks", _TOKENS, **_MEMIT), Shown("benchmarks", _WRITTEN, **_MEMIT))),),
    ),
    Question(
        "evaluation", "How fast is evaluation?", ("scoring", "memory"),
        (
            Says("Probes and texts in shared sweeps are {} as fast as one prompt at a time.",
                 (Shown("scoring", "ratio to one at a time"),)),
            Says("With an editor that keeps a memory beside the weights they are {} as fast.",
                 (Shown("memory", "ratio"),)),
        ),
        (
            Bars("times as fast as one prompt at a time", (Shown("scoring", "ratio to one at a time"),)),
            Bars("the same with a memory", (Shown("memory", "ratio"),)),
        ),
    ),
    Question(
        "memory", "What fits on my GPU, or in little memory?", ("streamed", "counts", "flows", "mass"),
        (
            Says("A model that does not fit is read from its files layer by layer: under the limit named below, all "
                 "work together took {} the time that it takes in memory, with the same bits. What fits on a card that "
                 "you name, `kedit-fast info MODEL --plan edit --memory 24GiB` says without the weights.",
                 (Shown("streamed", "ratio"),)),
            Says("Of the peak of the card named below, large models would use {}: predicted from counts of what the "
                 "work asks of it, and timed on none.", (Shown("counts", "share of peak, predicted"),)),
        ),
        (
            Bars("time, as a multiple of that in memory", (Shown("streamed", "ratio"),)),
            Bars("share of a card's peak, predicted, %", (Shown("counts", "share of peak, predicted"),)),
        ),
    ),
    Question(
        "another-model", "What about another model?", ("second",),
        (
            Says("On Gemma-3-270M, whose MLPs end in a norm, one fact by ROME has an efficacy of {} and a neighborhood "
                 "score of {} ({} before).",
                 (Shown("second", "efficacy", "^Gemma.*, ROME"), Shown("second", "neighborhood", "^Gemma.*, ROME"),
                  Shown("second", "neighborhood, base", "^Gemma.*, ROME"))),
            Says("Ten and thirty facts by MEMIT have {}, and {} ({} before); {} of paraphrases follow. Its "
                 "steps were chosen on other facts than these.",
                 (Shown("second", "efficacy", "^Gemma.*, MEMIT"), Shown("second", "neighborhood", "^Gemma.*, MEMIT"),
                  Shown("second", "neighborhood, base", "^Gemma.*, MEMIT"),
                  Shown("second", "paraphrase", "^Gemma.*, MEMIT"))),
            Says("What is missing to z grows behind the lower layers, to {} of what it was behind the third, for they "
                 "move all that stands above; behind the last {} are left. As the model's last norm reads them, {} are "
                 "left behind the first, {} behind the third and {} behind the last.",
                 (Shown("second", "||z - h|| behind 3 of 5 layers", "^Gemma.*, MEMIT"),
                  Shown("second", "||z - h|| behind 5 of 5 layers", "^Gemma.*, MEMIT"),
                  *(Shown("second", f"||norm(z) - norm(h)|| behind {n} of 5 layers", "^Gemma.*, MEMIT")
                    for n in (1, 3, 5)))),
            Says("With the layers read from disk P(new) is {} apart.",
                 (Shown("second", "P(new), largest distance from the model in memory", "^Gemma"),)),
            Says("Of the effect that corruption takes, the MLPs' best window at the last subject token gives back {}.",
                 (Shown("second", _MLP),)),
        ),
        (
            Bars("efficacy, %", (Shown("second", "efficacy"),)),
            Bars("of the total effect, MLP windows at the last subject token, %", (Shown("second", _MLP),)),
        ),
    ),
    Question(
        "processes", "What do several processes give?", ("ranks",),
        (
            Says("Two processes are, by the wall clock, {} as fast as one at second moments, {} at traces, {} at MEMIT "
                 "and {} at evaluation.",
                 tuple(Shown("ranks", f"{what}, wall time", "^2 ranks$")
                       for what in _PARTS)),
        ),
        (Bars("times as fast as one process, by the wall clock", tuple(
            Shown("ranks", f"{what}, wall time", label=what) for what in _PARTS)),),
    ),
)  # fmt: skip
