"""A server whose engine invents tokens: the HTTP process and the bridge are the real ones.

``python tests/server/stub_server.py SETTINGS OPTIONS`` with `FrontendSettings` and `StubOptions` as JSON.
"""

from __future__ import annotations

import signal
import sys
import time

import msgspec
import numpy as np

import launch  # noqa: F401 (makes phalanx importable from a checkout)
from phalanx.parallel.errors import CapacityError, ConfigError, RequestError
from phalanx.runtime.engine import ReplicaStats
from phalanx.runtime.request import Logprob, Request, TokenDelta
from phalanx.runtime.scheduler import DeltaBatch, SchedulerStats
from phalanx.runtime.server.link.bridge import EngineBridge
from phalanx.runtime.server.link.frontend import Frontend
from phalanx.runtime.server.link.messages import ModelInfo
from phalanx.runtime.server.settings import FrontendSettings


class StubOptions(msgspec.Struct):
    """How the stub behaves.

    Attributes:
        directory: where the tokenizer is.
        step_seconds: from the end of one step to the end of the next, whatever is done meanwhile.
        fail_after_steps: raise in this step.
        hang_after_steps: sleep for ever in this step.
        start_seconds: how long the engine takes to start.
    """

    directory: str
    vocab_size: int = 400
    max_model_len: int = 256
    max_open_requests: int = 8
    step_seconds: float = 0.0
    fail_after_steps: int | None = None
    hang_after_steps: int | None = None
    start_seconds: float = 0.0


FORBIDDEN_TOKEN = 13
"""A prompt with this token is refused by the stub, as the engine may refuse what the HTTP side let pass."""
FULL_TOKEN = 14
"""A prompt with this token finds the stub's queue full."""
GUIDE_TOKEN = 15
"""A prompt with this token fails as a guide does that is wrong, instead of giving it."""


