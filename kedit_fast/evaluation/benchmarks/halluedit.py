"""HalluEditBench (Huang et al. 2025, arXiv:2410.16251): hallucinations of a model corrected, in 26 topics.

The edit writes the true answer. Asked besides: the question as a choice of four, as a yes and as a no, the reversed
relation, questions two to six hops on, and one on the subject that must keep its answer (of which none is given: the
likeliest token and the text are compared with the base model's). Published scores are judged on free writing.
"""

from kedit_fast.evaluation.benchmark import Case
from kedit_fast.evaluation.questions import of_questions
from kedit_fast.evaluation.readings import Kind
from kedit_fast.facts.fact import record_facts
from kedit_fast.facts.files import Notes
from kedit_fast.facts.formats import Question, text_of

HOPS = range(2, 7)
KINDS = {
    "multiple_choice": Kind("the letter of the right answer among four"),
    "yes": Kind("yes to the new answer"),
    "no": Kind("no to a wrong one"),
    "reversed": Kind("the subject, asked by the answer"),
    **{f"{n}_hops": Kind(f"the answer {n} hops on") for n in HOPS},
    "kept": Kind("another question on the subject", ("same", "same_text")),
}
WRONG = "wrong_answer_of_llama_2_7b_chat"  # of the model that the file was made for; of another, none


def read(record, index: int, notes: Notes) -> Case:
    """The case of a record; a question that it lacks is not asked."""
    if not isinstance(record, dict) or "object" not in record:
        raise ValueError("expected an object with question, subject and object, as HalluEditBench has them")
    fact = {"id": record.get("id"), "prompt": record.get("question"), "subject": record.get("subject")}
    fact |= {"target_new": record["object"], "ground_truth": record.get(WRONG) or None}
    fact |= {"rephrase_prompt": record.get("paraphrased_question") or []}
    return Case(tuple(record_facts(fact, index, notes)), tuple(_questions(record)))


def _questions(record: dict):
    def given(kind: str, prompt: str, answer: str | None, *against: str):
        if text := text_of(record, prompt):
            yield Question(text, answer, kind=kind, against=against)

    letter = text_of(record, "multiple_choice_labels")
    if letter and (choices := text_of(record, "multiple_choice_with_letters")):
        prompt = f"{text_of(record, 'question')}\n{choices}\nAnswer:"
        others = tuple(other for other in "ABCD" if other != letter and f"{other}. " in choices)
        yield Question(prompt, letter, kind="multiple_choice", against=others)
    yield from given("yes", "yes_question", "Yes", "No")
    yield from given("no", "no_question", "No", "Yes")
    yield from given("reversed", "reversed_relation_question", text_of(record, "subject"))
    for n in HOPS:
        if answer := text_of(record, f"answer_{n}hop"):
            yield from given(f"{n}_hops", f"question_{n}hop", answer)
    yield from given("kept", "locality_question", None)


HALLUEDIT = of_questions(
    "halluedit", KINDS, read=read, score_of=("rewrite.contains", "paraphrase.contains", "kept.same")
)
