"""A Llama in float64 NumPy, written from the paper and read by the safetensors package: shares no code with Phalanx.

Touvron et al. 2023 (arXiv:2302.13971): RMSNorm, rotary positions, grouped attention, SwiGLU.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes  # noqa: F401 (registers bfloat16 with NumPy)
import numpy as np
from safetensors.numpy import load_file

Array = np.ndarray


class Float64Llama:
    """Log-probabilities of whole sequences, without a cache."""

    def __init__(self, directory: Path) -> None:
        self._config = json.loads((directory / "config.json").read_text())
        stored = {
            name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()
        }
        self._weights = {name: value.astype(np.float64) for name, value in stored.items()}

    def log_probabilities(self, token_ids: list[int]) -> Array:
        """Row t: the distribution of the token after ``token_ids[: t + 1]``, ``[T, V]``."""
        hidden = self._weights["model.embed_tokens.weight"][token_ids]
        for layer in range(self._config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            hidden = hidden + self._attention(prefix + "self_attn.", self._norm(hidden, prefix + "input_layernorm"))
            hidden = hidden + self._mlp(prefix + "mlp.", self._norm(hidden, prefix + "post_attention_layernorm"))
        logits = self._norm(hidden, "model.norm") @ self._weights["model.embed_tokens.weight"].T
        logits = logits - logits.max(axis=-1, keepdims=True)
        normalised: Array = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return normalised

    def _norm(self, hidden: Array, name: str) -> Array:
        mean = np.mean(hidden**2, axis=-1, keepdims=True)
        normalised: Array = hidden / np.sqrt(mean + self._config["rms_norm_eps"]) * self._weights[f"{name}.weight"]
        return normalised

    def _project(self, hidden: Array, name: str) -> Array:
        projected: Array = hidden @ self._weights[f"{name}.weight"].T
        return projected

    def _attention(self, prefix: str, hidden: Array) -> Array:
        head_dim, length = self._config["head_dim"], len(hidden)
        query, key, value = (
            self._project(hidden, f"{prefix}{name}_proj").reshape(length, -1, head_dim).swapaxes(0, 1) for name in "qkv"
        )
        query, key = self._rotated(query), self._rotated(key)
        repeats = len(query) // len(key)
        key, value = key.repeat(repeats, axis=0), value.repeat(repeats, axis=0)
        scores = query @ key.swapaxes(1, 2) / np.sqrt(head_dim)
        scores[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (weights / weights.sum(axis=-1, keepdims=True)) @ value
        return self._project(mixed.swapaxes(0, 1).reshape(length, -1), f"{prefix}o_proj")

    def _rotated(self, heads: Array) -> Array:
        half = heads.shape[-1] // 2
        angles = np.outer(np.arange(heads.shape[1]), self._config["rope_theta"] ** (-np.arange(half) / half))
        first, second = heads[..., :half], heads[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def _mlp(self, prefix: str, hidden: Array) -> Array:
        gate = self._project(hidden, f"{prefix}gate_proj")
        return self._project(
            gate / (1 + np.exp(-gate)) * self._project(hidden, f"{prefix}up_proj"), f"{prefix}down_proj"
        )
