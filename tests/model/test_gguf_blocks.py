"""The block formats of GGUF tensors against a slow reading of each block, bit by bit, in exact fractions."""

import struct
from fractions import Fraction

import numpy as np
import pytest

from kedit_fast.model import gguf_blocks
from kedit_fast.model.gguf_blocks import FORMATS, dequantize

NUMBERS = {form.name: form for form in FORMATS.values()}
# fp16: nothing, the least and the largest, and what no power of two divides evenly.
SCALES = (0.0, -0.0, 2**-24, -(2**-24), 2**-14, 65504.0, -65504.0, 0.1, -0.3, 1.0)


# ---- the reference: a block is bytes; bit i of it is bit i % 8 of byte i // 8


def bits(raw: bytes, first: int, n: int) -> int:
    """The whole number in n bits from bit ``first`` on, the lowest first."""
    return sum((raw[i // 8] >> i % 8 & 1) << i - first for i in range(first, first + n))


def half(raw: bytes, at: int) -> Fraction:
    """The fp16 number that begins at a byte."""
    return Fraction(struct.unpack_from("<e", raw, at)[0])


def signed(raw: bytes, at: int) -> int:
    return raw[at] - 256 * (raw[at] > 127)


def q4_1(raw: bytes) -> list[Fraction]:
    """20 bytes: scale, minimum, 16 bytes of which each has weight i below and weight i + 16 above."""
    return [bits(raw, 8 * (4 + i % 16) + 4 * (i // 16), 4) * half(raw, 0) + half(raw, 2) for i in range(32)]


def q5_0(raw: bytes) -> list[Fraction]:
    """22 bytes: scale, 32 fifth bits in order, then as above; 16 stands for 0."""
    values = [bits(raw, 8 * (6 + i % 16) + 4 * (i // 16), 4) + 16 * bits(raw, 16 + i, 1) for i in range(32)]
    return [(value - 16) * half(raw, 0) for value in values]


def q8_0(raw: bytes) -> list[Fraction]:
    """34 bytes: scale, 32 signed bytes."""
    return [signed(raw, 2 + i) * half(raw, 0) for i in range(32)]


def q4_k(raw: bytes) -> list[Fraction]:
    """144 bytes: scale of scales, scale of minima, 12 bytes of both for 8 parts, 128 bytes: 32 for two parts each."""
    weights = []
    for part in range(8):
        at = 8 * 4  # the first bit of the twelve bytes
        if part < 4:
            scale, minimum = bits(raw, at + 8 * part, 6), bits(raw, at + 8 * (part + 4), 6)
        else:
            scale = bits(raw, at + 8 * (part + 4), 4) + 16 * bits(raw, at + 8 * (part - 4) + 6, 2)
            minimum = bits(raw, at + 8 * (part + 4) + 4, 4) + 16 * bits(raw, at + 8 * part + 6, 2)
        for i in range(32):
            value = bits(raw, 8 * (16 + 32 * (part // 2) + i) + 4 * (part % 2), 4)
            weights.append(value * scale * half(raw, 0) - minimum * half(raw, 2))
    return weights


def q6_k(raw: bytes) -> list[Fraction]:
    """210 bytes: 128 of low bits, 64 of high ones, 16 signed scales, their scale; 32 stands for 0.

    Each half of the weights has half of them: weights 0 to 63 are the low nibbles of its 64 bytes, 64 to 127 the high
    ones; the upper bits of weight i are pair i // 32 of byte i % 32.
    """
    weights = []
    for i in range(256):
        side, j = divmod(i, 128)
        low = bits(raw, 8 * (64 * side + j % 64) + 4 * (j // 64), 4)
        high = bits(raw, 8 * (128 + 32 * side + j % 32) + 2 * (j // 32), 2)
        weights.append((low + 16 * high - 32) * signed(raw, 192 + i // 16) * half(raw, 208))
    return weights


# By the format's name: the reference, the bytes at which a block has fp16 numbers.
REFERENCES = {"Q4_1": (q4_1, (0, 2)), "Q5_0": (q5_0, (0,)), "Q8_0": (q8_0, (0,)), "Q4_K": (q4_k, (0, 2))}
REFERENCES |= {"Q6_K": (q6_k, (208,))}


def blocks_of(name: str, n: int) -> list[bytes]:
    """Random blocks, then such with every bit set and none, each with every pair of extreme scales."""
    random, size = np.random.default_rng(0), NUMBERS[name].block.itemsize
    made = [random.bytes(size) for _ in range(n)] + [b"\xff" * size, bytes(size)]
    scaled = []
    for number, raw in enumerate(made * len(SCALES)):
        block = bytearray(raw)
        for place in REFERENCES[name][1]:
            struct.pack_into("<e", block, place, SCALES[(number + 3 * place * (number // 7)) % len(SCALES)])
        scaled.append(bytes(block))
    return scaled


def test_every_format_has_a_reference():
    assert set(REFERENCES) | {"F32"} == set(NUMBERS)


@pytest.mark.parametrize("name", REFERENCES)
def test_weights_equal_the_format_s_definition(name):
    blocks = blocks_of(name, 9)
    expected = [float(weight) for block in blocks for weight in REFERENCES[name][0](block)]
    found = dequantize(b"".join(blocks), NUMBERS[name])
    assert found.dtype == np.float32 and found.flags.writeable
    if name == "Q4_1":  # its product is rounded before the sum
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7 * 15 * max(SCALES))
        small = [block for block in blocks if abs(struct.unpack_from("<e", block)[0]) <= 1]
        expected = [float(weight) for block in small for weight in q4_1(block)]
        np.testing.assert_allclose(dequantize(b"".join(small), NUMBERS[name]), expected, rtol=2e-7, atol=2e-6)
    else:  # the products have no more bits than fp32: one rounding at most
        np.testing.assert_array_equal(found, np.array(expected, np.float32))


@pytest.mark.parametrize("name", NUMBERS)
def test_blocks_are_read_in_any_number_at_a_time(name, monkeypatch):
    raw = np.random.default_rng(1).integers(0, 100, NUMBERS[name].block.itemsize * 21, dtype=np.uint8).tobytes()
    whole = dequantize(raw, NUMBERS[name])
    monkeypatch.setattr(gguf_blocks, "AT_ONCE", 2 * NUMBERS[name].weights)
    np.testing.assert_array_equal(dequantize(raw, NUMBERS[name]), whole)
    assert len(whole) == 21 * NUMBERS[name].weights and dequantize(b"", NUMBERS[name]).size == 0
