"""What an executor lacks is refused by name before a weight is read, also what it has never heard of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.attention import HeadNorm
from phalanx.runtime.config import ModelConfig, RopeConfig
from phalanx.runtime.executors.capabilities import Capabilities
from phalanx.runtime.executors.cuda.ops import CAPABILITIES as CUDA
from phalanx.runtime.executors.cuda.ops import CudaOps
from phalanx.runtime.executors.numpy.ops import CAPABILITIES as NUMPY
from phalanx.runtime.executors.numpy.ops import NumpyOps
from phalanx.runtime.executors.tensorrt.ops import CAPABILITIES as TENSORRT
from phalanx.runtime.executors.tensorrt.ops import TrtOps
from phalanx.runtime.llm import LLM
from phalanx.runtime.models import Model, find_model, registry
from phalanx.runtime.models.columns import head_runs
from phalanx.runtime.ops import AttentionSpec, ExpertsSpec, Ops
from tests.support.checkpoints import CASES, CASES_BY_NAME, CheckpointCase, write_checkpoint
from tests.support.fake_cupy import install_fake_device

ALL = (NUMPY, CUDA, TENSORRT)
LLAMA = CASES_BY_NAME["llama-grouped-heads"]


@dataclass(frozen=True, slots=True)
class SinkSpec(AttentionSpec):
    """A spec with a field that no executor knows."""

    sinks: bool = False


@dataclass(frozen=True, slots=True)
class SpiralRope(RopeConfig):
    """A rotary embedding with a field that no executor knows."""

    spiral: float = 0.0


Change = Callable[[AttentionSpec], AttentionSpec]


def with_sinks(spec: AttentionSpec) -> AttentionSpec:
    return SinkSpec(**{field.name: getattr(spec, field.name) for field in fields(spec)}, sinks=True)


def with_spiral(spec: AttentionSpec) -> AttentionSpec:
    return replace(spec, rope=SpiralRope(rotary_dim=spec.head_dim, spiral=0.5))


def changed(case: CheckpointCase, change: Change, layer: int = 2) -> tuple[Model, ModelConfig]:
    """The case's family with another attention in one layer."""
    model = find_model(case.config)
    decode = model.decode

    def attention(config: Any, number: int) -> AttentionSpec:
        spec = decode.attention(config, number)
        return change(spec) if number == layer else spec

    def block(ops: Ops[Any], config: Any, number: int, x: Any, residual: Any) -> Any:
        return decode.block(_Declared(ops, attention(config, number)), config, number, x, residual)  # type: ignore[arg-type]

    passes = {"decode": replace(decode, attention=attention, block=block)}
    return replace(model, passes=passes), model.read_config(case.config)


class _Declared:
    """Operations whose attention is the given one."""

    def __init__(self, ops: Ops[Any], spec: AttentionSpec) -> None:
        self._ops, self._spec = ops, spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def attention(self, qkv: Any, name: str, layer: int, spec: AttentionSpec) -> Any:
        return self._ops.attention(qkv, name, layer, self._spec)


@pytest.mark.parametrize("capabilities", ALL, ids=lambda each: each.engine)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_sinks, r"attention\.sinks=True is not supported"),
        (with_spiral, r"attention\.rope\.spiral=0\.5 is not supported"),
    ],
)
def test_a_field_that_no_executor_has_heard_of_is_refused_by_all(
    capabilities: Capabilities, change: Change, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"the {capabilities.engine} engine cannot run LlamaForCausalLM: {message}"):
        capabilities.check(*changed(LLAMA, change), "float32")


@pytest.mark.parametrize("engine", ["numpy", "cuda"])
def test_the_refusal_comes_before_weights_are_read(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))
    model, _ = changed(LLAMA, with_sinks)
    monkeypatch.setattr(registry, "MODELS", {model.architecture: model})
    directory = write_checkpoint(LLAMA, tmp_path)
    save_file(
        {"nothing": np.zeros(1, np.float32)}, directory / "model.safetensors"
    )  # loading it would raise CheckpointError
    with pytest.raises(ConfigError, match=r"attention\.sinks=True is not supported"):
        LLM(directory, engine=engine)


@pytest.mark.parametrize(
    ("capabilities", "change", "message"),
    [
        (CUDA, lambda spec: replace(spec, head_dim=264), r"attention\.head_dim=264 exceeds its limit of 256; use --engine numpy"),
        (CUDA, lambda spec: replace(spec, head_dim=12, rope=None), r"attention\.head_dim=12 is not a multiple of 8"),
        (CUDA, lambda spec: replace(spec, cached=False), r"attention\.cached=False is not supported"),
        (NUMPY, lambda spec: replace(spec, keys="encoder"), r"attention\.keys=encoder is not supported$"),
        (TENSORRT, lambda spec: replace(spec, soft_cap=50.0), r"attention\.soft_cap=50\.0 is not supported; use --engine numpy"),
        (TENSORRT, lambda spec: replace(spec, alibi_slopes=(0.5,) * 6), r"attention\.alibi_slopes=.* is not supported"),
        (TENSORRT, lambda spec: replace(spec, causal=False), r"attention\.causal=False is not supported"),
        (TENSORRT, lambda spec: replace(spec, prefix_end=(1, 2)), r"attention\.prefix_end=\(1, 2\) is not supported"),
        (TENSORRT, lambda spec: replace(spec, rope=RopeConfig(rotary_dim=8, two_dimensional=True)),
         r"attention\.rope\.two_dimensional=True is not supported"),
    ],
)  # fmt: skip
def test_every_field_of_every_layer_is_compared(capabilities: Capabilities, change: Change, message: str) -> None:
    model, config = changed(LLAMA, change)
    with pytest.raises(ConfigError, match=message):
        capabilities.check(*_fitting(model, config), "float32")


