"""A model's first layers with random weights, here and in transformers."""

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

__all__ = ["Comparison", "compare"]

TOLERANCE = 2e-4
"""Of the range of the log-probabilities."""

_NUM_LAYERS = 2
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
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
            f"{self.difference:.2e} of a range of {self.spread:.2f} ({_NUM_LAYERS} layers, random plain weights, float32)"
        )


def compare(raw: Mapping[str, Any], model_file: Path | None) -> Comparison:
    """Compute a random prompt's log-probabilities both ways, of the model that ``config.json`` ``raw`` describes.

    Raises:
        ConfigError: torch or transformers is missing, or transformers has no such model.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = _shortened(raw)
        (directory / "config.json").write_text(json.dumps(config))
        _write_weights(directory, model_file)
        size = config.get("padded_vocab_size") or config["vocab_size"]
        prompt = np.random.default_rng(0).integers(3, size, _PROMPT_LENGTH).tolist()
        theirs = _theirs(directory, prompt)
        ours = _ours(directory, model_file, prompt)
    return Comparison(float(np.abs(ours - theirs[np.arange(len(ours)), prompt[1:]]).max()), float(np.ptp(theirs)))


def _shortened(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fewer layers, not quantised; lists with an entry for each layer are cut to match."""
    plain = {name: value for name, value in raw.items() if name not in QUANTIZATION_KEYS}
    config = {**plain, "dtype": "float32", "torch_dtype": "float32"}
    for key in _LAYER_KEYS:
        count = plain.get(key)
        if isinstance(count, int):
            config[key] = min(count, _NUM_LAYERS)
            config |= {
                name: value[:_NUM_LAYERS]
                for name, value in plain.items()
                if isinstance(value, list) and len(value) == count
            }
    return config


def _write_weights(directory: Path, model_file: Path | None) -> None:
    from safetensors.numpy import save_file

    from phalanx.checkpoints.checkpoint import open_checkpoint
    from phalanx.checkpoints.dummy import DummySource
    from phalanx.runtime.models.registry import find_model
    from phalanx.runtime.models.user_file import model_from_file

    with open_checkpoint(directory, "dummy") as checkpoint:
        model = find_model(checkpoint.config, model_from_file(model_file))
        assert isinstance(checkpoint.source, DummySource)
        source = checkpoint.source.declared(model.weights(model.read_config(checkpoint.config)))
        tensors = {name: source.read(name, source.info(name).whole) for name in source.names()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def _theirs(directory: Path, prompt: list[int]) -> NDArray[np.float64]:
    """``[T, V]`` log-probabilities."""
    from phalanx.parallel.errors import ConfigError

    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(f"--against-transformers needs torch and transformers ({error}); install them") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    except (ValueError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"transformers has no such model ({first}); leave --against-transformers out") from None
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
