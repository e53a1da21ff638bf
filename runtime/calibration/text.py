# SPDX-License-Identifier: Apache-2.0
"""The text that a calibration reads, in windows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.errors import ConfigError, RequestError
from phalanx.runtime.text import Tokenizer

__all__ = ["MAX_BYTES", "MAX_TOKENS", "calibration_windows", "default_text"]

MAX_TOKENS = 32_768
"""Of a text; more of it adds time and little else."""
MAX_BYTES = 512 * MAX_TOKENS
"""Of a file: all that is read of it, which the longest tokens do not need."""
_WINDOW = 512
_BYTES = 4 * MAX_TOKENS
"""Of the default text: about as many tokens as count, and no more to encode than that."""


def default_text() -> str:
    """Phalanx's own sources: English prose and Python."""
    folder = files("phalanx.runtime")
    assert isinstance(folder, Path)
    text = ""
    for path in sorted(folder.rglob("*.py")):
        text += path.read_text("utf-8")
        if len(text) > _BYTES:
            break
    return text


def calibration_windows(
    text: str, tokenizer: Tokenizer | None, longest: int, vocab_size: int
) -> list[NDArray[np.int32]]:
    """Up to 32,768 tokens of ``text`` in windows of 512, or of ``longest`` if that is less.

    Each begins with what the tokenizer puts before a text.

    Raises:
        ConfigError: no tokenizer, one of another model, a text too short to keep rows for judging, or a model of one position.
    """
    if tokenizer is None:
        raise ConfigError(
            "the checkpoint has no tokenizer.json, so a text cannot be read for calibration; add it, or use --method rtn "
            "and a scheme without static inputs, and leave --kv-cache out"
        )
    try:
        ids = _first_tokens(text, tokenizer)
    except RequestError as error:
        raise ConfigError(f"the calibration text cannot be read: {error}") from None
    if len(ids) < 64:
        raise ConfigError(f"the calibration text has {len(ids)} tokens; give one of at least 64, better of 32,768")
    if max(ids) >= vocab_size:
        raise ConfigError(
            f"the tokenizer gives token {max(ids)} for the calibration text, but the model has {vocab_size} tokens; copy the tokenizer "
            "that belongs to it"
        )
    begin = [token for token in tokenizer.encode("")[:1] if token != ids[0]]
    size = min(_WINDOW, longest) - len(begin)
    if size < 1:
        raise ConfigError(
            f"the model takes {longest} token, which is the one that a text begins with; use --method rtn"
        )
    return [np.array([*begin, *ids[start : start + size]], np.int32) for start in range(0, len(ids), size)]


def _first_tokens(text: str, tokenizer: Tokenizer) -> Sequence[int]:
    """The tokens that count, of the shortest of some beginnings that has more: encoding 100 MB takes minutes and 17 GB."""
    size = 2 * _BYTES
    while len(ids := tokenizer.encode(text[:size], add_special_tokens=False)) <= MAX_TOKENS and size < len(text):
        size *= 2
    return ids[:MAX_TOKENS]
