# SPDX-License-Identifier: Apache-2.0
"""An engine on a GPU: memory, contexts, communicators and CUDA graphs of one rank. See `EngineSession`.

Each number of decoding slots has its own context, with fixed shapes and addresses, because a captured graph refers to
what its context held; prefill has one, bound anew to the slot of each chunk. All share one block of scratch memory, since passes
run one after the other on one stream. This module has not run on a GPU: TensorRT 8.6, which has,
computes segments instead.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.errors import ExecutorError
from phalanx.parallel.nccl_comm import DeviceCommunicator, wait_for
from phalanx.parallel.topology import Topology
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.executors.cuda.graphs import GraphCache, StepKey
from phalanx.runtime.executors.cuda.memory import DeviceArray, download, pinned_array, upload
from phalanx.runtime.executors.tensorrt.buffers import WORD_BYTES, BufferSizes, aligned, allocate
from phalanx.runtime.executors.tensorrt.builder import replace_file
from phalanx.runtime.executors.tensorrt.device import compute_capability
from phalanx.runtime.executors.tensorrt.engine_session import PassOutput, Wanted
from phalanx.runtime.executors.tensorrt.library import TensorRT
from phalanx.runtime.executors.tensorrt.log import BuildLog
from phalanx.runtime.executors.tensorrt.network import (
    DECODE_PROFILE,
    PREFILL_PROFILE,
    NetworkShape,
)
from phalanx.runtime.executors.tensorrt.passes import EnginePass, slot_buckets
from phalanx.runtime.models import Model

__all__ = ["DeviceSession", "LoadedEngine", "SessionGroups"]

_PASS_TIMEOUT_SECONDS = 300.0


@dataclass(slots=True)
class LoadedEngine:
    """A deserialised engine with what must outlive it.

    Attributes:
        log: what ``logger`` was told; gives errors their cause.
        kernel_cache: see `TensorRT.create_kernel_cache`; kept in ``kernel_path`` from one start to the next.
    """

    library: TensorRT
    log: BuildLog
    logger: Any
    runtime: Any
    engine: Any
    kernel_cache: Any = None
    kernel_path: Path | None = None

    def close(self) -> None:
        """Release everything, the engine before the runtime. Contexts must be gone."""
        kernels = self.library.serialize_kernel_cache(self.kernel_cache)
        if kernels and self.kernel_path is not None and os.access(self.kernel_path.parent, os.W_OK):
            replace_file(self.kernel_path, kernels)
        self.kernel_cache = None
        self.engine = None
        self.runtime = None

    def require(self, done: bool, what: str) -> None:
        """Raise `ExecutorError` with the library's own words unless ``done``."""
        if not done:
            raise ExecutorError(f"TensorRT refused {what}: {self.log.cause() or 'it gave no reason'}")


@dataclass(frozen=True, slots=True)
class SessionGroups:
    """This rank's communicators on the device: tensor-parallel peers and pipeline stages."""

    tensor: DeviceCommunicator
    stages: DeviceCommunicator


