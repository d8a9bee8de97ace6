"""npz and gzip files: read as numpy and gzip read them, and refused where they say that they hold what they do not."""

import gzip
import io
import zipfile

import numpy as np
import pytest

from kedit_fast.basics.packed import BESIDE, RATIO, read_arrays, unpacked
from tests.conftest import refused
from tests.fuzz.mutate import npy, zipped

ARRAYS = {
    "a": np.arange(6.0).reshape(2, 3), "by_columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "text": np.array("é{"), "none": np.zeros((0, 3), np.float32), "one": np.array(7), "flags": np.array([True, False]),
}  # fmt: skip


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back_as_numpy_has_them(save, tmp_path):
    save(tmp_path / "a.npz", **ARRAYS)
    found = read_arrays(tmp_path / "a.npz")
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert np.array_equal(found[name], array) and found[name].dtype == array.dtype
    assert list(read_arrays(tmp_path / "a.npz", ("one", "a"))) == ["one", "a"]


def header(shape: str, descr: str = "'<f8'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "no npz file, or cut short"),
        (zipped({"a.npy": npy(np.ones(3))})[:-30], "no npz file"),
        (zipped({"b.npy": npy(np.ones(3))}), r"lacks \['a'\]"),
        (zipped({"a.npy": b"x"}), "its a is no array"),
        (zipped({"a.npy": header(f"({2**40},)") + bytes(8)}), "its a is no array"),
        (zipped({"a.npy": header("(-1,)") + bytes(8)}), "its a is no array"),
        (zipped({"a.npy": header("(1,)", "'|O'") + bytes(8)}), "its a is no array"),
        (zipped({"a.npy": header("((((")}), "its a is no array"),
        (zipped({"a.npy": header("(1,)", "'<U2'") + b"\xff" * 8}), "its a is no array"),
        (zipped({"a.npy": npy(np.zeros(10**7))}, packed=True), "would unpack to 80,000,128 bytes from"),
    ],
    ids=range(10),
)
def test_arrays_that_are_none(data, says, tmp_path):
    (tmp_path / "a.npz").write_bytes(data)
    refused(says, read_arrays, tmp_path / "a.npz", ("a",))


def test_pickles_are_not_read(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([{}], dtype=object))
    refused("its a is no array of numbers or text", read_arrays, tmp_path / "a.npz")


def test_a_directory_that_lies_of_a_size(tmp_path):
    data = bytearray(zipped({"a.npy": npy(np.ones(3))}))
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = (2**31).to_bytes(4, "little")
    (tmp_path / "a.npz").write_bytes(data)
    refused("would unpack to 2,147,483,648 bytes", read_arrays, tmp_path / "a.npz")
    assert zipfile.is_zipfile(io.BytesIO(bytes(data)))


def test_gzip_is_read_as_far_as_it_is_wanted(tmp_path):
    path = tmp_path / "text.gz"
    text = b"".join(b"line %d\n" % i for i in range(100_000))
    path.write_bytes(gzip.compress(text) + b"no more of it")
    with unpacked(path) as file:
        assert file.readline() == b"line 0\n"
    with pytest.raises(ValueError, match=f"{path}: not a complete gzip file"), unpacked(path) as file:
        file.read()
    path.write_bytes(gzip.compress(text))
    with unpacked(path) as file:
        assert file.read() == text


def test_gzip_that_unpacks_to_far_more_than_it_is_long(tmp_path):
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(bytes(20 * BESIDE)))
    assert path.stat().st_size * RATIO < 19 * BESIDE
    with (
        pytest.raises(ValueError, match=f"{path} would unpack to over {RATIO} times its length"),
        unpacked(path) as file,
    ):
        file.read()
