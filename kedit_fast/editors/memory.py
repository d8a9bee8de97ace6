"""What editors that leave the weights alone share: what they do not read, and what their published files say."""

import re
from collections.abc import Callable
from typing import Any

MEMORY_UNREAD = dict.fromkeys(
    ("moments", "corpus"), "a memory stands beside the weights and needs no statistics of their inputs; leave it out"
) | {
    "independent": "each prompt is answered by one fact's entry as it is; edit.only(i) takes one",
    "contexts": "keys are those of the prompts as they are asked; leave it out",
}  # fmt: skip


def layers_of(value: Any) -> dict:
    """The layers of a published file's ``inner_params``, paths of down projections. Raises ValueError for others."""
    paths = [value] if isinstance(value, str) else value
    found = [re.search(r"(?:\[|\.)(\d+)\]?\.mlp\.(?:down_proj|c_proj|fc_out|dense_4h_to_h)\b", str(p)) for p in paths]
    if not all(found):
        raise ValueError("a memory stands here beside a down projection; expected its path alone")
    return {"layers": tuple(int(match[1]) for match in found if match)}


def only(*values: Any) -> Callable[[Any], dict]:
    """Of a name whose other values are not done here: sets nothing. Raises ValueError for another value."""

    def check(value: Any) -> dict:
        if value not in values:
            raise ValueError(f"not done here; expected {values[0]!r}")
        return {}

    return check
