# SPDX-License-Identifier: Apache-2.0
"""Putting a CUDA executor together: device, weights, memory plan, communicators, warm-up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from phalanx.checkpoints.formats import Format, FormattedWeight, format_weights
from phalanx.checkpoints.quantization.group_codes import GroupCodes
from phalanx.checkpoints.quantization.held import (
    PackedCodes,
    has_blocks,
    is_ordered,
    packed_until_values,
    whole_blocks,
)
from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.kernels.arena import Arena
from phalanx.kernels.attention_shape import AttentionLimits
from phalanx.kernels.compiler import FIRST_WITH_FP8
from phalanx.kernels.gemm import Gemm, open_gemm
from phalanx.kernels.library import KernelLibrary
from phalanx.kernels.step_update import StepArrays, StepKernels
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.launcher import launch_info
from phalanx.parallel.nccl_comm import DeviceCommunicator, SelfDeviceCommunicator, open_device_group
from phalanx.parallel.topology import Topology
from phalanx.runtime.executors.cuda.activations import ActivationPool
from phalanx.runtime.executors.cuda.all_reduce import PeerCommunicator
from phalanx.runtime.executors.cuda.attention import CacheLayout, CudaAttention
from phalanx.runtime.executors.cuda.executor import CudaExecutor, CudaGroups
from phalanx.runtime.executors.cuda.graphs import StepKey
from phalanx.runtime.executors.cuda.memory import DeviceArray, device_dtype
from phalanx.runtime.executors.cuda.ops import CAPABILITIES, CudaOps
from phalanx.runtime.executors.cuda.results import ResultLayout
from phalanx.runtime.executors.cuda.sampler import CudaSampler
from phalanx.runtime.executors.cuda.stage import CudaStage
from phalanx.runtime.executors.cuda.trace import Timeline, TracedOps
from phalanx.runtime.executors.cuda.tuning import tune_products, tuned_sizes
from phalanx.runtime.executors.cuda.weights import ConvertingSink
from phalanx.runtime.executors.fit import largest_converted, refuse_what_cannot_fit
from phalanx.runtime.executors.rank_spec import RankSpec
from phalanx.runtime.executors.sizes import longest_requested, longest_sequence
from phalanx.runtime.executors.weights import Weights, stage_weights
from phalanx.runtime.memory import DTYPE_BYTES, RESERVE_BYTES, kv_block_bytes, workspace_bytes
from phalanx.runtime.models import Model
from phalanx.runtime.models.base import Pass, vocabulary_shard
from phalanx.runtime.sampling.fields import MAX_TOKEN_BIASES
from phalanx.runtime.step import ADMISSION, STEP_LAYOUT, StepLimits

__all__ = ["create_cuda_executor", "create_lowered_executor", "select_device"]


def create_cuda_executor(spec: RankSpec) -> tuple[CudaExecutor, int]:
    """Load this rank's shard onto its GPU; also the longest sequence that fits. *Collective over the replica.*

    Raises:
        ConfigError: no GPU for this rank, the model needs what the kernels lack, or the memory does not suffice.
        CheckpointError: weights are missing, superfluous or of the wrong shape.
    """
    CAPABILITIES.check(spec.model, spec.config, spec.dtype)
    CAPABILITIES.check_formats(spec.config, _held_as_stored(spec))
    return create_lowered_executor(spec, lambda model: model.decode)


def create_lowered_executor(
    spec: RankSpec, lower: Callable[[Model], Pass[Any]], library_name: str = ""
) -> tuple[CudaExecutor, int]:
    """As `create_cuda_executor`, for a model that has been checked.

    Args:
        lower: what steps run in place of the model's decode pass; called with this rank's GPU and stream current.
        library_name: of what computes that, for reports; empty = our own kernels and cuBLASLt.

    Raises:
        ConfigError, CheckpointError: as `create_cuda_executor`.
    """
    limits = _step_limits(spec)
    _check_attention(spec)
    device, stream = select_device()
    import cupy  # not before: without it `select_device` says what to install

    with device, stream:
        library = KernelLibrary()
        _check_quantized(spec, library.architecture)
        with _open_groups(library, spec.topology, spec.comm) as groups:
            held, itemsize = spec.held_formats, DTYPE_BYTES[spec.dtype]
            loading_bytes = largest_converted(spec, held, itemsize)
            refuse_what_cannot_fit(spec, held, itemsize, _free_bytes(), "its GPU", loading_bytes)
            weights = _load(spec, library)
            gemm = open_gemm(library, has_blocks=any(has_blocks(weight.format) for weight in weights.values()))
            timeline = Timeline(stream) if spec.options.trace else None
            stage, attention = _stage(spec, limits, library, gemm, weights, groups, timeline, lower)
            sizes = tuned_sizes(limits.max_num_seqs, limits.max_num_tokens)
            tune_products(gemm, stage, sizes, limits.max_num_seqs, spec.comm)
            stage.run(_largest_step(limits))
            stream.synchronize()
            num_blocks = _num_blocks(spec)
            max_model_len = longest_sequence(spec.config, spec.options, num_blocks)
            attention.allocate(num_blocks)
            stage.arrays.hold_tokens(cupy.zeros((num_blocks, limits.block_size), np.int32))
            executor = CudaExecutor(stage, attention, limits, groups, stream, num_blocks, timeline, library_name)
        # Outside the context: aborting NCCL blocks while captured graphs hold the communicator.
        executor.warm_up(spec.comm)
    return executor, max_model_len


def _held(spec: RankSpec) -> list[FormattedWeight]:
    """Weights of this stage with the formats that they have in memory."""
    return stage_weights(spec.model, spec.config, spec.held_formats, spec.topology)


def _held_as_stored(spec: RankSpec) -> list[FormattedWeight]:
    """Weights that products take as they are stored."""
    return [weight for weight, held in zip(spec.declared, _held(spec), strict=True) if weight.format == held.format]


def _free_bytes() -> int:
    import cupy

    free: int = cupy.cuda.runtime.memGetInfo()[0]
    return free


def _check_quantized(spec: RankSpec, architecture: str) -> None:
    """Refuse products of fp8 codes before sm_89."""
    if int(architecture.removeprefix("sm_").rstrip("af")) >= FIRST_WITH_FP8:
        return
    for weight in format_weights(spec.model.weights(spec.config), spec.held_formats):
        if isinstance(weight.format, RowCodes) and weight.format.kind == "fp8":
            raise ConfigError(
                f"{weight.format.name} products need compute capability 8.9; this GPU has {architecture}: use int8 or 4-bit "
                "weights, or leave --quantize out"
            )


def select_device() -> tuple[Any, Any]:
    """Make this process's GPU current (the visible one, or that of its local rank) and create a stream on it.

    Raises:
        ConfigError: CuPy or the driver is missing, or there are fewer GPUs than ranks on this host.
    """
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        raise ConfigError(
            f"the cuda engine found no GPU ({error}); see that nvidia-smi lists one and install the extra [cuda13] in Phalanx's checkout (pip install -e '.[cuda13]'), or use --engine numpy"
        ) from error
    local_rank = launch_info().local_rank
    if count > 1 and local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank} has no GPU: {count} are visible; start at most {count} ranks on a host"
        )
    device = cupy.cuda.Device(local_rank if count > 1 else 0)
    device.use()
    return device, cupy.cuda.Stream(non_blocking=True)


@contextmanager
def _open_groups(library: KernelLibrary, topology: Topology, comm: Communicator) -> Iterator[CudaGroups]:
    """Groups of GPUs over the host groups, which stay open unless the body fails. *Collective* to enter."""
    groups: list[DeviceCommunicator] = []
    try:
        groups.append(_tensor_group(library, comm, topology.tp_group))
        for _ in range(2):
            groups.append(open_device_group(comm, topology.pp_group))
        yield CudaGroups(*groups)
    except BaseException:
        _abandon(groups)
        raise


def _abandon(groups: list[DeviceCommunicator]) -> None:
    """Abort the groups without coordinating with peers. Errors here are suppressed so that the original exception surfaces."""
    for release in [group.abort for group in groups] + [group.close for group in groups]:
        with suppress(Exception):
            release()


def _tensor_group(library: KernelLibrary, comm: Communicator, members: range) -> DeviceCommunicator:
    return PeerCommunicator(library, comm.split(members)) if len(members) > 1 else SelfDeviceCommunicator()


def _step_limits(spec: RankSpec) -> StepLimits:
    options = spec.options
    longest = longest_requested(spec.config, options.max_model_len)
    return StepLimits(
        options.max_num_seqs, options.max_num_batched_tokens, longest, options.block_size, spec.config.vocab_size
    )


def _cache_layout(spec: RankSpec) -> CacheLayout:
    """This rank's share of the key/value cache."""
    return CacheLayout.of(
        spec.attention, spec.options.block_size, spec.dtype, spec.tp_rank, spec.tp_size,
        has_fp8_pages=spec.kv_scales is not None,
    )  # fmt: skip


