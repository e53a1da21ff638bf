"""Slices out of files equal NumPy's, whatever the shape, and cost no more reading than they should."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from phalanx.checkpoints import slices
from phalanx.checkpoints.directory import DirectorySource
from phalanx.checkpoints.dtypes import to_float32
from phalanx.checkpoints.files import ModelDirectory
from phalanx.checkpoints.source import TensorInfo
from phalanx.parallel.errors import CheckpointError
from tests.checkpoints.safetensors_bytes import file_bytes


def open_single(directory: Path, tensors: dict[str, Any]) -> DirectorySource:
    save_file(tensors, directory / "model.safetensors")
    return DirectorySource(ModelDirectory.at(directory))


@st.composite
def shapes_and_indexes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    index = []
    for extent in shape:
        start = draw(st.integers(0, extent))
        index.append(slice(start, draw(st.integers(start, extent))))
    return tuple(shape), tuple(index)


@given(case=shapes_and_indexes(), through=st.sampled_from([0, 8, 8192]))
def test_any_slice_equals_numpy(case: tuple[tuple[int, ...], tuple[slice, ...]], through: int) -> None:
    shape, index = case
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    descriptor = os.memfd_create("tensor")
    try:
        os.write(descriptor, b"12345678" + whole.tobytes())
        expected = whole[index]
        out = np.full(expected.shape, np.nan, np.float32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slices, "READ_THROUGH_BYTES", through)
            patch.setattr(slices, "SCRATCH_BYTES", 64)
            slices.read_slice(descriptor, 8, shape, index, out, "test")
    finally:
        os.close(descriptor)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("index", "most_bytes"),
    [
        ((slice(3, 5), slice(0, 20_000)), 2 * 80_000),
        ((slice(0, 50), slice(100, 200)), 50 * 400),
        ((slice(7, 8), slice(5, 6)), 4),
    ],
)
def test_only_the_slice_is_read(index: Any, most_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(50, 20_000)).astype(np.float32)
    source = open_single(tmp_path, {"w": values})
    count = 0
    real = os.preadv

    def counting(descriptor: int, buffers: Any, offset: int) -> int:
        nonlocal count
        done = real(descriptor, buffers, offset)
        count += done
        return done

    monkeypatch.setattr(os, "preadv", counting)
    np.testing.assert_array_equal(source.read("w", index), values[index])
    source.close()
    assert count == most_bytes


def test_result_aliases_the_buffer_that_was_given(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    source = open_single(tmp_path, {"w": values})
    buffer = np.zeros(100, np.uint8)
    result = source.read("w", (slice(0, 3), slice(1, 3)), buffer)
    source.close()
    assert np.shares_memory(result, buffer)
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, values[:, 1:3])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("F32", np.float32),
        ("F16", np.float16),
        ("BF16", ml_dtypes.bfloat16),
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E5M2", ml_dtypes.float8_e5m2),
    ],
)
def test_every_stored_format_widens_exactly(name: str, dtype: Any, tmp_path: Path) -> None:
    if np.dtype(dtype).itemsize == 4:
        values = np.array([0.0, -0.0, 1.5, np.inf, -np.inf, np.nan, 1e-45, 3e38], np.float32)
    else:
        bits = np.arange(1 << (8 * np.dtype(dtype).itemsize), dtype=f"u{np.dtype(dtype).itemsize}")
        values = bits.view(dtype)
    header = {"w": {"dtype": name, "shape": [len(values)], "data_offsets": [0, values.nbytes]}}
    (tmp_path / "model.safetensors").write_bytes(file_bytes(header, values.tobytes()))
    source = DirectorySource(ModelDirectory.at(tmp_path))
    assert source.info("w") == TensorInfo((len(values),), name)
    read = source.read("w", (slice(0, len(values)),))
    source.close()
    assert read.dtype == np.dtype(dtype)
    wide = to_float32(read, np.empty(read.shape, np.float32))
    with np.errstate(invalid="ignore"):  # signalling NaNs are among them
        expected = values.astype(np.float64).astype(np.float32)
    np.testing.assert_array_equal(wide, expected)


def test_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    source = open_single(tmp_path, {"w": np.zeros((100, 100), np.float32)})
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match=r"'model\.safetensors' ended at byte 1000"):
        source.read("w", (slice(0, 100), slice(0, 100)))
    source.close()