def _fitting(model: Model, config: ModelConfig) -> tuple[Model, ModelConfig]:
    """With a block that only attends in the layer that differs, so that other sizes need no other weights."""

    def block(ops: Ops[Any], config: Any, number: int, x: Any, residual: Any) -> Any:
        spec = model.decode.attention(config, number)
        runs = head_runs(spec.num_heads, spec.num_kv_heads, spec.head_dim)[: 1 if spec.keys == "encoder" else 3]
        ops.attention(
            type(x)(sum(run.extent for run in runs), "split", runs), f"layers.{number}.attention", number, spec
        )
        return x, residual

    decode = replace(model.decode, block=block, block_weights=lambda config, layer: [])
    return replace(model, passes={"decode": decode}), config


def test_a_dtype_that_an_executor_lacks_is_refused() -> None:
    model = find_model(LLAMA.config)
    with pytest.raises(ConfigError, match=r"dtype=float64 is not supported \(only bfloat16, float16, float32\)"):
        CUDA.check(model, model.read_config(LLAMA.config), "float64")


def test_a_model_without_a_decoding_pass_is_refused() -> None:
    model = find_model(LLAMA.config)
    encoder = replace(model, passes={"encode": model.decode})
    with pytest.raises(ConfigError, match=r"it has no decoding pass \(only encode\)"):
        NUMPY.check(encoder, model.read_config(LLAMA.config), "float32")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_numpy_engine_runs_every_family(case: CheckpointCase) -> None:
    model = find_model(case.config)
    NUMPY.check(model, model.read_config(case.config), "float32")


@pytest.mark.parametrize(
    ("capabilities", "name", "feature"),
    [
        (TENSORRT, "mixtral-plain", "experts"),
        (TENSORRT, "qwen3-plain", "attention.head_norm"),
        (TENSORRT, "gemma3-windows", "attention.head_norm"),
        (TENSORRT, "cohere-head-norms", "attention.head_norm"),
        (TENSORRT, "phi3-longrope-long", "attention.rope.long_factors"),
        (TENSORRT, "baichuan-13b", "attention.alibi_slopes"),
        (TENSORRT, "gemma2-caps", "attention.soft_cap=4.0"),
        (TENSORRT, "bloom-plain", "attention.alibi_slopes"),
        (TENSORRT, "falcon-alibi", "attention.alibi_slopes"),
        (TENSORRT, "mpt-scaled", "attention.alibi_slopes"),
    ],
)
def test_families_that_an_engine_lacks_something_for_are_refused_by_name(
    capabilities: Capabilities, name: str, feature: str
) -> None:
    model = find_model(CASES_BY_NAME[name].config)
    message = rf"the {capabilities.engine} engine cannot run {model.architecture}: {feature}.* is not supported"
    with pytest.raises(ConfigError, match=message):
        capabilities.check(model, model.read_config(CASES_BY_NAME[name].config), "float32")


def test_contradictory_fields_are_refused() -> None:
    spec = AttentionSpec(4, 2, 8, 0.5)
    for rope in (RopeConfig(rotary_dim=10), RopeConfig(rotary_dim=3), RopeConfig(rotary_dim=6, two_dimensional=True)):
        with pytest.raises(
            ConfigError, match=r"rotary_dim=\d+ cannot turn pairs of . part\(s\) of heads of head_dim=8"
        ):
            replace(spec, rope=rope)
    with pytest.raises(ConfigError, match="num_experts_per_tok=8 exceeds the 6 experts of a layer"):
        ExpertsSpec(6, 8, "silu")
    with pytest.raises(ConfigError, match="3 ALiBi slopes for num_heads=4"):
        replace(spec, alibi_slopes=(1.0, 0.5, 0.25))
    with pytest.raises(ConfigError, match="window=4 needs causal attention"):
        replace(spec, window=4, causal=False)
    assert replace(spec, head_norm=HeadNorm(1e-6)).head_norm == HeadNorm(1e-6)


@pytest.mark.parametrize(("capabilities", "ops"), [(NUMPY, NumpyOps), (CUDA, CudaOps), (TENSORRT, TrtOps)])
def test_listed_operations_are_the_implemented_ones(capabilities: Capabilities, ops: type[Ops[Any]]) -> None:
    optional = {"experts", "sigmoid_gate"}
    operations = set(Ops.__abstractmethods__) | optional
    implemented = {name for name in operations if getattr(ops, name) is not getattr(Ops, name)}
    assert {name for name in capabilities.features if "." not in name} == implemented
