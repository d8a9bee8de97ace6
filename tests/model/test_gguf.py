"""The GGUF reader on files of a few bytes, with weights worked out by hand."""

import struct

import numpy as np
import pytest

from kedit_fast.model.gguf import read_gguf

F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
STRING, ARRAY = 8, 9


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def metadata_value(value) -> bytes:
    """A metadata value with its type in front: bool, int (u32), float (f32), str or a list of one of them."""
    if isinstance(value, list):
        parts = [metadata_value(item) for item in value]
        return struct.pack("<I", ARRAY) + parts[0][:4] + struct.pack("<Q", len(parts)) + b"".join(p[4:] for p in parts)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text(value)
    kind, code = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(value)]
    return struct.pack(f"<I{code}", kind, value)


def gguf_file(metadata: dict, tensors: dict, alignment: int = 32, version: int = 3) -> bytes:
    """A GGUF file. tensors: {name: (shape with rows first, type number, raw bytes)}."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + metadata_value(value) for key, value in metadata.items())
    body = b""
    for name, (shape, kind, raw) in tensors.items():
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += text(name) + dims + struct.pack("<IQ", kind, len(body))
        body += raw + bytes(-len(raw) % alignment)
    return head + bytes(-len(head) % alignment) + body


def q4_1_block(scale: float, minimum: float, values: list[int]) -> bytes:
    """20 bytes: two fp16 numbers, then value i in the low half of byte i and value 16 + i in its high half."""
    return struct.pack("<2e16B", scale, minimum, *(values[i] | values[i + 16] << 4 for i in range(16)))


def q8_0_block(scale: float, values: list[int]) -> bytes:
    return struct.pack("<e32b", scale, *values)


NIBBLES = [*range(16), *[15, 0] * 8]
SIGNED = [-128, 127, *range(-15, 15)]


@pytest.fixture
def small_file() -> bytes:
    plain = struct.pack("<6f", 0, 1, 2, 3, 4, 1e-40)
    half = q4_1_block(0.5, -2.0, NIBBLES) + q4_1_block(2.0, 1.0, NIBBLES[::-1])
    whole = q8_0_block(0.25, SIGNED)
    metadata = {"name": "tiny", "layers": 2, "tied": True, "eps": 1e-5, "words": ["a", "Ġé"], "kinds": [1, 3]}
    tensors = {"plain": ((2, 3), F32, plain), "half": ((2, 32), Q4_1, half), "whole": ((32,), Q8_0, whole)}
    return gguf_file(metadata, tensors)


def test_metadata_keeps_types_and_values(small_file):
    metadata = read_gguf(small_file).metadata
    expected = {"name": "tiny", "layers": 2, "tied": True, "words": ["a", "Ġé"], "kinds": [1, 3]}
    assert {key: metadata[key] for key in expected} == expected and metadata["tied"] is True
    assert metadata["eps"] == float(np.float32(1e-5)) != 1e-5  # the float32 value, not the decimal one


def test_tensors_equal_the_values_worked_out_by_hand(small_file):
    gguf = read_gguf(small_file)
    assert list(gguf.entries) == ["plain", "half", "whole"]
    np.testing.assert_array_equal(gguf.tensor("plain"), np.array([[0, 1, 2], [3, 4, 1e-40]], np.float32))
    first = [0.5 * q - 2 for q in NIBBLES]
    second = [2.0 * q + 1 for q in NIBBLES[::-1]]
    np.testing.assert_array_equal(gguf.tensor("half"), np.array([first, second], np.float32))
    np.testing.assert_array_equal(gguf.tensor("whole"), np.array([0.25 * q for q in SIGNED], np.float32))
    assert all(gguf.tensor(name).dtype == np.float32 and gguf.tensor(name).flags.writeable for name in gguf.entries)


def test_scale_and_minimum_are_applied_in_fp32():
    scale, minimum = 0.1, 0.3  # neither is exact in fp16, and in fp16 the products would round again
    gguf = read_gguf(gguf_file({}, {"w": ((1, 32), Q4_1, q4_1_block(scale, minimum, NIBBLES))}))
    expected = np.float32(np.float16(scale)) * np.array(NIBBLES, np.float32) + np.float32(np.float16(minimum))
    np.testing.assert_array_equal(gguf.tensor("w")[0], expected)


def test_a_stated_alignment_places_the_tensors():
    data = gguf_file({"general.alignment": 128}, {"w": ((2,), F32, struct.pack("<2f", 5, 7))}, alignment=128)
    assert read_gguf(data).tensor("w").tolist() == [5, 7]


def test_memory_maps_are_read_without_a_copy(small_file, tmp_path):
    path = tmp_path / "small.gguf"
    path.write_bytes(small_file)
    gguf = read_gguf(np.memmap(path, mode="r"))
    np.testing.assert_array_equal(gguf.tensor("half"), read_gguf(small_file).tensor("half"))


def test_every_truncation_is_an_error_that_says_so(small_file):
    data = small_file[:-30]  # drops the padding of the last tensor: the file is whole up to here
    read_gguf(data)
    for length in range(4, len(data)):
        with pytest.raises(ValueError, match="truncated"):
            read_gguf(data[:length])


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "begins with b'', expected b'GGUF'"),
        (b"PK\x03\x04 a wheel", "not a GGUF file"),
        (gguf_file({}, {}, version=2), "version 2 is not read, only version 3"),
        (
            gguf_file({}, {"w": ((4,), F16, bytes(8))}),
            "tensor 'w' has type F16; this reader knows F32, Q4_1, Q5_0, Q8_0, Q4_K, Q6_K",
        ),
        (gguf_file({}, {"w": ((4,), 99, bytes(8))}), "type number 99"),
        (gguf_file({}, {"w": ((2, 16), Q4_1, bytes(20))}), "no multiple of 32"),
        (gguf_file({"general.alignment": 0}, {}), "general.alignment is 0"),
        (gguf_file({}, {})[:16] + struct.pack("<Q", 1) + text("k") + struct.pack("<I", 77), "metadata type 77"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(data, message):
    with pytest.raises(ValueError, match=message):
        read_gguf(data)


def test_an_unknown_tensor_name_is_refused(small_file):
    with pytest.raises(ValueError, match="no tensor 'absent'"):
        read_gguf(small_file).tensor("absent")
