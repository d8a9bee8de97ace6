"""A model with its edits as lm-evaluation-harness asks one, for its tasks and for whoever calls it oneself:

    lm_eval.simple_evaluate(HarnessLM(lm.with_edit(edit)), tasks=["hellaswag"])

What is asked and what it is worth is the harness's; here the questions go up the model in this package's sweeps, so
that views, memories, texts before prompts and models read from disk are scored as they are. Needs lm_eval.
"""

import json
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kedit_fast.basics.progress import progress, scaled
from kedit_fast.basics.warn import warn
from kedit_fast.evaluation.probes import Answer, Probe, read_edited, read_probes
from kedit_fast.facts.tokens import TEMPLATE_OPTIONS, ChatText, check_template, encode
from kedit_fast.jobs.generate import generate
from kedit_fast.jobs.score import text_logprobs
from kedit_fast.model.lm import LM
from kedit_fast.sweep.plan import RowCost, free, together

CHUNK = 64  # requests a sweep when the weights are in memory: progress moves
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")  # settings that say nothing of greedy text
IDLE = ("early_stopping", "length_penalty", "pad_token_id", "renormalize_logits", "use_cache")  # say nothing of any
ONES = (  # settings that change nothing at 1; any other one at 0, False or None
    "num_beams", "num_beam_groups", "num_return_sequences", "repetition_penalty", "encoder_repetition_penalty", "top_p",
    "typical_p",
)  # fmt: skip

Both = tuple[list, list]  # what the base model answers, and what the edited one does


