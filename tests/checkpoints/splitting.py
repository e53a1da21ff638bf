"""Splitting test checkpoints in process, and reading them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.checkpoints.files import ModelDirectory
from phalanx.checkpoints.loader import load_weights
from phalanx.checkpoints.sinks import NumpySink
from phalanx.checkpoints.split_plan import SplitJob, stored_weights
from phalanx.checkpoints.splitter import SplitReport, split_checkpoint
from phalanx.parallel.communicator import SelfCommunicator
from phalanx.runtime.models import find_model

__all__ = ["load_rank", "read_all", "split"]


def split(path: Path, output: Path, tp: int, pp: int, dtype: str | None = None, threads: int = 1) -> SplitReport:
    """As ``launch.split`` does it."""
    with open_checkpoint(path) as checkpoint:
        model = find_model(checkpoint.config)
        config = model.read_config(checkpoint.config)
        stages = tuple(
            stored_weights(
                checkpoint.source, model.weights(config, layers, stage == 0, stage == pp - 1), checkpoint.formats
            )
            for stage, layers in enumerate(model.stages(config, pp))
        )
        ignored = (*model.ignored_tensors, *checkpoint.formats.not_used)
        job = SplitJob(model.architecture, stages, tp, ignored, dtype, layers=model.stages(config, pp))
        return split_checkpoint(checkpoint.source, ModelDirectory.at(path), job, output, SelfCommunicator(), threads)


def read_all(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of a checkpoint as it is stored."""
    with open_checkpoint(path) as checkpoint:
        source = checkpoint.source
        return {name: source.read(name, source.info(name).whole) for name in source.names()}


def load_rank(path: Path, tp: int, pp: int, rank: int) -> dict[str, np.ndarray[Any, Any]]:
    """The weights of one rank of a tp x pp layout."""
    sink = NumpySink()
    with open_checkpoint(path) as checkpoint:
        model = find_model(checkpoint.config)
        config = model.read_config(checkpoint.config)
        stage, tp_rank = divmod(rank, tp)
        specs = model.weights(config, model.stages(config, pp)[stage], stage == 0, stage == pp - 1)
        load_weights(checkpoint.source, specs, tp_rank, tp, sink, model.ignored_tensors, model.weights(config))
    return sink.weights
