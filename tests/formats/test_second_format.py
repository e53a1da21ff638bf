"""A weight format that only its own file knows goes from a checkpoint to logits, through splits, plans and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phalanx.checkpoints import formats
from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.checkpoints.sinks import NumpySink
from phalanx.launch.plan import main as plan
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import CheckpointError, ConfigError
from phalanx.parallel.thread_comm import run_ranks
from phalanx.parallel.topology import Layout, Topology
from phalanx.runtime.executors.weights import Weights, load_stage
from phalanx.runtime.llm import LLM
from phalanx.runtime.models import find_model
from phalanx.runtime.request import RequestOutput, SamplingParams
from tests.checkpoints.splitting import split
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint
from tests.support.fake_cupy import install_fake_device
from tests.support.toy_format import SECTION, ToyFormat, read_toy, write_toy

Array = np.ndarray[Any, Any]
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 3)]
PROMPT = (5, 17, 3, 99, 42, 8, 61)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMAT_READERS", {"toy": read_toy})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Quantised, and its dequantised values as a dense checkpoint: heads of 16, 88 inner columns in groups of 16 (5.5)."""
    root = tmp_path_factory.mktemp("toy")
    dense = write_checkpoint(CASES_BY_NAME["llama-grouped-heads"], root / "dense")
    write_toy(dense, root / "quantised", root / "twin")
    return root / "quantised", root / "twin"


def load(path: Path, tp: int, pp: int, rank: int, **options: Any) -> tuple[Weights[Array], dict[str, Array]]:
    sink = NumpySink(**options)
    return load_into(sink, path, tp, pp, rank), sink.weights


def load_into(sink: Any, path: Path, tp: int, pp: int, rank: int) -> Weights[Any]:
    with open_checkpoint(path) as checkpoint:
        model = find_model(checkpoint.config)
        config = model.read_config(checkpoint.config)
        topology = Topology(Layout(tp=tp, pp=pp), rank)
        return load_stage(checkpoint.source, model, config, checkpoint.formats, topology, sink)


def generate(path: Path, tp: int, pp: int, **options: Any) -> RequestOutput:
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=2, prompt_logprobs=2)

    def rank(comm: Communicator) -> list[RequestOutput]:
        layout = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
        with LLM(path, comm=comm, engine="numpy", block_size=4, num_kv_blocks=16, **layout, **options) as llm:
            return llm.generate([PROMPT], params)

    return run_ranks(tp * pp, rank)[0][0]


def logprobs(output: RequestOutput) -> list[float]:
    assert output.prompt_logprobs is not None
    assert output.logprobs is not None
    return [entry.logprob for entry in [*output.prompt_logprobs[1:], *output.logprobs] if entry is not None]


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_components_stand_for_the_slices_of_the_dequantised_weights(
    tp: int, chunk_bytes: int, checkpoints: tuple[Path, Path]
) -> None:
    """Rounding plain weights to bfloat16 leaves scales as they are; a whole group stays on one rank."""
    quantised, twin = checkpoints
    whole = load_file(twin / "model.safetensors")
    columns = {1: [(0, 88)], 2: [(0, 48), (48, 88)], 4: [(0, 16), (16, 48), (48, 64), (64, 88)]}
    heads = {1: [(0, 96)], 2: [(0, 48), (48, 96)], 4: [(0, 16), (16, 48), (48, 64), (64, 96)]}
    kv_heads = {1: [(0, 32)], 2: [(0, 16), (16, 32)], 4: [(0, 16), (0, 16), (16, 32), (16, 32)]}
    for rank in range(tp):
        weights, _ = load(quantised, tp, 1, rank, rounding="BF16", chunk_bytes=chunk_bytes)
        f, h, k = (slice(*cuts[tp][rank]) for cuts in (columns, heads, kv_heads))
        for layer in range(3):
            attention, mlp = (
                {name: whole[f"model.layers.{layer}.{room}.{name}_proj.weight"] for name in names}
                for room, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
            )
            expected = {
                "qkv": np.concatenate((attention["q"][h], attention["k"][k], attention["v"][k])),
                "output": attention["o"][:, h],
                "gate_up": np.concatenate((mlp["gate"][f], mlp["up"][f])),
                "down": mlp["down"][:, f],
            }
            for name, values in expected.items():
                weight = weights.linear(f"layers.{layer}.{name}")
                if layer == 1 and name in ("qkv", "output"):
                    assert weight.format == formats.DENSE
                else:
                    assert weight.format == ToyFormat(16)
                    np.testing.assert_array_equal(weight.format.dequantize(weight.components), values)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_tokens_and_logprobs_are_the_dequantised_checkpoints(tp: int, pp: int, checkpoints: tuple[Path, Path]) -> None:
    quantised, twin = checkpoints
    expected, output = generate(twin, 1, 1), generate(quantised, tp, pp)
    assert output.token_ids == expected.token_ids
    np.testing.assert_allclose(logprobs(output), logprobs(expected), atol=2e-5)


