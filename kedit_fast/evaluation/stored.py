"""How columns and means stand in JSON files, which know neither NaN nor infinity, and how they are read again."""

import math
from typing import Any

import torch
from torch import Tensor

from kedit_fast.basics import checks
from kedit_fast.basics.intervals import Interval, Metrics


def finite(value: Any) -> Any:
    """Plain values as JSON has them: None for NaN and infinity, also in dicts and lists."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary_of_record(record: dict[str, list]) -> dict[str, Interval]:
    """The summary of which ``finite`` gave the record; infinity has become NaN."""
    return {name: Interval._make(map(as_float, one)) for name, one in record.items()}


def as_float(value: float | None) -> float:
    """What ``finite`` gave, with NaN for None. Raises BadArgument for what it never gives."""
    return math.nan if value is None else checks.number("value", value)


def listed(columns: dict[str, Tensor] | None) -> dict[str, list] | None:
    """Columns as JSON has them; ``columns_of`` gives them back."""
    return None if columns is None else finite({name: column.tolist() for name, column in columns.items()})


def columns_of(listed: dict[str, list], metrics: Metrics, n: int) -> dict[str, Tensor]:
    """Columns as they were saved, NaN of metrics that are missing. ValueError for others, or not n values each."""
    if wrong := [name for name, values in listed.items() if name not in metrics or len(values) != n]:
        raise ValueError(f"{wrong[0]!r}: expected one of its metrics, and {n} values")
    return {
        name: torch.tensor([as_float(value) for value in values], dtype=torch.float32)
        for name, values in ({name: [None] * n for name in metrics} | listed).items()
    }
