"""Where a layer can be read or written. One name each, the same for every model family."""

from enum import StrEnum


class Site(StrEnum):
    """A place in the model where rows pass: residual-width [rows, d], unless it says otherwise."""

    embed = "embed"  # output of the token embedding, before learned positions are added
    attn_out = "attn_out"  # output of the attention's output projection, before any post-norm
    mlp_in = "mlp_in"  # input of the MLP, behind its norm
    mlp_gate_up = "mlp_gate_up"  # [rows, 2 d_ff] output of gate and up, where they are one matrix
    mlp_gate = "mlp_gate"  # [rows, d_ff] output of the gate projection
    mlp_up = "mlp_up"  # [rows, d_ff] output of the up projection
    # [rows, d_ff] input of the MLP's down projection: the key k of ROME and MEMIT; of experts the routed keys k̃
    mlp_key = "mlp_key"
    # output of the down projection, before any post-norm: the value v of ROME; of experts what the mixture gives
    mlp_out = "mlp_out"
    mlp_norm = "mlp_norm"  # output of the norm between the down projection and the residual stream, where there is one
    layer_out = "layer_out"  # the residual stream after the layer: the z of MEMIT


# Inside a block, as rows pass: the field of Family that names the module, and whether its input is meant.
INSIDE = {
    Site.attn_out: ("attn_proj", False),
    Site.mlp_in: ("mlp", True),
    Site.mlp_gate_up: ("mlp_gate_up", False),
    Site.mlp_gate: ("mlp_gate", False),
    Site.mlp_up: ("mlp_up", False),
    Site.mlp_key: ("mlp_down", True),
    Site.mlp_out: ("mlp_end", False),
    Site.mlp_norm: ("post_norm", False),
}
# {role of a projection (Family.roles): the site of its input}, and of its output.
IN = {"down": Site.mlp_key, "up": Site.mlp_in, "gate": Site.mlp_in, "gate_up": Site.mlp_in}
OUT = {"down": Site.mlp_out, "up": Site.mlp_up, "gate": Site.mlp_gate, "gate_up": Site.mlp_gate_up}
