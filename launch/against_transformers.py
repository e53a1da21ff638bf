# SPDX-License-Identifier: Apache-2.0
"""A model made small, with random weights, here and in transformers."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.checkpoints.quantized import QUANTIZATION_KEYS
from phalanx.launch.small_config import smaller

__all__ = ["Comparison", "compare"]

TOLERANCE = 2e-4
"""Of the range of the log-probabilities."""

_PROMPT_LENGTH = 24


@dataclass(frozen=True, slots=True)
class Comparison:
    """``difference``: the largest of a log-probability; ``spread``: the range of transformers' log-probabilities."""

    difference: float
    spread: float

    @property
    def is_equal(self) -> bool:
        """Whether rounding explains the difference."""
        return self.difference <= TOLERANCE * self.spread

    @property
    def line(self) -> str:
        """One line for people."""
        verdict = "equal" if self.is_equal else "NOT equal"
        return (
            f"transformers: {verdict}; log-probabilities of {_PROMPT_LENGTH - 1} tokens differ by at most "
            f"{self.difference:.2e} of a range of {self.spread:.2f} (up to 6 narrow layers, random plain weights, float32)"
        )


def compare(raw: Mapping[str, Any], model_file: Path | None) -> Comparison:
    """Compute a random prompt's log-probabilities both ways, of the model that ``config.json`` ``raw`` describes.

    Raises:
        ConfigError: torch or transformers is missing, or transformers has no such model.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        plain = {name: value for name, value in raw.items() if name not in (*QUANTIZATION_KEYS, "auto_map")}
        plain = {"pad_token_id": None, **plain}  # a class's own may lie beyond the small vocabulary
        config = smaller({**plain, **_text_sizes(raw, model_file), "dtype": "float32", "torch_dtype": "float32"})
        (directory / "config.json").write_text(json.dumps(config))
        size = _write_weights(directory, model_file)
        prompt = np.random.default_rng(0).integers(3, size, _PROMPT_LENGTH).tolist()
        theirs = _theirs(directory, prompt)
        ours = _ours(directory, model_file, prompt)
    return Comparison(float(np.abs(ours - theirs[np.arange(len(ours)), prompt[1:]]).max()), float(np.ptp(theirs)))


def _text_sizes(raw: Mapping[str, Any], model_file: Path | None) -> dict[str, Any]:
    """``text_config`` with the sizes that it leaves to its class."""
    from phalanx.runtime.models.registry import find_model
    from phalanx.runtime.models.user_file import model_from_file

    if not isinstance(raw.get("text_config"), dict):
        return {}
    config = find_model(raw, model_from_file(model_file)).read_config(raw)
    sizes = {
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "hidden_size": config.hidden_size, "vocab_size": config.vocab_size,
    }  # fmt: skip
    return {"text_config": {**sizes, **raw["text_config"]}}


def _write_weights(directory: Path, model_file: Path | None) -> int:
    """Write what the family declares; returns the vocabulary's size."""
    from safetensors.numpy import save_file

    from phalanx.checkpoints.checkpoint import open_checkpoint
    from phalanx.checkpoints.dummy import DummySource
    from phalanx.runtime.models.registry import find_model
    from phalanx.runtime.models.user_file import model_from_file

    with open_checkpoint(directory, "dummy") as checkpoint:
        model = find_model(checkpoint.config, model_from_file(model_file))
        assert isinstance(checkpoint.source, DummySource)
        config = model.read_config(checkpoint.config)
        source = checkpoint.source.declared(model.weights(config))
        tensors = {name: source.read(name, source.info(name).whole) for name in source.names()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    size: int = config.vocab_size
    return size


def _theirs(directory: Path, prompt: list[int]) -> NDArray[np.float64]:
    """``[T, V]`` log-probabilities."""
    from phalanx.parallel.errors import ConfigError

    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(f"--against-transformers needs torch and transformers ({error}); install them") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            has_images = "text_config" in json.loads((directory / "config.json").read_text())
            auto: Any = transformers.AutoModelForImageTextToText if has_images else transformers.AutoModelForCausalLM
            model: Any = auto.from_pretrained(directory, dtype=torch.float32)
    except Exception as error:  # its checks of fields raise classes of their own
        first = next(iter(str(error).splitlines()), "")
        what = f"{type(error).__name__}: {first}"
        raise ConfigError(f"transformers cannot load such a model ({what}); leave --against-transformers out") from None
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt])).logits[0].double()
    result: NDArray[np.float64] = torch.log_softmax(logits, -1).numpy()
    return result


def _ours(directory: Path, model_file: Path | None, prompt: list[int]) -> NDArray[np.float64]:
    """``[T - 1]`` log-probabilities of the prompt's tokens after the first."""
    from phalanx.runtime.llm import LLM
    from phalanx.runtime.request import SamplingParams

    with LLM(directory, engine="numpy", model_file=model_file) as llm:
        (output,) = llm.generate([tuple(prompt)], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
    assert output.prompt_logprobs is not None
    return np.array([entry.logprob for entry in output.prompt_logprobs if entry is not None])
