"""Quantised checkpoints as other tools write them: exact on load, at any layout, refused by name where they are not loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.checkpoints.formats import DENSE, Dense, Format, format_weights, read_formats
from phalanx.checkpoints.quantization.held import ExpertCodes, HeldValues, PackedCodes, held_formats
from phalanx.checkpoints.sinks import NumpySink
from phalanx.checkpoints.spec import Part
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import CheckpointError, ConfigError
from phalanx.parallel.sharding import Span
from phalanx.parallel.thread_comm import run_ranks
from phalanx.parallel.topology import Layout, Topology
from phalanx.runtime.executors.cuda import weights
from phalanx.runtime.executors.cuda.weights import ConvertingSink
from phalanx.runtime.executors.weights import Weights, load_stage
from phalanx.runtime.llm import LLM
from phalanx.runtime.models import find_model
from phalanx.runtime.request import RequestOutput, SamplingParams
from tests.checkpoints.splitting import split
from tests.support.checkpoints import CASES_BY_NAME, CheckpointCase, write_checkpoint
from tests.support.fake_cupy import install_fake_device

from . import writers

Array = np.ndarray[Any, Any]
LLAMA = CASES_BY_NAME["llama-grouped-heads"]
CASE = CheckpointCase(
    "llama-odd",
    {**LLAMA.config, "hidden_size": 64, "intermediate_size": 240, "num_attention_heads": 4, "num_key_value_heads": 2,
     "head_dim": 32, "num_hidden_layers": 2},
)  # fmt: skip
"""240 inner columns: 3.75 groups of 64, 15 of 16."""

FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def _int(bits: int, group: int, symmetric: bool, in_order: bool = True) -> tuple[Any, dict[str, Any]]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "actorder": None if in_order else "group",
    }
    return writers.compressed_int(bits, group, symmetric, in_order), writers.compressed_section(
        weights, "pack-quantized"
    )


def _gptq(bits: int, group: int, symmetric: bool, v1: bool, in_order: bool = True) -> tuple[Any, dict[str, Any]]:
    form = "gptq" if v1 else "gptq_v2"
    section = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group or -1,
        "sym": symmetric,
        "desc_act": not in_order,
        "checkpoint_format": form,
    }
    return writers.gptq(bits, group, symmetric, v1, in_order), section


def _modelopt_mixed(attention: Any, algorithm: str) -> tuple[Any, dict[str, Any]]:
    """Attention by ``algorithm``, the rest by AWQ, and one matrix as it is."""
    modules = {"layers.1.mlp.down_proj": writers.as_it_is, "self_attn": attention, "mlp": writers.modelopt_awq(8)}
    awq = {"quant_algo": "W4A16_AWQ", "group_size": 8, "has_zero_point": False, "pre_quant_scale": True}
    layers = {
        **{f"model.layers.{layer}.self_attn.{part}_proj": {"quant_algo": algorithm} for layer in range(2) for part in "qkvo"},
        **{f"model.layers.{layer}.mlp.{part}_proj": awq for layer in range(2) for part in ("gate", "up")},
        "model.layers.0.mlp.down_proj": awq,
    }  # fmt: skip
    return modules, {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}


def _gptq_by_rules() -> tuple[Any, dict[str, Any]]:
    """As GPTQModel writes ``dynamic``: a matrix as it is, others of 8 bits in other groups."""
    module, section = _gptq(4, 16, True, True)
    wide = writers.gptq(8, 32, False, True)
    rules = {r"-:.*layers\.1\.mlp\.down_proj": {}, r"+:.*self_attn\.": {"bits": 8, "group_size": 32, "sym": False}}
    return {"layers.1.mlp.down_proj": writers.as_it_is, "self_attn": wide, "": module}, {**section, "dynamic": rules}


WEIGHT_ONLY: dict[str, tuple[Any, dict[str, Any]]] = {
    "ct-w4-g64": _int(4, 64, True),  # heads of 32 halve the groups
    "ct-w4-g64-asymmetric": _int(4, 64, False),
    "ct-w4-g16-asymmetric": _int(4, 16, False),
    "ct-w8-channel": _int(8, 0, True),
    "ct-w8-g16-asymmetric": _int(8, 16, False),
    "ct-w4-order": _int(4, 16, True, in_order=False),
    "ct-w8-order-asymmetric": _int(8, 16, False, in_order=False),
    "ct-w4-order-unset": (writers.compressed_int_unset(4, 64), _int(4, 64, False, in_order=False)[1]),
    "gptq-4-v1": _gptq(4, 16, False, True),
    "gptq-4-v2": _gptq(4, 16, False, False),
    "gptq-8-v1": _gptq(8, 16, False, True),
    "gptq-4-g64": _gptq(4, 64, False, True),
    "gptq-4-row-symmetric": _gptq(4, 0, True, True),
    "gptq-4-order": _gptq(4, 16, False, True, in_order=False),
    "gptq-4-order-g32": _gptq(4, 32, False, True, in_order=False),
    "gptq-8-order-wide": _gptq(8, 64, True, False, in_order=False),
    "gptq-mixed": _gptq_by_rules(),
    "awq": (
        writers.awq(16),
        {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True},
    ),
    "awq-g64": (
        writers.awq(64),
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True},
    ),
    "ct-fp8-weight-only": (
        writers.fp8("channel"),
        writers.compressed_section({**FLOAT8, "strategy": "channel"}, "float-quantized"),
    ),
    "modelopt-awq": (writers.modelopt_awq_usual(8), {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 8, "ignore": ["lm_head"]}),
    "modelopt-w8a16": (writers.weight_only_int8, {"quant_method": "modelopt", "quant_algo": "W8A16", "ignore": ["lm_head"]}),
    "modelopt-blocks": (writers.modelopt_blocks, {"quant_method": "modelopt", "quant_algo": "fp8_pb_wo", "ignore": ["lm_head"]}),
    "modelopt-mixed": _modelopt_mixed(writers.weight_only_int8, "W8A16"),
}  # fmt: skip
WITH_INPUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ct-fp8-channel": (writers.fp8("channel", dtype=writers.ml_dtypes.bfloat16), writers.compressed_section({**FLOAT8, "strategy": "channel"}, "float-quantized", TOKENS)),
    "ct-fp8-tensor": (writers.fp8("tensor"), writers.compressed_section({**FLOAT8, "strategy": "tensor"}, "float-quantized", TOKENS)),
    "ct-fp8-static": (writers.fp8("tensor", input_scale=0.02), writers.compressed_section({**FLOAT8, "strategy": "tensor"}, "float-quantized", STATIC)),
    "ct-int8": (writers.int8, writers.compressed_section({**INT8, "strategy": "channel"}, "int-quantized", {**TOKENS, "type": "int"})),
    "ct-int8-static": (writers.int8_static(0.03), writers.compressed_section({**INT8, "strategy": "channel"}, "int-quantized", {**STATIC, "type": "int"})),
    "hf-fp8-blocks": (writers.fp8("block", "weight_scale_inv"), {"quant_method": "fp8", "weight_block_size": [32, 16], "activation_scheme": "dynamic"}),
    "hf-fp8-wide": (writers.fp8("large block", "weight_scale_inv"), {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}),
    "hf-fp8-powers": (writers.fp8("block", "weight_scale_inv", powers=True), {"quant_method": "fp8", "weight_block_size": [32, 16], "activation_scheme": "dynamic", "scale_fmt": "ue8m0"}),
    "fbgemm": (writers.fp8("channel"), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "modelopt-fp8": (writers.fp8("tensor", input_scale=0.02), {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]}),
    "modelopt-smoothquant": (writers.modelopt_smoothquant(0.05), {"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL", "ignore": ["lm_head"]}),
    "modelopt-mixed-fp8": _modelopt_mixed(writers.fp8("tensor", input_scale=0.02), "FP8"),
}  # fmt: skip
ALL = WEIGHT_ONLY | WITH_INPUTS
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]
ODD = CheckpointCase("llama-344", {**CASE.config, "hidden_size": 344, "intermediate_size": 688})
"""21.5 groups of 16 and 5.4 of 64 in a row; 43 of 16 and 10.75 of 64 inner columns, which no number of ranks divides."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quantised")
    write_checkpoint(CASE, root / "dense")
    return root


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``root``, of odd sizes."""
    root = tmp_path_factory.mktemp("odd")
    write_checkpoint(ODD, root / "dense")
    return root


def written(root: Path, name: str) -> tuple[Path, Path]:
    paths = root / name / "quantised", root / name / "twin"
    if not paths[0].exists():
        module, section = ALL[name]
        writers.write(root / "dense", *paths, module, section)
    return paths


def load(path: Path, tp: int, rank: int) -> Weights[Array]:
    with open_checkpoint(path) as checkpoint:
        model = find_model(checkpoint.config)
        config = model.read_config(checkpoint.config)
        return load_stage(
            checkpoint.source, model, config, checkpoint.formats, Topology(Layout(tp=tp), rank), NumpySink()
        )


def generate(path: Path, tp: int = 1, pp: int = 1, engine: str = "numpy", **options: Any) -> RequestOutput:
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, prompt_logprobs=0)

    def rank(comm: Communicator) -> RequestOutput:
        with LLM(
            path,
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            comm=comm,
            engine=engine,
            block_size=16,
            num_kv_blocks=16,
            max_num_seqs=3,
            max_num_batched_tokens=8,
            **options,
        ) as llm:
            return llm.generate([(5, 17, 3, 99, 42, 8, 61)], params)[0]

    return run_ranks(tp * pp, rank)[0]


def logprobs(output: RequestOutput) -> Array:
    assert output.prompt_logprobs is not None
    return np.array([one.logprob for one in output.prompt_logprobs if one is not None])


def shares(path: Path, tp: int, rank: int) -> dict[str, Callable[[Array], Array]]:
    """By weight: what of the whole matrix ``[out, in]`` a rank holds, as the cuts of its parts say."""
    with open_checkpoint(path) as checkpoint:
        model = find_model(checkpoint.config)
        weights = format_weights(model.weights(model.read_config(checkpoint.config)), checkpoint.formats)

    def of(parts: Sequence[Part]) -> Callable[[Array], Array]:
        def share(whole: Array) -> Array:
            taken, row = [], 0
            for part in parts:
                rows, columns = (part.span(axis, rank, tp) for axis in (0, 1))
                taken.append(whole[row + rows.start : row + rows.stop, columns.start : columns.stop])
                row += part.shape[0]
            return np.concatenate(taken)

        return share

    return {weight.spec.owner: of(weight.spec.parts) for weight in weights if weight.format != DENSE}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", ALL)
def test_dequantised_weights_equal_the_twins_bit_for_bit(odd: Path, name: str, tp: int) -> None:
    quantised, twin = written(odd, name)
    whole = load(twin, 1, 0)
    for rank in range(tp):
        weights, cut = load(quantised, tp, rank), shares(quantised, tp, rank)
        assert len(cut) == len(QUANTISED) - ("mixed" in name)
        for owner, share in cut.items():
            weight, expected = weights.linear(owner), share(whole.linear(owner).components["weight"])
            np.testing.assert_array_equal(weight.format.dequantize(weight.components), expected, err_msg=owner)


QUANTISED = [f"layers.{layer}.{owner}" for layer in range(2) for owner in ("qkv", "output", "gate_up", "down")]


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weight_only_checkpoints_compute_what_their_twins_do(odd: Path, name: str, tp: int, pp: int) -> None:
    quantised, twin = written(odd, name)
    output, expected = generate(quantised, tp, pp), generate(twin)
    assert output.token_ids == expected.token_ids
    np.testing.assert_allclose(logprobs(output), logprobs(expected), atol=5e-5)


@pytest.mark.parametrize(
    "name",
    ["ct-w4-g16-asymmetric", "gptq-4-v1", "gptq-4-order", "awq", "awq-g64", "ct-fp8-tensor", "hf-fp8-blocks", "modelopt-awq", "modelopt-smoothquant"],
)  # fmt: skip
def test_splits_hold_the_same_values(root: Path, name: str, tmp_path: Path) -> None:
    quantised, _ = written(root, name)
    expected = generate(quantised, 2)
    split(quantised, tmp_path / "split", 2, 1)
    output = generate(tmp_path / "split", 2)
    np.testing.assert_array_equal(logprobs(output), logprobs(expected))


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("family", ["phi3-window", "gpt_neox-odd-six-of-24-rotated"])
def test_splits_hold_blocks_that_parts_of_one_tensor_share(tmp_path: Path, family: str, tp: int, pp: int) -> None:
    """Blocks of 32 rows where gate ends after 80, and where heads have 24 for each of q, k and v: they were not split at all."""
    quantised = tmp_path / "quantised"
    dense = write_checkpoint(CASES_BY_NAME[family], tmp_path / "dense")
    writers.write(dense, quantised, tmp_path / "twin", *ALL["hf-fp8-blocks"])
    split(quantised, tmp_path / "split", tp, pp)
    for layout in ((1, 1), (2, 1), (2, 2)):
        output, expected = generate(tmp_path / "split", *layout), generate(quantised, *layout)
        np.testing.assert_array_equal(logprobs(output), logprobs(expected))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float16") for name in WEIGHT_ONLY), ("ct-w4-g64", "float32"), ("awq", "float32")], ids=str,
)  # fmt: skip
def test_the_cuda_engine_computes_weight_only_checkpoints(
    root: Path, device: None, name: str, dtype: Any, tp: int
) -> None:
    quantised, twin = written(root, name)
    output, expected = generate(quantised, tp, engine="cuda", dtype=dtype), generate(twin)
    np.testing.assert_allclose(logprobs(output), logprobs(expected), atol={"float16": 2e-2, "float32": 1e-3}[dtype])


@pytest.mark.parametrize(
    ("name", "dtype", "tp", "options"),
    [("ct-w4-g64-asymmetric", "float32", 2, {}), ("awq-g64", "float16", 1, {}), ("ct-fp8-weight-only", "float16", 2, {"expert_parallel": True}),
     ("gptq-4-order-g32", "float32", 2, {}),
     *(pytest.param(*one, marks=pytest.mark.slow) for one in [
         ("ct-w8-channel", "float32", 1, {}), ("ct-w4-g16-asymmetric", "float16", 2, {}), ("gptq-4-order", "float32", 1, {})])],
    ids=str,
)  # fmt: skip
def test_the_cuda_engine_computes_weight_only_experts(
    tmp_path: Path, device: None, name: str, dtype: Any, tp: int, options: dict[str, Any]
) -> None:
    quantised, twin = written_experts(tmp_path, name, has_router=True)
    output = generate(quantised, tp, engine="cuda", dtype=dtype, **options)
    bound = {"float16": 2e-2, "float32": 1e-3}[dtype]
    np.testing.assert_allclose(logprobs(output), logprobs(generate(twin)), atol=bound)


@pytest.mark.parametrize(
    "name",
    [
        "ct-fp8-channel",
        "ct-fp8-tensor",
        "ct-int8",
        "ct-fp8-static",
        "ct-int8-static",
        "modelopt-fp8",
        "modelopt-smoothquant",
        "modelopt-mixed-fp8",
        "fbgemm",
    ],
)
def test_the_cuda_engine_multiplies_8_bit_checkpoints(root: Path, device: None, name: str) -> None:
    quantised, twin = written(root, name)
    expected, plain = logprobs(generate(quantised)), logprobs(generate(twin))
    output = logprobs(generate(quantised, engine="cuda", dtype="float32"))
    assert np.abs(output - expected).max() < 0.05 * np.abs(plain - expected).max()


@pytest.mark.parametrize(
    ("name", "dtype", "tp"),
    [("hf-fp8-blocks", "float32", 1), ("hf-fp8-blocks", "float32", 2), ("hf-fp8-blocks", "float16", 1), ("hf-fp8-powers", "float32", 1), ("hf-fp8-wide", "float32", 2)],
)  # fmt: skip
def test_the_cuda_engine_multiplies_fp8_blocks(root: Path, device: None, name: str, dtype: Any, tp: int) -> None:
    """Inputs become what their codes in groups stand for; a last bit that moves one to the next code changes later layers."""
    quantised, twin = written(root, name)
    expected, plain = logprobs(generate(quantised, tp)), logprobs(generate(twin))
    output = logprobs(generate(quantised, tp, engine="cuda", dtype=dtype))
    bound = {"float32": 0.05, "float16": 1.0}[dtype]
    assert np.abs(output - expected).mean() < bound * np.abs(plain - expected).mean()


def test_one_matrix_of_experts_is_held_packed_at_a_time(
    tmp_path: Path, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that become plain values; else they would take half as much again while they load as they do afterwards."""
    quantised, _ = written_experts(tmp_path, "ct-w8-g16-asymmetric", has_router=True)
    allocate, unpack, packed, most = ConvertingSink.allocate, weights.unpack_weight, set[str](), list[int]()

    def allocated(sink: ConvertingSink, names: tuple[str, ...], *rest: Any) -> Any:
        array = allocate(sink, names, *rest)
        if names[0].endswith((".gate_up.codes", ".down.codes", ".router.codes")):
            packed.add(names[0])
        most.append(len(packed))
        return array

    def unpacked(*arguments: Any) -> None:
        unpack(*arguments)
        packed.pop()

    monkeypatch.setattr(ConvertingSink, "allocate", allocated)
    monkeypatch.setattr(weights, "unpack_weight", unpacked)
    generate(quantised, engine="cuda", dtype="float32")
    assert (max(most), len(packed)) == (1, 0)


