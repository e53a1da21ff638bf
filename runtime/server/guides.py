# SPDX-License-Identifier: Apache-2.0
"""Guides are tried before the engine sees them: on threads of their own, a few at a time, and not for long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from phalanx.parallel.errors import CapacityError, RequestError
from phalanx.runtime.guidance import check_guide
from phalanx.runtime.sampling.guides import Guide
from phalanx.runtime.server.errors import from_request_error, invalid, overloaded

__all__ = ["GuideChecker"]

CHECK_SECONDS = 5.0
"""How long compiling a guide and its first mask may take; llguidance's own limits end it soon after."""

MOST_CHECKS = 16
"""Guides that are tried or wait for it at once."""


class GuideChecker:
    """Compiles guides as the engine will, but for bytes instead of the model's tokens: their limits are the same, and no tokenizer
    has to be prepared."""

    def __init__(self, compile_guide: Callable[[Guide], None] = check_guide) -> None:
        self._compile_guide = compile_guide
        self._threads = ThreadPoolExecutor(2, "guides")
        self._num_checks = 0

    async def check(self, guide: Guide) -> None:
        """Raise ApiError for a guide that cannot be used: 400, or 429 while too many others are tried."""
        if self._num_checks >= MOST_CHECKS:
            raise overloaded(CapacityError(f"{MOST_CHECKS} guides are being compiled; try again later"))
        self._num_checks += 1
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._compile_guide, guide)
        work.add_done_callback(self._checked)
        try:
            await asyncio.wait_for(asyncio.shield(work), CHECK_SECONDS)
        except TimeoutError:
            raise invalid(
                f"{guide.name} took longer than {CHECK_SECONDS:g} s to compile; simplify it", guide.name
            ) from None
        except RequestError as error:
            raise from_request_error(error) from None

    def _checked(self, work: asyncio.Future[None]) -> None:
        self._num_checks -= 1
        if not work.cancelled():
            work.exception()  # which the caller has, unless it gave up
