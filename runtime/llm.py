# SPDX-License-Identifier: Apache-2.0
"""`LLM`: offline generation in an SPMD script. Every rank constructs it and calls it with the same prompts."""

from __future__ import annotations

import atexit
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import EndedElsewhereError, ExecutorError, RequestError
from phalanx.parallel.liveness.judge import Limits
from phalanx.parallel.liveness.progress import RankProgress
from phalanx.parallel.liveness.watch import RankWatch
from phalanx.parallel.mpi_comm import abort_world, world_communicator
from phalanx.parallel.topology import Layout, resolve_layout
from phalanx.runtime.config import EngineConfig
from phalanx.runtime.engine import follow
from phalanx.runtime.executors.registry import with_default_sizes
from phalanx.runtime.executors.scored_logits import LogitsReader
from phalanx.runtime.offline import OfflineRun, Progress, Prompt, as_prompts, one_for_each
from phalanx.runtime.quantisation import has_fp8_cache, in_one_line, quantisation_by_part, saturation_in_words
from phalanx.runtime.replica import build_replica
from phalanx.runtime.request import RequestOutput, SamplingParams
from phalanx.runtime.text import Tokenizer

__all__ = ["LLM", "Progress", "Prompt"]

_LOG = logging.getLogger("phalanx.llm")
_PATHS = ("model_file", "engine_dir")
"""Options that may be given as text, as the model may."""