EXCLUSIONS = {"compressed-tensors": "ignore", "fp8": "modules_to_not_convert", "modelopt": "ignore"}


MIXTRAL = CheckpointCase(
    "mixtral-odd",
    {**CASES_BY_NAME["mixtral-plain"].config, "hidden_size": 80, "intermediate_size": 160, "num_attention_heads": 4,
     "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2},
)  # fmt: skip
"""160 inner columns: 1.25 blocks of 128, 2.5 groups of 64."""
QWEN2_MOE = CASES_BY_NAME["qwen2_moe-one-dense-layer"]
QWEN3 = CheckpointCase("qwen3-two-layers", {**CASES_BY_NAME["qwen3_moe-plain"].config, "num_hidden_layers": 2})


def written_experts(
    root: Path, name: str, has_router: bool = False, case: CheckpointCase = MIXTRAL
) -> tuple[Path, Path]:
    """A mixture of experts in the format ``name``, its router, too, with ``has_router``; and its float twin."""
    dense = write_checkpoint(case, root / "dense")
    module, section = ALL[name]
    if not has_router:
        mixture = "block_sparse_moe" if case is MIXTRAL else "mlp"
        routers = [f"model.layers.{layer}.{mixture}.gate" for layer in range(2)]
        section = {**section, EXCLUSIONS[section["quant_method"]]: ["lm_head", *routers]}
    modules = {".gate.": module if has_router else writers.as_it_is, "": module}
    paths = root / "quantised", root / "twin"
    writers.write(dense, *paths, modules, section)
    return paths


@pytest.mark.parametrize(
    ("name", "tp", "has_router", "case", "options"),
    [("hf-fp8-blocks", 2, False, MIXTRAL, {}), ("ct-int8", 2, False, MIXTRAL, {}), ("ct-fp8-static", 2, False, QWEN3, {"expert_parallel": True}),
     ("fbgemm", 1, True, MIXTRAL, {}),
     *(pytest.param(*one, marks=pytest.mark.slow) for one in [
         ("hf-fp8-wide", 1, False, MIXTRAL, {}), ("hf-fp8-powers", 1, False, MIXTRAL, {}), ("ct-fp8-channel", 1, False, QWEN3, {}),
         ("modelopt-smoothquant", 1, False, MIXTRAL, {})])],
    ids=lambda value: value.name if isinstance(value, CheckpointCase) else str(value),
)  # fmt: skip
def test_the_cuda_engine_rounds_inputs_of_experts(
    tmp_path: Path, device: None, name: str, tp: int, has_router: bool, case: CheckpointCase, options: dict[str, Any]
) -> None:
    """What experts are multiplied by stands for codes; a router may be quantised, too."""
    paths = written_experts(tmp_path, name, has_router, case)
    expected, plain = logprobs(generate(paths[0], tp, **options)), logprobs(generate(paths[1]))
    output = logprobs(generate(paths[0], tp, engine="cuda", dtype="float32", **options))
    assert np.abs(output - expected).mean() < 0.05 * np.abs(plain - expected).mean()


@pytest.mark.parametrize(
    "name",
    [
        "ct-int8",
        "ct-w8-g16-asymmetric",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("hf-fp8-blocks", "ct-fp8-static", "gptq-4-order")),
    ],
)
def test_the_cuda_engine_weighs_by_a_gate_of_codes(tmp_path: Path, device: None, name: str) -> None:
    """A tool that quantises every linear layer makes codes of the one row by which Qwen2-MoE weighs its shared expert, too."""
    paths = tmp_path / "quantised", tmp_path / "twin"
    writers.write(write_checkpoint(QWEN2_MOE, tmp_path / "dense"), *paths, *ALL[name])
    expected = logprobs(generate(paths[0]))
    output = logprobs(generate(paths[0], engine="cuda", dtype="float32"))
    if name in WEIGHT_ONLY:
        np.testing.assert_allclose(output, expected, atol=1e-3)
    else:
        assert np.abs(output - expected).mean() < 0.05 * np.abs(logprobs(generate(paths[1])) - expected).mean()


