"""The all-reduce through shared memory, emulated: ranks are processes that map the same files in place of GPUs' memory."""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.kernels.all_reduce import ABSENT_BYTE, Exchange, Launch, all_reduce, choose_launch, fits
from phalanx.kernels.all_reduce_sizes import exchange_bytes
from phalanx.parallel.errors import ExecutorError
from tests.support.fake_cupy import FakeArray

from .devices import DTYPES
from .emulation import EmulatedLibrary
from .tolerance import assert_close

TIMEOUT_SECONDS = 240
SIZES = (4, 8, 300, 4, 1000, 52, 12, 700, 700, 4)  # elements; in float32 1 to 250 vectors
MOST_BYTES = 4096
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload([__name__])  # thirty-five ranks import it once
LAUNCHES = tuple(Launch(two_shot, blocks, 32) for two_shot in (False, True) for blocks in (1, 3))


def values(dtype: Any, call: int, rank: int) -> np.ndarray:
    """What a rank brings to a call: normal numbers, and in some the words that mean "not there yet"."""
    count = SIZES[call % len(SIZES)] * 4 // dtype.itemsize - call % 4  # not always whole vectors
    array = np.random.default_rng((call, rank)).standard_normal(count).astype(dtype)
    if call % 3 == 1 and array.nbytes >= 4:
        words = array.view(np.uint8)[: array.nbytes // 4 * 4].view(np.uint32)
        words[rank % len(words)] = 0xFFFFFFFF
    return array


def exchange_on_files(folder: Path, rank: int, num_ranks: int) -> Exchange:
    buffers = [np.memmap(folder / f"buffers-{peer}", np.uint8, "r+") for peer in range(num_ranks)]
    abort = np.memmap(folder / "abort", np.uint32, "r+")
    capacity = len(buffers[0]) // 32
    addresses = tuple(buffer.ctypes.data for buffer in buffers)
    exchange = Exchange(rank, addresses, capacity, np.zeros(2, np.uint32), abort.ctypes.data)
    KEPT.extend([*buffers, abort])
    return exchange


KEPT: list[np.ndarray] = []  # what an exchange only knows the address of


def create_files(folder: Path, num_ranks: int) -> None:
    for rank in range(num_ranks):
        num_bytes = 2 * 2 * (num_ranks - 1) * MOST_BYTES
        (folder / f"buffers-{rank}").write_bytes(bytes([ABSENT_BYTE]) * num_bytes)
    (folder / "abort").write_bytes(bytes(4))


def run_rank(folder: Path, cache: Path, rank: int, num_ranks: int, dtype_name: str) -> None:
    exchange, library = exchange_on_files(folder, rank, num_ranks), EmulatedLibrary(cache)
    results = []
    try:
        for call in range(2 * len(SIZES)):
            x = values(DTYPES[dtype_name], call, rank).view(FakeArray)
            all_reduce(library, x, exchange, LAUNCHES[call % len(LAUNCHES)])
            results.append(np.array(x).view(np.uint8))
        np.save(folder / f"result-{rank}.npy", np.concatenate(results))
    except BaseException:
        KEPT[-1][0] = 1  # the others wait for this rank
        raise


@pytest.fixture(scope="module")
def cache(request: pytest.FixtureRequest) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    return request.config.cache.mkdir("emulated-kernels")


@pytest.mark.parametrize(
    ("num_ranks", "dtype_name"),
    [
        (2, "float16"), (3, "float32"), (4, "bfloat16"), (5, "float16"), (6, "float32"), (7, "bfloat16"), (8, "bfloat16"),
    ],
)  # fmt: skip
def test_ranks_get_the_same_sums_call_after_call(cache: Path, tmp_path: Path, num_ranks: int, dtype_name: str) -> None:
    create_files(tmp_path, num_ranks)
    ranks = [
        FORK_SERVER.Process(target=run_rank, args=(tmp_path, cache, rank, num_ranks, dtype_name), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(TIMEOUT_SECONDS)
    assert [process.exitcode for process in ranks] == [0] * num_ranks
    results = [np.load(tmp_path / f"result-{rank}.npy") for rank in range(num_ranks)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    assert_sums(results[0], DTYPES[dtype_name], num_ranks)
    for rank in range(num_ranks):
        buffers = np.fromfile(tmp_path / f"buffers-{rank}", np.uint8)
        assert (buffers == ABSENT_BYTE).all(), "a slot was not emptied"


def assert_sums(result: np.ndarray, dtype: Any, num_ranks: int) -> None:
    """Against float64; a NaN is a NaN, whichever rank it came from."""
    parts = [
        [values(dtype, call, rank).astype(np.float64) for rank in range(num_ranks)] for call in range(2 * len(SIZES))
    ]
    ends = list(itertools.accumulate(len(part[0]) for part in parts))
    assert len(result) == ends[-1] * dtype.itemsize
    for got, part in zip(np.split(result.view(dtype), ends[:-1]), parts, strict=True):
        reference = np.sum(part, axis=0)
        is_number = ~np.isnan(reference)
        np.testing.assert_array_equal(np.isnan(got.astype(np.float64)), ~is_number)
        if is_number.any():
            magnitude = np.nanmax(np.sum(np.abs(part), axis=0))
            assert_close(got[is_number], reference[is_number], magnitude)


def test_a_rank_whose_peers_are_gone_ends_when_it_is_aborted(cache: Path, tmp_path: Path) -> None:
    create_files(tmp_path, 2)
    np.memmap(tmp_path / "abort", np.uint32, "r+")[0] = 1
    exchange = exchange_on_files(tmp_path, 1, 2)
    for launch in LAUNCHES[::2]:
        all_reduce(EmulatedLibrary(cache), np.ones(8, np.float16).view(FakeArray), exchange, launch)


def test_a_message_that_does_not_fit_is_refused(cache: Path) -> None:
    exchange = Exchange(0, (256, 512), 64, np.zeros(2, np.uint32), 0)
    for count, dtype, fitting in [
        (512, np.float16, True), (520, np.float16, False), (6, np.float16, True), (0, np.float16, False),
        (4, np.int32, False), (4, np.float64, False), (4, np.float32, True),
    ]:  # fmt: skip
        assert fits(np.zeros(count, dtype).view(FakeArray), exchange) is fitting, (count, dtype)
    with pytest.raises(ExecutorError, match=r"takes 65 vectors of 16 bytes, of which 64 fit"):
        all_reduce(EmulatedLibrary(cache), np.zeros(520, np.float16).view(FakeArray), exchange)


@pytest.mark.parametrize("num_ranks", range(2, 9))
def test_buffers_hold_every_message_up_to_the_limit_in_the_way_that_is_chosen(num_ranks: int) -> None:
    most_bytes = 8 << 20
    exchange = Exchange(0, (0,) * num_ranks, exchange_bytes(num_ranks, most_bytes) // 32, np.zeros(2, np.uint32), 0)
    both = set()
    for num_bytes in [*range(16, 4 << 20, 16 * 997), most_bytes]:
        launch = choose_launch(num_bytes // 16, num_ranks, 132)
        both.add(launch.two_shot)
        assert 1 <= launch.num_blocks <= 132
        assert fits(np.empty(num_bytes // 4, np.float32).view(FakeArray), exchange)
    assert both == {False, True}
    assert not fits(np.empty((most_bytes + 16 * num_ranks) // 4, np.float32).view(FakeArray), exchange)
