"""MeLLo: questions over several facts, some of them edited (Zhong et al. 2023, MQuAKE: Assessing Knowledge Editing in
Language Models via Multi-Hop Questions, arXiv:2305.14795, section 5).

    found = kf.mello(lm, edit, "What is the capital of the country where the Eiffel Tower is?")
    found[0].answer, found[0].hops

The model breaks a question into smaller ones, one after the other, and answers each by itself. Behind each answer the
nearest of the edit's facts is put, and the model says whether it contradicts; if it does, the fact is the answer that
it goes on with. So the edit is a memory, and the model itself stays as it is.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files

from kedit_fast.basics import checks
from kedit_fast.editors.in_context import statement
from kedit_fast.edits.chain import facts_in_force
from kedit_fast.edits.edit import Edit, edit_list
from kedit_fast.edits.retrieval import index_of
from kedit_fast.facts.tokens import asked
from kedit_fast.model.lm import LM, takes_lm

QUESTION, SUBQUESTION, OWN, FACT = "Question:", "Subquestion:", "Generated answer:", "Retrieved fact:"
CONTRADICTS, RESULT, FINAL = "contradicts the generated answer", "the intermediate answer is:", "Final answer:"
MOST_HOPS = 4


@dataclass(frozen=True)
class Hop:
    """A smaller question: the model's own answer to it, the fact that was put behind it, whether the model found that
    the two disagree, and the answer that it went on with; these two are None where it did not say."""

    question: str
    own: str
    fact: str
    contradicts: bool | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Reasoned:
    """A question with its answer, None where the model came to none; the hops on the way; all that was written."""

    question: str
    answer: str | None = None
    hops: tuple[Hop, ...] = ()
    text: str = field(default="", repr=False)


@takes_lm
def mello(
    lm: LM,
    edit: Edit | Iterable[Edit],
    questions: str | Iterable[str],
    *,
    max_hops: int = MOST_HOPS,
    retriever: str = "tfidf",
    max_new_tokens: int = 80,
    chat: bool = False,
) -> list[Reasoned]:
    """Answers to questions, greedily, with the facts of an edit (or of several, in their order) as the memory.

    lm: without the edit, whatever that is: its facts are read, not its changes
    max_hops: smaller questions at most; retriever: as ``kf.retrieve`` has it; max_new_tokens: of each
    chat: whether the model reads all of it as a question in a chat, and goes on as its assistant

    All questions go together, a sweep a token; the four examples that stand before each of them (``mello.txt``) are
    taken up once. Only models that go on in the form of the examples come to an answer.
    Raises ValueError for no questions, an edit without new answers, and a model without a chat template in a chat.
    """
    questions = checks.listed("questions", questions, str, "a question or a list of questions")
    max_hops = checks.whole("max_hops", max_hops, least=1, like=MOST_HOPS)
    chat = checks.flag("chat", chat)
    facts = [fact for fact in facts_in_force(edit_list(edit, "edit")) if fact.target_new]
    if not facts:
        raise ValueError("edit: expected one whose facts have a target_new, which are the memory; it holds none")
    memory = [f"{statement(fact, fact.target_new or '')}." for fact in facts]
    index = index_of(retriever, lm, memory)

    def write(texts: list[str]) -> list[str]:
        return lm.generate([asked(lm.tokenizer, text, chat) for text in texts], max_new_tokens)

    def recall(smaller: list[str]) -> list[str]:
        return [memory[i] for i in index.nearest(lm, smaller, 1)[0][:, 0].tolist()]

    return reasoned(write, recall, questions, max_hops)


def reasoned(
    write: Callable[[list[str]], list[str]],
    recall: Callable[[list[str]], list[str]],
    questions: Sequence[str],
    max_hops: int = MOST_HOPS,
) -> list[Reasoned]:
    """``mello`` by any model: write gives what follows each text, recall the fact nearest to each smaller question.

    A model that does not stop by itself is cut where it would put the fact, begin another question or leave a line
    blank.
    """
    head = files(__package__).joinpath("mello.txt").read_text(encoding="utf-8")
    found = [Reasoned(question, text=f"{QUESTION} {question}\n") for question in questions]
    for hop in range(max_hops + 1):  # behind the last fact there is still the answer
        open_ones = [i for i, one in enumerate(found) if one.answer is None and len(one.hops) == hop]
        if not open_ones:
            break
        made = write([f"{head}\n{found[i].text}" for i in open_ones])
        said = [_ahead(found[i], text) for i, text in zip(open_ones, made, strict=True)]
        for i, (one, _) in zip(open_ones, said, strict=True):
            found[i] = one
        going = [(i, *rest) for i, (_, rest) in zip(open_ones, said, strict=True) if rest and hop < max_hops]
        for (i, question, own), fact in zip(going, recall([q for _, q, _ in going]) if going else [], strict=True):
            one = found[i]
            hops = (*one.hops, Hop(question, own, fact))
            found[i] = Reasoned(one.question, None, hops, f"{one.text}{FACT} {fact}\n")
    return found


def _ahead(one: Reasoned, made: str) -> tuple[Reasoned, tuple[str, str] | None]:
    """(how far it is with what the model wrote behind it, the next smaller question and the model's own answer, if it
    asks one)."""
    made = _until(made.lstrip(), FACT, f"\n{QUESTION}", "\n\n")
    judged, _, rest = made.partition(SUBQUESTION if _first(made, SUBQUESTION, FINAL) == SUBQUESTION else FINAL)
    hops = one.hops
    if hops and RESULT in judged:
        last = hops[-1]
        result = _line(judged.partition(RESULT)[2])
        hops = (*hops[:-1], Hop(last.question, last.own, last.fact, CONTRADICTS in judged, result))
    text = one.text + made + "\n" * (not made.endswith("\n"))
    if _first(made, SUBQUESTION, FINAL) == FINAL:
        return Reasoned(one.question, _line(rest) or None, hops, text), None
    question, _, own = rest.partition(OWN)
    asks = (_line(question), _line(own)) if _line(question) and OWN in rest else None
    return Reasoned(one.question, None, hops, text), asks


def _line(text: str) -> str:
    return text.strip().split("\n")[0].strip()


def _until(text: str, *ends: str) -> str:
    """The text before the first of the ends."""
    return text[: min((at for end in ends if (at := text.find(end)) >= 0), default=len(text))]


def _first(text: str, *marks: str) -> str | None:
    """The mark that comes first; None where there is none."""
    places = {at: mark for mark in marks if (at := text.find(mark)) >= 0}
    return places[min(places)] if places else None