def test_experts_with_fewer_groups_than_ranks_are_whole_on_ranks_of_expert_parallelism(tmp_path: Path) -> None:
    """Qwen3-30B-A3B has 6 groups of 128 in an expert, and eight GPUs."""
    quantised, twin = written_experts(tmp_path, "gptq-4-g64", has_router=True, case=QWEN3)
    with pytest.raises(
        ConfigError,
        match=r"1 pieces of 64 of model\.layers\.\*\.\S+\.weight \(quantisation groups of 64; --expert-parallel cuts no expert",
    ):
        generate(quantised, 2)
    output = generate(quantised, 2, expert_parallel=True)
    np.testing.assert_allclose(logprobs(output), logprobs(generate(twin)), atol=5e-5)


@pytest.mark.parametrize(
    ("name", "held"),
    [*((name, ExpertCodes) for name in ("ct-w8-channel", "awq-g64", "ct-int8", "ct-fp8-static", "fbgemm", "hf-fp8-wide", "modelopt-smoothquant")),
     ("hf-fp8-blocks", HeldValues), *((name, Dense) for name in ("ct-w4-g16-asymmetric", "gptq-4-order", "gptq-4-order-g32"))],
)  # fmt: skip
def test_experts_are_held_as_codes_where_32_columns_in_order_share_a_scale(name: str, held: type[Format]) -> None:
    formats = read_formats({**MIXTRAL.config, "quantization_config": ALL[name][1]})
    model = find_model(MIXTRAL.config)
    experts = {
        spec.owner: spec for spec in model.weights(model.read_config(MIXTRAL.config)) if ".experts." in spec.owner
    }
    plan = held_formats(formats, "none", {"layers.0.experts"})
    assert {type(plan.choose(experts[f"layers.0.experts.{matrix}"])) for matrix in ("gate_up", "down")} == {held}
    assert not isinstance(plan.choose(experts["layers.0.experts.router"]), PackedCodes)


