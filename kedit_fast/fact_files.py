"""Fact files as they are published, read into the fields of :class:`kedit_fast.facts.Fact`.

One record at a time, told apart by the fields it has, never by its file's name:

    CounterFact, own   requested_rewrite{prompt, subject, target_new{str}, target_true{str}} (a list of them in MQuAKE)
    known_1000         subject, attribute, template, prompt
    zsRE (MEND)        src, subject, alt, answers, rephrase, loc
    flat               prompt (template, or with the subject inside), subject, target_new or target or target_true;
                       EasyEdit, KnowEdit, QAEdit and the records of measured facts are of this kind

In each, prompts to ask besides may stand under any of the names in ``PROMPTS``. A field whose name is nearly one of
those that are read is warned of. A record as ``Fact.to_record`` writes it, its last two fields for evaluation:

    {"requested_rewrite": {"prompt": "{} is in the city of", "subject": "The Eiffel Tower",
                           "target_new": {"str": "Rome"}, "target_true": {"str": "Paris"}},
     "paraphrase_prompts": ["The Eiffel Tower can be found in"],
     "neighborhood_prompts": ["The Louvre is in the city of"]}

Left out, as no score of this package reads it: CounterFact's attribute and generation prompts. What has no field of
its own (relation id, locality questions with another answer, portability) goes to ``provenance``.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
PROMPTS = {  # a Fact's lists of prompts: the names that they go by
    "paraphrases": ("paraphrases", "paraphrase_prompts", "rephrase_prompt", "rephrase"),
    "neighborhood": ("neighborhood", "neighborhood_prompts"),
    "same_subject": ("same_subject", "same_subject_prompts"),
}
ANSWERS = ("answer", "ground_truth", "target", "loc_ans")  # what data sets call the answer to a prompt
NEARLY = 0.9  # of difflib's ratio: "paraphrase_prompt" and "neighbourhood" are, "attribute_prompts" is not


class Question(NamedTuple):
    """A prompt and its answer (None: not known). about: the facts it follows from, each as ``facts.place`` names it."""

    prompt: str
    answer: str | None = None
    about: tuple[tuple[str, str], ...] = ()


def read_records(path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of a fact file; place is "<file>: record <i>", with the line number for JSON lines.

    path: .json or .json.gz (one array), .jsonl or .jsonl.gz (one record a line, read as far as it is asked for).
    Raises ValueError for another suffix, unreadable JSON (with its line), a broken gzip file, text that is not UTF-8,
    or a file without records; OSError where the file cannot be opened.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: a fact file ends in one of {', '.join(SUFFIXES)}")
    opened = gzip.open if path.suffix == ".gz" else open
    read = _read_lines if ".jsonl" in path.suffixes[-2:] else _read_array
    found = False
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            for item in read(path, file):
                found = True
                yield item
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    if not found:
        raise ValueError(f"{path}: holds no records")


def _read_array(path, file):
    records = _json(file.read(), path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a JSON array of records, found {type(records).__name__}")
    for index, record in enumerate(records):
        yield f"{path}: record {index}", record


def _read_lines(path, file):
    index = 0
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        yield f"{path}: record {index} (line {number})", _json(line, path, number)
        index += 1


def _json(text, path, line=None):
    """The value of a JSON text; ValueError, with the file and the line, where it has none. line: a line's own number"""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; for one record a line, name the file .jsonl" if line is None and error.msg == "Extra data" else ""
        place = f"{path}: line {line or error.lineno}, column {error.colno}"
        raise ValueError(f"{place}: not JSON ({error.msg}){hint}") from error
    except (RecursionError, ValueError) as error:  # brackets by the thousand; a number of thousands of digits
        raise ValueError(f"{path}{f': line {line}' if line else ''}: JSON that cannot be read ({error})") from error


