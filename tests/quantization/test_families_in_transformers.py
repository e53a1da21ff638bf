"""What ``launch.quantize`` writes of each family, transformers computes through compressed-tensors as engines do.

Weight-only schemes, because their products can be compared closely: tied embeddings, experts, biases, and every name that a family has
for its modules. `tests/demo/test_loads_in_transformers.py` has all schemes, of a trained model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from phalanx.launch import check
from phalanx.launch.quantize import main
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint

from . import test_checkpoints as checkpoints
from .test_stored_layouts import CASES

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

Array = np.ndarray[Any, Any]
PROMPT = (5, 17, 3, 99, 42, 8, 61)
NUM_TOKENS = 4
"""`checkpoints.generate` has these."""

OF_OTHERS = ("baichuan", "chatglm", "internlm2", "megatron", "qwen-")
"""transformers has no class of these families, which begin the names of their cases."""
NOT_LOADED = ("falcon", "gpt_bigcode")
"""transformers 5.24 initialises matrices of these that are packed and so not there: "object has no attribute 'weight'"."""
NO_MODULES = "gpt2"
"""Its Conv1D is no class that compressed-tensors quantises."""
WITH_IMAGES = "gemma3_multimodal-windows"
NAMES = [name for name in CASES if not name.startswith((*OF_OTHERS, *NOT_LOADED, NO_MODULES, WITH_IMAGES))]


@pytest.fixture(autouse=True)
def compressed_tensors() -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


def quantised(dense: Path, *options: str) -> Path:
    output = dense.parent / "out"
    assert main(["--model", str(dense), "--output", str(output), *options]) == 0
    return output


def transformers_model(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    has_images = "vision_config" in json.loads((directory / "config.json").read_text())
    auto = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    model: Any = auto.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        model(torch.tensor([[0, 1]]))  # the first call decompresses
    return model


def computed(directory: Path) -> tuple[list[int], Array]:
    """Greedy tokens after the prompt, and the log-probabilities of its own."""
    import torch

    model, token_ids = transformers_model(directory), list(PROMPT)
    for _ in range(NUM_TOKENS):
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([token_ids])).logits[0].double(), -1).numpy()
        token_ids.append(int(rows[-1].argmax()))
    return token_ids[len(PROMPT) :], rows[np.arange(len(PROMPT) - 1), PROMPT[1:]]


def agree(output: Path, dense: Path) -> None:
    answer = checkpoints.generate(output, dtype="float32")
    tokens, logprobs = computed(output)
    assert tokens == list(answer.token_ids)
    np.testing.assert_allclose(checkpoints.logprobs(answer), logprobs, rtol=0, atol=1e-4)
    plain = checkpoints.logprobs(checkpoints.generate(dense, dtype="float32"))
    assert np.abs(logprobs - plain).max() > 1e-3, "it is quantised there"


@pytest.mark.parametrize(
    "name", [*NAMES, "llama-one-kv-head-tied", "opt-narrow-norm-last", "qwen2_moe-one-dense-layer"]
)
def test_transformers_computes_every_family_as_engines_do(tmp_path: Path, name: str) -> None:
    dense = write_checkpoint(CASES_BY_NAME[name], tmp_path / "dense")
    agree(quantised(dense, "--scheme", "w4a16", "--group-size", "0"), dense)


@pytest.mark.parametrize("name", ["mixtral-plain", "qwen3_moe-plain", "opt-plain", "qwen2-plain"])
def test_8_bits_in_groups_likewise(tmp_path: Path, name: str) -> None:
    dense = write_checkpoint(CASES_BY_NAME[name], tmp_path / "dense")
    group = "4" if name == "opt-plain" else "8"
    agree(quantised(dense, "--scheme", "w8a16", "--group-size", group), dense)


@pytest.mark.parametrize("name", ["mixtral-plain", "qwen2_moe-one-dense-layer", "opt-plain"])
def test_fp8_weights_are_the_same_there_where_inputs_are_not_rounded_alike(tmp_path: Path, name: str) -> None:
    """Experts' inputs are plain there, and inputs without an axis of sequences (OPT's fc1, fc2) get a scale for each value."""
    dense = write_checkpoint(CASES_BY_NAME[name], tmp_path / "dense")
    output = quantised(dense, "--scheme", "fp8")
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    (output / "config.json").write_text(json.dumps(config))
    agree(output, dense)


@pytest.mark.parametrize("as_saved", [True, False], ids=["as transformers saves", "as it is called in memory"])
def test_image_encoders_stay_as_they_are_under_either_name(tmp_path: Path, as_saved: bool) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, Gemma3ForConditionalGeneration

    dense = write_checkpoint(CASES_BY_NAME[WITH_IMAGES], tmp_path / "dense")
    torch.manual_seed(0)
    model: Any = Gemma3ForConditionalGeneration(AutoConfig.from_pretrained(dense)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    config = (dense / "config.json").read_text()
    model.save_pretrained(dense)
    (dense / "config.json").write_text(config)
    if not as_saved:
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        save_file(state, dense / "model.safetensors", {"format": "pt"})
    assert any(name.startswith("vision_tower." if as_saved else "model.vision_tower.") for name in load_file(dense / "model.safetensors"))  # fmt: skip
    agree(quantised(dense, "--scheme", "w8a16"), dense)


def test_a_quantised_checkpoint_is_checked_as_the_plain_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``launch.check --against-transformers`` compares random weights, which are not quantised."""
    dense = write_checkpoint(CASES_BY_NAME["qwen2-plain"], tmp_path / "dense")
    output = quantised(dense, "--scheme", "w4a16", "--group-size", "8")
    assert check.main(["--model", str(output), "--against-transformers"]) == 0
    assert "transformers: equal" in capsys.readouterr().out
