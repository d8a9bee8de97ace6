"""A fact as a model reads it: its prompt and its answers as token ids, plain or as a question in a chat.

This is the one place where an answer is tokenized. Its ids are what the joint text of prompt and answer has more than
the prompt alone, so that training, scoring and generation speak of the same tokens. Whether a space stands between the
two is read off both texts (:func:`follows_directly`), or said by ``Fact.attached``.

The subject's tokens are found by character position through the tokenizer's offsets: tokenizing the parts and counting
gives other tokens wherever a merge crosses a boundary, and is off by one for tokenizers that put a start token before
each part.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from kedit_fast.facts.fact import Chat, Fact, check_text
from kedit_fast.facts.subjects import unspaced

WORD_MARKS = ("▁", "Ġ")  # how sentencepiece and byte-level vocabularies write the space before a word
CLOSING = ".,;:!?%…'’"  # an answer that begins so belongs to the word before it; closing brackets and quotes as well
JOINING = "-‐‑/#@_\\=~"  # a prompt that ends so is continued without a space
DASHES = "–—―"  # and after these, where no space stands before them
NEUTRAL = "0123456789%.,」』】》〉"  # between two words of an unspaced script these make no space either
# What a template may ask for: no thinking before the answer, and a date that does not change from day to day.
TEMPLATE_OPTIONS = {"enable_thinking": False, "date_string": "26 Jul 2024"}


class ChatText(str):
    """A text that a chat template rendered: it brings its own start tokens, so a tokenizer must add none.

    question: the last turn, as people show it; direct: whether the template writes the assistant's answer right behind
    the text, without a space
    """

    question: str
    direct: bool

    def __new__(cls, text: str, question: str = "", direct: bool = True):
        made = super().__new__(cls, text)
        made.question, made.direct = question, direct
        return made


class TokenizedPrompt(NamedTuple):
    """A fact's prompt as the model reads it.

    ids: token ids, special tokens included; span: half-open (b, e) of the subject's tokens, (0, 0) of a fact without
    one; text: what was tokenized;
    attached: whether the fact's answer follows without a space, as the fact says or as was guessed
    """

    ids: list[int]
    span: tuple[int, int]
    text: str
    attached: bool

    @property
    def lookup(self) -> int:
        """Position of the lookup token: the last subject token, where an edit is written."""
        return self.span[1] - 1


# ---- texts


def encode(tokenizer, text: str) -> list[int]:
    """Token ids as the tokenizer gives them, special tokens included; a start token is never doubled: not put before a
    text that begins with it, nor before a :class:`ChatText`."""
    return list(tokenizer(text, add_special_tokens=_adds_special(tokenizer, text))["input_ids"])


def _adds_special(tokenizer, text: str) -> bool:
    start = getattr(tokenizer, "bos_token", None)
    return not isinstance(text, ChatText) and not (start and text.startswith(start))


def chat_text(tokenizer, messages: Sequence[Mapping[str, str]]) -> ChatText:
    """Messages ({"role", "content"}) in the model's own chat template, with its generation prompt behind them.

    Raises ValueError for a tokenizer without a template, and for messages that its template refuses.
    """
    from jinja2 import TemplateError

    check_template(tokenizer)
    render = partial(tokenizer.apply_chat_template, tokenize=False, **TEMPLATE_OPTIONS)
    try:
        made = render(list(messages), add_generation_prompt=True)
        answered = render([*messages, {"role": "assistant", "content": "A"}])
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses these messages: {error}") from error
    direct = not (answered.startswith(made) and answered[len(made) : len(made) + 1].isspace())
    return ChatText(made, str(messages[-1]["content"]), direct)


def check_template(tokenizer) -> None:
    """Raises ValueError for a tokenizer without a chat template."""
    if not has_template(tokenizer):
        raise ValueError(
            "this model's tokenizer has no chat template, so it cannot be asked in a chat; leave out chat=True "
            "(--chat), or open the instruct version of the model"
        )


def has_template(tokenizer) -> bool:
    """Whether the model can be asked in a chat: of several named templates, the default is the one for that."""
    template = getattr(tokenizer, "chat_template", None)
    return "default" in template if isinstance(template, dict) else bool(template)


def asked(tokenizer, prompt: str, chat: Chat = False) -> str:
    """The text that a model reads when it is asked a prompt: the prompt itself, or it as the user's turn of a chat."""
    if not chat:
        return prompt
    before = () if chat is True else chat
    turns = [*before, ("user", prompt)]
    return chat_text(tokenizer, [{"role": role, "content": content} for role, content in turns])


