"""What lies around a model's blocks: embedding, positions, what the residual stream gets, final norm and head."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kedit_fast.kernels.target_logprob import Head
from kedit_fast.model.family import Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from kedit_fast.model.source import Source


class Around:
    """The part of an ``LM`` that its family's entry is the glue of."""

    if TYPE_CHECKING:  # fields, or properties, of an LM
        model: PreTrainedModel
        source: Source

        @property
        def family(self) -> Family: ...

        @property
        def config(self) -> PreTrainedConfig: ...

        @property
        def dtype(self) -> torch.dtype: ...

        @property
        def device(self) -> torch.device: ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings [rows, d] of tokens [rows], before learned positions: the site ``embed``."""
        return self.model.get_input_embeddings()(tokens.to(self.device))

    def enter(self, x: Tensor, pos: Tensor) -> Tensor:
        """What enters layer 0 of rows x [rows, d] at the site ``embed``: times the family's factor, or with the learned
        position of each row added, where it has them."""
        x = x if self.family.embedding_scale is None else x * self._scale(self.family.embedding_scale)
        if self.family.positions is None:
            return x
        return x + self.model.get_submodule(self.family.positions)(pos.to(x.device))

    def _scale(self, name: str | None) -> Any:
        """A factor that the config names; 1 where the family has none."""
        return 1.0 if name is None else getattr(self.config, name)

    @torch.no_grad()
    def into_stream(self, layer: int, out: Tensor) -> Tensor:
        """What the residual stream gets of the down projection's output m [n, d]: m itself, or what a norm or a factor
        makes of it."""
        family = self.family
        if family.post_norm is not None:
            out = self.source.part(layer, family.post_norm, out.to(self.dtype)).double()
        return out if family.residual_scale is None else out * self._scale(family.residual_scale)

    def rotary(self, layer: int, n_positions: int) -> tuple[Tensor, Tensor] | None:
        """(cos, sin) [n_positions, head_dim] of one layer, from the model's own rotary module."""
        if self.family.rotary is None:
            return None
        module = self.model.get_submodule(self.family.rotary)
        x = torch.empty(0, dtype=self.dtype, device=self.device)
        extra = (self.config.layer_types[layer],) if self.family.rotary_by_type else ()
        cos, sin = module(x, torch.arange(n_positions, device=self.device)[None], *extra)
        return cos[0], sin[0]

    def head(self, h: Tensor) -> Tensor:
        """Logits [rows, V] of hidden states [rows, d] after the last layer: final norm, head, factor, soft cap."""
        with torch.autocast(h.device.type, enabled=False):  # as in a sweep: results depend on no caller's context
            logits = self.model.get_output_embeddings()(self.model.get_submodule(self.family.norm)(h))
        if self._logit_scale != 1:
            logits = logits * self._logit_scale
        cap = self._logit_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @property
    def fusable_head(self) -> Head | Callable[[Tensor], Tensor]:
        """``head`` with its parts named, for ops that fuse it; ``head`` alone where its last part is no plain linear
        layer (quantized, adapted, hooked)."""
        out = self.model.get_output_embeddings()
        hooked = out._forward_hooks or out._forward_pre_hooks or "forward" in vars(out)
        scaled = self._logit_scale != 1
        if type(out) is not nn.Linear or hooked or out.weight.is_meta or (scaled and out.bias is not None):
            return self.head
        last = self.model.get_submodule(self.family.norm)
        norm = (lambda h: last(h) * self._logit_scale) if scaled else last
        return Head(self.head, norm, out.weight, out.bias, self._logit_cap)

    @property
    def _logit_scale(self) -> float:
        return self._scale(self.family.logit_scale) / self._scale(self.family.logit_divisor)

    @property
    def _logit_cap(self) -> float | None:
        return getattr(self.config, "final_logit_softcapping", None)
