"""``launch.quantize`` of matrices that families store transposed, or several in one: read again by the format's definition and by engines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phalanx.checkpoints.spec import WeightSpec
from phalanx.launch.quantize import main
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.models import find_model, registry
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint
from tests.support.short_demo import write_short_demo

from . import test_checkpoints as checkpoints

Array = np.ndarray[Any, Any]
ROOT = Path(__file__).resolve().parents[2]
RUNNABLE = [case for case in CASES_BY_NAME.values() if not (case.prefix_end or case.max_model_len or case.model_file)]
ONE_EACH = {case.config["architectures"][0]: case.name for case in reversed(RUNNABLE)}
CASES = [*sorted(ONE_EACH.values()), "cohere-head-norms"]
CONV1D = ("c_attn", "c_proj", "c_fc")


def unpacked(tensors: dict[str, Array], bits: int) -> dict[str, Array]:
    """Float32 values ``[out, in]`` of ``pack-quantized`` modules: offset binary codes from the low bits of each word up."""
    values = {}
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        rows, columns = tensors[f"{module}.weight_shape"].tolist()
        fields = tensors[name].view(np.uint32)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & (2**bits - 1)
        codes = fields.reshape(rows, -1)[:, :columns].astype(np.float64) - 2 ** (bits - 1)
        scale = tensors[f"{module}.weight_scale"]
        spread = np.repeat(scale.astype(np.float64), columns // scale.shape[1], axis=1)
        values[f"{module}.weight"] = (codes * spread).astype(np.float32)
    return values


def twin(dense: Path, quantised: Path, path: Path, bits: int) -> Path:
    """The float checkpoint with the values of the quantised one, stored as they were."""
    original, values = (
        load_file(dense / "model.safetensors"),
        unpacked(load_file(quantised / "model.safetensors"), bits),
    )
    assert values
    is_gpt2 = "GPT2" in json.loads((dense / "config.json").read_text())["architectures"][0]
    for name, array in values.items():
        is_transposed = is_gpt2 and name.split(".")[-2] in CONV1D
        stored = array.T if is_transposed else array
        size, error = np.abs(original[name]).max(), np.abs(stored - original[name]).max()
        assert error < size / 2 ** (bits - 1), "within a step of what it was, in the same place"
        original[name] = np.ascontiguousarray(stored).astype(original[name].dtype)
    path.mkdir()
    (path / "config.json").write_text((dense / "config.json").read_text())
    save_file(original, path / "model.safetensors")
    return path


def written(name: str, path: Path) -> Path:
    """With a vocabulary that holds the prompt of `checkpoints.generate`."""
    case = CASES_BY_NAME[name]
    return write_checkpoint(replace(case, config={**case.config, "vocab_size": 101}) if "gpt2" in name else case, path)


@pytest.mark.parametrize("name", CASES)
def test_every_family_computes_what_was_written(tmp_path: Path, name: str) -> None:
    dense, output = written(name, tmp_path / "dense"), tmp_path / "out"
    assert main(["--model", str(dense), "--output", str(output), "--scheme", "w8a16"]) == 0
    expected, plain = (
        checkpoints.logprobs(checkpoints.generate(path)) for path in (twin(dense, output, tmp_path / "twin", 8), dense)
    )
    tp = 2 if (2, 1) in CASES_BY_NAME[name].layouts else 1
    found = checkpoints.logprobs(checkpoints.generate(output, tp))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - plain).max() > 1e-4


@pytest.mark.parametrize("scheme", ["fp8", "int8", "w4a16"])
@pytest.mark.parametrize("name", ["gpt2-plain", "phi3-window"])
def test_other_schemes_hold_gpt2_and_phi3(tmp_path: Path, name: str, scheme: str) -> None:
    dense, output = written(name, tmp_path / "dense"), tmp_path / "out"
    group = ["--group-size", "8" if "phi3" in name else "0"] if scheme == "w4a16" else []  # heads of 12 cut groups of 8
    assert main(["--model", str(dense), "--output", str(output), "--scheme", scheme, *group]) == 0
    weights, original = checkpoints.load(output, 1, 0), checkpoints.load(dense, 1, 0)
    quantised = [weight for weight in weights.values() if weight.format.name != "dense"]
    assert len(quantised) == 4 * CASES_BY_NAME[name].config.get(
        "n_layer", CASES_BY_NAME[name].config.get("num_hidden_layers", 0)
    )
    for weight in quantised:
        values, plain = weight.format.dequantize(weight.components), original.linear(weight.name).components["weight"]
        assert 0 < np.linalg.norm(values - plain) < 0.12 * np.linalg.norm(plain)
    if scheme == "w4a16":
        expected = checkpoints.generate(twin(dense, output, tmp_path / "twin", 4))
        found = checkpoints.generate(output, 2)
        np.testing.assert_allclose(checkpoints.logprobs(found), checkpoints.logprobs(expected), atol=1e-4)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_short_demo(tmp_path_factory.mktemp("demo") / "llama", 2)


@pytest.fixture(scope="module")
def fused(demo: Path) -> Path:
    """The same model as a Phi 3, which stores q, k and v in one matrix, gate and up in another."""
    path = demo.parent / "phi3"

    def fuse(tensors: dict[str, Array]) -> None:
        for layer in range(2):
            for target, parts in FUSED.items():
                names = [f"model.layers.{layer}.{part}.weight" for part in parts]
                tensors[f"model.layers.{layer}.{target}.weight"] = np.concatenate([tensors.pop(name) for name in names])

    write_short_demo(path, 2, fuse)
    config = json.loads((path / "config.json").read_text())
    changed = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": 2048,
        "pad_token_id": 1,
    }
    kept = {
        name: value
        for name, value in config.items()
        if name not in ("attention_bias", "mlp_bias", "pretraining_tp", "head_dim")
    }
    (path / "config.json").write_text(json.dumps({**kept, **changed}))
    return path


FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


@pytest.mark.parametrize(
    "arguments",
    [("int8", "smoothquant"), ("w4a16", "gptq", "--group-size", "16"), ("int8", "rtn", "--kv-cache", "fp8")],
    ids=lambda arguments: arguments[1],
)  # fmt: skip
def test_calibrated_methods_give_a_fused_matrix_the_codes_of_its_parts(
    demo: Path, fused: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    scheme, method, *more = arguments
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "tests" / "demo" / "held_out" / "operator.txt").read_text("utf-8")[:3000])
    files = []
    for model in (demo, fused):
        output = tmp_path / model.name
        options = ["--scheme", scheme, "--method", method, "--calibration", str(text), *more]
        assert main(["--model", str(model), "--output", str(output), *options]) == 0
        files.append(load_file(output / "model.safetensors"))
    apart, together = files
    expected = dict(apart)
    for layer in range(2):
        for target, parts in FUSED.items():
            for suffix in ("weight", "weight_packed", "weight_scale"):
                names = [f"model.layers.{layer}.{part}.{suffix}" for part in parts]
                if names[0] in expected:
                    joined = np.concatenate([expected.pop(name) for name in names])
                    expected[f"model.layers.{layer}.{target}.{suffix}"] = joined
    compared = {name: array for name, array in expected.items() if not name.endswith("weight_shape")}
    assert compared.keys() == {name for name in together if not name.endswith("weight_shape")}
    for name, array in compared.items():
        np.testing.assert_array_equal(together[name], array, err_msg=name)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_unpacks_gpt2_and_phi3_to_what_engines_have(fused: Path, tmp_path: Path, bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    import torch

    for dense in (written("gpt2-plain", tmp_path / "gpt2"), fused):
        output = tmp_path / f"{dense.name}-quantised"
        assert (
            main(["--model", str(dense), "--output", str(output), "--scheme", f"w{bits}a16", "--group-size", "0"]) == 0
        )
        tensors, weights = load_file(output / "model.safetensors"), checkpoints.load(output, 1, 0)
        found = {}
        for name in [name for name in tensors if name.endswith(".weight_packed")]:
            module = name.removesuffix(".weight_packed")
            shape = torch.Size(tensors[f"{module}.weight_shape"].tolist())
            codes = helpers.unpack_from_int32(torch.tensor(tensors[name]), bits, shape).numpy()
            found[module] = codes.astype(np.float32) * tensors[f"{module}.weight_scale"]
        held = {
            weight.name: weight.format.dequantize(weight.components)
            for weight in weights.values()
            if weight.format.name != "dense"
        }
        assert len(found) == len(held)
        for array in held.values():
            assert any(np.array_equal(array, other) for other in found.values())


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_transformers_computes_a_quantised_phi3_as_engines_do(fused: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    import torch
    from transformers import AutoModelForCausalLM

    output = tmp_path / "out"
    assert main(["--model", str(fused), "--output", str(output), "--scheme", "w4a16", "--group-size", "16"]) == 0
    model: Any = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    prompt = [5, 17, 3, 99, 42, 8, 61]
    with torch.no_grad():
        model(torch.tensor([prompt]))  # the first call decompresses
        rows = torch.log_softmax(model(torch.tensor([prompt])).logits[0].double(), -1).numpy()
    theirs = rows[np.arange(len(prompt) - 1), prompt[1:]]
    ours, plain = (checkpoints.logprobs(checkpoints.generate(path, dtype="float32")) for path in (output, fused))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(theirs - plain).max() > 0.01, "it is quantised there"


class WithPlainRows:
    """A family from outside, in whose layers some rows of ``qkv_proj`` are a small matrix that every rank holds, too."""

    def __init__(self, family: Any) -> None:
        self._family = family

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def weights(self, *arguments: Any) -> list[WeightSpec]:
        specs = self._family.weights(*arguments)
        (part, *_) = next(spec for spec in specs if spec.name == "layers.1.qkv.weight").parts
        return [*specs, WeightSpec("layers.1.router.weight", (replace(part, shard=None),))]


def test_a_matrix_of_which_some_rows_stay_plain_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = write_checkpoint(CASES_BY_NAME["phi3-window"], tmp_path / "dense")
    monkeypatch.setattr(registry, "find_model", lambda config, own: WithPlainRows(find_model(config)))
    with pytest.raises(ConfigError, match=r"1\.self_attn\.qkv_proj\.weight holds matrices that stay as they are, too"):
        main(["--model", str(dense), "--output", str(tmp_path / "out"), "--scheme", "fp8"])
