# SPDX-License-Identifier: Apache-2.0
"""What a model is, as frozen values: read from a Hugging Face ``config.json``, validated once, handed down.

A family's own reader (``runtime/models/<family>.py``) fills `ModelConfig`; unknown features are refused there, never
ignored. `EngineConfig` holds what the operator chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from phalanx.parallel.errors import ConfigError
from phalanx.parallel.topology import Layout
from phalanx.runtime.token_fields import is_finite_number

__all__ = [
    "GPU_MAX_NUM_SEQS",
    "Activation",
    "ComputeDType",
    "DTypeName",
    "EngineConfig",
    "EngineName",
    "KvCacheDType",
    "ModelConfig",
    "QuantizeName",
    "RopeConfig",
    "SchedulingPolicy",
]

Activation = Literal["silu", "gelu_tanh", "gelu", "relu", "relu2"]
SchedulingPolicy = Literal["fcfs", "priority"]
ComputeDType = Literal["float32", "bfloat16", "float16"]
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
QuantizeName = Literal["none", "fp8", "int8"]
KvCacheDType = Literal["auto", "float32", "bfloat16", "float16", "fp8"]
EngineName = Literal["auto", "numpy", "cuda", "tensorrt"]
LoadFormat = Literal["auto", "dummy"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021).

    Attributes:
        theta: base of the geometric frequency series.
        rotary_dim: leading part of each head that is rotated, even.
        scaling: how positions beyond the training length are handled.
        factor: stretch of the context; 1 without scaling.
        low_freq_factor, high_freq_factor: Llama 3's band limits.
        original_max_positions: training length before stretching.
        beta_fast, beta_slow: YaRN's band limits in rotations.
        truncate: round YaRN's band limits outwards to whole dimensions.
        attention_factor: multiplies cosines and sines (YaRN); 1 otherwise.
        short_factors, long_factors: what each frequency is divided by (longrope): in engines for sequences up to
            ``original_max_positions``, and in those for longer ones.
        interleaved: pairs are neighbouring channels (GPT-J) instead of the two halves of the rotated part (Llama).
        two_dimensional: two leading parts of each head are rotated, the first by the position in the prefix of the sequence
            (`AttentionSpec.prefix_end`), at whose last token later ones stay, the second by the position after it, which is 0 in
            the prefix (GLM, Du et al. 2022).

    Raises:
        ConfigError: a field that gives no angles.
    """

    theta: float = 10000.0
    rotary_dim: int = 0
    scaling: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    interleaved: bool = False
    two_dimensional: bool = False

    def __post_init__(self) -> None:
        if self.scaling not in (known := ("default", "linear", "llama3", "yarn", "longrope")):
            raise ConfigError(f"scaling={self.scaling!r} of a rotary embedding is none of {', '.join(known)}")
        for name in ("theta", "factor", "attention_factor"):
            if not is_finite_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} of a rotary embedding is not a finite Python number above 0"
                )
        if isinstance(self.rotary_dim, bool) or not isinstance(self.rotary_dim, int):
            raise ConfigError(f"rotary_dim={self.rotary_dim!r} of a rotary embedding is not a Python int")
        lengths = {len(self.short_factors), len(self.long_factors)}
        if self.scaling == "longrope" and lengths != {self.rotary_dim // 2}:
            raise ConfigError(
                f"short_factors and long_factors of a rotary embedding have {len(self.short_factors)} and {len(self.long_factors)} numbers "
                f"for rotary_dim={self.rotary_dim}; give one for each pair"
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model's dimensions in the field's terms (D, H, K, C, F, V of the shape legend in `phalanx.runtime.ops`).

    What only one family needs is a field of that family's subclass, in its file; executors see these fields only, and take
    heads, rotary embedding and all else about attention from the layers' `AttentionSpec`.

    Attributes:
        expert_parallel: the operator's choice: tensor-parallel ranks own experts whole, instead of a share of each.

    Raises:
        ConfigError: dimensions that cannot belong together.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm_eps: float
    activation: Activation
    rope: RopeConfig | None
    tie_embeddings: bool
    dtype: ComputeDType = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    expert_parallel: bool = False

    @property
    def scaled_positions(self) -> int:
        """Maximum number of positions that ``--max-model-len`` may ask for: what rope scaling stretches the trained length to, as in vLLM."""
        rope = self.rope
        if rope is None or rope.scaling not in ("linear", "yarn"):
            return self.max_positions
        return max(self.max_positions, int(rope.original_max_positions * rope.factor))

    @property
    def default_positions(self) -> int:
        """Longest sequence without ``--max-model-len``.

        YaRN names the trained length, so one that ``max_positions`` repeats is known to be unscaled. With linear scaling some
        checkpoints give the length before and some after scaling: only the operator can tell. longrope has other factors for
        engines of more than the trained length, which short sequences are worse with.
        """
        rope = self.rope
        if rope is not None and rope.scaling == "longrope":
            return min(rope.original_max_positions, self.max_positions)
        unscaled = rope is not None and rope.scaling == "yarn" and rope.original_max_positions >= self.max_positions
        return self.scaled_positions if unscaled else self.max_positions

    def compute_dtype(self, requested: DTypeName) -> ComputeDType:
        """What was asked for; for ``auto`` the checkpoint's own."""
        return self.dtype if requested == "auto" else requested

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                     "intermediate_size", "max_positions"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} in config.json is below 1; the file is damaged")
        if not 0.0 <= self.norm_eps < 1.0:
            raise ConfigError(f"norm_eps={self.norm_eps} in config.json is outside 0 to 1; the file is damaged")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "config.json is damaged or describes an unsupported attention"
            )


