# SPDX-License-Identifier: Apache-2.0
"""``generation_config.json`` as one typed value: end tokens, and the sampling defaults of the model's author."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.token_fields import is_finite_number, optional_token_id, shown, token_ids

__all__ = ["GENERATION_KEYS", "GenerationConfig", "KeyUse"]

FILE = "generation_config.json"

KeyUse = Literal["honoured", "ignored", "refused"]

_HONOURED = (
    "bos_token_id", "eos_token_id", "max_new_tokens", "min_p", "repetition_penalty", "temperature", "top_k", "top_p",
)  # fmt: skip
_IGNORED = (
    "_from_model_config", "assistant_confidence_threshold", "assistant_token_id", "chat_format", "max_window_size",
    "trust_remote_code", "user_token_id", "assistant_early_exit", "assistant_ensemble_weight",
    "assistant_lookbehind", "cache_config", "cache_implementation", "compile_config", "continuous_batching_config",
    "decoder_start_token_id", "disable_compile", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty", "is_assistant", "length_penalty", "low_memory", "max_cache_len", "max_length",
    "max_matching_ngram_size", "max_time", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
    "pad_token_id", "prefill_chunk_size", "prompt_lookup_num_tokens", "remove_invalid_values", "renormalize_logits",
    "return_dict_in_generate", "speculation_type", "target_lookbehind", "transformers_version", "use_cache",
)  # fmt: skip
_REFUSED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "bad_words_ids": (), "begin_suppress_tokens": (), "constraints": (), "diversity_penalty": (0,), "dola_layers": (),
        "epsilon_cutoff": (0,), "eta_cutoff": (0,), "exponential_decay_length_penalty": (), "force_words_ids": (), "frequency_penalty": (0,), "presence_penalty": (0,),
        "forced_bos_token_id": (), "forced_eos_token_id": (), "guidance_scale": (1,), "min_length": (0,),
        "min_new_tokens": (0,), "no_repeat_ngram_size": (0,), "num_beam_groups": (1,), "num_beams": (1,),
        "penalty_alpha": (0,), "sequence_bias": (), "stop_strings": (), "suppress_tokens": (), "token_healing": (False,),
        "top_h": (), "typical_p": (1,), "use_mtp": (False,), "watermarking_config": (),
    }
)  # fmt: skip
"""Keys that would change answers, and the values besides null and empty that ask for nothing."""

_USES: tuple[tuple[KeyUse, tuple[str, ...]], ...] = (
    ("honoured", _HONOURED), ("ignored", _IGNORED), ("refused", tuple(_REFUSED)),
)  # fmt: skip

GENERATION_KEYS: Mapping[str, KeyUse] = MappingProxyType({key: use for use, keys in _USES for key in keys})
"""Every key of ``generation_config.json`` known, and what becomes of it."""


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """What the model's author set for generation; None or empty where the file says nothing.

    Attributes:
        eos_token_ids: tokens that end an answer; they replace those of ``config.json``.
        bos_token_id: replaces that of ``config.json``.
        max_new_tokens: default of ``max_tokens``.
        temperature, top_k, top_p, min_p, repetition_penalty: defaults for requests that do not set them. As in vLLM they count
            whatever ``do_sample`` says.
    """

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> GenerationConfig:
        """Read a parsed ``generation_config.json``.

        Raises:
            ConfigError: a value of the wrong type or outside its range, or a key that would change answers and has no
                counterpart here.
        """
        for key, value in raw.items():
            _check_key(key, value)
        return cls(
            eos_token_ids=token_ids("eos_token_id", raw.get("eos_token_id"), FILE),
            bos_token_id=optional_token_id("bos_token_id", raw.get("bos_token_id"), FILE),
            max_new_tokens=_whole(raw, "max_new_tokens", 1),
            temperature=_number(raw, "temperature", 0.0, 2.0),
            top_k=_whole(raw, "top_k", -1),
            top_p=_number(raw, "top_p", 0.0, 1.0) or None,
            min_p=_number(raw, "min_p", 0.0, 1.0),
            repetition_penalty=_number(raw, "repetition_penalty", 0.001, 1000.0),
        )

    def sampling_defaults(self) -> dict[str, Any]:
        """What a request inherits, by field name of `SamplingParams`; only what the file sets."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def _check_key(key: str, value: Any) -> None:
    use = GENERATION_KEYS.get(key)
    if use in ("honoured", "ignored") or value is None or value is False or value in ("", [], {}):
        return
    neutral = _REFUSED.get(key, (0, 1.0))
    if not isinstance(value, bool) and isinstance(value, int | float) and value in neutral:
        return
    why = "is not supported" if use == "refused" else "is unknown"
    raise ConfigError(
        f"{key}={shown(value)} in {FILE} {why}, and could change answers; remove the key from the file to serve without it"
    )


def _number(raw: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    value = raw.get(name)
    if value is None:
        return None
    if not is_finite_number(value):
        raise ConfigError(f"{name}={shown(value)} in {FILE} is not a finite number; correct it or remove the key")
    if not low <= value <= high:
        raise ConfigError(f"{name}={value} in {FILE} is outside {low:g} to {high:g}; correct it or remove the key")
    return float(value)


def _whole(raw: Mapping[str, Any], name: str, low: int) -> int | None:
    value = raw.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**31:
        raise ConfigError(
            f"{name}={shown(value)} in {FILE} is not a whole number of at least {low}; correct it or remove the key"
        )
    return value