SCALES = {
    f"model.layers.{layer}.self_attn.{kind}_scale": np.array([0.01], np.float32) for layer in range(2) for kind in "kv"
}
KV_SECTION = {**writers.compressed_section({**FLOAT8, "strategy": "channel"}, "float-quantized", TOKENS), "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}}  # fmt: skip


def test_scales_of_the_cache_are_read_and_used(root: Path, tmp_path: Path) -> None:
    writers.write(root / "dense", tmp_path / "kv", tmp_path / "twin", writers.fp8("channel"), KV_SECTION, SCALES)
    with_cache, without = logprobs(generate(tmp_path / "kv")), logprobs(generate(written(root, "fbgemm")[0]))
    assert 0 < np.abs(with_cache - without).mean() < 0.4
    scale_of_one = logprobs(generate(written(root, "fbgemm")[0], kv_cache_dtype="fp8"))
    assert not np.array_equal(with_cache, scale_of_one)
    tiny = {name: scale * 1e-4 for name, scale in SCALES.items()}
    writers.write(root / "dense", tmp_path / "tiny", tmp_path / "twin-2", writers.fp8("channel"), KV_SECTION, tiny)
    assert np.abs(logprobs(generate(tmp_path / "tiny")) - without).mean() > 3 * np.abs(with_cache - without).mean()


@pytest.mark.parametrize(
    ("scales", "message"),
    [({}, "promises an fp8 key/value cache, but model.layers.0.self_attn has no key scale"),
     ({**SCALES, "model.layers.1.self_attn.v_scale": np.array([0.0], np.float32)}, r"v_scale' holds \[0.0\]"),
     ({**SCALES, "model.layers.1.self_attn.v_scale": np.array([np.nan], np.float32)}, r"v_scale' holds \[nan\]")],
)  # fmt: skip
def test_scales_of_the_cache_that_are_missing_or_useless_are_an_error(
    root: Path, tmp_path: Path, scales: dict[str, Array], message: str
) -> None:
    writers.write(root / "dense", tmp_path / "kv", tmp_path / "twin", writers.fp8("channel"), KV_SECTION, scales)
    with pytest.raises(CheckpointError, match=message):
        generate(tmp_path / "kv")


def changed(path: Path, target: Path, section: dict[str, Any]) -> Path:
    target.mkdir()
    config = json.loads((path / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    shutil.copy(path / "model.safetensors", target)
    return target


@pytest.mark.parametrize(
    ("section", "message"),
    [({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method='bitsandbytes'"),
     ({"quant_method": "torchao"}, "quant_method='torchao'"),
     ({"quant_method": "compressed-tensors"}, "compressed-tensors without config_groups"),
     ({"quant_method": "mxfp4"}, "quant_method='mxfp4'"),
     ({"quant_method": "fp8"}, "fp8 without activation_scheme and weight_block_size"),
     ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt quant_algo='NVFP4' cannot be loaded"),
     ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "gptq bits=3 .* use 4 or 8 bits"),
     ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq version='gemv'"),
     (writers.compressed_section({**INT8, "num_bits": 2, "strategy": "group"}, "pack-quantized"), "num_bits=2"),
     (writers.compressed_section({**FLOAT8, "num_bits": 4, "strategy": "tensor_group"}, "nvfp4-pack-quantized"), "nvfp4-pack"),
     (writers.compressed_section({**INT8, "strategy": "channel"}, "int-quantized", {**TOKENS, "symmetric": False}), "asymmetric activations"),
     ({**KV_SECTION, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity format='sparse-24-bitmask'")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_not_loaded_is_refused_by_name(
    root: Path, tmp_path: Path, section: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=message):
        generate(changed(root / "dense", tmp_path / "changed", section))


def test_a_column_of_a_group_that_does_not_exist_is_an_error(root: Path, tmp_path: Path, device: None) -> None:
    quantised, _ = written(root, "gptq-4-order")
    shutil.copytree(quantised, tmp_path / "damaged")
    tensors = load_file(quantised / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.g_idx"][3] = 99
    save_file(tensors, tmp_path / "damaged" / "model.safetensors")
    message = r"^tensor 'model\.layers\.1\.mlp\.down_proj\.g_idx': says that a column is in group 99 of 15;"
    with pytest.raises(CheckpointError, match=message):
        generate(tmp_path / "damaged")
    with pytest.raises(CheckpointError, match=message):
        generate(tmp_path / "damaged", engine="cuda", dtype="float16")


@pytest.mark.parametrize("inner", [688, 11008, 13696, 18944, 29568])
def test_indices_of_groups_take_a_fraction_of_a_byte_a_weight(inner: int) -> None:
    """They are one row for all rows of a matrix in the file; q, k and v may have one each, and ranks take any rows of gate and up."""
    config = {**CASE.config, "hidden_size": 4096, "intermediate_size": inner, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
    model = find_model(config)
    section = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": True}
    weights = format_weights(model.weights(model.read_config(config)), read_formats({"quantization_config": section}))
    for tp in (1, 2, 3, 8):
        for weight in weights:
            components = {one.kind: one.local_shape(tp - 1, tp) for one in weight.components}
            if "group_index" in components:
                (rows, columns), (index_rows, index_columns) = components["codes"], components["group_index"]
                assert (rows % index_rows, index_columns) == (0, columns)
                assert 4 * index_rows * index_columns <= rows * columns / 4
                assert index_rows == 1 or not weight.spec.owner.endswith(("output", "down"))


@pytest.mark.parametrize("inner", [64, 48, 688])
def test_an_index_of_groups_leaves_as_many_ranks_as_a_plain_weight_has(inner: int) -> None:
    config = {**CASE.config, "intermediate_size": inner}
    model = find_model(config)
    specs = model.weights(model.read_config(config))
    section = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": True}

    def rows(part: Part) -> list[Span]:
        return [part.span(0, rank, 3) for rank in range(3)]

    plain, indexed = (
        format_weights(specs, read_formats({**config, **more})) for more in ({}, {"quantization_config": section})
    )
    for before, after in zip(plain, indexed, strict=True):
        if all(part.shard is None or part.shard.axis == 0 for part in before.spec.parts):
            assert [rows(one) for one in after.spec.parts] == [rows(one) for one in before.spec.parts]


def test_groups_of_which_heads_leave_small_pieces_compute_what_their_twins_do(
    root: Path, tmp_path: Path, device: None
) -> None:
    """Heads of 32 leave pieces of 8 of groups of 40, as heads of 80 (Phi-2, StableLM 3B) leave 16 of 128."""
    writers.write(root / "dense", tmp_path / "quantised", tmp_path / "twin", *_gptq(4, 40, False, True))
    expected = logprobs(generate(tmp_path / "twin"))
    for tp in (1, 3):
        np.testing.assert_allclose(logprobs(generate(tmp_path / "quantised", tp)), expected, atol=5e-5)
    output = generate(tmp_path / "quantised", 2, engine="cuda", dtype="float32")
    np.testing.assert_allclose(logprobs(output), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["gptq-4-v1", "ct-w8-channel", "ct-fp8-weight-only"])
@pytest.mark.parametrize("says_tied", [True, False])
def test_a_quantised_head_is_the_files_own_whatever_config_json_says_of_ties(
    root: Path, tmp_path: Path, name: str, says_tied: bool
) -> None:
    module, section = ALL[name]
    section = {**section, "ignore": [], "lm_head": True}
    paths = tmp_path / "quantised", tmp_path / "twin"
    writers.write(root / "dense", *paths, module, section, also=("lm_head.weight",))
    config = json.loads((paths[0] / "config.json").read_text())
    (paths[0] / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": says_tied}))
    expected = logprobs(generate(paths[1]))
    for tp in (1, 2):
        np.testing.assert_allclose(logprobs(generate(paths[0], tp)), expected, atol=5e-5)


def test_a_rule_that_the_data_contradicts_names_both(root: Path, tmp_path: Path) -> None:
    quantised, _ = written(root, "fbgemm")
    section = {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head", "down_proj"]}
    with pytest.raises(CheckpointError, match=r"down_proj.weight(_scale)?'"):
        generate(changed(quantised, tmp_path / "wrong", section))


def test_parts_of_one_product_need_one_scheme(root: Path, tmp_path: Path) -> None:
    quantised, _ = written(root, "fbgemm")
    section = {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head", "up_proj"]}
    with pytest.raises(
        ConfigError,
        match=r"gives dense to model\.layers\.0\.mlp\.up_proj and fp8 .* to model\.layers\.0\.mlp\.gate_proj, which are computed as one product",
    ):
        generate(changed(quantised, tmp_path / "mixed", section))


def test_experts_of_two_schemes_are_named_in_part(tmp_path: Path) -> None:
    """All experts of a layer are one product, and there may be hundreds of them."""
    quantised, _ = written_experts(tmp_path, "ct-fp8-channel", case=QWEN3)
    section = json.loads((quantised / "config.json").read_text())["quantization_config"]
    section["ignore"].append("re:.*experts\\.0\\..*")
    with pytest.raises(
        ConfigError, match=r"gives dense to \S+gate_proj, \S+up_proj and fp8 .* to \S+, \S+, \S+ and \d+ more, which"
    ):
        generate(changed(quantised, tmp_path / "mixed", section))