def fact_fields(record: dict) -> list[dict]:
    """The fields of each Fact in one record: one, or several where ``requested_rewrite`` is a list (MQuAKE).

    Raises ValueError where the record is no object, fits no format (what each format misses is named), has a field of
    another type than the format says, or its subject does not stand in its prompt.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with named fields, found {type(record).__name__}")
    misses = []
    for form in FORMATS:
        missing = [" or ".join(names) for names in form.needs if not any(name in record for name in names)]
        if not missing:
            return form.read(record)
        misses.append(f"{form.name} (misses {', '.join(missing)})")
    raise ValueError(f"fields {', '.join(sorted(record)) or 'none'} fit no known format; tried {'; '.join(misses)}")


def _read_counterfact(record):
    rewrites = record["requested_rewrite"]
    several = isinstance(rewrites, list)
    if several and not rewrites:
        raise ValueError("requested_rewrite: expected at least one fact, found an empty list")
    name = _id(record, "case_id")
    facts = []
    for number, rewrite in enumerate(rewrites if several else [rewrites]):
        if not isinstance(rewrite, dict):
            raise ValueError(f"requested_rewrite: expected an object, found {type(rewrite).__name__}")
        if "prompt" not in rewrite:
            raise ValueError("requested_rewrite misses prompt")
        provenance = _provenance(record)
        if rewrite.get("relation_id"):
            provenance["relation_id"] = rewrite["relation_id"]
        facts.append(
            {
                "prompt": rewrite["prompt"],
                "subject": rewrite.get("subject"),
                "target_new": _target(rewrite.get("target_new"), "target_new"),
                "target_true": _target(rewrite.get("target_true"), "target_true"),
                **_prompt_lists(record),
                **_form(record),
                "id": f"{name}.{number}" if several else name,
                "provenance": provenance,
            }
        )
    return facts


def _read_known(record):
    """known_1000: the record's prompt is its template filled in, often with words of the model's own after it."""
    template, subject = _text(record, "template"), _text(record, "subject")
    stem, text = template.replace("{}", subject), record.get("prompt")
    if text is None or template.count("{}") != 1:
        prompt = template
    elif _text(record, "prompt").startswith(stem):
        prompt = template + text[len(stem) :]
    else:
        prompt = as_template(text, subject)
    return [
        {
            "prompt": prompt,
            "subject": subject,
            "target_true": _target(record["attribute"], "attribute"),
            **_prompt_lists(record),
            "id": _id(record, "known_id"),
            "provenance": {key: record[key] for key in ("relation_id",) if record.get(key)},
        }
    ]


def _read_zsre(record):
    """zsRE as prepared for MEND: the edit makes the model answer ``alt``; ``loc`` is a question on something else.

    MEND's file has records with an empty ``alt``: facts without a target_new.
    """
    subject = _text(record, "subject")
    provenance = {key: record[key] for key in ("portability",) if record.get(key)}
    if record.get("loc"):
        provenance["locality"] = [{"prompt": record["loc"], "answer": record.get("loc_ans")}]
    return [
        {
            "prompt": as_template(_text(record, "src"), subject),
            "subject": subject,
            "target_new": _target(record["alt"], "alt") or None,
            "target_true": _target(record.get("answers"), "answers"),
            **_prompt_lists(record),
            "id": _id(record, "id"),
            "provenance": provenance,
        }
    ]


def _read_flat(record):
    subject = _text(record, "subject")
    same_subject, other = _locality(record.get("locality"), subject)
    prompts = _prompt_lists(record)
    provenance = _provenance(record)
    provenance |= {key: record[key] for key in ("source", "portability") if record.get(key)}
    if other:
        provenance["locality"] = other
    new = "target_new" if "target_new" in record else "target"
    true = "target_true" if "target_true" in record else "ground_truth"
    return [
        {
            "prompt": _flat_prompt(record, subject),
            "subject": subject,
            "target_new": _target(record.get(new), new),
            "target_true": _target(record.get(true), true),
            **prompts | {"same_subject": prompts["same_subject"] + same_subject},
            **_form(record),
            "id": _id(record, "id", "case_id"),
            "provenance": provenance,
        }
    ]


def _form(record) -> dict:
    """How the prompts are asked: in a chat or plainly, and whether answers follow without a space."""
    return {"chat": record.get("chat") or False, "attached": record.get("attached")}


def _flat_prompt(record, subject):
    """The template; or, of messages, with the last one's content as template."""
    prompt = record["prompt"]
    if not isinstance(prompt, list):
        return as_template(_text(record, "prompt"), subject)
    last = prompt[-1] if prompt else None
    if not isinstance(last, dict) or not isinstance(last.get("content"), str):
        raise ValueError(f"prompt: expected a string or messages with role and content, found {prompt!r}")
    return [*prompt[:-1], last | {"content": as_template(last["content"], subject)}]


def as_template(text: str, subject: str) -> str:
    """text with "{}" where the subject stands: the first place where it is a whole word, else the first place.

    A text that already is a template (one "{}") is given back as it is. Raises ValueError where the subject is absent.
    """
    if "{}" in text:
        return text
    at = [match.start() for match in re.finditer(re.escape(subject), text)]
    if not subject.strip() or not at:
        raise ValueError(f"subject {subject!r} not in prompt {text!r}; the prompt needs the subject or one {{}}")
    whole = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", text)
    begin = whole.start() if whole else at[0]
    return text[:begin] + "{}" + text[begin + len(subject) :]


