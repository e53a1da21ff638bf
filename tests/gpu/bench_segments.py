"""Time of TensorRT 8.6's segments of one model alone, in CUDA graphs: what a step takes less attention, sums and copies.

    python -m tests.gpu.bench_segments ENGINE_DIR MODEL_DIR [--tokens 1,8,64,256,2048]

``ENGINE_DIR`` was made by ``launch.build`` for one rank. Prints microseconds of all segments of a step by number of tokens, and the
gigabytes per second at which their weights are read.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import launch  # noqa: F401 (makes phalanx importable from a checkout)
from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.parallel.topology import Layout, Topology
from phalanx.runtime.executors.tensorrt.engine_directory import EngineDirectory
from phalanx.runtime.executors.tensorrt.installed import load_tensorrt
from phalanx.runtime.executors.tensorrt.library8 import TensorRT8
from phalanx.runtime.executors.tensorrt.segments.plans import digest, profile_sizes, read_plans
from phalanx.runtime.executors.tensorrt.segments.program import SegmentCall
from phalanx.runtime.executors.tensorrt.segments.programs import rank_programs
from phalanx.runtime.executors.tensorrt.segments.runner import DeviceSegments
from phalanx.runtime.models import find_model

REPEATS = 20


def main() -> None:
    """Time each different segment, and add up those of a step."""
    import cupy

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", default="1,8,64,256,2048")
    args = parser.parse_args()
    directory = EngineDirectory.existing(args.engines)
    shape, library = directory.read_shape(), load_tensorrt()
    assert isinstance(library, TensorRT8), library.name
    with open_checkpoint(args.model, "dummy") as checkpoint:
        model = find_model(checkpoint.config)
        config = model.read_config(checkpoint.config)
        programs = rank_programs(model, config, checkpoint.formats, Topology(Layout()))
    path = next(args.engines.glob("*_rank0.engine"))
    names = {segment: digest(segment) for segment in programs.segments}
    plans = read_plans(path, names.values())
    sizes = profile_sizes(shape.max_num_seqs, shape.max_prefill_tokens)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        runner = DeviceSegments(
            library, {segment: plans[name] for segment, name in names.items()}, programs.calls, sizes
        )
        assert programs.head is not None
        steps = [*programs.blocks.steps, *programs.head.steps]
        calls = Counter(step.segment for step in steps if isinstance(step, SegmentCall))
        call_of = {step.segment: step for step in steps if isinstance(step, SegmentCall)}
        for tokens in (count for count in map(int, args.tokens.split(",")) if count <= sizes[-1]):
            times = {
                segment: _microseconds(runner, call_of[segment], tokens, shape.numpy_dtype, stream) for segment in calls
            }
            total = sum(times[segment] * count for segment, count in calls.items())
            most = calls.most_common(1)[0][0]
            num_bytes = sum(int(np.prod(extents)) for _, extents in most.weights) * shape.numpy_dtype.itemsize
            print(
                f"{tokens} tokens: {total:,.0f} us a step; the commonest segment {times[most]:,.1f} us, its weights at "
                f"{num_bytes / times[most] / 1e3:,.0f} GB/s",
                flush=True,
            )


def _microseconds(runner: DeviceSegments, call: SegmentCall, tokens: int, dtype: np.dtype[Any], stream: Any) -> float:
    import cupy

    def array(*extents: int) -> Any:
        count = int(np.prod(extents))
        values = (cupy.arange(count, dtype=cupy.uint32) * cupy.uint32(2654435761) >> cupy.uint32(16)) & cupy.uint32(
            0xFFFF
        )
        return ((values.astype(cupy.float32) / 65535 - 0.5) * 0.05).astype(dtype).reshape(extents)

    segment = call.segment
    weights = [array(*extents) for _, extents in segment.weights]
    inputs = [array(tokens, width) for width in segment.widths]
    outputs = [cupy.empty((tokens, value.width), dtype) for value in segment.outputs]
    runner.run(call, inputs, weights, outputs)
    stream.synchronize()
    stream.begin_capture()
    runner.run(call, inputs, weights, outputs)
    graph = stream.end_capture()
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    graph.launch(stream)
    start.record(stream)
    for _ in range(REPEATS):
        graph.launch(stream)
    end.record(stream)
    end.synchronize()
    elapsed: float = cupy.cuda.get_elapsed_time(start, end) / REPEATS * 1e3
    return elapsed


if __name__ == "__main__":
    main()
