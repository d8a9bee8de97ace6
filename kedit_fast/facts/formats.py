"""Fact records as they are published, read into the fields of :class:`kedit_fast.facts.Fact`.

One record at a time, told apart by the fields it has, never by their file's name:

    CounterFact, own   requested_rewrite{prompt, subject, target_new{str}, target_true{str}} (a list of them in MQuAKE,
                       whose questions follow from all of them together)
    known_1000         subject, attribute, template, prompt
    zsRE (MEND)        src, subject, alt, answers, rephrase, loc, loc_ans
    WikiBio (KnowEdit) text, concept, labels
    flat               prompt (template, or with the subject inside), subject, target_new or target or target_true;
                       EasyEdit, KnowEdit, QAEdit, WikiBigEdit and the records of measured facts are of this kind
    question           question, answer (TOFU): the answer is what an edit writes
    no answer          prompt, subject: to be traced

A record without a subject is a Fact without one. In each, prompts to ask besides may stand under any of the names in
``PROMPTS``, and locality in any of its published forms: a probe that names the subject is another relation of it, any
other a neighbor, each with its own answer. A record as ``Fact.to_record`` writes it, its last two fields for
evaluation:

    {"requested_rewrite": {"prompt": "{} is in the city of", "subject": "The Eiffel Tower",
                           "target_new": {"str": "Rome"}, "target_true": {"str": "Paris"}},
     "phrasing_prompts": ["{} stands in"],
     "paraphrase_prompts": ["The Eiffel Tower can be found in"],
     "neighborhood_prompts": ["The Louvre is in the city of", {"prompt": "Big Ben is in", "answer": "London"}]}

Of several spellings of an answer the first is meant. What has no field of its own (relation id, portability) goes to
``provenance``, CounterFact's generation prompts and the id of its new target among it. What no format reads is counted
in ``Notes``, for instance attribute prompts; only fields that say where a record comes from (``ABOUT``) are passed
over.
"""

from collections.abc import Callable, Set
from functools import partial
from typing import NamedTuple

from kedit_fast.basics.checks import shown
from kedit_fast.basics.words import json_kind
from kedit_fast.facts.files import Notes
from kedit_fast.facts.subjects import as_template, folded, is_named

PROMPTS = {  # a Fact's lists of prompts: the names that they go by
    "phrasings": ("phrasings", "phrasing_prompts"),
    "paraphrases": ("paraphrases", "paraphrase_prompts", "rephrase_prompt", "rephrase"),
    "neighborhood": ("neighborhood", "neighborhood_prompts"),
    "same_subject": ("same_subject", "same_subject_prompts"),
}
ANSWERED = ("neighborhood", "same_subject")  # whose prompts may have an answer of their own
ASKED = ("prompt", "loc", "question", "New Question")  # what data sets call a prompt beside its answer,
ANSWERS = ("answer", "ground_truth", "target", "loc_ans", "New Answer")  # and the answer
ABOUT = {  # of a record's origin, and what a model said to it: nothing to ask or to write
    "id", "case_id", "known_id", "split", "source_split", "topic", "orig", "cond", "pred", "prediction", "p_true",
    "p_new", "n_true_tokens",
}  # fmt: skip
COMMON = {
    "provenance", "portability", "generation_prompts", "relation_id", "source", "chat", "attached"
}.union(*PROMPTS.values())  # fmt: skip
LOCALITY = {"locality", "locality_prompt", "locality_ground_truth", "loc", "loc_ans"}


class Question(NamedTuple):
    """A prompt and its answer (None: not known).

    about: the facts it follows from, each as ``facts.place`` names it
    kind: what it is to a benchmark, for instance "one_hop"
    aliases: other spellings of the answer; against: answers that it is compared with, for instance other choices
    """

    prompt: str
    answer: str | None = None
    about: tuple[tuple[str, str], ...] = ()
    kind: str = ""
    aliases: tuple[str, ...] = ()
    against: tuple[str, ...] = ()


# ---- records


def fact_fields(record: dict, notes: Notes | None = None) -> list[dict]:
    """The fields of each Fact in one record: one, or several where ``requested_rewrite`` is a list (MQuAKE).

    notes: told of what is not used. Raises ValueError where the record is no object, fits no format (what each format
    misses is named), has a field of another type than the format says, or its subject does not stand in its prompt.
    """
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with named fields, found {json_kind(record)}")
    notes = notes or Notes()
    misses = []
    for form in FORMATS:
        missing = [" or ".join(names) for names in form.needs if not any(name in record for name in names)]
        if missing:
            misses.append(f"{form.name} (misses {', '.join(missing)})")
            continue
        facts = form.read(record, notes)
        known = form.reads | COMMON | LOCALITY | ABOUT | {name for names in form.needs for name in names}
        notes.unused.update(name for name, value in record.items() if name not in known and _says_something(value))
        return facts
    raise ValueError(f"fields {', '.join(sorted(record)) or 'none'} fit no known format; tried {'; '.join(misses)}")


