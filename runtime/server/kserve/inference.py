# SPDX-License-Identifier: Apache-2.0
"""What both doors of the v2 protocol do with a request, over HTTP or gRPC: find the model, run it, count it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from phalanx import __version__
from phalanx.runtime.server.board import Board
from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.kserve.answers import piece, whole
from phalanx.runtime.server.kserve.contract import MODELS, ModelContract
from phalanx.runtime.server.kserve.errors import InvalidTensor
from phalanx.runtime.server.kserve.inputs import Row
from phalanx.runtime.server.kserve.parameters import timeout_seconds
from phalanx.runtime.server.kserve.parsing import Query, parse_rows
from phalanx.runtime.server.kserve.statistics import ModelStatistics
from phalanx.runtime.server.kserve.tensors import Tensor
from phalanx.runtime.server.kserve.text_models import postprocess, preprocess
from phalanx.runtime.server.openai.generation_job import GenerationJob, start_job
from phalanx.runtime.server.services import Services
from phalanx.runtime.server.time_limit import TimeLimit

__all__ = ["Inference"]

EXTENSIONS = ("binary_tensor_data", "generate", "model_configuration", "model_repository", "parameters", "statistics")

_NOT_MEASURED = frozenset(
    {
        "context_logits", "generation_logits", "kv_cache_alloc_new_blocks", "kv_cache_reused_blocks",
        "kv_cache_alloc_total_blocks", "total_accepted_draft_tokens", "total_draft_tokens", "acceptance_rate",
        "arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns",
    }
)  # fmt: skip

_TEXT_MODELS = {"preprocessing": preprocess, "postprocessing": postprocess}


class Inference:
    """The models of the TensorRT-LLM backend over one engine.

    Args:
        board: where the HTTP processes count requests.
    """

    def __init__(self, services: Services, board: Board) -> None:
        self.services = services
        self.statistics: Mapping[str, ModelStatistics] = {name: ModelStatistics(name, board) for name in MODELS}

    def metadata(self) -> dict[str, Any]:
        """Body of ``GET v2``."""
        return {"name": "phalanx", "version": __version__, "extensions": list(EXTENSIONS)}

    def index(self) -> list[dict[str, str]]:
        """The repository index."""
        return [{"name": name, "version": "1", "state": "READY", "reason": ""} for name in MODELS]

    def contract(self, name: str, version: str = "") -> ModelContract:
        """The model of that name.

        Raises:
            ApiError: 404: there is none, or not in this version.
        """
        found = MODELS.get(name)
        if found is None:
            raise ApiError(
                404, f"Request for unknown model: '{name:.100}' is not found; use one of {', '.join(MODELS)}"
            )
        if version not in ("", "1"):
            raise ApiError(
                404, f"Request for unknown model: '{name}' version {version:.20} is not found; use version 1"
            )
        return found

    def model_statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Statistics of one model, or of all.

        Raises:
            ApiError: 404: no such model.
        """
        names = [self.contract(name, version).name] if name else list(MODELS)
        return {"model_stats": [self.statistics[found].shown() for found in names]}

    def check_outputs(self, contract: ModelContract, names: Sequence[str]) -> None:
        """Raise InvalidTensor if a request asks for an output that the model does not have, or that Phalanx does not measure."""
        known = {spec.name for spec in contract.outputs}
        for name in names:
            if name not in known:
                raise InvalidTensor(f"unexpected inference output '{name:.100}' for model '{contract.name}'")
            if name in _NOT_MEASURED:
                raise InvalidTensor(f"output '{name}' is not supported by this server; leave it out")

    def parse(self, contract: ModelContract, rows: Sequence[Row]) -> Query:
        """What the rows ask the engine for.

        Raises:
            ApiError: 400, naming the input.
        """
        return parse_rows(contract, rows, self.services.model.vocab_size)

    def limit(self, arrival: float, parameters: Mapping[str, Any]) -> TimeLimit:
        """Return when a request of any model must be over: the client's ``timeout``, within the server's limit.

        Raises:
            InvalidTensor: ``timeout`` is not a number of microseconds.
        """
        seconds = timeout_seconds(parameters)
        return TimeLimit.shortest(arrival, seconds, self.services.settings.request_timeout_seconds)

    async def start(self, query: Query, limit: TimeLimit) -> GenerationJob:
        """Submit a query. The job must be closed.

        Raises:
            ApiError: as `start_job`.
        """
        return await start_job(self.services, query.rows, limit)

    async def run(self, contract: ModelContract, rows: Sequence[Row], limit: TimeLimit) -> list[Tensor]:
        """All outputs, once they are complete. Cancelled with the task.

        Raises:
            ApiError: the request is refused or failed.
        """
        with self.statistics[contract.name].measure(len(rows)):
            if contract.name in _TEXT_MODELS:
                async with limit.enforced():
                    return await _TEXT_MODELS[contract.name](self.services, rows)
            query = self.parse(contract, rows)
            job = await self.start(query, limit)
            try:
                return whole(contract, query, await job.collect())
            finally:
                job.close()

    async def stream(
        self, contract: ModelContract, rows: Sequence[Row], limit: TimeLimit
    ) -> AsyncGenerator[tuple[list[Tensor], bool], None]:
        """The outputs of each response, and whether it is the last: what is new, if the request asks to stream, else everything at once.

        Raises:
            ApiError: the request is refused or failed.
        """
        query = None if contract.name in _TEXT_MODELS else self.parse(contract, rows)
        if query is None or not query.stream:
            yield await self.run(contract, rows, limit), True
            return
        with self.statistics[contract.name].measure(len(rows)):
            job = await self.start(query, limit)
            try:
                while not job.is_finished:
                    taken = await job.next()
                    for index, (choice, events) in enumerate(taken, 1):
                        yield piece(contract, query, choice, events), job.is_finished and index == len(taken)
            finally:
                job.close()
