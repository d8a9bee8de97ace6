"""Logs of runs that go on."""

from kedit_fast.basics.log import Log


def test_a_log_that_goes_on_has_each_line_once(tmp_path):
    path, records = tmp_path / "log.jsonl", [{"n": n} for n in (1, 2, 2, 3)]
    Log(path).add(records)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):  # killed at any byte
        path.write_bytes(whole[:cut])
        log = Log(path)
        log.add(records[:2], again=True)
        log.add(records[2:], again=True)
        assert path.read_bytes() == whole
    Log(path).add(records[:1])
    assert path.read_bytes() == whole + b'{"n": 1}\n'
    path.unlink()
    Log(path).add(records, again=True)
    assert path.read_bytes() == whole
    Log(None).add(records, again=True)
