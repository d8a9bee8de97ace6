"""What vLLM takes of a LoRA adapter, so that an export fails here and not on the server.

Read from the files of vLLM 0.33.0: ranks from ``MaxLoRARanks`` (config/lora.py); models from the classes of
model_executor/models that lack ``SupportsLoRA``; modules from ``packed_modules_mapping``, the only names under which a
matrix that vLLM holds in one with others can be adapted (lora/worker_manager.py). Families that it serves by
transformers' own code (gpt_neox, phi, olmo, ...) take adapters of every linear module.
"""

from collections.abc import Iterable
from typing import Any

RELEASE = "0.33.0"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be; 16 where nothing is said
# Families whose class refuses every adapter ("does not support LoRA yet").
WITHOUT_LORA = {"gpt2": "GPT2LMHeadModel", "gptj": "GPTJForCausalLM", "stablelm": "StablelmForCausalLM"}
# Matrices that vLLM knows by the names of their halves alone, which this family's checkpoint does not have.
ONLY_HALVES = {("glm4", "gate_up")}


def max_lora_rank(rank: int) -> int | None:
    """The least --max-lora-rank with which a server takes an adapter of this rank; None where none is large enough."""
    return next((allowed for allowed in RANKS if allowed >= rank), None)


def why_not(model_type: str, roles: Iterable[str], rank: int = 1) -> str:
    """Why vLLM does not load an adapter of a family's matrices, by their roles; empty if it does."""
    if model_type in WITHOUT_LORA:
        return f"its {WITHOUT_LORA[model_type]} takes no LoRA adapters"
    if halves := [role for role in roles if (model_type, role) in ONLY_HALVES]:
        return f"its {model_type} takes no adapter of {halves[0]} as one matrix"
    return "" if max_lora_rank(rank) else f"it takes no rank over {RANKS[-1]}, this adapter has {rank}"


def checked(max_rank: int | None, config: Any, roles: Iterable[str]) -> int:
    """The largest rank of an adapter for vLLM, ``max_rank`` at most; ValueError where it loads no such adapter.

    config: of the base model
    """
    if reason := why_not(config.model_type, roles):
        raise ValueError(
            f"vLLM {RELEASE} does not load this adapter: {reason}. Serve a merged checkpoint (kedit-fast merge without "
            "--peft, kedit_fast.merge_checkpoint), or export for PEFT, without server= (--server)"
        )
    return min(max_rank or RANKS[-1], RANKS[-1])
