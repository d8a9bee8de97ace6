"""Where a layer can be read or written. One name each, the same for every model family."""

from enum import Enum


class Site(str, Enum):
    """A place in the model where rows pass. All are residual-width [rows, d] but ``mlp_key`` [rows, d_ff]."""

    embed = "embed"  # output of the token embedding, before learned positions are added
    attn_out = "attn_out"  # output of the attention's output projection, before any post-norm
    mlp_key = "mlp_key"  # input of the MLP's down projection: the key k of ROME and MEMIT
    mlp_out = "mlp_out"  # output of the down projection, before any post-norm: the value v of ROME
    layer_out = "layer_out"  # the residual stream after the layer: the z of MEMIT
