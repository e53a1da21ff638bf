"""``preprocessing`` and ``postprocessing`` with tokenizers that know more tokens than the model."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.kserve.text_models import preprocess
from phalanx.runtime.server.link.messages import ModelInfo
from phalanx.runtime.server.services import Services


class AddedToken:
    """Letters are tokens 0 to 25; ``<new>``, added to the tokenizer alone, is 26."""

    def __init__(self) -> None:
        self.max_token_characters = 5
        self.special_tokens: dict[str, str] = {}

    def encode(self, text: str, **_: Any) -> tuple[int, ...]:
        return (26,) if text == "<new>" else tuple(ord(letter) - ord("a") for letter in text)


def test_a_bias_for_a_token_that_the_model_lacks_is_refused_as_the_ensemble_does() -> None:
    row = {"QUERY": "ab", "REQUEST_OUTPUT_LEN": 4, "EMBEDDING_BIAS_WORDS": ["z"], "EMBEDDING_BIAS_WEIGHTS": [1.5]}
    client: Any = SimpleNamespace(model=ModelInfo("", 26, 16, 1))
    tokenizer: Any = AddedToken()
    nothing: Any = None
    with ThreadPoolExecutor(1) as workers:
        services = Services(client, nothing, nothing, workers, tokenizer)
        bias = asyncio.run(preprocess(services, [row]))[4]
        assert (bias.name, bias.array.shape) == ("EMBEDDING_BIAS", (1, 26))
        with pytest.raises(ApiError, match="EMBEDDING_BIAS_WORDS holds 26; token ids are 0 to 25") as refused:
            asyncio.run(preprocess(services, [row | {"EMBEDDING_BIAS_WORDS": ["<new>"]}]))
    assert refused.value.status == 400
