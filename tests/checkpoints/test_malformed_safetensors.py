"""Broken safetensors files: one clear error within a second, little memory, nothing opened outside the directory."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.checkpoints.directory import DirectorySource
from phalanx.checkpoints.dtypes import FLOAT_DTYPES
from phalanx.checkpoints.files import ModelDirectory
from phalanx.parallel.errors import CheckpointError
from tests.checkpoints.safetensors_bytes import GOOD_HEADER, entry, file_bytes

_A, _B = GOOD_HEADER["a"], GOOD_HEADER["b"]
_TEXT = json.dumps(GOOD_HEADER).encode()

MALFORMED: dict[str, tuple[bytes, str]] = {
    # The frame: length, header, data.
    "empty file": (b"", "bytes"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "bytes"),
    "length only": (struct.pack("<Q", 2), "bytes"),
    "length beyond the file": (file_bytes(GOOD_HEADER, length=10_000), "ends inside its header"),
    "length of 2^63": (file_bytes(GOOD_HEADER, length=1 << 63), "limit"),
    "length of 2^64 - 1": (file_bytes(GOOD_HEADER, length=(1 << 64) - 1), "limit"),
    "length of 100 MB": (file_bytes(GOOD_HEADER, length=100_000_000), "limit"),
    "length one short": (file_bytes(GOOD_HEADER, length=len(_TEXT) - 1), "JSON"),
    "length one long": (file_bytes(GOOD_HEADER, length=len(_TEXT) + 1), "JSON"),
    "length zero": (struct.pack("<Q", 0) + bytes(48), "begin with"),
    "truncated in the header": (file_bytes(GOOD_HEADER)[:40], "ends inside its header"),
    "truncated in the data": (file_bytes(GOOD_HEADER, 47), "47|describes"),
    "one byte too many": (file_bytes(GOOD_HEADER, 49), "describes"),
    "all zeros": (bytes(4096), "begin with"),
    "pickle of torch": (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M" + bytes(64), "pickle"),
    "a zip archive": (b"PK\x03\x04" + bytes(100), "ZIP archive"),
    "an HTML page": (b"<!DOCTYPE html><html>404</html>" + bytes(64), "web page"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    # The header as JSON.
    "header is no JSON": (file_bytes(None, text=b"{not json}"), "JSON"),
    "header is cut JSON": (file_bytes(None, text=_TEXT[:-3]), "JSON"),
    "header is a list": (file_bytes(None, text=b"[1, 2]"), "begin with"),
    "header begins with a space": (file_bytes(None, text=b" " + _TEXT), "begin with"),
    "header is not UTF-8": (file_bytes(None, text=b'{"\xff\xfe": 1}'), "JSON"),
    "header is UTF-16": (file_bytes(None, text=_TEXT.decode().encode("utf-16-le")), "JSON"),
    "header is nested 100,000 deep": (file_bytes(None, text=b'{"a":' + b"[" * 100_000), "JSON"),
    "header has a second value behind": (file_bytes(None, text=_TEXT + b"{}"), "JSON"),
    "number of 5,000 digits": (file_bytes(None, text=b'{"a": ' + b"9" * 5000 + b"}"), "JSON"),
    "tensor twice": (file_bytes(None, text=_TEXT[:-1] + b', "a": ' + json.dumps(_A).encode() + b"}"), "twice"),
    "dtype twice": (
        file_bytes(None, 4, text=b'{"a": {"dtype": "I8", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'),
        "twice",
    ),
    "many keys, the last twice": (
        file_bytes(None, text=b"{" + b", ".join(b'"%d": 1' % n for n in [*range(50_000), 49_999]) + b"}"), "twice",
    ),
    # Entries.
    "entry is null": (file_bytes({"a": None}, 0), "not described"),
    "entry is a list": (file_bytes({"a": [1]}, 0), "not described"),
    "entry without dtype": (file_bytes({"a": {"shape": [4], "data_offsets": [0, 16]}}, 16), "not described"),
    "entry without shape": (file_bytes({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, 16), "not described"),
    "entry without offsets": (file_bytes({"a": {"dtype": "F32", "shape": [4]}}, 16), "not described"),
    "entry with an unknown field": (file_bytes({"a": {**_A, "strides": [1]}}, 16), "not described"),
    "metadata is a list": (file_bytes({"__metadata__": [], "a": _A}, 16), "not strings"),
    "metadata holds a number": (file_bytes({"__metadata__": {"x": 1}, "a": _A}, 16), "not strings"),
    "dtype unknown": (file_bytes({"a": entry(0, 16, [4], "F31")}, 16), "dtype"),
    "dtype lower case": (file_bytes({"a": entry(0, 16, [4], "f32")}, 16), "dtype"),
    "dtype is a number": (file_bytes({"a": entry(0, 16, [4], 32)}, 16), "dtype"),
    "dtype is a list": (file_bytes({"a": entry(0, 16, [4], ["F32"])}, 16), "dtype"),
    "shape is a number": (file_bytes({"a": {**_A, "shape": 4}}, 16), "shape"),
    "shape is negative": (file_bytes({"a": entry(0, 16, [-4])}, 16), "shape"),
    "shape is two negatives": (file_bytes({"a": entry(0, 16, [-2, -2])}, 16), "shape"),
    "shape is fractional": (file_bytes({"a": entry(0, 16, [4.0])}, 16), "shape"),
    "shape is true": (file_bytes({"a": entry(0, 4, [True])}, 4), "shape"),
    "shape is text": (file_bytes({"a": entry(0, 16, ["4"])}, 16), "shape"),
    "shape wraps round 2^64": (file_bytes({"a": entry(0, 16, [4, 1 << 32, 1 << 32])}, 16), "covers"),
    "shape has 100,000 axes": (file_bytes({"a": entry(0, 4, [1] * 100_000)}, 4), "shape"),
    "shape smaller than its bytes": (file_bytes({"a": entry(0, 16, [3])}, 16), "covers"),
    "shape larger than its bytes": (file_bytes({"a": entry(0, 16, [5])}, 16), "covers"),
    "offsets are one number": (file_bytes({"a": {**_A, "data_offsets": [0]}}, 16), "data_offsets"),
    "offsets are three numbers": (file_bytes({"a": {**_A, "data_offsets": [0, 16, 16]}}, 16), "data_offsets"),
    "offsets are reversed": (file_bytes({"a": {**_A, "data_offsets": [16, 0]}}, 16), "covers"),
    "offsets are negative": (file_bytes({"a": {**_A, "data_offsets": [-16, 0]}}, 16), "data_offsets"),
    "offsets are fractional": (file_bytes({"a": {**_A, "data_offsets": [0.0, 16.0]}}, 16), "data_offsets"),
    "offsets of 2^63": (file_bytes({"a": {**_A, "data_offsets": [1 << 63, (1 << 63) + 16]}}, 16), "data_offsets"),
    "offset beyond the file": (file_bytes({"a": entry(0, 16), "b": entry(4096, 4112)}, 32), "gap"),
    "tensors overlap": (file_bytes({"a": entry(0, 16), "b": entry(8, 24)}, 24), "overlaps"),
    "tensors coincide": (file_bytes({"a": entry(0, 16), "b": entry(0, 16)}, 16), "overlaps"),
    "gap between tensors": (file_bytes({"a": entry(0, 16), "b": entry(20, 36)}, 36), "gap"),
    "gap before the first": (file_bytes({"a": entry(4, 20)}, 20), "gap"),
    "no tensors but data": (file_bytes({}, 48), "describes"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file_is_refused_in_one_clear_line_within_a_second(name: str, tmp_path: Path) -> None:
    data, expected = MALFORMED[name]
    (tmp_path / "model.safetensors").write_bytes(data)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=expected) as caught:
        DirectorySource(ModelDirectory.at(tmp_path))
    assert time.process_time() - start < 1.0
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    assert "model.safetensors" in message


def test_there_are_enough_cases_and_the_good_file_loads(tmp_path: Path) -> None:
    assert len(MALFORMED) >= 40
    (tmp_path / "model.safetensors").write_bytes(file_bytes(GOOD_HEADER))
    assert DirectorySource(ModelDirectory.at(tmp_path)).info("b").shape == (2, 4)


def test_header_over_the_limit_is_not_even_read(tmp_path: Path) -> None:
    entries = b", ".join(b'"%d": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(150_000))
    (tmp_path / "model.safetensors").write_bytes(file_bytes(None, 0, text=b"{" + entries + b"}"))
    with pytest.raises(CheckpointError, match="more shards"):
        DirectorySource(ModelDirectory.at(tmp_path))


@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 60),
)
def test_damaged_bytes_load_as_a_consistent_file_or_are_refused(edits: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(file_bytes(GOOD_HEADER))
    for position, byte in edits:
        data[position % len(data)] = byte
    data = data[: len(data) - cut]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(data)
        try:
            source = DirectorySource(ModelDirectory.at(Path(folder)))
        except CheckpointError:
            return
        for name in source.names():
            info = source.info(name)
            if info.dtype in FLOAT_DTYPES:
                assert source.read(name, info.whole).shape == info.shape
        source.close()


_PROBE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from phalanx.checkpoints.directory import DirectorySource
from phalanx.checkpoints.dtypes import FLOAT_DTYPES
from phalanx.checkpoints.files import ModelDirectory
from phalanx.parallel.errors import CheckpointError

root = Path(sys.argv[2])
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in sorted(root.iterdir()):
    try:
        DirectorySource(ModelDirectory.at(folder))
    except CheckpointError:
        pass
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
outside = [path for path in opened if not path.startswith(str(root))]
print(growth // 1024, len(opened), outside)
"""


def test_malformed_files_cost_little_memory_and_open_nothing_outside(tmp_path: Path) -> None:
    for number, (data, _) in enumerate(MALFORMED.values()):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "model.safetensors").write_bytes(data)
    root = str(Path(__file__).resolve().parents[2])
    result = subprocess.run(
        [sys.executable, "-c", "import launch;" + _PROBE, root, str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=True, cwd=root,
    )  # fmt: skip
    growth, opened, outside = result.stdout.split(maxsplit=2)
    assert int(growth) < 64, "MiB of resident memory"
    assert int(opened) >= len(MALFORMED)
    assert outside.strip() == "[]"
