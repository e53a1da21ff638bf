# SPDX-License-Identifier: Apache-2.0
"""Sizes that every engine derives in the same way from the model, the operator's choices and the memory that there is."""

from __future__ import annotations

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import EngineConfig, ModelConfig

__all__ = ["longest_requested", "longest_sequence"]


def longest_requested(config: ModelConfig, max_model_len: int | None) -> int:
    """Maximum number of tokens of one sequence, prompt and output, before any cache is sized: ``max_model_len``, or the model's own.

    Raises:
        ConfigError: ``max_model_len`` exceeds the model's positions, scaled as its rotary fields say.
    """
    if max_model_len is None:
        return config.default_positions
    if max_model_len > config.scaled_positions:
        raise ConfigError(
            f"--max-model-len={max_model_len} is beyond the {config.scaled_positions} positions of "
            f"{config.architecture}; use at most {config.scaled_positions}"
        )
    return max_model_len


def longest_sequence(config: ModelConfig, options: EngineConfig, num_blocks: int) -> int:
    """Maximum number of tokens of one sequence once the cache has ``num_blocks`` blocks.

    Raises:
        ConfigError: more was asked for than the model's positions or the cache allow.
    """
    wanted = longest_requested(config, options.max_model_len)
    capacity = num_blocks * options.block_size
    if options.max_model_len is None:
        return min(wanted, capacity)
    if wanted > capacity:
        raise ConfigError(
            f"--max-model-len={wanted} does not fit the cache of {num_blocks} blocks x {options.block_size} "
            f"= {capacity} tokens; use at most {capacity}, or more --num-kv-blocks"
        )
    return wanted