class StubEngine:
    """Continues a prompt p with p[0], p[1], ... again and again; prompt token 12 makes a request fail."""

    def __init__(self, options: StubOptions) -> None:
        self._options = options
        self._open: dict[str, tuple[Request, int]] = {}
        self._plain: set[str] = set()
        self._last_step = 0.0
        self._news: list[TokenDelta] = []
        self.num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._open or self._news)

    def submit(self, request: Request) -> None:
        if FORBIDDEN_TOKEN in request.prompt_token_ids:
            raise RequestError("token 13 brings bad luck; leave it out", "prompt")
        if FULL_TOKEN in request.prompt_token_ids:
            raise CapacityError("the stub is full; try again later", 7.0)
        if not self.has_work:
            self._last_step = time.monotonic()
        self._open[request.request_id] = (request, 0)
        params = request.params
        if params.logprobs is None and not params.stop_token_ids and request.deadline is None:
            self._plain.add(request.request_id)

    def cancel(self, request_id: str) -> None:
        self._plain.discard(request_id)
        if self._open.pop(request_id, None) is not None:
            say(f"CANCELLED {request_id}")
            self._news.append(TokenDelta(request_id, finish_reason="cancelled"))

    def step_batches(self) -> list[DeltaBatch]:
        self._wait_for_step()
        self.num_steps += 1
        if self.num_steps == self._options.fail_after_steps:
            raise ArithmeticError("the stub broke")
        if self.num_steps == self._options.hang_after_steps:
            time.sleep(3600)
        deltas, self._news = self._news, []
        plain_ids, plain_tokens = [], []
        for request_id, (request, count) in list(self._open.items()):
            prompt = request.prompt_token_ids
            if 2 < count < request.params.max_tokens - 1 and request_id in self._plain:
                self._open[request_id] = (request, count + 1)
                plain_ids.append(request_id)
                plain_tokens.append(prompt[count % len(prompt)])
            else:
                deltas.append(self._advance(request, count))
        return [in_columns(deltas), DeltaBatch(np.array(plain_ids, np.object_), token_ids=np.array(plain_tokens))]

    def _wait_for_step(self) -> None:
        now = time.monotonic()
        self._last_step = max(self._last_step + self._options.step_seconds, now)
        time.sleep(self._last_step - now)

    def replica_stats(self) -> list[ReplicaStats]:
        scheduler = SchedulerStats(len(self._open), 0, len(self._open), 100, 3, 20, 5)
        return [ReplicaStats(self.num_steps, self.has_work, scheduler)]

    def _advance(self, request: Request, count: int) -> TokenDelta:
        params, prompt = request.params, request.prompt_token_ids
        request_id = request.request_id
        if request.deadline is not None and time.monotonic() > request.deadline:
            return self._end(TokenDelta(request_id, finish_reason="error", error="its deadline has passed"))
        if 12 in prompt and count == 2:
            return self._end(TokenDelta(request_id, finish_reason="error", error="its logits are not finite"))
        if GUIDE_TOKEN in prompt and count == prompt.index(GUIDE_TOKEN):
            error = "no token fits structured_outputs any more"
            return self._end(
                TokenDelta(request_id, finish_reason="error", error=error, error_param="structured_outputs")
            )
        scores = None
        if count == 0 and params.prompt_logprobs is not None:
            scored = [self._logprob(token, params.prompt_logprobs) for token in prompt[1:]]
            scores = (None, *scored)
        if params.max_tokens == 0:
            return self._end(TokenDelta(request_id, prompt_logprobs=scores, finish_reason="length"))
        token = prompt[count % len(prompt)]
        logprobs = () if params.logprobs is None else (self._logprob(token, params.logprobs),)
        reason = "length" if count + 1 == params.max_tokens else None
        stop_reason = None
        if token in params.stop_token_ids and count + 1 >= params.min_tokens:
            reason, stop_reason = "stop", token
        delta = TokenDelta(
            request_id,
            (token,),
            logprobs,
            scores,
            reason,
            stop_reason,
            num_cached_tokens=4 if count == 0 else 0,
        )
        if reason is not None:
            return self._end(delta)
        self._open[request_id] = (request, count + 1)
        return delta

    def _end(self, delta: TokenDelta) -> TokenDelta:
        del self._open[delta.request_id]
        self._plain.discard(delta.request_id)
        return delta

    def _logprob(self, token: int, num_top: int) -> Logprob:
        """The token itself is the most probable, its successors come next."""
        top = tuple(((token + i) % self._options.vocab_size, -0.5 - i) for i in range(num_top))
        return Logprob(token, -0.5, top)


def in_columns(deltas: list[TokenDelta]) -> DeltaBatch:
    """Plain next tokens in columns, as the scheduler gives them."""

    def is_plain(delta: TokenDelta) -> bool:
        return bool(delta.token_ids) and delta == TokenDelta(delta.request_id, delta.token_ids)

    plain = [delta for delta in deltas if is_plain(delta)]
    return DeltaBatch(
        request_ids=np.array([delta.request_id for delta in plain], np.object_),
        token_ids=np.array([delta.token_ids[0] for delta in plain], np.int32),
        deltas=[delta for delta in deltas if not is_plain(delta)],
    )


def main() -> int:
    settings = msgspec.json.decode(sys.argv[1], type=FrontendSettings)
    options = msgspec.json.decode(sys.argv[2], type=StubOptions)
    try:
        frontend = Frontend.start([sys.executable, "-m", "launch.http_process"], settings)
    except ConfigError as error:
        say(str(error))
        return 2
    say(f"GRPC {frontend.grpc_port}")
    say(f"BOUND {frontend.url}")
    time.sleep(options.start_seconds)
    bridge = EngineBridge(StubEngine(options), frontend.channels, num_saturated=lambda: 11)
    _drain_on_signal(bridge)
    model = ModelInfo(options.directory, options.vocab_size, options.max_model_len, options.max_open_requests)
    try:
        bridge.run(model, lambda: say(f"READY {frontend.url}"))
    except Exception as error:
        frontend.abandon(f"{type(error).__name__}: {error}")
        raise
    frontend.stop()
    return 0


def _drain_on_signal(bridge: EngineBridge) -> None:
    signal.signal(signal.SIGTERM, lambda *_: bridge.request_drain())


def say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    raise SystemExit(main())
