"""How files are mutated: bytes, and by their structure JSON, lines of it, safetensors, npz and GGUF files.

A mutation takes the bytes of a file and a ``random.Random`` and gives bytes; the same seed, the same bytes. One that
knows a structure raises where the bytes have it no more.
"""

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable
from random import Random

import numpy as np

Mutation = Callable[[bytes, Random], bytes]
SECRET = "kedit-fast-secret"  # of a file outside, whose name stands in mutated files and that nobody may open
DEEP, LONG, DIGITS = 100_000, 1_000_000, 100_000

# Texts of JSON that stand for what no reader expects; the large ones are rare, for they take time to make.
TEXTS = (
    "null", "true", "false", "0", "-1", "1", "1.5", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1e308",
    str(2**31), str(2**53), str(2**63), str(-(2**63)), str(2**64), "9" * 400, '""', '"x"', '" "', "[]", "{}", "[[]]",
    "[null]", '[""]', "[0]", "[1, 2, 3]", '["a", "b"]', '{"a": 1}', '{"": null}', '{"a": 1, "a": 2}', '"\\ud800"',
    '"\\u0000"', '"\\u202e"', '"NaN"', '"1"', f'"../{SECRET}"', f'"../../{SECRET}"', f'"/tmp/{SECRET}"', '"C:\\\\x"',
    '"file:///etc/passwd"', '".."', '"."', '"a/b"', "[[[[[[[[]]]]]]]]", "1e-400", "[1e999]", "[NaN, NaN]",
    '{"str": "x"}',
)  # fmt: skip
LARGE = (
    "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, '"' + "x" * LONG + '"', "9" * DIGITS,
    "0." + "3" * DIGITS, "[" + "0," * 50_000 + "0]", "[" + "{}," * 20_000 + "{}]", '"' + "{}" * 20_000 + '"',
    "{" + ",".join(f'"k{i}":{i}' for i in range(20_000)) + "}",
)  # fmt: skip
NUMBERS = (0, 1, 7, 8, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def text(rng: Random) -> str:
    """A JSON text that is not expected."""
    return rng.choice(LARGE) if rng.random() < 0.01 else rng.choice(TEXTS)


# ---- bytes


def of_bytes(data: bytes, rng: Random) -> bytes:
    """Bits turned, a piece cut out, doubled, moved, zeroed or foreign, the end cut off or more behind it."""
    if not data:
        return rng.randbytes(rng.randrange(64))
    a, b = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    b = min(b, a + rng.choice((1, 4, 16, 256, len(data))))
    made = bytearray(data)
    kind = rng.randrange(8)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        return data[:a]
    elif kind == 2:
        return data[:a] + data[b:]
    elif kind == 3:
        return data[:b] + data[a:]
    elif kind == 4:
        made[a:b] = bytes(b - a)
    elif kind == 5:
        made[a:b] = rng.randbytes(b - a)
    elif kind == 6:
        return data + rng.choice((b"\0", b"x", b"\n", data, rng.randbytes(rng.randrange(256))))
    else:
        return rng.choice((b"", b"\0", b"\x80\x02}q\0.", b"PK\x03\x04", b"\x1f\x8b", b"{}", b"\xff\xfe", data[a:b]))
    return bytes(made)


# ---- JSON


def of_json(data: bytes, rng: Random) -> bytes:
    """One to three values of a JSON document changed: another kind of thing, gone, doubled, renamed, given twice."""
    return _changed(json.loads(data), rng).encode("utf-8", "surrogatepass")


def _changed(value, rng: Random) -> str:
    raw: dict[str, str] = {}
    holder = [value]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change(holder, rng, raw)
    made = json.dumps(holder[0])
    for mark, standing in raw.items():
        made = made.replace(f'"{mark}"', standing)
    return made


def _change(holder: list, rng: Random, raw: dict[str, str]) -> None:
    places = list(_places(holder))
    box, key = rng.choice(places)
    kind = rng.randrange(10)
    if kind < 5 or box is holder:
        mark = f"@@{len(raw)}@@"
        raw[mark] = text(rng)
        box[key] = mark
    elif kind == 5:
        del box[key]
    elif kind == 6:
        other, at = rng.choice(places)
        box[key] = json.loads(json.dumps(other[at]))
    elif kind == 7 and isinstance(box, dict):
        box[rng.choice(("x", "", "__class__", "a" * 300, "layer", "format"))] = box.pop(key)
    elif kind == 7:
        box[key:key] = [box[key]] * rng.choice((1, 2, 100))
    elif isinstance(box, dict):
        mark = f"@@{len(raw)}@@"
        given = json.dumps(key)
        raw[mark] = "{" + f"{given}: {json.dumps(box[key])}, {given}: {text(rng)}" + "}"
        box[key] = mark if kind == 8 else [box[key]]
    else:
        box[key] = {"a": box[key]}


def _places(value):
    """(box, key) of every value in a tree."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _places(inner)


def of_lines(data: bytes, rng: Random) -> bytes:
    """A line of a JSON lines file changed, gone, doubled or joined with the next."""
    lines = data.splitlines(keepends=True)
    if not lines:
        return of_bytes(data, rng)
    at = rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind < 3:
        lines[at] = of_json(lines[at], rng) + b"\n"
    elif kind == 3:
        lines[at : at + 1] = [lines[at]] * rng.choice((0, 2))
    elif kind == 4:
        lines[at] = lines[at].rstrip(b"\n")
    else:
        lines[at] = of_bytes(lines[at], rng)
    return b"".join(lines)


# ---- safetensors


def split_tensors(data: bytes) -> tuple[dict, dict[str, bytes]]:
    """(header, {name: its bytes}) of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    return header, {n: body[slice(*at["data_offsets"])] for n, at in header.items() if n != "__metadata__"}


def joined_tensors(header: dict, tensors: dict[str, bytes]) -> bytes:
    """The file of such parts; a tensor of bytes takes the length that its bytes have."""
    made, body = {k: v for k, v in header.items() if k == "__metadata__"}, b""
    for name, part in tensors.items():
        at = dict(header[name]) | {"data_offsets": [len(body), len(body) + len(part)]}
        made[name] = at | ({"shape": [len(part)]} if at["dtype"] == "U8" else {})
        body += part
    text = json.dumps(made).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


def of_tensors(data: bytes, rng: Random) -> bytes:
    """A safetensors file with another header, header's length, record (in a tensor, or in the metadata) or bytes."""
    header, tensors = split_tensors(data)
    kind = rng.randrange(6)
    if kind == 0:
        return of_bytes(data, rng)
    if kind == 1:
        length = rng.choice((*NUMBERS, len(data) - 8, len(data) - 9, int.from_bytes(data[:8], "little") + 1))
        return length.to_bytes(8, "little") + data[8:]
    records = {k: v for k, v in header.get("__metadata__", {}).items() if v.startswith("{")}
    if kind >= 4 and "record" in tensors:
        tensors["record"] = of_json(tensors["record"], rng)
        tensors.pop("sha256", None)  # files of before have none; with it, only the digest would be looked at
        return joined_tensors(header, tensors)
    if kind >= 4 and records:
        name = rng.choice(sorted(records))
        header["__metadata__"][name] = of_json(records[name].encode(), rng).decode("utf-8", "replace")
        return joined_tensors(header, tensors)
    if kind == 3 and tensors:
        name = rng.choice(sorted(tensors))
        if rng.random() < 0.3:
            tensors = {n: part for n, part in tensors.items() if n not in (name, "sha256")}
        else:
            special = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff" * 8, b"\0" * 8))
            tensors[name] = (special * (len(tensors[name]) // len(special) + 1))[: len(tensors[name])]
            tensors.pop("sha256", None)
        return joined_tensors(header, tensors)
    text = _changed(header, rng).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :]


# ---- npz


def npy(array: np.ndarray) -> bytes:
    made = io.BytesIO()
    np.lib.format.write_array(made, array, allow_pickle=False)
    return made.getvalue()


def zipped(members: dict[str, bytes], packed: bool = False) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as file:
        for name, data in members.items():
            file.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
    return made.getvalue()


SHAPES = (
    "()",
    "(0,)",
    "(-1,)",
    "(1,)",
    f"({2**40},)",
    f"({2**62}, {2**62})",
    f"(0, {2**63})",
    "(3, 3)",
    "(1,) * 99",
    "3",
)
DESCRS = (
    "'|O'",
    "'<f8'",
    "'<f4'",
    "'|b1'",
    "'<U9'",
    f"'<U{2**30}'",
    "'|V0'",
    "'<c16'",
    "'<M8[s]'",
    "[('a', '<f4')]",
    "3",
)


def of_npz(data: bytes, rng: Random) -> bytes:
    """An npz file with another record, array header, member, or directory; or one that unpacks to far more."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    name = rng.choice(sorted(members))
    kind = rng.randrange(8)
    if kind == 0:
        return of_bytes(data, rng)
    if kind == 1:  # the directory, at the end
        at = max(0, len(data) - rng.randrange(1, 400))
        return data[:at] + struct.pack("<I", rng.choice(NUMBERS) % 2**32) + data[at + 4 :]
    if kind == 2:
        del members[name]
    elif kind == 3:
        members[name] = of_bytes(members[name], rng)
    elif kind == 4:
        header = f"{{'descr': {rng.choice(DESCRS)}, 'fortran_order': {rng.choice((True, False, 3))}, "
        header = (header + f"'shape': {rng.choice(SHAPES)}, }}").encode() + b"\n"
        body = members[name][-rng.randrange(1, 200) :]
        members[name] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body
    elif kind == 5:  # a bomb, of a member that is read or of one that is not
        size = 10**7 if rng.random() < 0.05 else 10**5
        members[rng.choice((name, "more.npy"))] = npy(np.zeros(size, np.uint8))
        return zipped(members, packed=True)
    elif kind == 6:
        array = rng.choice(
            (np.zeros(0), np.full((2, 2), np.nan), np.zeros((3, 3), "<U3"), np.array(7), np.ones((4, 4)))
        )
        members[name] = npy(array)
    elif "record.npy" in members:
        record = str(np.load(io.BytesIO(members["record.npy"]), allow_pickle=False))
        members["record.npy"] = npy(np.array(of_json(record.encode(), rng).decode("utf-8", "replace")))
    else:
        members[rng.choice((f"../{SECRET}.npy", "a/b.npy", "x"))] = members[name]
    return zipped(members, packed=rng.random() < 0.2)


# ---- GGUF


def of_gguf(data: bytes, rng: Random) -> bytes:
    """A GGUF file with a length, count, type, dimension or offset that is another."""
    if rng.random() < 0.3 or len(data) < 40:
        return of_bytes(data, rng)
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, code = rng.randrange(4, len(made) - 8), rng.choice(("<I", "<Q"))
        struct.pack_into(code, made, at, rng.choice((*NUMBERS, rng.randrange(32))) % 2 ** (8 * struct.calcsize(code)))
    return bytes(made)


# ---- gzip, YAML


def packed(value) -> bytes:
    """A JSON value in a gzip file."""
    return gzip.compress(json.dumps(value).encode(), mtime=0)


def of_packed(data: bytes, rng: Random) -> bytes:
    """A gzip file of other JSON, of other bytes, or one that unpacks to far more than it is long."""
    kind = rng.randrange(4)
    if kind == 0:
        return of_bytes(data, rng)
    inner = gzip.decompress(data)
    if kind == 1:
        inner = rng.choice((b" ", b"[", b"0", b'{"a":')) * (10**7 if rng.random() < 0.05 else 10**5)
    return gzip.compress(of_json(inner, rng) if kind > 1 else inner, mtime=0)


LINES = (
    b"a: &a [x, x]\nb: [*a, *a]\n", b"layers: !!python/object/apply:os.system ['true']\n", b"layers: [3, 3]\n",
    b"? [a]\n: b\n", b"v_lr: .inf\n", b"v_lr: .nan\n", b"layers: " + b"[" * 500, b"- a\n", b"%YAML 9.9\n---\n",
    b"v_lr: 0o777\nlayers: 2001-01-01\n", b"layers: {3: 4}\n", b"\xff", b"v_lr: " + b"9" * 5_000 + b"\n",
    b"a: |\n  x\n",
    b"layers: 190:20:30\n", b"v_lr: !!binary aGk=\n", b"null: 3\n", b"<<: {layers: [9]}\n", b"\t: 3\n",
)  # fmt: skip


def of_yaml(data: bytes, rng: Random) -> bytes:
    """A YAML file with a line that is another."""
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines) + 1)
    lines[at : at + rng.randrange(2)] = [rng.choice(LINES)]
    return b"".join(lines)