def set_before(tokenizer, prompt: str, text: str) -> str:
    """A prompt as a model reads it (what :func:`asked` gives), with a text put before it: in a chat inside the last
    turn, else behind the special tokens that the prompt itself begins with."""
    if not text:
        return prompt
    at = _place_in(prompt, prompt.question) if isinstance(prompt, ChatText) else _after_special(tokenizer, prompt)
    made = prompt[:at] + text + prompt[at:]
    return ChatText(made, text + prompt.question, prompt.direct) if isinstance(prompt, ChatText) else made


def other_form(fact: Fact) -> Fact:
    """The fact asked in the other form: a plain prompt as a question in a chat, and the other way round."""
    return replace(fact, chat=not fact.chat)


def spoken(text: str) -> str:
    """A text as people show it: of a chat the question."""
    return text.question if isinstance(text, ChatText) else text


# ---- a fact's prompt and its subject


def fact_tokens(tokenizer, fact: Fact, context: str = "{}") -> TokenizedPrompt:
    """The fact's prompt, filled in and set in a context such as "Because of this. {}", with its subject's span.

    In a chat the context stands inside the user's turn; in a plain prompt behind any special tokens that the prompt
    itself writes before its subject (a start token, a rendered template).
    Raises ValueError for a context without or with several "{}", for a tokenizer without offsets or chat template, and
    where the template leaves nothing of the prompt to be found.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets, so the subject's tokens cannot be located; "
            "load a fast tokenizer (one with a tokenizer.json)"
        )
    parts = context.split("{}")
    if len(parts) != 2:
        raise ValueError(f"context {context!r}: expected one {{}}, found {len(parts) - 1}")
    before, after = parts
    place = fact.prompt.index("{}") if fact.subject is not None else len(fact.prompt)
    at = 0 if fact.chat else _after_special(tokenizer, fact.prompt[:place])
    content = fact.text[:at] + before + fact.text[at:] + after
    begin = len(before) + place
    text = asked(tokenizer, content, fact.chat)
    if fact.chat:
        begin += _place_in(text, content)
    answer = fact.target_new or fact.target_true or ""
    # asked of the bare prompt: a quote that a context opens is not the prompt's
    attached = follows_directly(asked(tokenizer, fact.text, fact.chat), answer, fact.attached)
    if fact.subject is None:
        return TokenizedPrompt(encode(tokenizer, text), (0, 0), text, attached)
    ids, span = _encode_span(tokenizer, text, (begin, begin + len(fact.subject)))
    return TokenizedPrompt(ids, span, text, attached)


def _place_in(text: str, content: str) -> int:
    """Where a turn's content stands in a rendered chat; templates may strip it."""
    stripped = content.strip()
    at = text.rfind(stripped)
    if at < 0:
        raise ValueError(
            f"the model's chat template changes the text of a turn: {stripped!r} is not in {text!r}, so the subject's "
            "tokens cannot be found; ask plainly"
        )
    return at - (len(content) - len(content.lstrip()))


def _after_special(tokenizer, head: str) -> int:
    """Where a context goes in a plain prompt that begins with ``head``: 0, or behind the last special token in it and,
    where a line end follows it (the role's name in a rendered template), behind that; else behind the spaces there."""
    ends = [
        head.rfind(token) + len(token) for token in set(getattr(tokenizer, "all_special_tokens", ())) if token in head
    ]
    if not ends:
        return 0
    at = max(ends)
    rest = head[at:]
    if "\n" in rest:
        at += rest.rindex("\n") + 1
        return at
    return at + len(rest) - len(rest.lstrip())


def _encode_span(tokenizer, text: str, chars: tuple[int, int]) -> tuple[list[int], tuple[int, int]]:
    """Tokenize text as :func:`encode` does and find the tokens of text[b:e]: (ids, half-open span).

    A token belongs to the span if its characters and the span's overlap, so one that straddles an end is in, and so are
    all the tokens into which one character is split; a token that is only the space before the span is out, whether
    or not the tokenizer counts a leading space to the word's own token. Blanks at the span's ends are not counted.

    tokenizer: a fast Hugging Face tokenizer. chars: (b, e) in characters of text.
    Raises ValueError where no token overlaps the span.
    """
    begin, end = chars
    word = text[begin:end]
    begin, end = begin + len(word) - len(word.lstrip()), end - len(word) + len(word.rstrip())
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=_adds_special(tokenizer, text))
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    # Start tokens and other tokens that the text does not hold have the empty range (0, 0), which overlaps nothing.
    inside = [at for at, (b, e) in enumerate(offsets) if b < e and b < end and e > begin]
    if not inside:
        raise ValueError(f"no token of {text!r} covers {word!r}; the tokenizer drops these characters")
    # A word mark put before the text's first word may be a token of its own that claims the word's first character.
    if len(inside) > 1 and offsets[inside[0]][0] == offsets[inside[1]][0]:
        inside = inside[tokenizer.convert_ids_to_tokens(ids[inside[0]]) in WORD_MARKS :]
    return ids, (inside[0], inside[-1] + 1)