def _check_attention(spec: RankSpec) -> None:
    """Refuse caches and attention that no kernel computes, before there are weights."""
    layout = _cache_layout(spec)
    for layer, attention in spec.attention.items():
        layout.shape(attention, layer)


def _load(spec: RankSpec, library: KernelLibrary) -> Weights[DeviceArray]:
    held = {weight.spec.owner: weight.format for weight in _held(spec) if weight.spec.kind == "weight"}
    packing, plain = _packing(spec.declared, held)
    quantize = {owner: held[owner] for owner in spec.quantized}
    ordered = [weight.spec.owner for weight in spec.declared if is_ordered(weight.format)]
    blocks = {
        weight.spec.owner
        for weight in spec.declared
        if weight.spec.owner in packing.keys() - plain.keys()
        and packing[weight.spec.owner].has_blocks
        and whole_blocks(weight.spec.parts, spec.tp_rank, spec.tp_size)
    }
    sink = ConvertingSink(spec.dtype, library, quantize, packing, plain, ordered, blocks)
    return sink.converted(spec.load(sink))


def _packing(
    declared: Iterable[FormattedWeight], held: Mapping[str, Format]
) -> tuple[dict[str, PackedCodes], dict[str, Format]]:
    """How stored codes are packed, and the formats of those that are unpacked again, because no kernel of theirs takes codes."""
    packing: dict[str, PackedCodes] = {}
    plain: dict[str, Format] = {}
    for weight in declared:
        owner, stored = weight.spec.owner, weight.format
        if not isinstance(stored, GroupCodes | RowCodes) or is_ordered(stored) or held[owner] == stored:
            continue
        if isinstance(chosen := held[owner], PackedCodes):
            packing[owner] = chosen
        else:
            packing[owner], plain[owner] = packed_until_values(stored), chosen
    return packing, plain


