"""The probes of facts as tokens, and what a model and its edited view answer to them in one sweep."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_fast.evaluation.metrics import Answers, Reading
from kedit_fast.facts.fact import Fact, Question, folded
from kedit_fast.facts.tokens import answer_tokens, asked, encode
from kedit_fast.jobs.collect import collect
from kedit_fast.jobs.finite import check_answers
from kedit_fast.jobs.score import continuation_places, likeliest_tokens, logprobs
from kedit_fast.sweep.edited import add_edited
from kedit_fast.sweep.runs import RunList
from kedit_fast.sweep.sites import Site


class Probe(NamedTuple):
    """A prompt's token ids, and those of target_new and target_true as they continue it (None: not known)."""

    prompt: list[int]
    targets: tuple[list[int] | None, list[int] | None]


class FactProbes(NamedTuple):
    """All that is asked about one fact.

    kinds: probes of the rewrite prompt (one), of the paraphrases, of the neighborhood prompts that are scored, and of
        the subject's other prompts whose answer is known
    same_subject: token ids of all the subject's other prompts, whose next token is read
    left_out: number of neighborhood prompts that name an edited subject, which are not scored
    owner: the fact whose independent edit acts here; 0 where edits are shared
    """

    kinds: tuple[list[Probe], list[Probe], list[Probe], list[Probe]]
    same_subject: list[list[int]]
    left_out: int
    owner: int

    @property
    def n_rows(self) -> int:
        """Rows at most in a sweep: base and edited, nothing shared."""
        of_probes = (
            len(probe.prompt) + len(target or ()) for kind in self.kinds for probe in kind for target in probe.targets
        )
        return 2 * (sum(of_probes) + sum(map(len, self.same_subject)))

    @property
    def longest(self) -> int:
        """Tokens of the longest text that is read; an answer's last token is predicted, not read."""
        of_probes = (
            len(probe.prompt) + len(target or "0") - 1
            for kind in self.kinds
            for probe in kind
            for target in probe.targets
        )
        return max([*of_probes, *map(len, self.same_subject)], default=0)


class Names:
    """Finds which texts name one of many subjects: they hold it as a whole, whatever the case.

    Not bound to word ends, which not every script has: "Io" is found in "Iowa". Subjects are looked up by their first
    letters, so 10,000 of them cost a text no more than 10.
    """

    def __init__(self, subjects: Iterable[str | None]):
        folded = {subject.strip().casefold() for subject in subjects if subject is not None}
        self._n_letters = min((3, *map(len, folded)))
        self._by_start: dict[str, list[str]] = {}
        for subject in folded:
            self._by_start.setdefault(subject[: self._n_letters], []).append(subject)

    def in_text(self, text: str) -> bool:
        """Whether the text names any of the subjects."""
        text = text.casefold()
        return any(
            text.startswith(subject, at)
            for at in range(len(text))
            for subject in self._by_start.get(text[at : at + self._n_letters], ())
        )


def fact_probes(lm, fact: Fact, edited: list[Names], owner: int = 0) -> FactProbes:
    """The fact's probes as tokens. edited: the subjects that are edited together with this fact."""
    neighbors, others = fact.questions("neighborhood"), fact.questions("same_subject")
    clean = [question for question in neighbors if not any(names.in_text(question.prompt) for names in edited)]
    own = [Question(prompt, fact.target_true) for prompt in (fact.text, *fact.paraphrases)]
    known = [Question(question.prompt, question.answer) for question in others if question.answer]
    return FactProbes(
        kinds=(
            [_probe(lm, fact, question, fact.target_new) for question in own[:1]],
            [_probe(lm, fact, question, fact.target_new) for question in own[1:]],
            [_probe(lm, fact, question, _other(fact.target_new, question.answer)) for question in clean],
            [_probe(lm, fact, question, None) for question in known],
        ),
        same_subject=[encode(lm.tokenizer, asked(lm.tokenizer, question.prompt, fact.chat)) for question in others],
        left_out=len(neighbors) - len(clean),
        owner=owner,
    )


def check_fit(lm, facts: Iterable[Fact], probes: Iterable[FactProbes] | None = None, room: int = 0) -> None:
    """Raises ValueError for a fact that asks more than the model has positions for, whatever it is asked last.

    probes: the facts', where they are made already; room: tokens that are generated after its own prompt
    """
    facts = list(facts)
    probes = [fact_probes(lm, fact, []) for fact in facts] if probes is None else probes
    for fact, of_fact in zip(facts, probes, strict=True):
        lm.check_length(of_fact.longest, f"fact {fact.label}")
        own = max((len(probe.prompt) for probe in of_fact.kinds[0]), default=0)
        lm.check_length(own + room - 1, f"fact {fact.label} and {room} new tokens")


def _other(new: str | None, own: str | None) -> str | None:
    """The new answer, but where it is a neighbor's own: there it is right, and nothing stands against it."""
    return None if new and own and folded(new) == folded(own) else new


def _probe(lm, fact: Fact, question: Question, new: str | None) -> Probe:
    return probe(lm, asked(lm.tokenizer, question.prompt, fact.chat), (new, question.answer), fact.attached)


