"""What every part of one rank's executor is built from, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.checkpoints.checkpoint import Checkpoint
from phalanx.checkpoints.formats import FormattedWeight
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.sharding import stage_layers
from phalanx.parallel.topology import Topology
from phalanx.runtime.config import ComputeDType, EngineConfig, ModelConfig
from phalanx.runtime.executors.weights import Array, CollectingSink, Weights, load_stage, stage_weights
from phalanx.runtime.models import Model

__all__ = ["RankSpec"]


@dataclass(frozen=True, slots=True)
class RankSpec:
    """What one rank serves, how, and its place among the ranks of its replica.

    Attributes:
        model: the family; ``config`` its dimensions, ``checkpoint`` its weights.
        options: what the operator chose.
        topology: this rank's place in the world.
        comm: all ranks of the replica, in order.
    """

    model: Model
    config: ModelConfig
    checkpoint: Checkpoint
    options: EngineConfig
    topology: Topology
    comm: Communicator

    @property
    def dtype(self) -> ComputeDType:
        """Compute type: what was asked for, else the checkpoint's own."""
        return self.config.compute_dtype(self.options.dtype)

    @property
    def layers(self) -> range:
        """Global numbers of the blocks of this rank's stage."""
        return stage_layers(self.config.num_layers, self.topology.layout.pp)[self.topology.stage]

    @property
    def declared(self) -> list[FormattedWeight]:
        """Weights of this stage with their formats."""
        return stage_weights(self.model, self.config, self.checkpoint.formats, self.topology)

    def load(self, sink: CollectingSink[Array]) -> Weights[Array]:
        """Load this rank's weights into ``sink``. Raises as `load_stage`."""
        checkpoint = self.checkpoint
        return load_stage(checkpoint.source, self.model, self.config, checkpoint.formats, self.topology, sink)

    @property
    def tp_rank(self) -> int:
        """Place within the tensor-parallel group."""
        return self.topology.tp_rank

    @property
    def tp_size(self) -> int:
        """Ranks of the tensor-parallel group."""
        return self.topology.layout.tp