def _id(record, *keys):
    """The first of these fields that is there, as text; "" for none."""
    return next((str(record[key]) for key in keys if record.get(key) is not None), "")


def _provenance(record):
    value = {} if record.get("provenance") is None else record["provenance"]
    if not isinstance(value, dict):
        raise ValueError(f"provenance: expected an object with named fields, found {value!r}")
    return dict(value)


def _text(record, key):
    if not isinstance(record[key], str):
        raise ValueError(f"{key}: expected a string, found {record[key]!r}")
    return record[key]


def _target(value, key):
    """A target given as a string, {"str": ...}, or a list of answers, of which the first is meant; None if absent."""
    while isinstance(value, list | dict):
        if isinstance(value, dict) and "str" not in value:
            raise ValueError(f"{key}: expected a string or an object with 'str', found {value!r}")
        value = value["str"] if isinstance(value, dict) else (value[0] if value else None)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key}: expected a string, found {value!r}")
    return value


def _prompt_lists(record) -> dict[str, tuple[str | Question, ...]]:
    """The prompts of all names that a list goes by."""
    return {
        field: tuple(prompt for name in names for prompt in _prompts(record, name, field != "paraphrases"))
        for field, names in PROMPTS.items()
    }


def misnamed(record: dict) -> dict[str, str]:
    """{field that no format reads: the known name that it nearly has}."""
    return {name: near for name in record if isinstance(name, str) and (near := _nearly(name))}


@cache
def _nearly(name: str) -> str | None:
    known = {name for form in FORMATS for names in form.needs for name in names} | {"requested_rewrite", "locality"}
    known |= {name for names in PROMPTS.values() for name in names}
    return None if name in known else next(iter(get_close_matches(name, sorted(known), 1, NEARLY)), None)


def _prompts(record, key, answered: bool):
    """The prompts under a key: a string, a list of strings or of {"prompt": ..., "answer": ...}, or nothing.

    answered: whether an answer is read
    """
    value = record.get(key)
    items = [value] if isinstance(value, str) else value or []
    if not isinstance(items, list):
        raise ValueError(f"{key}: expected a list of prompts, found {value!r}")
    prompts = []
    for item in items:
        prompt = item.get("prompt") if isinstance(item, dict) else item
        if not isinstance(prompt, str):
            raise ValueError(f"{key}: expected a string or an object with 'prompt', found {item!r}")
        answer = _answer(item, key) if answered and isinstance(item, dict) else None
        prompts.append(prompt if answer is None else Question(prompt, answer))
    return tuple(prompts)


def _answer(record: dict, key: str) -> str | None:
    """The answer of an object with a prompt, under any of the names that data sets give it."""
    return next((_target(record[name], f"{key}, {name}") for name in ANSWERS if record.get(name) is not None), None)


def _locality(value, subject):
    """Split EasyEdit's locality probes: prompts that name the subject, and all others with their answers.

    value: {kind: [{"prompt", "ground_truth"}] or {"prompt", "ground_truth"}} or [{"loc", "loc_ans"}].
    The others have an answer of their own, which is not the fact's, so they are no neighborhood prompts.
    """
    kinds = value.values() if isinstance(value, dict) else [value or []]
    same, other = [], []
    for probe in (probe for kind in kinds for probe in (kind if isinstance(kind, list) else [kind])):
        if not isinstance(probe, dict):
            raise ValueError(f"locality: expected objects with 'prompt' or 'loc', found {probe!r}")
        prompts = probe.get("prompt", probe.get("loc"))
        answer = probe.get("ground_truth", probe.get("loc_ans"))
        for prompt in prompts if isinstance(prompts, list) else [prompts]:
            if not isinstance(prompt, str):
                raise ValueError(f"locality: expected objects with 'prompt' or 'loc', found {probe!r}")
            if subject in prompt:
                same.append(prompt)
            else:
                other.append({"prompt": prompt, "answer": answer})
    return tuple(same), other


class Format(NamedTuple):
    """A record format: it fits where of every tuple in ``needs`` one field is there."""

    name: str
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[dict], list[dict]]


FORMATS = (
    Format("CounterFact", (("requested_rewrite",),), _read_counterfact),
    Format("known_1000", (("subject",), ("attribute",), ("template",)), _read_known),
    Format("zsRE", (("src",), ("subject",), ("alt",)), _read_zsre),
    Format("flat", (("prompt",), ("subject",), ("target_new", "target", "target_true")), _read_flat),
)