def test_a_split_loads_and_splits_again_at_any_layout(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    quantised, _ = checkpoints
    split(quantised, tmp_path / "once", 4, 1)
    split(tmp_path / "once", tmp_path / "twice", 2, 3)
    for path in (tmp_path / "once", tmp_path / "twice"):
        for tp, pp in LAYOUTS:
            for rank in range(tp * pp):
                found, expected = load(path, tp, pp, rank)[1], load(quantised, tp, pp, rank)[1]
                assert found.keys() == expected.keys()
                for name, array in expected.items():
                    assert found[name].dtype == array.dtype
                    np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_split_converts_plain_weights_only(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    split(checkpoints[0], tmp_path / "half", 2, 1, dtype="BF16")
    with open_checkpoint(tmp_path / "half") as checkpoint:
        dtypes = {name: checkpoint.source.info(name).dtype for name in checkpoint.source.names()}
    assert dtypes["model.layers.0.mlp.up_proj.codes"] == "I32"
    assert dtypes["model.layers.0.mlp.up_proj.scales"] == "F16"
    assert dtypes["model.layers.0.mlp.up_proj.gain"] == "F32"
    assert dtypes["model.norm.weight"] == dtypes["model.layers.1.self_attn.q_proj.weight"] == "BF16"


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_the_planner_counts_what_a_rank_holds(
    tp: int, pp: int, checkpoints: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(checkpoints[0]), "--json", "--tp", str(tp), "--pp", str(pp)]
    assert plan(arguments) == 0
    for rank in json.loads(capsys.readouterr().out)["ranks"]:
        _, arrays = load(checkpoints[0], tp, pp, rank["rank"])
        assert rank["weight_bytes"] == sum(array.nbytes for array in arrays.values())


def test_dummy_weights_are_the_same_at_every_layout(checkpoints: tuple[Path, Path]) -> None:
    expected = generate(checkpoints[0], 1, 1, load_format="dummy", seed=3)
    for tp, pp in LAYOUTS[1:]:
        output = generate(checkpoints[0], tp, pp, load_format="dummy", seed=3)
        assert output.token_ids == expected.token_ids
        np.testing.assert_allclose(logprobs(output), logprobs(expected), atol=2e-5)


def test_a_device_gets_the_same_components(
    checkpoints: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install_fake_device(monkeypatch, tmp_path)
    from phalanx.runtime.executors.cuda.weights import CudaSink

    for rank in range(2):
        sink = CudaSink("float32", None)  # type: ignore[arg-type]
        load_into(sink, checkpoints[0], 2, 1, rank)
        _, expected = load(checkpoints[0], 2, 1, rank)
        assert sink.weights.keys() == expected.keys()
        for name, array in expected.items():
            assert sink.weights[name].dtype == array.dtype
            np.testing.assert_array_equal(np.asarray(sink.weights[name]), array, err_msg=name)


@pytest.mark.parametrize("engine", ["cuda", pytest.param("tensorrt", marks=pytest.mark.tensorrt)])
def test_engines_that_cannot_multiply_it_say_so_before_they_read(engine: str, checkpoints: tuple[Path, Path]) -> None:
    if engine == "tensorrt":
        pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    message = (
        rf"the {engine} engine cannot multiply toy int4 weights, which layers\.0\.qkv of this LlamaForCausalLM has"
    )
    with pytest.raises(ConfigError, match=message):
        LLM(checkpoints[0], engine=engine)


def test_without_its_reader_the_checkpoint_is_refused_by_name(
    checkpoints: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "FORMAT_READERS", {})
    with pytest.raises(ConfigError, match=r"quant_method='toy'.*use the unquantised checkpoint"):
        open_checkpoint(checkpoints[0])


def test_a_group_that_heads_would_cut_is_refused(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((checkpoints[0] / "config.json").read_text())
    section = SECTION | {"group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    with pytest.raises(
        ConfigError, match=r"layers\.0\.qkv.weight: groups of 32 values do not divide the 48 of each of 2"
    ):
        plan(["--model", str(tmp_path)])


@pytest.mark.parametrize(
    ("tensor", "replacement", "message"),
    [
        ("model.layers.0.mlp.up_proj.gain", None, r"lacks 1 of .*'model\.layers\.0\.mlp\.up_proj\.gain'"),
        ("model.layers.0.mlp.up_proj.codes", np.zeros((88, 6), np.uint8), r"stored as U8, but its quantisation .* I32"),
        ("model.layers.0.mlp.up_proj.scales", np.zeros((88, 4), np.float16), r"shape \[88, 4\].* requires \[88, 3\]"),
    ],
)
def test_damaged_components_are_named(
    tensor: str, replacement: Array | None, message: str, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    stored = load_file(checkpoints[0] / "model.safetensors")
    del stored[tensor]
    save_file(stored if replacement is None else stored | {tensor: replacement}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoints[0] / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, 1, 1, 0)


@pytest.mark.parametrize("shape", [(), (1, 1), (1, 1, 1)])
def test_axes_of_one_element_may_be_there_or_not(
    shape: tuple[int, ...], checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    stored = load_file(checkpoints[0] / "model.safetensors")
    stored = {name: array.reshape(shape) if name.endswith(".gain") else array for name, array in stored.items()}
    (tmp_path / "other").mkdir()
    save_file(stored, tmp_path / "other" / "model.safetensors")
    (tmp_path / "other" / "config.json").write_bytes((checkpoints[0] / "config.json").read_bytes())
    split(tmp_path / "other", tmp_path / "split", 2, 1)
    expected = load(checkpoints[0], 2, 1, 1)[1]
    for path in (tmp_path / "other", tmp_path / "split"):
        for name, array in load(path, 2, 1, 1)[1].items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)