def _says_something(value) -> bool:
    return value is not None and value not in ("", [], {})


def _fact(record, notes, *, prompt, subject, new, true, name, paraphrases=(), record_of=None) -> dict:
    """The fields of a Fact: what a format calls by its own names, and what all share.

    name: the fact's id; paraphrases: further ones; record_of: the object that the prompt stands in, where that is not
    the record itself
    """
    rewrite = record if record_of is None else record_of
    if subject is not None:
        given = _text("subject", subject)
        prompt, subject = _template(prompt, given)
        if subject != given:
            notes.spelled.append(f"{given!r} as {subject!r}")
    lists = {
        field: [q for name in names for q in _prompts(record, name, field in ANSWERED, notes)]
        for field, names in PROMPTS.items()
    }
    for question in _locality(record, true, notes):
        if subject is not None and is_named(question.prompt, subject):
            lists["same_subject"].append(question)
        elif question.answer is None:
            notes.unused["locality prompts without an answer"] += 1
        else:
            lists["neighborhood"].append(question)
    provenance = _provenance(record)
    provenance |= {key: record[key] for key in ("source", "portability") if record.get(key)}
    relation = rewrite.get("relation_id") or record.get("relation_id")
    provenance |= {"relation_id": relation} if relation else {}
    target = rewrite.get("target_new")
    provenance |= {"target_id": target["id"]} if isinstance(target, dict) and target.get("id") else {}
    written = texts_of(record, "generation_prompts")
    provenance |= {"generation_prompts": list(dict.fromkeys(written))} if written else {}
    lists["paraphrases"] += [text for text in paraphrases if text is not None]
    return {
        "prompt": prompt,
        "subject": subject,
        "target_new": new,
        "target_true": true,
        **{field: tuple(prompts) for field, prompts in lists.items()},
        "chat": record.get("chat") or False,
        "attached": record.get("attached"),
        "id": name,
        "provenance": provenance,
    }


def _template(prompt, subject: str) -> tuple[str | list, str]:
    """(prompt with "{}" for the subject, the subject as it is spelled there); of messages the last one is the prompt"""
    if not isinstance(prompt, list):
        return as_template(_text("prompt", prompt), subject)
    last = prompt[-1] if prompt else None
    if not isinstance(last, dict) or not isinstance(last.get("content"), str):
        raise ValueError(f"prompt: expected a string or messages with role and content, found {shown(prompt)}")
    content, subject = as_template(last["content"], subject)
    return [*prompt[:-1], last | {"content": content}], subject


def _read_counterfact(record, notes):
    rewrites = record["requested_rewrite"]
    several = isinstance(rewrites, list)
    if several and not rewrites:
        raise ValueError("requested_rewrite: expected at least one fact, found an empty list")
    name = _id(record, "case_id")
    facts = []
    for number, rewrite in enumerate(rewrites if several else [rewrites]):
        if not isinstance(rewrite, dict):
            raise ValueError(f"requested_rewrite: expected an object, found {json_kind(rewrite)}")
        if "prompt" not in rewrite:
            raise ValueError("requested_rewrite misses prompt")
        facts.append(
            _fact(
                record,
                notes,
                prompt=rewrite["prompt"],
                subject=rewrite.get("subject"),
                new=_target(rewrite.get("target_new"), "target_new"),
                true=_target(rewrite.get("target_true"), "target_true"),
                name=f"{name}.{number}" if several else name,
                paraphrases=[text_of(rewrite, "question")],
                record_of=rewrite,
            )
        )
        unused = set(rewrite) - {"prompt", "subject", "target_new", "target_true", "relation_id", "question"}
        notes.unused.update(f"requested_rewrite.{key}" for key in unused if _says_something(rewrite[key]))
    _add_case_questions(record, facts, notes)
    return facts


def _add_case_questions(record, facts: list[dict], notes: Notes) -> None:
    """MQuAKE: questions whose answer follows from all edits of the case; they stand beside the last of them."""
    questions = [] if record.get("questions") is None else _prompts(record, "questions", False, notes)
    answer = _target(record.get("new_answer"), "new_answer")
    if answer is None and questions:
        notes.unused["questions"] += len(questions)
    if answer is None or not questions:
        return
    others = [{"prompt": fact["prompt"], "subject": fact["subject"]} for fact in facts[:-1]]
    asked = [{"prompt": question, "answer": answer, "follows_from": others} for question in questions]
    provenance = facts[-1]["provenance"]
    provenance["portability"] = [*_as_list(provenance.get("portability")), *asked]