class HarnessLM(TemplateLM):
    """A model, or a view of one with edits, under the harness's rules: where a request is cut into tokens, what its
    empty context is, how a text is windowed, where one that is written ends.

    Differs: of a model that gives NaN (an edit that overflows) a continuation has log-probability -inf, and a text ends
    there; sampling (``do_sample``) is among all tokens unless the task says ``top_k``, and from ``seed``; text is
    written by the task's settings alone, without penalties that the model's own generation config may name; a chat is
    rendered as elsewhere in this package, with thinking off.
    """

    def __init__(self, lm: LM, *, seed: int = 0, edited: "HarnessLM | None" = None):
        """lm: what is asked; edited: the same model with edits, which reads what this one does in the same sweeps, and
        has its answers ready. Raises ValueError for independent edits, each of which is a model for its own fact."""
        super().__init__()
        if lm.independent:
            lm.run_owner  # noqa: B018 (it raises, with the way out)
        self.lm, self.tokenizer = lm, lm.tokenizer
        self._seed, self._edited = seed, edited
        self._known: dict[Hashable, Any] = {}  # answers, by what was asked
        self._chats: dict[str, ChatText] = {}

    # ---- what the harness asks of any model

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        length = resolve_max_length(self.lm.config, self.tokenizer)
        return length if self.lm.longest is None else min(length, self.lm.longest)

    @property
    def max_gen_toks(self) -> int:
        return 256

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            return encode(self.tokenizer, string)
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as the model reads it; of a template that refuses them without system messages, of which it warns.
        ValueError for a model without a template, and for a chat that its template refuses."""
        check_template(self.tokenizer)
        without = [turn for turn in chat_history if turn["role"] != "system"]
        try:
            text = self._rendered(chat_history, add_generation_prompt)
        except TemplateError as error:
            try:
                if len(without) == len(chat_history):
                    raise
                text = self._rendered(without, add_generation_prompt)
            except TemplateError:
                raise ValueError(f"the model's chat template refuses a task's chat: {error}") from error
            warn("the model's chat template takes no system messages: tasks are asked without")
        asked = [turn["content"] for turn in chat_history if turn["role"] == "user"]
        self._chats[text] = ChatText(text, asked[-1] if asked else "")  # an edit puts its text into the last turn
        return text

    def _rendered(self, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
        how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt} | TEMPLATE_OPTIONS
        return str(self.tokenizer.apply_chat_template(turns, continue_final_message=not add_generation_prompt, **how))

    # ---- read

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[tuple], **_: Any) -> list[tuple[float, bool]]:
        """(log p in nats, whether it is what the model itself would say) of each ((context, continuation), and their
        token ids); equal ones are read once."""
        probes = [self._probe(texts[0], *ids) for texts, *ids in requests]
        self._warn_of_cuts([len(ids) > len(one.prompt) for one, (_, ids, _) in zip(probes, requests, strict=True)])
        keys = [("read", one.text, tuple(one.prompt), *map(str, one.answers)) for one in probes]
        return self._answers(dict(zip(keys, probes, strict=True)), self._read, keys)

    def _probe(self, context: str, prompt: list[int], continuation: list[int]) -> Probe:
        """What is too long loses its beginning, as the harness has it."""
        if not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens behind {context[-80:]!r}; expected 1 to "
                f"{self.max_length}, what the model reads"
            )
        prompt = list(prompt) or [self.prefix_token_id]
        room = self.max_length + 1 - len(continuation)  # the last token is predicted, not read
        if len(prompt) > room:
            prompt = prompt[-room:]
            return Probe(prompt, str(self.tokenizer.decode(prompt)), (continuation,))
        text = self._chats.get(context, context.rstrip()) or str(self.tokenizer.decode([self.prefix_token_id]))
        return Probe(prompt, text, (continuation,))

    def _warn_of_cuts(self, cut: list[bool]) -> None:
        if any(cut):
            warn(
                f"{sum(cut)} of {len(cut)} requests are longer than the {self.max_length} tokens that the model reads, "
                "and lose their beginning",
            )

    def _read(self, probes: list[Probe]) -> Both:
        view = self._read_by
        kept = RowCost.of(view).kept + view.d_model * view.dtype.itemsize  # the rows that are read
        most = None if view.source.pass_bytes else CHUNK
        base: list[tuple[float, bool]] = []
        edited: list[tuple[float, bool]] = []
        with progress("reading answers", len(probes)) as bar:
            for chunk in together(probes, lambda one: 2 * sum(one.lengths), free(view) // kept, most):
                advance = scaled(bar.advance, len(chunk))
                if view.edits and self._edited is None:
                    sides = [read_edited(view, chunk, advance)]
                else:
                    sides = [side for side in read_probes(view, chunk, advance) if side is not None]
                for found, side in zip((base, edited), (sides[0], sides[-1]), strict=True):
                    found += map(_scored, chunk, side)
        return base, edited

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """log p in nats of each text, of which no token is left out; an edit that puts text before prompts, and one
        that is routed, act as in ``evaluate(text=)``.

        Differs: of a model with a limit (learned positions) windows are one token shorter, because a sweep over texts
        reads their last token too.
        """
        asked, of_each = [], []
        size = self.max_length - (self.lm.longest is not None)
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, size, context_len=1)
            of_each.append(
                [("rolling", tuple(before), tuple(said)) for before, said in map(make_disjoint_window, windows)]
            )
            asked += of_each[-1]
        found = dict(zip(asked, self._answers(dict(zip(asked, asked, strict=True)), self._rolled, asked), strict=True))
        return [math.fsum(found[window] for window in windows) for windows in of_each]

    def _rolled(self, windows: list[tuple]) -> Both:
        sides = text_logprobs(self._read_by, [[*before, *said] for _, before, said in windows], "reading texts")
        base, edited = (
            [float(found[-len(said) :].double().sum()) for found, (_, _, said) in zip(side, windows, strict=True)]
            for side in sides
        )
        return base, edited

    @property
    def _read_by(self) -> LM:
        """The view whose sweeps answer for both models, where there are two."""
        return self.lm if self._edited is None else self._edited.lm

    def _answers(self, asked: dict, read: Callable[[list], Both], keys: list) -> list:
        """What the model answers, by keys; asked: {key: what is read}, of which ``read`` is given what is new."""
        new = {key: one for key, one in asked.items() if key not in self._known}
        if new:
            base, edited = read(list(new.values()))
            self._known.update(zip(new, edited if self._edited is None else base, strict=True))
            if self._edited is not None:
                self._edited._known.update(zip(new, edited, strict=True))
        return [self._known[key] for key in keys]

    # ---- written

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What the model writes behind each context, up to the first of the request's stop strings or an end token."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        for numbers in groups.values():
            made = self._written([requests[i].args[0] for i in numbers], requests[numbers[0]].args[1])
            for i, text in zip(numbers, made, strict=True):
                texts[i] = text
        return texts

    def _written(self, contexts: list[str], settings: dict) -> list[str]:
        how: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        end = self.tokenizer.decode([self.eot_token_id])
        until = [text for text in handle_stop_sequences(how.pop("until"), end) if text]
        n, room = how["max_gen_toks"], self.max_length - how.pop("max_gen_toks")
        if room < 1:
            raise ValueError(f"max_gen_toks = {n}: the model reads {self.max_length} tokens, prompt and text together")
        sampling = _sampling(how)
        view, texts, owners = self.lm.as_read([self._chats.get(one, one) for one in contexts])
        prompts = [self.tok_encode(str(text)) or [self.prefix_token_id] for text in texts]
        self._warn_of_cuts([len(ids) > room for ids in prompts])
        ended = lambda tokens: any(text in self.tokenizer.decode(tokens) for text in until)  # noqa: E731
        how = sampling | {
            "repetition_penalty": 1,
            "seed": self._seed,
            "owners": owners,
            "until": ended,
            "nan_ends": bool(self.lm.edits),
        }
        made = generate(view, [ids[-room:] for ids in prompts], n, **how)
        decoded = (self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in made)
        return [postprocess_generated_text(text, until, None) for text in decoded]


def _scored(probe: Probe, answer: Answer) -> tuple[float, bool]:
    """(log p of all tokens of the probe's one answer, whether each of them is the likeliest)."""
    n, p = len(probe.answers[0] or ()), answer.p[0]
    return (n * math.log(p) if p > 0 else -math.inf), bool(answer.exact[0])


def _sampling(settings: dict) -> dict[str, Any]:
    """A task's generation settings as ``generate`` takes them. Raises ValueError for one that it does not know."""
    how = dict(settings)
    sampled = how.pop("do_sample")
    temperature, top_k = how.pop("temperature", 0.0), how.pop("top_k", None)
    unknown = {k: v for k, v in how.items() if not _is_idle(k, v) and (sampled or k not in SAMPLING)}
    if unknown:
        raise ValueError(
            f"generation_kwargs {unknown}: text is written greedily, or sampled by temperature and top_k; leave the "
            "rest out of the task"
        )
    if sampled and not temperature > 0:
        raise ValueError(
            "generation_kwargs: do_sample without a temperature above 0; give one, or leave do_sample out (greedy text)"
        )
    return {"temperature": temperature, "top_k": top_k or None} if sampled else {"temperature": 0.0}


def _is_idle(name: str, value: Any) -> bool:
    """Whether a setting with this value changes nothing."""
    return name in IDLE or value is None or value == (1 if name in ONES else 0)