def _stage(
    spec: RankSpec,
    limits: StepLimits,
    library: KernelLibrary,
    gemm: Gemm,
    weights: Weights[DeviceArray],
    groups: CudaGroups,
    timeline: Timeline | None,
    lower: Callable[[Model], Pass[Any]],
) -> tuple[CudaStage, CudaAttention]:
    import cupy

    config, topology = spec.config, spec.topology
    vocabulary = vocabulary_shard().span(config.vocab_size, spec.tp_rank, spec.tp_size)
    pool = ActivationPool(_scratch(spec, limits))
    arrays = StepArrays.allocate(
        lambda _name, shape, dtype: cupy.zeros(shape, dtype),
        max_num_seqs=limits.max_num_seqs,
        max_num_tokens=limits.max_num_tokens,
        max_logit_rows=limits.max_logit_rows,
        max_blocks_per_seq=limits.blocks_per_seq,
        max_plan_words=limits.max_plan_words,
        admission_words=ADMISSION.itemsize // 4,
        max_biases=MAX_TOKEN_BIASES,
        block_size=limits.block_size,
    )
    attention_limits = AttentionLimits(limits.max_num_seqs, limits.max_num_tokens, limits.max_model_len)
    attention = CudaAttention(library, _cache_layout(spec), attention_limits, arrays, pool, spec.kv_scales)
    parts = (config.num_layers, library, gemm, weights, vocabulary, groups.tensor, arrays, pool, attention)
    ops = CudaOps(*parts) if timeline is None else TracedOps(timeline, *parts)
    sampler = CudaSampler(library, vocabulary, config.vocab_size, groups.tensor, arrays, pool)
    hidden_rows = 0 if topology.is_first_stage else limits.max_num_tokens
    hidden = cupy.zeros((hidden_rows, config.hidden_size), device_dtype(spec.dtype))
    results = cupy.zeros(ResultLayout.most_words(limits.max_logit_rows) if topology.is_last_stage else 0, np.int32)
    step = StepKernels(library, arrays, limits.block_size, STEP_LAYOUT.defines)
    stage = CudaStage(lower(spec.model), config, topology, spec.layers, step, ops, sampler, hidden, results)
    return stage, attention


def _scratch(spec: RankSpec, limits: StepLimits) -> Any:
    """Room for the activations of the largest step."""
    itemsize = device_dtype(spec.dtype).itemsize
    num_bytes = workspace_bytes(
        spec.model,
        spec.config,
        spec.held_formats,
        spec.topology,
        limits.max_num_seqs,
        limits.max_num_tokens,
        itemsize,
    )
    return Arena(num_bytes + (1 << 20)).scratch("activations", num_bytes)


def _largest_step(limits: StepLimits) -> StepKey:
    return StepKey(limits.max_num_tokens, min(limits.max_num_seqs, limits.max_num_tokens), has_prefill=True)


def _num_blocks(spec: RankSpec) -> int:
    """Blocks of the cache: as asked for, else what is left on the rank that has least. *Collective.*"""
    import cupy

    options, itemsize = spec.options, _cache_layout(spec).page_dtype.itemsize
    block_bytes = kv_block_bytes(spec.attention.values(), spec.tp_rank, spec.tp_size, options.block_size, itemsize)
    free, total = cupy.cuda.runtime.memGetInfo()
    usable = free - int((1.0 - options.gpu_memory_utilization) * total) - RESERVE_BYTES
    fitting = int(spec.comm.all_gather(np.array([max(usable, 0) // block_bytes])).min())
    wanted = options.num_kv_blocks or max(fitting, 1)
    if wanted > fitting:
        raise ConfigError(
            f"{wanted} blocks of {block_bytes:,} bytes do not fit next to weights and "
            f"activations: {max(usable, 0):,} bytes are left ({fitting} blocks); use more GPUs, a smaller "
            "--max-num-batched-tokens, or a larger --gpu-memory-utilization"
        )
    return wanted
