"""What each rank of `test_all_reduce` does: ``mpirun -n R python -m tests.gpu.all_reduce_ranks CHECK``."""

from __future__ import annotations

import sys
import traceback
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import cupy
import ml_dtypes
import numpy as np

import launch  # noqa: F401  makes phalanx importable from a checkout
from phalanx.kernels.all_reduce import Launch, all_reduce
from phalanx.kernels.all_reduce_sizes import MOST_BYTES
from phalanx.kernels.library import KernelLibrary
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import CommunicatorError
from phalanx.parallel.mpi_comm import abort_world, world_communicator
from phalanx.parallel.nccl_comm import wait_for
from phalanx.runtime.executors.cuda.all_reduce import PeerAllReduce, PeerCommunicator, open_peer_all_reduce

DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SHORT_SIZES = (16, 8192, 48, 4, 8190, 65536 + 16, 8192 - 16, 16, 262144, (1 << 20) - 16, 112, (1 << 20) + 48, 65536)
LONG_SIZES = (2 << 20, 16, (8 << 20) + 16, MOST_BYTES, 8192)
NUM_REPLAYS = 1000

# Small whole numbers, so that sums are exact in every type; each rank in turn is late.
PROGRAM = cupy.RawModule(
    code="""
#include <cuda_fp16.h>
__device__ int value(int i, int rank, int step) { return (i + 3 * rank + step * (1 + i % 5)) % 16; }
extern "C" __global__ void fill(SCALAR* x, int size, const int* step, int rank, int num_ranks) {
    if (*step % (num_ranks + 1) == rank) for (long long start = clock64(); clock64() - start < 30000;) {}
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x)
        x[i] = static_cast<SCALAR>(static_cast<float>(value(i, rank, *step)));
}
extern "C" __global__ void compare(const SCALAR* x, int size, const int* step, int num_ranks, int* wrong) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
        int sum = 0;
        for (int rank = 0; rank < num_ranks; ++rank) sum += value(i, rank, *step);
        if (static_cast<float>(x[i]) != static_cast<float>(sum)) atomicAdd(wrong, 1);
    }
}
extern "C" __global__ void advance(int* step) { ++*step; }
""".replace("SCALAR", "__half"),
)


def upload(array: np.ndarray) -> Any:
    """On the current stream: an ordinary copy may return before its last 64 KiB have arrived, and this stream does not wait for it."""
    stream, memory = cupy.cuda.get_current_stream(), cupy.cuda.alloc(array.nbytes)
    memory.copy_from_host_async(array.ctypes.data, array.nbytes, stream)
    stream.synchronize()
    return cupy.ndarray(array.shape, array.dtype, memory)


def download(array: Any) -> np.ndarray:
    cupy.cuda.get_current_stream().synchronize()
    host = np.empty(array.shape, array.dtype)
    array.data.copy_to_host(host.ctypes.data, host.nbytes)
    return host


def assert_sums(
    comm: Communicator, sizes: tuple[int, ...], sum_up: Callable[[Any], object], rounds_each_hop: bool = False
) -> None:
    """Against float64, and bit by bit the same on all ranks. NCCL rounds a sum to its type whenever it passes it on."""
    digests = []
    for number, num_bytes in enumerate(sizes):
        for dtype in DTYPES if num_bytes < 4 << 20 else DTYPES[number % 3 :][:1]:
            count = num_bytes // dtype.itemsize
            parts = [
                np.random.default_rng((number, rank)).standard_normal(count, np.float32).astype(dtype)
                for rank in range(comm.size)
            ]
            x = upload(parts[comm.rank])
            sum_up(x)
            result = download(x)
            wide = [part.astype(np.float64) for part in parts]
            reference, magnitude = np.sum(wide, axis=0), np.sum(np.abs(wide), axis=0)
            # Float32 sums of R numbers err by (R - 1) 2^-24 of the magnitudes at most; then one rounding.
            rounded = (comm.size - 1) * magnitude if rounds_each_hop else np.abs(reference)
            limit = comm.size * 2.0**-24 * magnitude + 1.01 * ROUNDING[dtype.name] * rounded
            error = np.abs(result.astype(np.float64) - reference)
            assert np.all(error <= limit), f"{dtype} {num_bytes} B: {np.argmax(error - limit)}, {np.max(error - limit)}"
            digests.append(zlib.crc32(result.view(np.uint8)))
    gathered = comm.all_gather(np.array(digests, np.int64))
    assert (gathered == gathered[0]).all(), "ranks differ"


