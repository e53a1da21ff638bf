# SPDX-License-Identifier: Apache-2.0
"""What every handler works with: engine, tokenizer, settings, metrics, and the checks that need them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from phalanx.parallel.errors import RequestError
from phalanx.runtime.sampling.guides import Guide
from phalanx.runtime.server.errors import ApiError, from_request_error, invalid
from phalanx.runtime.server.guides import GuideChecker
from phalanx.runtime.server.link.engine_client import EngineClient
from phalanx.runtime.server.link.messages import ModelInfo
from phalanx.runtime.server.metrics import Metrics
from phalanx.runtime.server.settings import FrontendSettings
from phalanx.runtime.server.turnstile import Turnstile
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
    guides: GuideChecker = field(default_factory=GuideChecker)
    turnstile: Turnstile = field(default_factory=Turnstile)
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

    def need_template(self, *, for_tools: bool = False) -> ChatTemplate:
        """Return the chat template; raise 400 if the checkpoint has none, or none that shows tools to the model."""
        tokenizer = self.need_tokenizer("messages")
        template = tokenizer.tool_template if for_tools else tokenizer.chat_template
        if template is None:
            problem = tokenizer.chat_problem or "this checkpoint has no chat template"
            raise invalid(f"{problem}; use /v1/completions", "messages")
        if for_tools and not template.takes_tools:
            raise invalid("the chat template of this checkpoint does not take tools; leave them out", "tools")
        return template

    @property
    def tool_call_form(self) -> str | None:
        """The form in which the model writes tool calls, a key of `TOOL_CALL_FORMS`; None if it is not known."""
        chosen = self.settings.tool_call_parser
        if chosen != "auto":
            return None if chosen == "none" else chosen
        template = None if self.tokenizer is None else self.tokenizer.tool_template
        return None if template is None else template.tool_call_form

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """Values of sampling fields that a request leaves out, as the checkpoint's author set them."""
        return self.model.sampling_defaults

    def check_token_ids(self, token_ids: Sequence[int], name: str) -> None:
        """Raise 400 unless all ids are inside the vocabulary."""
        for token_id in token_ids:
            if not 0 <= token_id < self.model.vocab_size:
                raise invalid(f"{name} holds {token_id}; token ids are 0 to {self.model.vocab_size - 1}", name)

    def check_characters(self, count: int, name: str, last: int | None = None) -> None:
        """Raise 400 if so many characters cannot fit into the context, whatever they are, nor their ``last`` tokens alone."""
        limit = self.model.max_model_len
        if last is not None and last <= limit:
            return
        most = limit * self.need_tokenizer(name).max_token_characters
        if count > most:
            raise invalid(
                f"This model's maximum context length is {limit} tokens, which are at most {most} characters. However, you "
                f"requested {count} characters. Please reduce the length of the {name}.",
                name, "context_length_exceeded",
            )  # fmt: skip

    async def check_guide(self, guide: Guide) -> None:
        """Raise 400 if the engine could not use a guide."""
        self.need_tokenizer(guide.name)
        await self.guides.check(guide)

    async def encode(
        self, text: str, *, add_special_tokens: bool, name: str = "prompt", last: int | None = None
    ) -> tuple[int, ...]:
        """Token ids of a text, of which the ``last`` ones, computed outside the event loop.

        Raises:
            ApiError: 400: no tokenizer; more characters than the context can hold, whatever they are, unless only tokens that it can hold
                are wanted.
        """
        tokenizer = self.need_tokenizer(name)
        self.check_characters(len(text), name, last)
        return await self.in_worker(lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens, last=last))

    async def in_worker(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` on a worker thread; `RequestError` becomes a 400."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.workers, work)
        except RequestError as error:
            raise from_request_error(error) from None
