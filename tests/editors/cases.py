"""Facts, contexts and statistics for the tests of the editors, and tiny models that are float64 all through."""

import functools
import json
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gptj.modeling_gptj import GPTJAttention
from transformers.models.granite.modeling_granite import GraniteRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm

import kedit_fast as kf
from kedit_fast.editors.located import Prompts
from kedit_fast.moments.second_moment import SecondMoment
from kedit_fast.sweep.sites import Site
from tests.conftest import open_tiny
from tests.make import bits, same_bits
from tests.oracle.values import Fact as OracleFact
from tests.tiny import D_FF, tiny_model

FAMILIES = ("gpt2", "gptj", "llama", "gemma2", "olmo2")
POST_NORM = ("gemma2", "olmo2")
N_TOKENS = 500

# The subject inside, at the start, alone (the lookup token is the prompt's last one); targets of one and more tokens.
FACTS = (
    kf.Fact(prompt="The {} is in the city of", subject="Space Needle", target_new="Rome"),
    kf.Fact(prompt="{} plays the sport of", subject="LeBron James", target_new="cheese boat"),
    kf.Fact(prompt="{}", subject="Big Ben", target_new="London"),
    kf.Fact(prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="Berlin"),
)
# The same with other prompts to train on: whole, as a template, and with the subject last; of one none.
PHRASED = tuple(
    replace(fact, phrasings=phrasings)
    for fact, phrasings in zip(
        FACTS,
        (
            ("Where is the Space Needle? It is in", "You find the {}"),
            ("{} is a player of",),
            (),
            ("Everybody speaks of Danielle Darrieux", "The language of {} is", "Danielle Darrieux was born in"),
        ),
        strict=True,
    )
)
GROUPS = [["{}"], ["The sun. {}", "I go there because of the piano in New York. {}"]]
# Of published settings files; the package takes them from the model.
MODULE_PATHS = {
    "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
    "layer_module_tmp": "transformer.h.{}",
    "mlp_module_tmp": "transformer.h.{}.mlp",
    "attn_module_tmp": "transformer.h.{}.attn",
    "ln_f_module": "transformer.ln_f",
    "lm_head_module": "transformer.wte",
}
FLAT = [context for group in GROUPS for context in group]


def oracle_facts(facts=FACTS) -> list[OracleFact]:
    return [OracleFact(f.prompt, f.subject, f.target_new, tuple(one.prompt for one in f.phrased())) for f in facts]


@functools.cache
def moments(n_layers: int = 4, n_tokens: int = N_TOKENS) -> dict[int, SecondMoment]:
    """{layer: second moment of random keys}, far from the identity and different in each layer."""
    made = {}
    for layer in range(n_layers):
        generator = torch.Generator().manual_seed(layer)
        keys = torch.randn(n_tokens, D_FF, generator=generator, dtype=torch.float64)
        keys *= torch.linspace(0.3, 2.0, D_FF, dtype=torch.float64)
        made[layer] = SecondMoment((keys.T @ keys / n_tokens).float(), n_tokens, layer)
    return made


def matrices(given=None) -> dict[int, torch.Tensor]:
    """The same as the oracle takes them."""
    return {layer: moment.matrix for layer, moment in (given or moments()).items()}


def values_at(lm, facts, layer) -> torch.Tensor:
    """[n, d] layer_out at the lookup token of the bare prompts."""
    return Prompts.of(lm, facts, [["{}"]]).read(lm, averaged={}, bare={Site.layer_out: layer}).bare[Site.layer_out]


def named(name, family="gpt2", layers=4):
    """A tiny model that says it was opened as ``name``."""
    lm = open_tiny(tiny_model(family, layers=layers))
    lm.model.config._name_or_path = name
    return lm


def written(folder, record, name="settings.json"):
    """A file of a text, or of a record in JSON."""
    (folder / name).write_text(record if isinstance(record, str) else json.dumps(record))
    return folder / name


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want|| in float64."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    return ((got - want).norm() / want.norm()).item()


def apart(made, expected) -> float:
    """||Δ - Δ'|| / ||Δ'|| of two edits of the same layers, in the layer where it is largest."""
    assert made.layers == expected.layers
    return max(relative(made.deltas[i].dense(), expected.deltas[i].dense()) for i in expected.layers)


@contextmanager
def left_as_it_was(family="llama"):
    """Gives an opened model in training mode, some of it frozen; after the block it is the same, and bears no trace."""
    model = tiny_model(family).train()
    flags = {name: i % 3 > 0 for i, (name, _) in enumerate(model.named_parameters())}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    before, implementation = bits(model), model.config._attn_implementation
    yield open_tiny(model)
    assert same_bits(model, before) and model.config._attn_implementation == implementation
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "_attn" in vars(m) for m in model.modules())


def make_exact(monkeypatch) -> None:
    """Takes the float32 casts out of Hugging Face's norms and gptj's attention, for oracle and package alike.

    With them a float64 model is no sharper than float32: a value that falls on either side of a rounding step moves by
    6e-8.
    """

    def norm(self, x):
        eps = self.eps if isinstance(self, Gemma2RMSNorm) else self.variance_epsilon
        weight = self.weight + 1 if isinstance(self, Gemma2RMSNorm) else self.weight
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def attend(self, query, key, value, attention_mask=None):
        scores = query @ key.transpose(-1, -2) / self.head_dim**0.5 + attention_mask
        weights = scores.softmax(-1)
        return weights @ value, weights

    for module in (Gemma2RMSNorm, GraniteRMSNorm, LlamaRMSNorm, Olmo2RMSNorm, Phi3RMSNorm):
        monkeypatch.setattr(module, "forward", norm)
    monkeypatch.setattr(GPTJAttention, "_attn", attend)