def probe(lm, prompt: str, answers: tuple[str | None, str | None], attached: bool | None = None) -> Probe:
    """A prompt as the model reads it, with its answers (new, true) as they continue it."""
    ids = (None if answer is None else answer_tokens(lm.tokenizer, prompt, answer, attached) for answer in answers)
    return Probe(encode(lm.tokenizer, prompt), tuple(ids))


@torch.no_grad()
def read_probes(
    lm, facts: list[FactProbes], independent: bool = False, advance=None
) -> tuple[list[Reading], list[Reading] | None]:
    """What the base model and, where ``lm`` carries edits, the edited one answer: a Reading a fact, in one sweep.

    independent: the edits are owned; each fact is asked under its own; advance: as in ``sweep``
    Values are fp64. A prompt that the edited model answers with NaN (its activations overflow) is answered wrong: its
    probabilities are 0, and so are the flags beside them. Raises ValueError where the base model does, of which there
    is nothing to say.
    """
    probes = [probe for fact in facts for kind in fact.kinds for probe in kind]
    owners = torch.tensor([fact.owner for fact in facts for kind in fact.kinds for _ in kind], dtype=torch.int64)
    # One pair a known target; cell 2i belongs to the target_new of probe i, 2i + 1 to its target_true.
    pairs = [(probe.prompt, target) for probe in probes for target in probe.targets if target is not None]
    known = [target is not None for probe in probes for target in probe.targets]
    cells = torch.tensor(known, dtype=torch.bool).nonzero()[:, 0]
    same = [ids for fact in facts for ids in fact.same_subject]
    owners = [*owners[cells // 2].tolist(), *(fact.owner for fact in facts for _ in fact.same_subject)]

    places = continuation_places(pairs)
    sides = _hidden_states(lm, places, same, owners if independent else None, advance)
    k = len(places.pos)
    base_top = likeliest_tokens(lm, sides[0][k:])
    readings = []
    for h in sides:
        # fp64: where an edit wrecks both answers, their order is still told below e^-103
        logprob = logprobs(lm, h[:k], places.targets).cpu().double()
        p_top = logprobs(lm, h[k:], base_top).cpu().double().exp()
        if h is sides[0]:
            base = dataclasses.replace(lm, edits=())
            check_answers(base, logprob, lambda i: places.sequences[places.pair[i]])
            check_answers(base, p_top, same.__getitem__)
        answers = _answers(lm, h[:k], logprob, places, cells, len(probes))
        same_top = (likeliest_tokens(lm, h[k:]) == base_top).to(p_top.dtype).cpu()
        same_top, p_top = (values.where(~p_top.isnan(), 0) for values in (same_top, p_top))
        readings.append(_by_fact(facts, answers, same_top, p_top))
    return readings[0], readings[-1] if lm.edits else None


def _hidden_states(lm, places, prompts: list[list[int]], owners, advance) -> list[Tensor]:
    """[k + m, d] after the last layer, at k places and the m prompts' last tokens: of base and, if edited, of that."""
    runs = RunList()
    base, edited = add_edited(lm, runs, places.sequences + prompts, owners)
    at = torch.cat([places.pair, torch.arange(len(prompts)) + len(places.sequences)])
    pos = torch.cat([places.pos, torch.tensor([len(ids) - 1 for ids in prompts], dtype=torch.int64)])
    sides = [base] if edited is base else [base, edited]
    last = lm.n_layers - 1
    run = torch.cat([side[at] for side in sides])
    read = collect(lm, runs.runs(), Site.layer_out, [last], run, pos.repeat(len(sides)), advance)
    return list(read[last].chunk(len(sides)))


def _answers(lm, h: Tensor, logprob: Tensor, places, cells: Tensor, n_probes: int) -> Tensor:
    """[n_probes, 4]: p_new, p_true, exact_new, exact_true; NaN where the target is not known, 0 for a NaN answer.

    logprob: [k] fp64 of the target tokens after the hidden states h [k, d]
    """
    is_top = (likeliest_tokens(lm, h).cpu() == places.targets).to(logprob.dtype)
    n_tokens = torch.tensor(places.lengths, dtype=logprob.dtype)
    sums = torch.zeros(2, len(cells), dtype=logprob.dtype).index_add(1, places.pair, torch.stack([logprob, is_top]))
    # Both answers of a prompt: were only the one that overflowed 0, the other would win against it.
    failed = torch.zeros(n_probes, dtype=torch.bool).index_fill_(0, cells[sums[0].isnan()] // 2, True)[cells // 2]
    answers = logprob.new_full((2, 2 * n_probes), torch.nan)
    answers[0, cells] = (sums[0] / n_tokens).exp().where(~failed, 0)
    answers[1, cells] = ((sums[1] == n_tokens) & ~failed).to(logprob.dtype)
    return answers.view(2, n_probes, 2).transpose(0, 1).flatten(1)


def _by_fact(facts: list[FactProbes], answers: Tensor, same_top: Tensor, p_top: Tensor) -> list[Reading]:
    kinds = iter(answers.split([len(kind) for fact in facts for kind in fact.kinds]))
    n_same = [len(fact.same_subject) for fact in facts]
    return [
        Reading(*(Answers(*next(kinds).unbind(1)) for _ in range(4)), top, p)
        for top, p in zip(same_top.split(n_same), p_top.split(n_same), strict=True)
    ]
