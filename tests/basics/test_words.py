"""Numbers in sentences, and what errors say."""

import numpy as np
import pytest
import torch

from kedit_fast.basics.words import counted, is_out_of_memory, ranges


def test_one_is_singular():
    assert [counted(n, "fact") for n in (0, 1, 2, 1_000)] == ["0 facts", "1 fact", "2 facts", "1,000 facts"]


def test_numbers_in_a_row_are_folded():
    assert ranges([3, 4, 5, 8]) == "3-5, 8" and ranges([]) == "" and ranges([2]) == "2" and ranges([1, 2]) == "1-2"


def test_memory_that_runs_out_is_told_from_other_errors():
    real = []
    for ask in (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: np.empty(2**60, dtype=np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            ask()
        real.append(error.value)
    said = ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"]
    assert all(map(is_out_of_memory, [*real, torch.OutOfMemoryError("x"), *map(RuntimeError, said)]))
    assert not any(map(is_out_of_memory, [RuntimeError("shapes differ"), ValueError(said[0])]))
