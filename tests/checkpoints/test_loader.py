"""What a rank gets equals the slice of the unsplit tensor that the layout gives it, cut here by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.checkpoints.dummy import DummySlice
from phalanx.checkpoints.loader import LoadReport, load_weights
from phalanx.checkpoints.sinks import NumpySink
from phalanx.checkpoints.source import Index
from phalanx.parallel.errors import CheckpointError
from phalanx.runtime.models import find_model
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint

LLAMA = CASES_BY_NAME["llama-grouped-heads"]
GPT2 = CASES_BY_NAME["gpt2-plain"]


def load(path: Path, tp_rank: int = 0, tp_size: int = 1, **options: Any) -> tuple[dict[str, np.ndarray], LoadReport]:
    sink = NumpySink(**options)
    with open_checkpoint(path) as checkpoint:
        model = find_model(checkpoint.config)
        specs = model.weights(model.read_config(checkpoint.config))
        report = load_weights(checkpoint.source, specs, tp_rank, tp_size, sink, model.ignored_tensors)
    return sink.weights, report


def change(path: Path, **tensors: Any) -> None:
    """Replace, add or (None) remove tensors of ``model.safetensors``; ``.`` in names is written ``__``."""
    stored = load_file(path / "model.safetensors")
    for name, values in tensors.items():
        stored.pop(name.replace("__", "."), None)
        if values is not None:
            stored[name.replace("__", ".")] = values
    save_file(stored, path / "model.safetensors")


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_llama_shards_are_megatrons(tp_size: int, chunk_bytes: int, tmp_path: Path) -> None:
    """6 query heads of 16 over 2 key/value heads; 88 feed-forward columns in units of 8; 101 vocabulary rows."""
    path = write_checkpoint(LLAMA, tmp_path)
    stored = load_file(path / "model.safetensors")
    block = {name.removeprefix("model.layers.0."): value for name, value in stored.items() if ".layers.0." in name}
    query_heads = {1: [range(6)], 2: [range(3), range(3, 6)], 4: [range(1), range(1, 3), range(3, 4), range(4, 6)]}
    kv_heads = {1: [range(2)], 2: [range(1), range(1, 2)], 4: [range(1), range(1), range(1, 2), range(1, 2)]}
    units = [range(rank * 11 // tp_size * 8, (rank + 1) * 11 // tp_size * 8) for rank in range(tp_size)]
    for rank in range(tp_size):
        weights, _ = load(path, rank, tp_size, chunk_bytes=chunk_bytes)
        queries = [row for head in query_heads[tp_size][rank] for row in range(head * 16, head * 16 + 16)]
        keys = [row for head in kv_heads[tp_size][rank] for row in range(head * 16, head * 16 + 16)]
        qkv = [block["self_attn.q_proj.weight"][queries]]
        qkv += [block[f"self_attn.{letter}_proj.weight"][keys] for letter in "kv"]
        np.testing.assert_array_equal(weights["layers.0.qkv.weight"], np.concatenate(qkv))
        np.testing.assert_array_equal(weights["layers.0.output.weight"], block["self_attn.o_proj.weight"][:, queries])
        gate_up = [block[f"mlp.{name}_proj.weight"][units[rank]] for name in ("gate", "up")]
        np.testing.assert_array_equal(weights["layers.0.gate_up.weight"], np.concatenate(gate_up))
        np.testing.assert_array_equal(weights["layers.0.down.weight"], block["mlp.down_proj.weight"][:, units[rank]])
        np.testing.assert_array_equal(weights["layers.0.mlp_norm.weight"], block["post_attention_layernorm.weight"])
        each = {1: 112, 2: 64, 4: 32}[tp_size]
        padded = np.zeros((each * tp_size, 48), np.float32)
        padded[:101] = stored["model.embed_tokens.weight"]
        np.testing.assert_array_equal(weights["embed.weight"], padded[rank * each : (rank + 1) * each])


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("chunk_bytes", [1, 700, 1 << 20])
def test_gpt2_is_transposed_and_its_fused_matrix_cut(tp_size: int, chunk_bytes: int, tmp_path: Path) -> None:
    path = write_checkpoint(GPT2, tmp_path)
    stored = {name.removeprefix("transformer."): value for name, value in load_file(path / "model.safetensors").items()}
    width, inner = 48 // tp_size, 192 // tp_size
    for rank in range(tp_size):
        weights, _ = load(path, rank, tp_size, chunk_bytes=chunk_bytes)
        columns = slice(rank * width, (rank + 1) * width)
        fused = stored["h.1.attn.c_attn.weight"]
        expected = np.concatenate([fused[:, third * 48 : (third + 1) * 48][:, columns].T for third in range(3)])
        np.testing.assert_array_equal(weights["layers.1.qkv.weight"], expected)
        bias = stored["h.1.attn.c_attn.bias"].reshape(3, 48)[:, columns].reshape(-1)
        np.testing.assert_array_equal(weights["layers.1.qkv.bias"], bias)
        np.testing.assert_array_equal(weights["layers.1.output.weight"], stored["h.1.attn.c_proj.weight"][columns].T)
        shard = slice(rank * inner, (rank + 1) * inner)
        np.testing.assert_array_equal(weights["layers.1.up.weight"], stored["h.1.mlp.c_fc.weight"][:, shard].T)
        np.testing.assert_array_equal(weights["layers.1.down.weight"], stored["h.1.mlp.c_proj.weight"][shard].T)
        np.testing.assert_array_equal(weights["layers.1.down.bias"], stored["h.1.mlp.c_proj.bias"])
        assert weights["lm_head.weight"] is weights["embed.weight"]


def test_rank_reads_its_own_bytes_only(tmp_path: Path) -> None:
    path = write_checkpoint(LLAMA, tmp_path)
    reports = [load(path, rank, 2)[1] for rank in range(2)]
    whole = load(path)[1]
    norms = 7 * 48 * 4
    assert sum(report.bytes_read for report in reports) == whole.bytes_read + norms
    assert whole.num_weights == 2 + 1 + 3 * 6


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_published_gpt2_names_without_prefix_load(prefix: str, tmp_path: Path) -> None:
    path = write_checkpoint(GPT2, tmp_path)
    stored = load_file(path / "model.safetensors")
    renamed = {name.replace("transformer.", prefix): values for name, values in stored.items()}
    renamed[f"{prefix}h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.bool_)
    save_file(renamed, path / "model.safetensors")
    weights, _ = load(path)
    np.testing.assert_array_equal(weights["final_norm.bias"], stored["transformer.ln_f.bias"])


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    path = write_checkpoint(LLAMA, tmp_path)
    change(path, model__norm__weight=None, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(
        CheckpointError, match=r"lacks 2 of 30 .*'model\.layers\.1\.mlp\.up_proj\.weight', 'model\.norm"
    ):
        load(path)


def test_unused_tensors_are_named(tmp_path: Path) -> None:
    path = write_checkpoint(LLAMA, tmp_path)
    change(path, model__layers__0__self_attn__q_proj__bias=np.zeros(96, np.float32))
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) .*not use: 'model\.layers\.0\.self_attn\.q_proj\.bias'"):
        load(path)


def test_tensors_that_the_family_ignores_may_be_there(tmp_path: Path) -> None:
    path = write_checkpoint(LLAMA, tmp_path)
    change(path, model__layers__0__self_attn__rotary_emb__inv_freq=np.zeros(8, np.float32))
    load(path)


def test_wrong_shape_is_named_with_what_was_expected(tmp_path: Path) -> None:
    path = write_checkpoint(LLAMA, tmp_path)
    change(path, model__norm__weight=np.zeros(47, np.float32))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has shape \[47\].* requires \[48\]"):
        load(path)


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.float64, np.uint8])
def test_weights_stored_as_something_else_than_floats_are_refused(dtype: Any, tmp_path: Path) -> None:
    path = write_checkpoint(LLAMA, tmp_path)
    change(path, model__norm__weight=np.zeros(48, dtype))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is stored as"):
        load(path)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_weights_widen_exactly(stored: str, tmp_path: Path) -> None:
    case = CASES_BY_NAME["gpt2-float16" if stored == "float16" else "llama-bfloat16"]
    path = write_checkpoint(case, tmp_path)
    weights, _ = load(path)
    name = "transformer.h.0.mlp.c_fc.weight" if stored == "float16" else "model.layers.0.self_attn.o_proj.weight"
    ours = weights["layers.0.up.weight"].T if stored == "float16" else weights["layers.0.output.weight"]
    np.testing.assert_array_equal(ours, load_file(path / "model.safetensors")[name].astype(np.float32))


@pytest.mark.parametrize(("rounding", "dtype"), [("BF16", ml_dtypes.bfloat16), ("F16", np.float16)])
@pytest.mark.parametrize("case", [LLAMA, GPT2], ids=lambda case: case.name)
def test_rounding_happens_before_widening(case: Any, rounding: str, dtype: Any, tmp_path: Path) -> None:
    path = write_checkpoint(case, tmp_path)
    exact, _ = load(path)
    rounded, _ = load(path, rounding=rounding)
    changed = 0
    for name, values in exact.items():
        np.testing.assert_array_equal(rounded[name], values.astype(dtype).astype(np.float32), err_msg=name)
        changed += not np.array_equal(rounded[name], values)
    assert changed > 10


def test_sink_that_makes_dummy_weights_itself_is_asked_to(tmp_path: Path) -> None:
    class DeviceLike(NumpySink):
        calls = 0

        def generate(self, destination: np.ndarray, index: Index, dummy: DummySlice) -> None:
            self.calls += 1
            values = dummy.values().astype(np.float32)
            destination[index] = values.T if dummy.transposed else values

    path = write_checkpoint(GPT2, tmp_path)
    results = []
    for sink in (DeviceLike(), NumpySink()):
        with open_checkpoint(path, "dummy", seed=1) as checkpoint:
            model = find_model(checkpoint.config)
            specs = model.weights(model.read_config(checkpoint.config))
            load_weights(checkpoint.source, specs, 1, 2, sink)
        results.append(sink)
    device, host = results
    assert isinstance(device, DeviceLike)
    assert device.calls > 0
    for name, values in host.weights.items():
        np.testing.assert_array_equal(device.weights[name], values, err_msg=name)
