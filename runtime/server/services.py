# SPDX-License-Identifier: Apache-2.0
"""What every handler works with: engine, tokenizer, settings, metrics, and the checks that need them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from phalanx.parallel.errors import RequestError
from phalanx.runtime.server.errors import ApiError, from_request_error, invalid
from phalanx.runtime.server.link.engine_client import EngineClient
from phalanx.runtime.server.link.messages import ModelInfo
from phalanx.runtime.server.metrics import Metrics
from phalanx.runtime.server.settings import FrontendSettings
from phalanx.runtime.text import ChatTemplate, Tokenizer

__all__ = ["Services"]

Result = TypeVar("Result")


@dataclass(slots=True)
class Services:
    """What handlers work with. ``model`` and ``tokenizer`` are there once the server is ready."""

    client: EngineClient
    settings: FrontendSettings
    metrics: Metrics
    workers: ThreadPoolExecutor
    tokenizer: Tokenizer | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> ModelInfo:
        """What the engine said about the model."""
        assert self.client.model is not None
        return self.client.model

    @property
    def model_name(self) -> str:
        """The name that answers carry."""
        return self.settings.model_names[0]

    def check_model(self, name: str | None) -> None:
        """Raise 404 when a request asks for another model."""
        if name is not None and name not in self.settings.model_names:
            known = ", ".join(self.settings.model_names)
            raise ApiError(
                404, f"model {name!r} is not served here; use {known}", param="model", code="model_not_found"
            )

    def need_tokenizer(self, param: str) -> Tokenizer:
        """The tokenizer, or 400 where the checkpoint has none."""
        if self.tokenizer is None:
            raise invalid(f"the checkpoint has no tokenizer.json, so {param} cannot be text; use token ids", param)
        return self.tokenizer

    def need_template(self) -> ChatTemplate:
        """The chat template, or 400 where the checkpoint has none."""
        tokenizer = self.need_tokenizer("messages")
        if tokenizer.chat_template is None:
            problem = tokenizer.chat_problem or "this checkpoint has no chat template"
            raise invalid(f"{problem}; use /v1/completions", "messages")
        return tokenizer.chat_template

    async def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of a prompt, computed outside the event loop."""
        tokenizer = self.need_tokenizer("prompt")
        most = self.model.max_model_len * tokenizer.max_token_characters
        return await self.in_worker(
            lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens, max_characters=most)
        )

    async def in_worker(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` on a worker thread; `RequestError` becomes a 400."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.workers, work)
        except RequestError as error:
            raise from_request_error(error) from None

    def deadline(self, arrival: float) -> float | None:
        """Monotonic time at which a request that arrived at ``arrival`` must be over."""
        seconds = self.settings.request_timeout_seconds
        return None if seconds is None else arrival + seconds

    def completion_budget(self, num_prompt_tokens: int, asked: int | None, param: str) -> int:
        """How many tokens to generate: what was asked for, or what the context has room for.

        Raises:
            ApiError: 400 ``context_length_exceeded``.
        """
        room = self.model.max_model_len - num_prompt_tokens
        if asked is not None and asked < 0:
            raise invalid(f"{param}={asked} is negative; use 1 or more", param)
        if num_prompt_tokens == 0:
            raise invalid("the prompt is empty; give at least one token", "prompt")
        if (asked or 0) > room or room < (0 if asked == 0 else 1):
            wanted = "" if asked is None else f" and {param}={asked}"
            raise invalid(
                f"{num_prompt_tokens} prompt tokens{wanted} exceed this model's context of "
                f"{self.model.max_model_len} tokens; shorten the prompt or ask for fewer tokens",
                param if room > 0 else "prompt",
                "context_length_exceeded",
            )
        return room if asked is None else asked
