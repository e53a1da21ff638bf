"""Dummy weights: the documented formula, the same values in every slice and layout, sane magnitudes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.checkpoints.dummy import DummySlice, DummySource
from phalanx.checkpoints.loader import load_weights
from phalanx.checkpoints.sinks import NumpySink
from phalanx.checkpoints.source import Index
from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.models import find_model
from tests.support.checkpoints import CASES_BY_NAME

_MASK = (1 << 32) - 1


def mix(h: int) -> int:
    h ^= h >> 16
    h = h * 0x7FEB352D & _MASK
    h ^= h >> 15
    h = h * 0x846CA68B & _MASK
    return h ^ h >> 16


def value(seed: int, name: str, flat: int, mean: float, width: float) -> np.float32:
    """The documented formula in Python integers."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    key0, key1 = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    return np.float32(mean) + np.float32(width) * uniform(flat, key0, key1)


def uniform(flat: int, key0: int, key1: int) -> np.float32:
    h = mix((flat & _MASK) ^ key0)
    h = mix(h + ((flat >> 32) ^ key1) & _MASK)
    return np.float32(((h >> 8) - (1 << 23)) / (1 << 23))


def source_of(shape: tuple[int, ...], dtype: str = "F32", name: str = "layers.0.w", seed: int = 3) -> DummySource:
    return DummySource(seed, dtype).declared([WeightSpec("w", (Part(name, shape),))])


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_values_follow_the_documented_formula(dtype: str) -> None:
    source = source_of((5, 7), dtype)
    values = source.read("layers.0.w", (slice(0, 5), slice(0, 7)))
    width = np.float32(0.02 * np.sqrt(3.0))
    expected = np.array([value(3, "layers.0.w", i, 0.0, width) for i in range(35)], np.float32).reshape(5, 7)
    np.testing.assert_array_equal(values.astype(np.float32), expected.astype(values.dtype).astype(np.float32))


def test_index_beyond_32_bits_follows_the_formula() -> None:
    start = (1 << 33) + 5
    dummy = DummySlice(1, 2, 0.0, 1.0, "F32", (1 << 34,), (slice(start, start + 3),))
    expected = [uniform(start + i, 1, 2) for i in range(3)]
    np.testing.assert_array_equal(dummy.values(), np.array(expected, np.float32))


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    fractions=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_any_slice_alone_equals_the_slice_of_the_whole(
    shape: tuple[int, int], fractions: tuple[float, float, float, float]
) -> None:
    source = source_of(shape)
    rows = sorted(int(part * shape[0]) for part in fractions[:2])
    columns = sorted(int(part * shape[1]) for part in fractions[2:])
    index: Index = (slice(*rows), slice(*columns))
    whole = source.read("layers.0.w", (slice(0, shape[0]), slice(0, shape[1])))
    np.testing.assert_array_equal(source.read("layers.0.w", index), whole[index])


def test_slices_larger_than_one_block_are_seamless() -> None:
    source = source_of((3, 200_000))
    whole = source.read("layers.0.w", (slice(0, 3), slice(0, 200_000)))
    for column in (0, 65_535, 65_536, 131_072, 199_999):
        part = source.read("layers.0.w", (slice(0, 3), slice(column, column + 1)))
        np.testing.assert_array_equal(part, whole[:, column : column + 1])


def test_matrices_look_like_an_initialisation() -> None:
    source = source_of((400, 500))
    values = source.read("layers.0.w", (slice(0, 400), slice(0, 500)))
    assert abs(values.mean()) < 5e-4
    assert values.std() == pytest.approx(0.02, rel=0.01)
    neighbours = np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 0.01


def test_names_and_seeds_give_different_values() -> None:
    reads = [
        source_of((8, 8), name=name, seed=seed).read(name, (slice(0, 8), slice(0, 8)))
        for name, seed in (("a.w", 0), ("b.w", 0), ("a.w", 1))
    ]
    assert not any(np.array_equal(reads[i], reads[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize(("name", "low", "high"), [("x.norm.weight", 0.25, 0.75), ("x.bias", -0.02, 0.02)])
def test_vectors_are_drawn_by_their_role(name: str, low: float, high: float) -> None:
    values = source_of((4096,), name=name).read(name, (slice(0, 4096),))
    assert low <= values.min() < low + 0.05 * (high - low)
    assert high - 0.05 * (high - low) < values.max() <= high


@pytest.mark.parametrize("case", ["llama-grouped-heads", "gpt2-plain", "gemma-one-kv-head"])
def test_every_layout_gets_the_same_weights(case: str, tmp_path: Path) -> None:
    raw = CASES_BY_NAME[case].config | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = find_model(raw)
    specs = model.weights(model.read_config(raw))
    whole = open_checkpoint(tmp_path, "dummy", seed=7).source
    assert isinstance(whole, DummySource)
    whole = whole.declared(specs)
    save_file(
        {name: whole.read(name, whole.info(name).whole) for name in whole.names()}, tmp_path / "model.safetensors"
    )
    for rank, size in ((0, 1), (0, 2), (1, 2), (3, 4)):
        generated, stored = (load(specs, tmp_path, kind, rank, size) for kind in ("dummy", "auto"))
        assert generated.keys() == stored.keys()
        for name, values in stored.items():
            np.testing.assert_array_equal(generated[name], values, err_msg=name)


def load(
    specs: list[WeightSpec], path: Path, kind: Literal["dummy", "auto"], rank: int, size: int
) -> dict[str, np.ndarray]:
    sink = NumpySink()
    with open_checkpoint(path, kind, seed=7) as checkpoint:
        load_weights(checkpoint.source, specs, rank, size, sink)
    return sink.weights


def test_dummy_needs_config_only_and_refuses_an_unknown_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "int8"}')
    with pytest.raises(ConfigError, match="int8"):
        open_checkpoint(tmp_path, "dummy", seed=0)