def _read_known(record, notes):
    """known_1000: the record's prompt is its template filled in, often with words of the model's own after it."""
    template, subject = _text("template", record["template"]), _text("subject", record["subject"])
    stem, text = template.replace("{}", subject), text_of(record, "prompt")
    if text is None or template.count("{}") != 1:
        text = template
    elif text.startswith(stem):
        text = template + text[len(stem) :]
    new, true = _target(record.get("target_new"), "target_new"), _target(record["attribute"], "attribute")
    return [_fact(record, notes, prompt=text, subject=subject, new=new, true=true, name=_id(record, "known_id"))]


def _read_zsre(record, notes):
    """zsRE as prepared for MEND: the edit makes the model answer ``alt``; ``loc`` is a question on something else.

    MEND's file has records with an empty ``alt``: facts without a target_new.
    """
    record = record | {"alt": _target(record["alt"], "alt") or None}
    return _read_by_name(record, notes, prompt="src", new="alt", true="answers")


def _read_by_name(record, notes, *, prompt, new, subject="subject", true=None, ids=("id",)):
    """A record that calls the fields of a fact so, and needs no further reading."""
    new, true = _target(record.get(new), new), _target(record.get(true), true)
    prompt, subject = record[prompt], record.get(subject)
    return [_fact(record, notes, prompt=prompt, subject=subject, new=new, true=true, name=_id(record, *ids))]


def _read_flat(record, notes):
    new = "target_new" if "target_new" in record else "target"
    true = "target_true" if "target_true" in record else "ground_truth"
    return _read_by_name(record, notes, prompt="prompt", new=new, true=true, ids=("id", "case_id"))


# ---- fields


def _id(record, *keys):
    """The first of these fields that is there, as text; "" for none."""
    return next((str(record[key]) for key in keys if record.get(key) is not None), "")


def _provenance(record):
    value = {} if record.get("provenance") is None else record["provenance"]
    if not isinstance(value, dict):
        raise ValueError(f"provenance: expected an object with named fields, found {shown(value)}")
    return dict(value)


def _text(key, value):
    if not isinstance(value, str):
        raise ValueError(f"{key}: expected a string, found {shown(value)}")
    return value


def text_of(record: dict, key: str) -> str | None:
    """A field that is a text or not there. Raises ValueError for anything else."""
    return None if record.get(key) is None else _text(key, record[key])


def texts_of(record: dict, key: str) -> tuple[str, ...]:
    """A field that is a list of texts or not there. Raises ValueError for anything else."""
    value = record.get(key) or []
    if not isinstance(value, list) or not all(isinstance(one, str) and one.strip() for one in value):
        raise ValueError(f"{key}: expected a list of texts, found {shown(value)}")
    return tuple(value)


def _as_list(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _target(value, key):
    """A target given as a string, {"str": ...}, or a list of answers, of which the first is meant; None if absent."""
    while isinstance(value, list | dict):
        if isinstance(value, dict) and "str" not in value:
            raise ValueError(f"{key}: expected a string or an object with 'str', found {shown(value)}")
        value = value["str"] if isinstance(value, dict) else (value[0] if value else None)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key}: expected a string, found {shown(value)}")
    return value


def _prompts(record, key, answered: bool, notes: Notes) -> list[str | Question]:
    """The prompts under a key: a string, a list of strings or of {"prompt": ..., "answer": ...}, or nothing.

    answered: whether an answer is read
    """
    value = record.get(key)
    items = [value] if isinstance(value, str) else value or []
    if not isinstance(items, list):
        raise ValueError(f"{key}: expected a list of prompts, found {shown(value)}")
    prompts = []
    for item in items:
        prompt = item.get("prompt") if isinstance(item, dict) else item
        if not isinstance(prompt, str):
            raise ValueError(f"{key}: expected a string or an object with 'prompt', found {shown(item)}")
        answer = _first_of(item, ANSWERS) if isinstance(item, dict) else None
        if answer is not None and not answered:
            notes.unused[f"{key}.answer"] += 1
        prompts.append(Question(prompt, _target(answer, f"{key}, the answer")) if answered and answer else prompt)
    return prompts


def _first_of(record: dict, keys):
    return next((record[key] for key in keys if record.get(key) is not None), None)


