"""Checkpoint folders of tiny models, and edits of them."""

import torch
from safetensors.torch import save_file

from tests.make import lowrank, make_edit
from tests.tiny import tiny_model, tiny_tokenizer


def save_checkpoint(folder, family="llama", dtype=torch.float32, shard="5GB"):
    """Saves a tiny model with its tokenizer and a few files that are not weights; -> the model."""
    model = tiny_model(family, dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("a model card")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    return model


def two_edits(model):
    """A chain: the second edit has a layer of its own and one in common with the first."""
    return (
        make_edit(model, deltas={1: lowrank(seed=1), 2: lowrank(seed=2)}),
        make_edit(model, deltas={2: lowrank(seed=5), 3: lowrank(seed=6)}),
    )


def contents(folder):
    """{name: bytes} of all files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def base_checkpoint(folder):
    """A checkpoint whose names lack the model's prefix and whose head is tied, as GPT-2's own files are."""
    model = tiny_model("gpt2")
    folder.mkdir()
    model.config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = {n.removeprefix("transformer."): t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return model
