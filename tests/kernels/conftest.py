"""Where the tests of a kernel compute; those of Triton say another place."""

import pytest


@pytest.fixture
def device() -> str:
    return "cpu"