class DeviceSession:
    """Runs an engine that holds a whole stage on this rank's GPU. *Construction is collective over the replica.*

    Args:
        device, stream: this rank's GPU and where passes run.

    Raises:
        ConfigError: the GPU's memory does not hold caches and buffers.
        ExecutorError: TensorRT refused a context, an address or a communicator.
    """

    def __init__(
        self, loaded: LoadedEngine, model: Model, config: ModelConfig, topology: Topology, shape: NetworkShape,
        groups: SessionGroups, device: Any, stream: Any,
    ) -> None:  # fmt: skip
        self._loaded, self._topology, self._groups = loaded, topology, groups
        self._device, self._stream = device, stream
        self._vocab_size = config.vocab_size
        self._sizes = sizes = BufferSizes(model, config, topology, shape)
        pieces = sizes.pieces(loaded.engine.device_memory_size_v2)
        self._memory = allocate(pieces, shape)
        for name in sizes.caches:
            self._memory[name].fill(0)  # a masked position counts 0 times its value, which must not be NaN
        self._inputs = pinned_array((pieces["inputs"] // WORD_BYTES,), np.int32)
        self._inputs_taken = stream.record()
        self._outputs = self._pinned_outputs() if topology.is_last_stage and topology.tp_rank == 0 else {}
        self._outputs_there = stream.record()
        self._decode = {count: self._decode_context(count) for count in slot_buckets(shape.max_num_seqs)}
        self._prefill = self._context(PREFILL_PROFILE)
        self._graphs: GraphCache[bool] = GraphCache(stream, self._can_capture())
        stream.synchronize()

    @property
    def device(self) -> str:
        """TensorRT and the GPU's compute capability."""
        return f"{self._loaded.library.name} on compute capability {compute_capability(self._device.id)}"

    def run(self, engine_pass: EnginePass, wanted: Wanted) -> PassOutput | None:
        """Compute a pass; see `EngineSession.run`."""
        with self._device, self._stream:
            self._upload(engine_pass)
            if not self._topology.is_first_stage:
                self._groups.stages.recv(self._hidden("hidden", engine_pass), self._topology.stage - 1)
            self._enqueue(engine_pass)
            if not self._topology.is_last_stage:
                self._groups.stages.send(self._hidden("hidden_out", engine_pass), self._topology.stage + 1)
            if wanted == "nothing":
                return None
            return self._download(len(engine_pass.rows), wanted)

    def close(self) -> None:
        """Finish, then release graphs before contexts, contexts before the engine, and groups last. *Collective.*"""
        with self._device, self._stream:
            self._stream.synchronize()
            self._graphs.clear()
            self._decode.clear()
            self._prefill = None
            self._loaded.close()
            self._memory.clear()
            self._groups.stages.close()
            self._groups.tensor.close()

    # Contexts

    def _context(self, profile: int) -> Any:
        """A context on a profile, with the shared scratch memory and the tensor-parallel group. *Collective.*"""
        loaded = self._loaded
        context = loaded.library.create_context(loaded.engine, loaded.kernel_cache, profile == DECODE_PROFILE)
        self._loaded.require(context is not None, "an execution context (it needs more device memory than is free)")
        self._loaded.require(context.set_optimization_profile_async(profile, self._stream.ptr), f"profile {profile}")
        scratch = self._memory["scratch"]
        context.set_device_memory(scratch.data.ptr, scratch.size)
        if self._groups.tensor.size > 1:
            handle = _capsule(self._groups.tensor.handle)
            self._loaded.require(context.set_communicator(handle), "the tensor-parallel communicator")
        for name, address in self._fixed_addresses():
            self._loaded.require(context.set_tensor_address(name, address), f"the address of {name}")
        return context

    def _decode_context(self, num_slots: int) -> Any:
        context = self._context(DECODE_PROFILE)
        self._bind_slots(context, 0, num_slots)
        self._set_shapes(context, num_slots, 1, num_slots)
        return context

    def _fixed_addresses(self) -> Iterator[tuple[str, int]]:
        base = self._memory["inputs"].data.ptr
        for name, start in self._input_starts():
            yield name, base + start * WORD_BYTES
        for name in ("hidden", "hidden_out", *self._sizes.output_words):
            if name in self._memory:
                yield name, self._memory[name].data.ptr

    def _bind_slots(self, context: Any, first_slot: int, num_slots: int) -> None:
        """Caches of consecutive slots, in and out at the same address."""
        sizes = self._sizes
        for name, extents in sizes.caches.items():
            shape = (num_slots, *extents)
            address = self._memory[name].data.ptr + first_slot * sizes.slot_bytes(extents)
            self._loaded.require(context.set_tensor_address(name, address), f"the address of {name}")
            self._loaded.require(
                context.set_tensor_address(f"{name}.updated", address), f"the address of {name}.updated"
            )
            self._loaded.require(context.set_input_shape(name, shape), f"shape {shape} of {name}")

    def _set_shapes(self, context: Any, num_seqs: int, num_tokens: int, num_rows: int) -> None:
        shapes: dict[str, tuple[int, ...]] = {"positions": (num_seqs, num_tokens), "write_indices": (num_seqs,)}
        if self._topology.is_first_stage:
            shapes["token_ids"] = (num_seqs, num_tokens)
        else:
            shapes["hidden"] = (num_seqs, num_tokens, self._sizes.config.hidden_size)
        if self._topology.is_last_stage:
            shapes["logit_rows"] = (num_rows,)
        for name, shape in shapes.items():
            self._loaded.require(context.set_input_shape(name, shape), f"shape {shape} of {name}")

    def _can_capture(self) -> bool:
        contexts = self._decode.values()
        return all(self._loaded.library.can_capture(context, self._stream.ptr) for context in contexts)

    # One pass

    def _upload(self, engine_pass: EnginePass) -> None:
        """All int32 inputs in one copy; waits until the copy before has left the pinned memory."""
        self._inputs_taken.synchronize()
        for name, start in self._input_starts():
            values = getattr(engine_pass, name).ravel()
            self._inputs[start : start + len(values)] = values
        upload(self._memory["inputs"], self._inputs, self._stream)
        self._inputs_taken.record(self._stream)

    def _input_starts(self) -> Iterator[tuple[str, int]]:
        start = 0
        for name, words in self._sizes.input_words.items():
            yield name, start
            start += aligned(words * WORD_BYTES) // WORD_BYTES

    def _enqueue(self, engine_pass: EnginePass) -> None:
        num_seqs, num_tokens = engine_pass.token_ids.shape
        if engine_pass.profile == DECODE_PROFILE:
            key = StepKey(num_rows=num_seqs, num_logit_rows=num_seqs, has_prefill=False)
            self._graphs.run(key, lambda key: self._execute(self._decode[key.num_rows]))
            return
        self._bind_slots(self._prefill, engine_pass.first_slot, num_seqs)
        self._set_shapes(self._prefill, num_seqs, num_tokens, len(engine_pass.logit_rows))
        self._execute(self._prefill)

    def _execute(self, context: Any) -> bool:
        self._loaded.require(context.execute_async_v3(self._stream.ptr), "to start a pass")
        return True

    def _hidden(self, name: str, engine_pass: EnginePass) -> DeviceArray:
        return self._memory[name][: engine_pass.num_tokens * self._sizes.token_bytes]

    def _pinned_outputs(self) -> dict[str, NDArray[Any]]:
        dtypes = {"logits": np.float32, "token_out": np.int32, "logit_sum": np.float32}
        return {name: pinned_array((words,), dtypes[name]) for name, words in self._sizes.output_words.items()}

    def _download(self, num_rows: int, wanted: Wanted) -> PassOutput:
        """The first rows of the outputs, after waiting for them."""
        counts = {"token_out": num_rows, "logit_sum": num_rows}
        if wanted == "logits":
            counts["logits"] = num_rows * self._vocab_size
        for name, count in counts.items():
            download(self._outputs[name], self._memory[name][: count * WORD_BYTES], self._stream)
        self._outputs_there.record(self._stream)
        groups = self._groups.tensor, self._groups.stages
        wait_for(self._outputs_there, groups, _PASS_TIMEOUT_SECONDS, self._graphs.clear)
        is_finite = np.isfinite(self._outputs["logit_sum"][:num_rows])
        token_ids = np.where(is_finite, self._outputs["token_out"][:num_rows], np.int32(-1))
        logits = self._outputs["logits"][: counts.get("logits", 0)].reshape(-1, self._vocab_size)
        return PassOutput(token_ids, logits if wanted == "logits" else None)


def _capsule(address: int) -> Any:
    """A pointer as the bindings take it."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(address, None, None)