GPU_MAX_NUM_SEQS = 1024
"""A GPU multiplies 64 rows in the time of one; the cache, not this number, should decide how many sequences run."""


LARGEST_SIZE = 2**31 - 1
"""Plans of steps hold 32-bit numbers."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the operator chooses; sizes in tokens, sequences, blocks.

    Attributes:
        layout: sizes of the parallel axes.
        dtype: compute type; ``auto`` = the checkpoint's own (the numpy engine always computes in float32 and rounds
            weights to this type first).
        max_model_len: maximum length of prompt + output; None = what the model was made for.
        max_num_seqs: maximum number of sequences that run at once; commands and `LLM` take `GPU_MAX_NUM_SEQS` for the cuda engine.
        max_num_batched_tokens: maximum number of tokens in a step (prefill is cut into chunks of at most this).
        block_size: tokens in one block of the key/value cache.
        expert_parallel: tensor-parallel ranks own experts whole, instead of a share of each.
        quantize: ``fp8`` or ``int8`` quantises the float weights of layers while they are loaded, one scale for each row.
        kv_cache_dtype: what the cache holds; ``auto`` = what the checkpoint says, else the compute type.
        num_kv_blocks: blocks in the cache; None = as many as memory holds (cuda) or as max_num_seqs could use (numpy).
        model_file: Python file that defines the model's family; None = a built-in one, or of an installed package.
        engine_dir: TensorRT engines made by ``launch.build``; None = build them when first used and keep them.
        scheduling_policy: in which order requests run, see `SchedulerConfig.policy`.
        prefix_caching: share blocks between requests with equal beginnings.
        seed: for random weights and for requests that bring no seed.
        trace: record a timeline of the last steps (cuda; they then run without graphs).

    Raises:
        ConfigError: a name is not one of those that its field takes, or a size is below its minimum.
    """

    layout: Layout = Layout()
    engine: EngineName = "auto"
    dtype: DTypeName = "auto"
    load_format: LoadFormat = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    num_kv_blocks: int | None = None
    expert_parallel: bool = False
    quantize: QuantizeName = "none"
    kv_cache_dtype: KvCacheDType = "auto"
    model_file: Path | None = None
    engine_dir: Path | None = None
    gpu_memory_utilization: float = 0.90
    prefix_caching: bool = True
    max_queued_requests: int = 1024
    scheduling_policy: SchedulingPolicy = "fcfs"
    seed: int = 0
    trace: bool = False

    def __post_init__(self) -> None:
        for name, names in _CHOICES.items():
            if (value := getattr(self, name)) not in get_args(names):
                raise ConfigError(f"{_flag(name)}={value} is unknown; use one of {', '.join(get_args(names))}")
        minimums = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "block_size": 1, "max_queued_requests": 0}
        for name, minimum in minimums.items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"{_flag(name)}={getattr(self, name)} is below {minimum}; use at least {minimum}")
        for name in (*minimums, "max_model_len", "num_kv_blocks"):
            if (getattr(self, name) or 0) > LARGEST_SIZE:
                raise ConfigError(
                    f"{_flag(name)}={getattr(self, name)} is beyond {LARGEST_SIZE}, the largest number in a step; use a smaller one"
                )
        for name in ("max_model_len", "num_kv_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{_flag(name)}={value} is below 1; leave it out for the default")
        if self.kv_cache_dtype not in ("auto", "fp8", self.dtype) and self.dtype != "auto":
            raise ConfigError(
                f"--kv-cache-dtype={self.kv_cache_dtype} is neither fp8 nor the compute type --dtype={self.dtype}; use one of these"
            )
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"--gpu-memory-utilization={self.gpu_memory_utilization} is outside (0, 1]; 0.90 is the default"
            )


_CHOICES = {
    "engine": EngineName, "dtype": DTypeName, "load_format": LoadFormat, "quantize": QuantizeName, "kv_cache_dtype": KvCacheDType,
    "scheduling_policy": SchedulingPolicy,
}  # fmt: skip
"""Fields that take names. The command line checks its flags, and `LLM` hands on what a script gives."""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
