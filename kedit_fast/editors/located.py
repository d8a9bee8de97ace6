"""What ROME, MEMIT and AlphaEdit share: a fact is written at its subject's last token, by a value optimized for it."""

from dataclasses import dataclass
from typing import ClassVar

from kedit_fast.basics import checks
from kedit_fast.editors.editor import Editor
from kedit_fast.jobs.values import ValueSettings
from kedit_fast.model.lm import LM
from kedit_fast.sweep.sites import Site


@dataclass(frozen=True)
class Located(Editor):
    """The hyper-parameters that they share, under their published names, and how they are read.

    layers: edited
    v_num_grad_steps, v_lr, v_weight_decay, kl_factor: of the optimization of a fact's value (jobs/values.py);
    clamp_norm_factor: ||value - start|| <= this times ||start||
    v_loss_layer: whose hidden state MEMIT's loss reads (None: the last); ROME's loss is of the model's own output, so
    there the field is only read
    context_template_length_params: (length, n) of generated contexts
    mom2_adjustment: whether second moments are used; regularizer: added to C's diagonal, relative to its mean; 0 is the
    published form
    source: where these settings come from, for whoever reads the edit
    """

    layers: tuple[int, ...] = ()
    fact_token: str = "subject_last"
    v_num_grad_steps: int = 20
    v_lr: float = 0.5
    v_loss_layer: int | None = None
    v_weight_decay: float = 0.5
    clamp_norm_factor: float = 0.75
    kl_factor: float = 0.0625
    mom2_adjustment: bool = True
    context_template_length_params: tuple[tuple[int, int], ...] = ((10, 5),)
    regularizer: float = 0.0
    source: str = "given"

    POSITIVE: ClassVar[tuple[str, ...]] = ("v_num_grad_steps", "v_lr", "clamp_norm_factor")

    def __post_init__(self):
        super().__post_init__()
        checks.choice("fact_token", self.fact_token, ["subject_last"])  # the only one that carries the fact

    def check(self, lm: LM) -> None:
        """Raises ValueError for layers that the model does not have."""
        super().check(lm)
        if self.v_loss_layer is not None:
            checks.layers("v_loss_layer", [self.v_loss_layer], lm.n_layers)

    def v_settings(self, lm: LM, layer: int) -> ValueSettings:
        """How v* (ROME) is optimized: at a layer's mlp_out, for the loss of the model's own output."""
        return self._values_at(layer, Site.mlp_out, lm.n_layers - 1)

    def z_settings(self, lm: LM) -> ValueSettings:
        """How z (MEMIT) is optimized: at the output of the last edit layer, for the loss at ``v_loss_layer``."""
        top, last = self.layers[-1], lm.n_layers - 1 if self.v_loss_layer is None else self.v_loss_layer
        return self._values_at(top, Site.layer_out, max(last, top))

    def _values_at(self, layer: int, site: Site, loss_layer: int) -> ValueSettings:
        return ValueSettings(
            layer=layer, site=site, lr=self.v_lr, steps=self.v_num_grad_steps, weight_decay=self.v_weight_decay,
            kl_factor=self.kl_factor, clamp=self.clamp_norm_factor, loss_layer=loss_layer,
        )  # fmt: skip
