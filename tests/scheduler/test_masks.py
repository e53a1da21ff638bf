"""Token masks that come late, or not at all."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np

from phalanx.parallel.errors import RequestError
from phalanx.runtime.guidance import GuideMask
from phalanx.runtime.kv_cache import BlockPlanner
from phalanx.runtime.sampling.guides import Guide
from phalanx.runtime.scheduler import Scheduler

from .harness import CONFIG, make_request, make_result, plan_step


class FailsWhileLookedAt(Future[Any]):
    """Not done at the first look; at the second it has just failed."""

    num_looks = 0

    def done(self) -> bool:
        self.num_looks += 1
        if self.num_looks == 2:
            self.set_exception(RequestError("the grammar is too large", "structured_outputs"))
        return super().done()


class Masks:
    """Gives the mask of a guide whose compilation ends when it is looked at."""

    def start(self, guide: Guide) -> GuideMask:
        return GuideMask(self, lambda: None, CONFIG.vocab_size, "structured_outputs")  # type: ignore[arg-type]

    def submit(self, *_: Any) -> FailsWhileLookedAt:
        return FailsWhileLookedAt()


def test_guide_that_fails_while_a_step_is_planned_ends_its_request_alone() -> None:
    cache = BlockPlanner(64, 4, CONFIG.max_num_seqs, CONFIG.max_model_len)
    scheduler = Scheduler(CONFIG, cache, Masks())
    scheduler.submit(make_request("a", structured_outputs={"regex": "a+"}), 0.0)
    assert scheduler.plan(0.0) is None
    scheduler.wait_for_masks(0.0)
    assert scheduler.plan(0.0) is None
    (delta,) = scheduler.take_deltas()
    assert (delta.finish_reason, delta.error) == ("error", "the grammar is too large")
    assert delta.error_param == "structured_outputs", "the client's mistake, not the server's"
    assert not scheduler.has_work


def test_request_that_only_scores_its_prompt_needs_no_mask() -> None:
    cache = BlockPlanner(64, 4, CONFIG.max_num_seqs, CONFIG.max_model_len)
    scheduler = Scheduler(CONFIG, cache, Masks())
    scheduler.submit(make_request("a", structured_outputs={"regex": "a+"}, max_tokens=0, prompt_logprobs=0), 0.0)
    plan = plan_step(scheduler)
    result = make_result(plan)
    result.logprobs = np.zeros(len(result.token_ids), np.float32)
    scheduler.apply(result, 0.0)
    (delta,) = scheduler.take_deltas()
    assert (delta.finish_reason, delta.error) == ("length", None)
    assert delta.prompt_logprobs is not None
