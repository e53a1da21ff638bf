# SPDX-License-Identifier: Apache-2.0
"""Showing what ranks do until they are ready."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from phalanx.launch.arguments import engine_options
from phalanx.launch.progress import Progress

if TYPE_CHECKING:
    from phalanx.parallel.communicator import Communicator
    from phalanx.runtime.llm import LLM

__all__ = ["start_llm", "start_progress"]

OnPhase = Callable[[str, int, "int | None"], None]


@contextmanager
def start_progress(shown: bool, tell: Callable[[str], None] = lambda _: None) -> Iterator[OnPhase]:
    """Yield what `RankProgress.reporting` takes: phases go to standard error, and in words to ``tell``.

    Args:
        shown: whether this rank writes.
        tell: called with ``loading weights, 41 %``, once for each text.
    """
    last = ""
    with Progress("starting", None, "weights", shown) as progress:

        def on_phase(phase: str, done: int, total: int | None) -> None:
            nonlocal last
            progress.show(done, total, phase)
            text = f"{phase}, {100 * done // total} %" if total else phase
            if text != last:
                last = text
                tell(text)

        yield on_phase


def start_llm(args: argparse.Namespace, world: Communicator) -> LLM:
    """The `LLM` of a command's arguments, whose ranks watch each other. *Collective.* Raises as `LLM`."""
    from phalanx.runtime.llm import LLM

    with start_progress(world.rank == 0) as on_phase:
        return LLM(args.model, on_phase=on_phase, **engine_options(args))
