# SPDX-License-Identifier: Apache-2.0
"""Building segments, and the file that holds a rank's: as many plans as it has different segments.

``<model>_<dtype>_tp<T>_pp<P>_rank<R>.engine`` is eight bytes (little-endian length of the header), a JSON header that gives
each segment's place by its digest, and the plans one after the other.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phalanx.parallel.errors import ConfigError, ExecutorError
from phalanx.runtime.executors.tensorrt.graph import Graph
from phalanx.runtime.executors.tensorrt.library8 import TensorRT8
from phalanx.runtime.executors.tensorrt.log import BuildLog
from phalanx.runtime.executors.tensorrt.segments.lowering import input_name, write_segment
from phalanx.runtime.executors.tensorrt.segments.program import Segment

__all__ = ["SegmentBuilder", "digest", "profile_sizes", "read_plans", "write_plans"]

_FEW, _SOME = 8, 64
"""Tokens up to which decoding has separate profiles: kernels for one token are not those for many."""


def digest(segment: Segment) -> str:
    """A name for the segment in files."""
    return hashlib.blake2b(repr(segment).encode(), digest_size=8).hexdigest()


def profile_sizes(max_num_seqs: int, max_num_tokens: int) -> tuple[int, ...]:
    """The largest numbers of tokens of an engine's profiles, ascending; each starts after the one before."""
    return tuple(sorted({min(size, max_num_tokens) for size in (_FEW, _SOME, max_num_seqs, max_num_tokens)}))


class SegmentBuilder:
    """Builds segments one by one, with one timing cache.

    Args:
        sizes: of the profiles.
        timings: a serialised timing cache; empty = none.

    Raises:
        ConfigError: there is no GPU that the library supports.
    """

    def __init__(self, library: TensorRT8, dtype: np.dtype[Any], sizes: Sequence[int], timings: bytes) -> None:
        self._library, self._dtype, self._sizes = library, dtype, sizes
        self._log = BuildLog()
        logger = library.logger(self._log)
        self._log.keep_alive(logger)
        self.timings = timings
        self.num_layers = 0
        try:
            self._builder = library.module.Builder(logger)
        except Exception as error:
            raise ConfigError(
                f"{library.name} cannot build engines on this machine: {self._log.cause() or error}; it needs a GPU and its driver"
            ) from error

    def build(self, segment: Segment) -> bytes:
        """The plan of one segment.

        Raises:
            ExecutorError: TensorRT failed; the message gives what it logged.
        """
        library = self._library
        graph = Graph(library, library.create_network(self._builder))  # it keeps constants until the engine is built
        write_segment(graph, segment, self._dtype)
        config = self._builder.create_builder_config()
        library.configure_types(config, self._dtype)
        for smallest, largest in zip((0, *self._sizes[:-1]), self._sizes, strict=True):
            profile = self._builder.create_optimization_profile()
            for index, width in enumerate(segment.widths):
                profile.set_shape(input_name(index), (smallest + 1, width), (largest, width), (largest, width))
            config.add_optimization_profile(profile)
        library.set_timing_cache(config, self.timings)
        plan = self._builder.build_serialized_network(graph.network, config)
        if plan is None:
            raise ExecutorError(
                f"{library.name} could not build a segment of {len(segment.calls)} operations: "
                f"{self._log.cause() or 'it gave no reason'}"
            )
        self.timings = library.timing_cache(config)
        self.num_layers += graph.network.num_layers
        return bytes(plan)


def write_plans(path: Path, plans: Mapping[str, bytes], replace: Callable[[Path, bytes], None]) -> int:
    """Write plans by digest with ``replace``, which makes a file appear whole or not at all; returns the bytes."""
    places, start = {}, 0
    for name, plan in plans.items():
        places[name] = [start, start + len(plan)]
        start += len(plan)
    header = json.dumps(places).encode()
    content = struct.pack("<Q", len(header)) + header + b"".join(plans.values())
    replace(path, content)
    return len(content)


def read_plans(path: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """The plans of ``wanted``.

    Raises:
        ConfigError: the file is damaged or lacks one.
    """
    content = path.read_bytes()
    try:
        (length,) = struct.unpack_from("<Q", content)
        places = json.loads(content[8 : 8 + length])
        first = 8 + length
        plans = {name: content[first + places[name][0] : first + places[name][1]] for name in wanted}
        if any(len(plan) != places[name][1] - places[name][0] for name, plan in plans.items()):
            raise ValueError("it is cut short")
    except (ValueError, KeyError, struct.error) as error:
        raise ConfigError(
            f"{path} is damaged or of another model ({error}); build it again with phalanx build"
        ) from None
    return plans