def questions_of(value, key: str) -> list[Question]:
    """Questions in any published form: a prompt; {"prompt", "answer"} under the names in ``ASKED`` and ``ANSWERS``,
    where both may be lists of equal length, paired by position; a list of these; {kind: any of these}.

    Raises ValueError, naming the key, for anything else, and for lists of different length.
    """
    if value is None:
        return []
    if isinstance(value, list):
        return [question for each in value for question in questions_of(each, key)]
    if isinstance(value, dict) and not any(name in value for name in ASKED):
        if alone := [name for name in ANSWERS if name in value]:
            raise ValueError(f"{key}: {shown(value)} has {alone[0]!r} and no 'prompt'; expected both")
        return [question for each in value.values() for question in questions_of(each, key)]
    record = {"prompt": value} if isinstance(value, str) else value
    prompts = _first_of(record, ASKED) if isinstance(record, dict) else None
    if not isinstance(prompts, list):
        prompts, answers = [prompts], [_first_of(record, ANSWERS)] if isinstance(record, dict) else []
    else:
        answers = _answers_to(prompts, _first_of(record, ANSWERS), key)
    if not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ValueError(f"{key}: expected a prompt or an object with 'prompt' and 'answer', found {shown(value)}")
    about = _follows_from(record, key)
    return [Question(p, _answer_to(p, a, key), about) for p, a in zip(prompts, answers, strict=True)]


def _answers_to(prompts: list, answers, key: str) -> list:
    """An answer, or its spellings, for each of several prompts."""
    if answers is None:
        return [None] * len(prompts)
    if isinstance(answers, list) and len(answers) == len(prompts):
        return answers
    if len(prompts) == 1:
        return [answers]
    n = len(answers) if isinstance(answers, list) else 1
    raise ValueError(f"{key}: {len(prompts)} prompts and {n} answers; expected an answer for each, in their order")


def _answer_to(prompt: str, answer, key: str) -> str | None:
    while isinstance(answer, list):  # data sets list spellings; the first is meant
        answer = answer[0] if answer else None
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise ValueError(f"{key}: the answer to {shown(prompt)} is {shown(answer)}; expected a text")
    return answer


def _follows_from(record: dict, key: str) -> tuple[tuple[str, str], ...]:
    facts = record.get("follows_from") or []
    if not all(isinstance(fact, dict) and isinstance(fact.get("prompt"), str) for fact in _as_list(facts)):
        raise ValueError(f"{key}: follows_from: expected objects with 'prompt' and 'subject', found {shown(facts)}")
    return tuple((folded(fact.get("subject") or ""), folded(fact["prompt"])) for fact in _as_list(facts))


def _locality(record: dict, true: str | None, notes: Notes) -> list[Question]:
    """The locality probes of a record, under any of the names that data sets give them.

    ``locality_ground_truth`` beside neighborhood prompts and without a prompt of its own is CounterFact's: the first
    neighbor's answer, which is the fact's old one.
    """
    found = questions_of(record.get("locality"), "locality")
    for prompt, answer in (("locality_prompt", "locality_ground_truth"), ("loc", "loc_ans")):
        if record.get(prompt):
            found += questions_of({"prompt": record[prompt], "answer": record.get(answer)}, prompt)
        elif record.get(answer) and _target(record[answer], answer).strip() != (true or "").strip():
            notes.unused[answer] += 1
    return found


# ---- formats


class Format(NamedTuple):
    """A record format: it fits where of every tuple in ``needs`` one field is there. reads: what else is read."""

    name: str
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[dict, Notes], list[dict]]
    reads: Set[str] = frozenset()


FORMATS = (
    Format("CounterFact", (("requested_rewrite",),), _read_counterfact, {"questions", "new_answer"}),
    Format("known_1000", (("subject",), ("attribute",), ("template",)), _read_known, {"prompt", "target_new"}),
    Format("zsRE", (("src",), ("alt",)), _read_zsre, {"subject", "answers"}),
    Format(  # of KnowEdit: a passage that names its person, ``concept``, and the sentence that goes on, ``labels``
        "WikiBio",
        (("text",), ("concept",), ("labels",)),
        partial(_read_by_name, prompt="text", subject="concept", new="labels"),
    ),
    Format("flat", (("prompt",), ("target_new", "target", "target_true")), _read_flat, {"subject", "ground_truth"}),
    Format(
        "question", (("question",), ("answer",)), partial(_read_by_name, prompt="question", new="answer"), {"subject"}
    ),
    Format("no answer", (("prompt",), ("subject",)), partial(_read_by_name, prompt="prompt", new="target_new")),
)

READ = (COMMON | LOCALITY).union(  # every field that some format reads
    *(form.reads for form in FORMATS), *({name for names in form.needs for name in names} for form in FORMATS)
)