def assert_replays(comm: Communicator, sum_up: Callable[[Any], object], num_replays: int) -> None:
    """Sums of changing values, sizes interleaved, in one graph."""
    fill, compare, advance = (PROGRAM.get_function(name) for name in ("fill", "compare", "advance"))
    step, wrong = cupy.zeros(1, np.int32), cupy.zeros(1, np.int32)
    arrays = [cupy.empty(num_bytes // 2, np.float16) for num_bytes in (8192, 16, 131072, (1 << 20) + 48, 8192, 65536)]
    rank, num_ranks = np.int32(comm.rank), np.int32(comm.size)

    def program() -> None:
        advance((1,), (1,), (step,))
        for x in arrays:
            fill((8,), (256,), (x, np.int32(x.size), step, rank, num_ranks))
            sum_up(x)
            compare((8,), (256,), (x, np.int32(x.size), step, num_ranks, wrong))

    stream = cupy.cuda.get_current_stream()
    program()
    stream.synchronize()
    stream.begin_capture()
    program()
    graph = stream.end_capture()
    for _ in range(num_replays):
        graph.launch(stream)
    stream.synchronize()
    assert int(step[0]) == num_replays + 1
    assert int(wrong[0]) == 0, f"{int(wrong[0])} wrong values"


def check_own(comm: Communicator, library: KernelLibrary) -> None:
    """Our kernels alone, one GPU a rank."""
    peers = open_own(comm, library)
    assert_sums(comm, SHORT_SIZES + LONG_SIZES, peers)
    assert_replays(comm, peers, NUM_REPLAYS)
    for two_shot in (False, True):  # whichever is chosen for so many ranks
        shape = Launch(two_shot, 33, 256)
        assert_sums(comm, SHORT_SIZES, partial(all_reduce, library, exchange=peers.exchange, launch=shape))
        assert_replays(comm, partial(all_reduce, library, exchange=peers.exchange, launch=shape), NUM_REPLAYS)
    peers.close()


def check_shared(comm: Communicator, library: KernelLibrary) -> None:
    """More ranks than GPUs: they take turns on a GPU, so few and short."""
    peers = open_own(comm, library)
    assert_sums(comm, (16, 8192, 262144 + 16, 48, (2 << 20) + 16), peers)
    peers.close()


def check_group(comm: Communicator, library: KernelLibrary) -> None:
    """What the executor uses: NCCL takes what is longer than our buffers, or of another type."""
    group = PeerCommunicator(library, comm.split(range(comm.size)))
    assert group._peers is not None
    assert_sums(comm, (16, 8192, 6, 8190), group.all_reduce)
    assert_sums(comm, (MOST_BYTES + 16 * comm.size,) * 3, group.all_reduce, rounds_each_hop=True)
    x = cupy.full(5, comm.rank + 1, np.int32)
    assert download(group.all_reduce(x)).tolist() == [comm.size * (comm.size + 1) // 2] * 5
    group.close()


def check_lost_peer(comm: Communicator, library: KernelLibrary) -> None:
    """Rank 0 does not come to the last call."""
    group = PeerCommunicator(library, comm.split(range(comm.size)))
    x = cupy.ones(4096, np.float16)
    group.all_reduce(x)
    if comm.rank:
        for _ in range(3):
            group.all_reduce(x)
    event = cupy.cuda.Event()
    event.record()
    try:
        wait_for(event, [group], 2.0)
        assert comm.rank == 0, "nobody was waited for"
    except CommunicatorError:
        assert comm.rank, "rank 0 waited for nobody"
        event.synchronize()
    comm.barrier()
    if comm.rank == 0:
        group.abort()
    group.close()


def open_own(comm: Communicator, library: KernelLibrary) -> PeerAllReduce:
    peers = open_peer_all_reduce(library, comm)
    assert not isinstance(peers, str), peers
    return peers


CHECKS = {"own": check_own, "shared": check_shared, "group": check_group, "lost_peer": check_lost_peer}


def main() -> None:
    """Run the checks that the command line names."""
    comm = world_communicator()
    device = cupy.cuda.Device(comm.rank % cupy.cuda.runtime.getDeviceCount())
    device.use()
    with device, cupy.cuda.Stream(non_blocking=True):
        for name in sys.argv[1:]:
            CHECKS[name](comm, KernelLibrary())
            comm.barrier()
            if comm.rank == 0:
                print(f"{name}: {comm.size} ranks passed", flush=True)
    comm.close()


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        abort_world(1)  # the others wait on their devices
        raise
