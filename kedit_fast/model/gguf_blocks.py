"""The block formats of GGUF tensors, by their numbers in a file: what lies in a block, and the weights it stands for.

Weights of a quantized tensor lie in blocks: small whole numbers q beside the scales that they share. All is computed in
fp32, in the order in which ggml computes it (github.com/ggml-org/ggml, src/ggml-common.h has the blocks). A format is
one entry of ``FORMATS``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BLOCK = 32  # weights of a block of the older formats
SUPER = 256  # of a block of the K formats, whose parts have scales of their own
AT_ONCE = 1 << 20  # weights; what a call holds beside its result is a few bytes for each


@dataclass(frozen=True)
class Format:
    """A block format. weigh: fp32 [blocks, weights] of blocks [blocks] of the dtype ``block``"""

    name: str
    weights: int  # of a block
    block: np.dtype
    weigh: Callable[[np.ndarray], np.ndarray]


def dequantize(raw, form: Format) -> np.ndarray:
    """The weights of whole blocks as a flat fp32 array. raw: their bytes, any contiguous buffer"""
    blocks = np.frombuffer(raw, form.block)
    out = np.empty((len(blocks), form.weights), np.float32)
    step = AT_ONCE // form.weights
    for begin in range(0, len(blocks), step):
        out[begin : begin + step] = form.weigh(blocks[begin : begin + step])
    return out.reshape(-1)


def _f32(blocks):
    return blocks[:, None]


def _q4_1(blocks):
    """q d + m"""
    return _nibbles(blocks["q"]) * _fp32(blocks["d"]) + _fp32(blocks["m"])


def _q5_0(blocks):
    """(q - 16) d; bit i of the four bytes ``high`` is the fifth of q number i"""
    fifth = np.unpackbits(blocks["high"], axis=1, bitorder="little")
    return ((_nibbles(blocks["q"]) | fifth << 4).astype(np.float32) - 16) * _fp32(blocks["d"])


def _q8_0(blocks):
    """q d"""
    return blocks["q"] * _fp32(blocks["d"])


def _q4_k(blocks):
    """q (d scale) - (dmin minimum), with a scale and a minimum of six bits for each of eight parts.

    Two parts share 32 bytes of nibbles. Of the twelve bytes of scales the first four have those of parts 0 to 3 in
    their low six bits, the next four their minima; the last four have the low four bits of scale (low nibble) and
    minimum (high nibble) of parts 4 to 7, whose upper two bits are on top of the first eight bytes.
    """
    n = len(blocks)
    scales, minima, rest = blocks["scales"].reshape(n, 3, 4).swapaxes(0, 1)
    scales, minima = (
        np.concatenate([first & 63, low | first >> 6 << 4], axis=1)
        for first, low in ((scales, rest & 15), (minima, rest >> 4))
    )
    q = _nibbles(blocks["q"].reshape(n, 4, BLOCK)).reshape(n, 8, BLOCK)
    weights = q * (_fp32(blocks["d"]) * scales)[..., None] - (_fp32(blocks["dmin"]) * minima)[..., None]
    return weights.reshape(n, SUPER)


def _q6_k(blocks):
    """(q - 32) (d scale), with a signed scale for each of sixteen parts.

    Each half of a block has 64 bytes of nibbles, the low four bits, and 32 bytes of the upper two: of weight i, of i +
    32, i + 64 and i + 96 in byte i, from its lowest bits on.
    """
    n = len(blocks)
    low = _nibbles(blocks["low"].reshape(n, 2, 64))
    high = blocks["high"].reshape(n, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    q = (low | high.reshape(n, 2, 128) << 4).reshape(n, 16, 16).astype(np.float32) - 32
    return (q * (_fp32(blocks["d"]) * blocks["scales"])[..., None]).reshape(n, SUPER)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[..., 2 n] of [..., n] bytes: their low halves, then their high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fp32(numbers: np.ndarray) -> np.ndarray:
    """[blocks, 1], to multiply with."""
    return numbers.astype(np.float32)[:, None]


FORMATS = {
    0: Format("F32", 1, np.dtype("<f4"), _f32),
    3: Format("Q4_1", BLOCK, np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]), _q4_1),
    6: Format("Q5_0", BLOCK, np.dtype([("d", "<f2"), ("high", "u1", 4), ("q", "u1", 16)]), _q5_0),
    8: Format("Q8_0", BLOCK, np.dtype([("d", "<f2"), ("q", "i1", BLOCK)]), _q8_0),
    12: Format("Q4_K", SUPER, np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("q", "u1", 128)]), _q4_k),
    14: Format(
        "Q6_K", SUPER, np.dtype([("low", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("d", "<f2")]), _q6_k
    ),
}
# Those that are not read, for the error message.
OTHERS = {1: "F16", 2: "Q4_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K"}
OTHERS |= {24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
