"""`LLM`: offline generation in an SPMD script. Every rank constructs it and calls it with the same prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import CapacityError, RequestError
from phalanx.parallel.mpi_comm import world_communicator
from phalanx.parallel.topology import Layout, resolve_layout
from phalanx.runtime.config import EngineConfig
from phalanx.runtime.engine import Engine, follow
from phalanx.runtime.executors.factory import with_default_sizes
from phalanx.runtime.replica import build_replica, phase
from phalanx.runtime.request import FinishReason, Logprob, Request, RequestOutput, SamplingParams, TokenDelta
from phalanx.runtime.text import TextStream, Tokenizer

__all__ = ["LLM", "Progress", "Prompt"]

Prompt = str | Sequence[int]
"""Text, or token ids as they are."""

_LARGEST_TOKEN_ID = 2**31 - 1
"""What a step's arrays hold; the scheduler knows the vocabulary's own, smaller limit."""

Progress = Callable[[int, TokenDelta, str], None]
"""Called on the leader as tokens arrive: index of the request, what was added, its text."""


class LLM:
    """A checkpoint on all ranks of this job, for offline generation.

    ``mpirun -n 4 python script.py`` with ``with LLM(model, tensor_parallel_size=4) as llm: llm.generate([...])``. Without
    mpirun it runs on one rank. *Construction, `generate` and `close` are collective: every rank calls them, in the same order.*

    Args:
        model: Hugging Face directory or output of ``launch.split``; None = the demo checkpoint.
        tensor_parallel_size, pipeline_parallel_size, data_parallel_size: the layout; by default all ranks are tensor-parallel.
        comm: the job's ranks; by default those of MPI.
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
        **options: Any,
    ) -> None:
        world = world_communicator() if comm is None else comm
        layout = resolve_layout(world.size, tensor_parallel_size, pipeline_parallel_size, data_parallel_size)
        config = EngineConfig(layout=layout, **with_default_sizes({"max_queued_requests": 1 << 30, **options}))
        self._replica = build_replica(None if model is None else Path(model), config, world)
        self.tokenizer = Tokenizer.from_directory(self._replica.directory)
        self._closed = False

    @property
    def max_model_len(self) -> int:
        """Most tokens of one sequence, prompt and output."""
        return self._replica.max_model_len

    @property
    def layout(self) -> Layout:
        """Sizes of the parallel axes."""
        return self._replica.options.layout

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

        Raises:
            RequestError: a prompt or its parameters cannot run here; nothing is lost of the others' results if you call `run`.
        """
        listed = _as_list(prompts)
        params = _one_for_each(sampling_params, len(listed))
        outputs = self.run(listed, params)
        refused = next((output for output in outputs if output.finish_reason == "error"), None)
        if refused is not None:
            raise RequestError(f"prompt {refused.index}: {refused.error}")
        return outputs

    def run(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], progress: Progress | None = None
    ) -> list[RequestOutput]:
        """Like `generate`, but a prompt that cannot run ends with ``finish_reason="error"`` instead. *Collective.*"""
        replica = self._replica
        mine = range(replica.topology.replica, len(prompts), replica.options.layout.dp)
        finished: list[RequestOutput] = []
        if replica.engine is not None:
            with phase("generating"):
                run = _Run(replica.engine, self.tokenizer, progress)
                finished = run([(index, prompts[index], params[index]) for index in mine])
            replica.engine.release()
        else:
            with phase("executing steps"):
                follow(replica.control, replica.executor)
        return self._share(finished, len(prompts))

    def close(self) -> None:
        """Release the executor and the groups. *Collective.*"""
        if not self._closed:
            self._closed = True
            self._replica.executor.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()

    def _share(self, finished: list[RequestOutput], count: int) -> list[RequestOutput]:
        """Give every rank the results of every replica's leader. *Collective.*"""
        world, layout = self._replica.world, self._replica.options.layout
        if world.size == 1:
            return sorted(finished, key=lambda output: output.index)
        outputs: list[RequestOutput] = []
        for leader in range(0, world.size, layout.tp * layout.pp):
            encoded = msgspec.msgpack.encode(finished) if world.rank == leader else b""
            size = world.broadcast(np.array([len(encoded)], np.int64), leader)
            data = np.frombuffer(encoded, np.uint8).copy() if world.rank == leader else np.empty(size[0], np.uint8)
            outputs += msgspec.msgpack.decode(world.broadcast(data, leader).tobytes(), type=list[RequestOutput])
        assert len(outputs) == count, (len(outputs), count)
        return sorted(outputs, key=lambda output: output.index)


