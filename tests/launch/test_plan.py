"""``launch.plan``: exact bytes, from ``config.json`` alone, without NumPy, MPI or a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.checkpoints.loader import load_weights
from phalanx.checkpoints.sinks import NumpySink
from phalanx.launch.plan import main
from phalanx.parallel.errors import CheckpointError, ConfigError
from phalanx.runtime.models import find_model
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def llama_3_8b(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return tmp_path


def plan(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str) -> dict[str, Any]:
    assert main(["--model", str(path), "--json", *arguments]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize(("bits", "columns"), [(4, 14336), (8, 14336), (4, 14400)])
def test_packed_weights_count_as_a_gpu_holds_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int, columns: int
) -> None:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    section = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    config = {**LLAMA_3_8B, "intermediate_size": columns, "quantization_config": section}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (rank,) = plan(capsys, tmp_path)["ranks"]
    in_chunk = 512 // bits  # codes of 64 bytes, to which rows are padded
    row_bytes = {inner: -(-inner // in_chunk) * 64 + inner // 64 * 4 for inner in (4096, columns)}
    assert rank["weights"]["mlp"] == 32 * (2 * columns * row_bytes[4096] + 4096 * row_bytes[columns])
    assert rank["weights"]["attention"] == 32 * (4096 + 2 * 1024 + 4096) * row_bytes[4096]


def test_llama_3_8b_on_one_gpu_by_hand(llama_3_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = plan(capsys, llama_3_8b, "--gpu-memory-gib", "80")
    (rank,) = result["ranks"]
    assert rank["weights"] == {
        "embedding": 128256 * 4096 * 2,
        "attention": 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096) * 2,
        "mlp": 32 * 3 * 4096 * 14336 * 2,
        "norms": 65 * 4096 * 2,
        "head": 128256 * 4096 * 2,
    }
    assert rank["weight_bytes"] == 2 * 8_030_261_248  # the published number of parameters
    assert rank["kv_block_bytes"] == 2 * 32 * 8 * 128 * 16 * 2 + 4 * 16
    left = int(80 * 2**30 * 0.9) - 2**30 - rank["weight_bytes"] - rank["workspace_bytes"]
    assert result["kv_blocks"] == left // rank["kv_block_bytes"]
    assert result["full_length_sequences"] == result["kv_blocks"] // 512
    assert result["kv_tokens"] == result["kv_blocks"] * 16
    assert result["fits"] is True


@pytest.mark.parametrize(
    ("tp", "pp", "exchange_mib", "stages"),
    [(1, 1, 0, [0]), (2, 1, 64, [0, 0]), (1, 2, 0, [0, 1]), (8, 2, 112, [0] * 8 + [1] * 8), (16, 1, 0, [0] * 16)],
)
def test_communication_is_hidden_states_and_the_all_reduces_buffers(
    tp: int, pp: int, exchange_mib: int, stages: list[int], llama_3_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = plan(capsys, llama_3_8b, "--tp", str(tp), "--pp", str(pp), "--max-num-batched-tokens", "100")
    expected = [(exchange_mib << 20) + (100 * 4096 * 2 if stage else 0) for stage in stages]
    assert [rank["communication_bytes"] for rank in result["ranks"]] == expected


@pytest.mark.parametrize("name", ["llama-one-kv-head-tied", "gpt2-untied-odd-width", "gemma-several-kv-heads"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 2), (1, 3)])
def test_weights_are_exactly_what_a_rank_loads(
    name: str, tp: int, pp: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_checkpoint(CASES_BY_NAME[name], tmp_path)
    result = plan(capsys, path, "--tp", str(tp), "--pp", str(pp), "--dtype", "float32")
    model = find_model(CASES_BY_NAME[name].config)
    config = model.read_config(CASES_BY_NAME[name].config)
    for rank in result["ranks"]:
        stage = rank["rank"] // tp
        layers = model.stages(config, pp)[stage]
        assert rank["layers"] == [layers.start, layers.stop]
        sink = NumpySink()
        with open_checkpoint(path) as checkpoint:
            specs = model.weights(config, layers, stage == 0, stage == pp - 1)
            load_weights(checkpoint.source, specs, rank["tp_rank"], tp, sink, all_specs=model.weights(config))
        held = {id(array): array.nbytes for array in sink.weights.values()}
        assert rank["weight_bytes"] == sum(held.values()) == sum(rank["weights"].values())


def test_more_memory_fits_more_and_too_little_says_what_to_do(
    llama_3_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = [plan(capsys, llama_3_8b, "--gpu-memory-gib", size)["kv_blocks"] for size in ("16", "24", "48", "80")]
    assert blocks[0] == 0
    assert 0 < blocks[1] < blocks[2] < blocks[3]
    assert main(["--model", str(llama_3_8b), "--gpu-memory-gib", "16"]) == 0
    assert "use more tp or pp" in capsys.readouterr().out


def test_smallest_gpu_is_the_smallest_that_fits(llama_3_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smallest = plan(capsys, llama_3_8b)["smallest_gpu_bytes"] / 2**30
    for size, fits in ((smallest + 1e-6, True), (smallest - 1e-6, False)):
        assert plan(capsys, llama_3_8b, "--gpu-memory-gib", str(size))["fits"] is fits


def test_replicas_serve_as_many_again(llama_3_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (plan(capsys, llama_3_8b, "--gpu-memory-gib", "80", "--dp", dp) for dp in "12")
    assert two["full_length_sequences"] == 2 * one["full_length_sequences"]
    assert (two["num_gpus"], len(two["ranks"])) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tp", "33"], "32 query heads cannot be shared by tp_size=33; use a tp_size of at most 32"),
        (["--pp", "33"], "num_layers=32"),
        (["--max-model-len", "9000"], "8192 positions"),
        (["--gpu-memory-gib", "0"], "not above 0"),
        (["--max-num-seqs", "0"], "max-num-seqs=0"),
        (
            ["--kv-cache-dtype", "float16"],
            "--kv-cache-dtype=float16 is neither fp8 nor the compute type bfloat16; use one of these",
        ),
    ],
)
def test_impossible_plans_are_refused(arguments: list[str], expected: str, llama_3_8b: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        main(["--model", str(llama_3_8b), *arguments])


ENDS_PLAIN = {
    "quant_method": "compressed-tensors", "ignore": ["lm_head", r"re:model\.layers\.(0|31)\.(mlp|self_attn\.o_proj)"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"], "format": "float-quantized",
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        },
        "group_1": {
            "targets": ["re:.*down_proj"], "format": "pack-quantized",
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
        },
    },
}  # fmt: skip
"""The feed-forward parts of the first and the last layer, gate with up and down, and their output projections."""


@pytest.mark.parametrize(
    ("arguments", "section", "words"),
    [
        ((), None, "weights: not quantised; cache: not quantised"),
        (("--quantize", "fp8", "--kv-cache-dtype", "fp8"), None,
         "weights: fp8 by row, activations by token; cache: fp8 with a scale of 1"),
        ((), {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
         "weights: fp8 by tensor, activations by tensor, static; cache: fp8 with the checkpoint's scales"),
        ((), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 900.0},
         "weights: fp8 by row, activations by token up to 900; cache: not quantised"),
        (("--kv-cache-dtype", "bfloat16"), {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True},
         "weights: int4 in groups of 128; cache: not quantised"),
        ((), ENDS_PLAIN, "weights: fp8 by row, activations by token and int8 by rows (all but 6 of 128 matrices of layers); cache: not quantised"),
    ],
    ids=["plain", "while loading", "static", "bounded", "groups", "two schemes and exceptions"],
)  # fmt: skip
def test_it_says_how_weights_activations_and_cache_are_quantised(
    arguments: tuple[str, ...], section: dict[str, Any] | None, words: str, llama_3_8b: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = LLAMA_3_8B if section is None else {**LLAMA_3_8B, "quantization_config": section}
    (llama_3_8b / "config.json").write_text(json.dumps(config))
    assert plan(capsys, llama_3_8b, *arguments)["quantisation"] == words
    assert main(["--model", str(llama_3_8b), *arguments]) == 0
    assert words in capsys.readouterr().out


def test_a_checkpoint_that_is_quantised_already_is_not_planned_as_something_else(llama_3_8b: Path) -> None:
    section = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
    (llama_3_8b / "config.json").write_text(json.dumps({**LLAMA_3_8B, "quantization_config": section}))
    with pytest.raises(
        ConfigError, match="--quantize=fp8: the checkpoint holds int4 in groups of 128 weights already; leave it out"
    ):
        main(["--model", str(llama_3_8b), "--gpu-memory-gib", "80", "--quantize", "fp8"])


def test_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        main(["--model", str(tmp_path)])


def test_table_names_every_rank_and_part(llama_3_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(llama_3_8b), "--tp", "2", "--pp", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:7] == ["rank", "layers", "embedding", "attention", "mlp", "norms", "head"]
    assert [line.split()[:2] for line in lines[2:6]] == [["0", "0-16"], ["1", "0-16"], ["2", "17-31"], ["3", "17-31"]]


def test_it_needs_neither_numpy_nor_mpi(llama_3_8b: Path) -> None:
    program = (
        "import sys; from launch.plan import main; main(sys.argv[1:]);"
        "print([name for name in ('numpy', 'mpi4py', 'cupy') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "--model", str(llama_3_8b)],
        cwd=ROOT, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert result.stdout.splitlines()[-1] == "[]"