class LLM:
    """A checkpoint on all ranks of this job, for offline generation.

    ``mpirun -n 4 python script.py`` with ``with LLM(model, tensor_parallel_size=4) as llm: llm.generate([...])``. Without
    mpirun it runs on one rank. *Construction, `generate` and `close` are collective: every rank calls them, in the same order.*

    Args:
        model: Hugging Face directory, the name of a model in the Hugging Face cache (``ORG/NAME``), or output of ``launch.split``;
            None = the demo checkpoint.
        tensor_parallel_size, pipeline_parallel_size, data_parallel_size: the layout; by default all ranks are tensor-parallel.
        comm: the job's ranks; by default those of MPI.
        on_phase: told what this rank does while it starts, and how much of it is done: ``(phase, done, total)``.
        options: further fields of `EngineConfig` (engine, dtype, max_num_seqs, ...).

    Raises:
        ConfigError: layout, engine or sizes do not fit the model or this machine.
        CheckpointError: the checkpoint is missing or broken.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        tensor_parallel_size: int | None = None,
        pipeline_parallel_size: int | None = None,
        data_parallel_size: int | None = None,
        comm: Communicator | None = None,
        on_phase: Callable[[str, int, int | None], None] | None = None,
        **options: Any,
    ) -> None:
        world = world_communicator() if comm is None else comm
        progress = RankProgress()
        self._watch = None
        if comm is None and world.size > 1:
            self._watch = RankWatch(world, progress, Limits())
            atexit.register(self._leave)
        layout = resolve_layout(world.size, tensor_parallel_size, pipeline_parallel_size, data_parallel_size)
        paths = {name: Path(options[name]) for name in _PATHS if options.get(name) is not None}
        config = EngineConfig(layout=layout, **with_default_sizes({"max_queued_requests": 1 << 30, **options, **paths}))
        with progress.reporting(on_phase):
            self._replica = build_replica(None if model is None else Path(model), config, world, progress)
        self.tokenizer = Tokenizer.from_directory(self._replica.directory)
        self._closed = self._has_warned = False
        self._failure: str | None = None
        self._ids = map(str, itertools.count())

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of one sequence, prompt and output."""
        return self._replica.max_model_len

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What `generate` uses if no parameters are given: the defaults of ``generation_config.json``."""
        return SamplingParams(**self._replica.generation.sampling_defaults())

    @property
    def vocab_size(self) -> int:
        """V, tokens that the model knows."""
        return self._replica.config.vocab_size

    @property
    def layout(self) -> Layout:
        """Sizes of the parallel axes."""
        return self._replica.options.layout

    @property
    def quantisation(self) -> str:
        """How weights, activations and cache are quantised, in one line: by the checkpoint, or while it was loaded."""
        return in_one_line(self.quantisation_by_part)

    @property
    def quantisation_by_part(self) -> dict[str, str]:
        """The same of ``weights``, with the activations that they meet, and ``cache``."""
        replica = self._replica
        return quantisation_by_part(replica.family, replica.config, replica.checkpoint.formats, replica.options)

    @property
    def device(self) -> str:
        """What computes on this rank, in words, for reports."""
        return self._replica.executor.device

    @property
    def is_leader(self) -> bool:
        """Whether this is the job's first rank, which should do the printing."""
        return self._replica.world.rank == 0

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt; results in input order, on every rank. *Collective.*

        Without ``sampling_params`` those of `default_sampling_params` are used.

        Raises:
            RequestError: a prompt or its parameters cannot run here. `run` returns the other prompts' results.
            ExecutorError: an earlier call broke the engine; make a new LLM.
        """
        listed = as_prompts(prompts)
        params = one_for_each(sampling_params, len(listed), self.default_sampling_params)
        outputs = self.run(listed, params)
        refused = next((output for output in outputs if output.finish_reason == "error"), None)
        if refused is not None:
            raise RequestError(f"prompt {refused.index}: {refused.error}")
        return outputs

    def run(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        progress: Progress | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Like `generate`, but a prompt that cannot run ends with ``finish_reason="error"`` instead. *Collective.*

        On a leader ``progress`` sees the tokens and ``on_output`` the results of its replica as they come.
        Ctrl-C on a leader, or an exception of ``progress``, ends the call on every rank. The LLM can be used again.

        Raises:
            ExecutorError: an earlier call broke the engine, or another replica's leader ended this call.
        """
        if self._failure is not None:
            raise ExecutorError(f"this LLM cannot be used any more, since {self._failure}; make a new one")
        replica, outcome = self._replica, _Outcome()
        interruption: BaseException | None = None
        if replica.engine is None:
            with self._unusable_after_failure(), replica.progress.phase("executing steps"):
                follow(replica.control, replica.executor, replica.progress)
        else:
            mine = range(replica.topology.replica, len(prompts), replica.options.layout.dp)
            run = OfflineRun(replica.engine, self.tokenizer, self._ids, progress, on_output)
            try:
                with replica.progress.phase("generating"):
                    outcome.outputs = run((index, prompts[index], params[index]) for index in mine)
            except BaseException as error:
                if run.engine_failed:
                    self._failure = _described(error)
                    raise
                interruption, outcome.error = error, _described(error)
            replica.engine.release()
        with self._unusable_after_failure():
            outcomes = self._share(outcome)
            self._warn_of_saturation()
        if interruption is not None:
            raise interruption
        return _all_outputs(outcomes, len(prompts))

    @contextmanager
    def reading_logits(self, reader: LogitsReader) -> Iterator[None]:
        """Show ``reader`` the logits of prompts that are scored meanwhile, on the ranks that hold them."""
        self._replica.executor.logits_reader = reader
        try:
            yield
        finally:
            self._replica.executor.logits_reader = None

    @property
    def has_fp8_cache(self) -> bool:
        """Whether keys and values are held as fp8."""
        return has_fp8_cache(self._replica.checkpoint.formats, self._replica.options)

    def num_saturated(self) -> int:
        """Keys and values that the fp8 caches of all ranks could not hold so far. *Collective.*"""
        own = np.array(self._replica.executor.num_saturated)
        return int(self._replica.world.all_gather(own).sum())

    def _warn_of_saturation(self) -> None:
        """Say it once, on the first rank. *Collective.*"""
        if self.has_fp8_cache and not self._has_warned and (count := self.num_saturated()):
            self._has_warned = True
            if self.is_leader:
                _LOG.warning("%s", saturation_in_words(count))

    def close(self) -> None:
        """Release the executor and the groups. *Collective.*"""
        if not self._closed:
            self._closed = True
            self._replica.executor.close()
            self._leave()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._watch is not None:
            self._watch.__exit__(kind, error, trace)

    def _leave(self) -> None:
        """Tell the other ranks that this one makes no more calls; at the end of a script that failed, end them all."""
        if self._watch is None:
            return
        atexit.unregister(self._leave)
        watch, self._watch = self._watch, None
        error = getattr(sys, "last_value", None)
        if error is None:
            watch.close()
            return
        watch.fail(error)
        abort_world(1)

    @contextmanager
    def _unusable_after_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._failure = _described(error)
            raise

    def _share(self, outcome: _Outcome) -> list[_Outcome]:
        """Give every rank the outcome of every replica's leader. *Collective.*"""
        world, layout = self._replica.world, self._replica.options.layout
        if world.size == 1:
            return [outcome]
        outcomes: list[_Outcome] = []
        for leader in range(0, world.size, layout.tp * layout.pp):
            encoded = msgspec.msgpack.encode(outcome) if world.rank == leader else b""
            size = world.broadcast(np.array([len(encoded)], np.int64), leader)
            data = np.frombuffer(encoded, np.uint8).copy() if world.rank == leader else np.empty(size[0], np.uint8)
            outcomes.append(_OUTCOMES.decode(world.broadcast(data, leader).tobytes()))
        return outcomes


@dataclass(slots=True)
class _Outcome:
    """What a leader has to tell after a call: results, or why it ended early."""

    outputs: list[RequestOutput] = field(default_factory=list)
    error: str | None = None


_OUTCOMES = msgspec.msgpack.Decoder(_Outcome)
"""Made once: ranks that are threads must not describe the type to msgspec at the same time."""


def _all_outputs(outcomes: Sequence[_Outcome], count: int) -> list[RequestOutput]:
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    if errors:
        raise EndedElsewhereError(f"another rank ended this call ({errors[0]}); the LLM can be used again")
    outputs = [output for outcome in outcomes for output in outcome.outputs]
    assert len(outputs) == count, (len(outputs), count)
    return sorted(outputs, key=lambda output: output.index)


def _described(error: BaseException) -> str:
    return f"a call ended with {type(error).__name__}: {error}".rstrip(": ")