@dataclass(slots=True)
class _Growing:
    """One request while it runs."""

    index: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    stream: TextStream | None
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    num_cached_tokens: int = 0

    def take(self, delta: TokenDelta) -> tuple[str, str | None]:
        """Add what a step brought; returns the new text and the stop text that it completed, if any."""
        self.num_cached_tokens = delta.num_cached_tokens or self.num_cached_tokens
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        count, text, stop = len(delta.token_ids), "", None
        if self.stream is not None:
            visible = delta.token_ids[:-1] if delta.ends_with_stop_token(self.params) else delta.token_ids
            piece = self.stream.push(visible)
            text, stop = piece.text, piece.stop
            if stop is not None:
                count = piece.num_tokens
            elif delta.finish_reason is not None:
                text += self.stream.finish()
        self.token_ids += delta.token_ids[:count]
        self.logprobs += delta.logprobs[:count]
        self.text.append(text)
        return text, stop

    def finish(self, reason: FinishReason, stop_reason: int | str | None, error: str | None) -> RequestOutput:
        """The final result."""
        return RequestOutput(
            index=self.index,
            prompt_token_ids=self.prompt_token_ids,
            token_ids=tuple(self.token_ids),
            text=None if self.stream is None else "".join(self.text),
            finish_reason=reason,
            stop_reason=stop_reason,
            logprobs=None if self.params.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens,
            error=error,
        )


class _Run:
    """One call of `LLM.run` on a leader: all requests in, all results out."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, progress: Progress | None) -> None:
        self._engine, self._tokenizer, self._progress = engine, tokenizer, progress
        self._growing: dict[str, _Growing] = {}
        self._finished: list[RequestOutput] = []

    def __call__(self, work: list[tuple[int, Prompt, SamplingParams]]) -> list[RequestOutput]:
        for index, prompt, params in work:
            self._submit(index, prompt, params)
        while self._growing:
            for delta in self._engine.step():
                self._take(delta)
        return self._finished

    def _submit(self, index: int, prompt: Prompt, params: SamplingParams) -> None:
        growing = _Growing(index, (), params, None)
        try:
            growing.prompt_token_ids = self._encode(prompt)
            self._check_stop(params)
            # The scheduler checks the token ids, so it comes before the tokenizer.
            self._engine.submit(Request(str(index), growing.prompt_token_ids, params))
        except (RequestError, CapacityError) as error:
            self._finished.append(growing.finish("error", None, str(error)))
            return
        growing.stream = self._stream(growing.prompt_token_ids, params)
        self._growing[str(index)] = growing

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            token_ids = tuple(map(int, prompt))
            if too_large := [token for token in token_ids if abs(token) > _LARGEST_TOKEN_ID]:
                raise RequestError(
                    f"prompt token {too_large[0]} is no token id; use numbers below the vocabulary's size"
                )
            return token_ids
        if self._tokenizer is None:
            raise RequestError("the checkpoint has no tokenizer.json, so text cannot be read; give token ids", "prompt")
        return self._tokenizer.encode(prompt)

    def _check_stop(self, params: SamplingParams) -> None:
        if self._tokenizer is None and params.stop:
            raise RequestError("stop needs text, but the checkpoint has no tokenizer.json; use stop_token_ids", "stop")

    def _stream(self, prompt_token_ids: tuple[int, ...], params: SamplingParams) -> TextStream | None:
        if self._tokenizer is None:
            return None
        return self._tokenizer.text_stream(
            prompt_token_ids, stop=params.stop, include_stop=params.include_stop, min_tokens=params.min_tokens,
            skip_special_tokens=params.skip_special_tokens,
        )  # fmt: skip

    def _take(self, delta: TokenDelta) -> None:
        growing = self._growing.get(delta.request_id)
        if growing is None:  # ended by a stop text while a step was in flight
            return
        text, stop = growing.take(delta)
        reason = "stop" if stop is not None else delta.finish_reason
        if self._progress is not None:
            self._progress(growing.index, dataclasses.replace(delta, finish_reason=reason), text)
        if reason is None:
            return
        del self._growing[delta.request_id]
        if stop is not None and delta.finish_reason is None:
            self._engine.cancel(delta.request_id)
        self._finished.append(growing.finish(reason, delta.stop_reason if stop is None else stop, delta.error))


def _as_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One prompt, or many: a sequence of numbers is one prompt."""
    listed: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    return [listed] if listed and all(isinstance(item, (int, np.integer)) for item in listed) else listed


def _one_for_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling_params for {count} prompts; give one, or one for each")
    return list(params)