# ---- answers


def answer_tokens(tokenizer, prompt: str, answer: str, attached: bool | None = None) -> list[int]:
    """ids of an answer as it continues a prompt: the prompt's ids + these are the ids of the joint text.

    prompt: as the model reads it (what :func:`asked` gives); attached: whether no space stands between the two, None:
    :func:`follows_directly`. Where a merge crosses the boundary (a prompt that ends in a space, two Chinese words), the
    prompt's ids stay as they are, since the model reads the prompt alone, and the answer's own follow: those that
    decode, behind the prompt's, to the joint text.

    Differs: the published code tokenizes " target" alone whatever the prompt. That is the same for byte-level BPE and a
    prompt that ends in a word; sentencepiece tokenizers put a word mark of their own before every text, so " Paris"
    alone is an empty word mark and Paris.
    Raises ValueError for an empty answer, or one that the tokenizer drops or cannot attach.
    """
    check_text("target", answer)
    if follows_directly(prompt, answer, attached):
        answer = answer.lstrip()
    elif not answer[0].isspace():
        answer = " " + answer
    prompt_ids, joint = _plain_ids(tokenizer, prompt), _plain_ids(tokenizer, prompt + answer)
    if joint[: len(prompt_ids)] == prompt_ids:
        ids = joint[len(prompt_ids) :]
    else:
        ids = _own_ids(tokenizer, answer, prompt_ids, joint)
    if not ids:
        raise ValueError(f"target {answer!r} has no tokens; the tokenizer drops these characters")
    return ids


def fact_answer(tokenizer, fact: Fact, answer: str | None = None) -> list[int]:
    """ids of an answer (default: target_new) as it continues the fact's bare prompt; the same in every context, which
    stands before it. Errors as of :func:`answer_tokens`."""
    answer = fact.target_new if answer is None else answer
    return answer_tokens(tokenizer, asked(tokenizer, fact.text, fact.chat), answer, fact.attached)


def _own_ids(tokenizer, answer: str, prompt_ids: list[int], joint: list[int]) -> list[int]:
    """ids of an answer that decode, behind the prompt's, to what the joint ids decode to.

    Behind a line end a sentencepiece tokenizer puts no word mark before it, behind a letter byte-level BPE adds no
    space of its own.
    """
    meant = _spell(tokenizer, joint)
    for anchor in ("", "\n", "a"):
        head, whole = _plain_ids(tokenizer, anchor) if anchor else [], _plain_ids(tokenizer, anchor + answer)
        if whole[: len(head)] == head and _spell(tokenizer, prompt_ids + whole[len(head) :]) == meant:
            return whole[len(head) :]
    raise ValueError(
        f"target {answer!r} cannot stand behind {_spell(tokenizer, prompt_ids)[-40:]!r}: this tokenizer joins the two "
        "to other tokens; end the prompt a word earlier, or say attached=False"
    )


def _spell(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _plain_ids(tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def follows_directly(prompt: str, answer: str, attached: bool | None = None) -> bool:
    """Whether an answer follows a prompt without a space; attached: what was said of it, None to guess.

    Guessed from how the prompt ends (white space, an opening bracket or quote, a currency sign, a hyphen; a script
    without spaces between words) and how the answer begins (white space of its own: no; closing punctuation: yes). In
    a chat it is as the template writes an assistant's turn.
    """
    if prompt[-1:].isspace():
        return True
    if attached is not None:
        return attached
    if isinstance(prompt, ChatText):
        return prompt.direct
    if answer[:1].isspace():
        return False
    start, end = answer[:1], prompt[-1:]
    if start and (start in CLOSING or unicodedata.category(start) in ("Pe", "Pf")):
        return True
    return _opens(prompt, end) or unspaced(end) or (unspaced(start) and unspaced(prompt.rstrip(NEUTRAL)[-1:]))


def _opens(prompt: str, end: str) -> bool:
    """Whether the prompt's last character leads straight to a word."""
    if end == '"':
        return prompt.count('"') % 2 == 1
    if end == "'":
        return len(prompt) == 1 or not prompt[-2].isalnum()
    if end in DASHES:
        return not prompt[:-1].endswith(" ")
    return bool(end) and (end in JOINING or unicodedata.category(end) in ("Ps", "Pi", "Sc") or end in "„‚¿¡")
