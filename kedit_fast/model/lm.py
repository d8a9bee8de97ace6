"""A language model as the package sees it: the Hugging Face model, its tokenizer, and where its layers come from."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from kedit_fast.basics import checks
from kedit_fast.basics.state import own_state
from kedit_fast.basics.words import counted
from kedit_fast.facts.tokens import chat_text, encode
from kedit_fast.model import family as fam
from kedit_fast.model.around import Around
from kedit_fast.model.edited import CarriesEdits
from kedit_fast.model.family import Family, family_of, text_config
from kedit_fast.model.fingerprint import fingerprint
from kedit_fast.model.placement import Placement
from kedit_fast.model.shape import Sizes
from kedit_fast.model.source import DEFAULT_MEMORY, Source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from kedit_fast.edits.edit import Edit

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True, eq=False)
class LM(Around, Sizes, CarriesEdits):
    """A model to trace and edit. Made by ``open_model``; only ``Edit.apply`` changes the Hugging Face model in it.

    model: the Hugging Face model (its layers on meta when they are read from disk); tokenizer: a fast tokenizer;
    source: supplies layer i; memory: bytes a sweep may hold besides the weights; edits: the edits that sweeps apply,
    in order, see ``with_edit``; note: what a reader of results must know of the model; opened_as: what ``open_model``
    was given, where that was a name; placement: where its weights went and why, of a model that was opened from its
    folder; prompted: whether what is asked holds already what the edits put before prompts
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    source: Source
    memory: int = DEFAULT_MEMORY
    edits: "tuple[Edit, ...]" = ()
    note: str = ""
    opened_as: str = ""
    placement: Placement | None = None
    prompted: bool = False
    _cache: dict = field(default_factory=dict, repr=False)

    # ---- shape

    @property
    def family(self) -> Family:
        return family_of(self.model.config)

    @property
    def config(self) -> "PreTrainedConfig":
        """The text model's config."""
        return text_config(self.model.config)

    @property
    def n_layers(self) -> int:
        return len(self.source.layers)

    @property
    def _embedding(self) -> Tensor:
        """The embedding's weight [V, d]."""
        return cast(Tensor, self.model.get_input_embeddings().weight)

    @property
    def d_model(self) -> int:
        return self._embedding.shape[1]

    @cached_property
    def d_ff(self) -> int:
        """Width of a key; of a mixture of experts, that of all its experts (``model/experts.py``)."""
        down = fam.projection(self.model, 0)
        if fam.is_experts(down):
            return fam.as_wide(down).shape[1]
        if fam.is_conv1d(down):
            return cast(Tensor, down.weight).shape[0]
        return getattr(down, "in_features", None) or cast(Tensor, down.weight).shape[1]  # packed, it has another

    def shape_of(self, role: str) -> tuple[int, int]:
        """[out, in] of the projection that plays a role (``Family.roles``); ValueError where the family has none."""
        fam.role_path(self.model.config, role)
        wide = self.d_ff * (1 + (role == "gate_up"))
        return (self.d_model, wide) if role == "down" else (wide, self.d_model)

    def width_of(self, site: str) -> int:
        """Width of the rows at a site (``sweep.sites.Site``)."""
        return {"mlp_key": 1, "mlp_up": 1, "mlp_gate": 1, "mlp_gate_up": 2}.get(site, 0) * self.d_ff or self.d_model

    @property
    def n_vocab(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def name(self) -> str:
        """What the model was opened as."""
        return self.opened_as or self.model.config._name_or_path or self.model.config.model_type

    def __repr__(self) -> str:
        source = "" if self.source.in_memory else f", read from {self.source.name}"
        edits = f", {counted(len(self.edits), 'edit')}" * bool(self.edits)
        return f"LM({self.name}, {self.config.model_type}, {self.n_layers} layers, {self.dtype_name}{source}{edits})"

    @property
    def fingerprint(self) -> str:
        """Which weights these are, as they are now (edits that this view carries are not counted).

        Read anew each time where the weights are in memory: an edit may have been written into them since.
        """
        if self.source.in_memory:
            return fingerprint(self.model, self.source)
        if "fingerprint" not in self._cache:
            self._cache["fingerprint"] = fingerprint(self.model, self.source)
        return self._cache["fingerprint"]

    # ---- how long a text may be

    def check_length(self, n_positions: int, whose: str = "") -> None:
        """Raises ValueError for a text longer than a sweep takes, with the reason and whose text it is."""
        longest, why = self._longest
        if longest is not None and n_positions > longest:
            raise ValueError(
                f"{whose}{': ' * bool(whose)}a text of {n_positions} tokens; this model takes {longest} here: {why}. "
                "Shorten the text"
            )

    @property
    def positions(self) -> int | None:
        """Positions that the model was made for; None where its configuration names none. A sweep may take more."""
        return getattr(self.config, "max_position_embeddings", None)

    def window(self, n_tokens: int) -> int:
        """So many tokens, or as many as the model was made for where those are fewer."""
        return min(n_tokens, self.positions or n_tokens)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest text that a sweep takes; None where there is no limit."""
        return self._longest[0]

    @cached_property
    def _longest(self) -> tuple[int | None, str]:
        if self.family.rotary is None:
            return self.positions, "its position table ends there"
        rope = getattr(self.config, "rope_parameters", None) or {}
        for scaling in (rope, *(v for v in rope.values() if isinstance(v, dict))):
            if scaling.get("rope_type") in ("dynamic", "longrope"):
                longest = scaling.get("original_max_position_embeddings") or self.positions
                return longest, "beyond it rotary frequencies depend on the longest text of a call"
        return None, ""

    # ---- for people

    def encode(self, text: str) -> list[int]:
        """Token ids as the tokenizer gives them, special tokens included; a start token is never doubled."""
        return encode(self.tokenizer, checks.text("text", text, blank=True))

    @own_state()
    def top_tokens(self, prompt: str, k: int = 5) -> list[tuple[str, float]]:
        """The k likeliest next tokens after ``prompt`` with their probabilities."""
        from kedit_fast.jobs.score import next_token_probs

        prompt = checks.text("prompt", prompt, like="The capital of France is")
        k = checks.whole("k", k, least=1, most=self.n_vocab, like=5)
        view, texts, owners = self.as_read([prompt])
        probs = next_token_probs(view, [self.encode(texts[0])], owners)[0].topk(k)
        return [
            (str(self.tokenizer.decode([i])), p)
            for i, p in zip(probs.indices.tolist(), probs.values.tolist(), strict=True)
        ]

    @overload
    def generate(self, prompts: str, max_new_tokens: int = 20, **sampling: Any) -> str: ...

    @overload
    def generate(self, prompts: Iterable[str], max_new_tokens: int = 20, **sampling: Any) -> list[str]: ...

    @own_state()
    def generate(self, prompts: str | Iterable[str], max_new_tokens: int = 20, **sampling: Any) -> str | list[str]:
        """Continuations of prompts (greedy; see ``jobs.generate.generate`` for sampling), without the prompts. A text
        ends at any of ``stop_tokens``; ``repetition_penalty`` is the model's own."""
        from kedit_fast.jobs.generate import generate

        single = isinstance(prompts, str)
        prompts = checks.listed("prompts", prompts, str, "a text or a list of texts")
        view, read, owners = self.as_read([checks.text("prompts", p, blank=True) for p in prompts])
        made = generate(view, [self.encode(text) for text in read], max_new_tokens, owners=owners, **sampling)
        texts = [str(self.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in made]
        return texts[0] if single else texts

    def chat(self, messages: str | Sequence[Mapping[str, str]], max_new_tokens: int = 64, **sampling: Any) -> str:
        """The reply to messages ({"role", "content"}, the question last), or to one question, asked in the model's own
        chat template; sampling as in ``generate``. Raises ValueError for a model without a template."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.generate(chat_text(self.tokenizer, messages), max_new_tokens, **sampling)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a text: every end token of the model's generation config, and the tokenizer's."""
        named = self._of_generation("eos_token_id")
        ends = list(named) if isinstance(named, list | tuple) else [named]
        return frozenset(end for end in [*ends, self.tokenizer.eos_token_id] if end is not None)

    @property
    def repetition_penalty(self) -> float:
        """The model's generation config's, for text that is written; 1.0, where it names none, is without one."""
        return self._of_generation("repetition_penalty") or 1.0

    def _of_generation(self, name: str):
        """What the model's generation config, if it has one, names; else None."""
        return getattr(getattr(self.model, "generation_config", None), name, None)

    @own_state()
    def with_edit(self, edit: "Edit", written: torch.dtype | str | None = None) -> "LM":
        """A view of this model with an edit on top; the weights stay as they are.

        written: a dtype; the edit then acts as it would once written into weights of that dtype (in bf16 a small
        share of an edit loses 2-4 %). Raises ValueError for an edit made on another model, for one that this view
        carries already, and for a routed one beside another or beside independent ones.
        """
        if not hasattr(edit, "acting_on"):
            checks.refuse("edit", edit, "an Edit; Edit.load reads a file, and of several each goes on the view before")
        if written is not None:
            written = getattr(torch, checks.dtype("written", written))
        return replace(self, edits=(*self.edits, edit.acting_on(self, written)))


def takes_lm(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A public function whose argument ``lm`` is checked first, and that computes in ``own_state``.

    Anything but what ``open_model`` gives is refused with the way to come by one; so is None, unless it is the default.
    """
    parameters = inspect.signature(function).parameters
    place, is_optional = list(parameters).index("lm"), parameters["lm"].default is None

    @wraps(function)
    def door(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if len(args) > place or "lm" in kwargs:  # else Python says what is missing
            lm = args[place] if len(args) > place else kwargs["lm"]
            if not (isinstance(lm, LM) or (lm is None and is_optional)):
                way = "model, tokenizer=tokenizer" if isinstance(lm, nn.Module) else '"smollm2"'
                checks.refuse("lm", lm, f"what open_model returns, lm = kf.open_model({way})")
        with own_state():
            return function(*args, **kwargs)

    return door
