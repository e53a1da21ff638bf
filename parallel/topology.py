# SPDX-License-Identifier: Apache-2.0
"""Which rank does what: world = data x pipeline x tensor, as pure arithmetic.

Tensor-parallel ranks are consecutive (they share NVLink), then pipeline stages, then data-parallel replicas:

    rank = (replica * pp + stage) * tp + tensor_rank
"""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.parallel.errors import ConfigError

__all__ = ["Layout", "Topology", "replica_ranks", "resolve_layout"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the three axes.

    Raises:
        ConfigError: a size is below 1.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for name, size in (("tensor", self.tp), ("pipeline", self.pp), ("data", self.dp)):
            if size < 1:
                raise ConfigError(f"--{name}-parallel-size={size} is below 1; use 1 to switch that axis off")

    @property
    def world_size(self) -> int:
        """Number of ranks that this layout needs."""
        return self.dp * self.pp * self.tp


@dataclass(frozen=True, slots=True)
class Topology:
    """One rank's place in a layout.

    Raises:
        ConfigError: ``rank`` is outside the layout.
    """

    layout: Layout
    rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.layout.world_size:
            raise ConfigError(f"rank={self.rank} is outside 0..{self.layout.world_size - 1} of {self.layout}")

    @property
    def tp_rank(self) -> int:
        """Place within the tensor-parallel group."""
        return self.rank % self.layout.tp

    @property
    def stage(self) -> int:
        """Pipeline stage, 0 first."""
        return self.rank // self.layout.tp % self.layout.pp

    @property
    def replica(self) -> int:
        """Data-parallel replica."""
        return self.rank // (self.layout.tp * self.layout.pp)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes logits and samples."""
        return self.stage == self.layout.pp - 1

    @property
    def is_leader(self) -> bool:
        """Whether this rank plans the steps of its replica (its first rank)."""
        return self.stage == 0 and self.tp_rank == 0

    @property
    def replica_rank(self) -> int:
        """Place within the replica."""
        return self.rank - self.replica_group.start

    @property
    def tp_group(self) -> range:
        """Places within the replica of this rank's tensor-parallel group, in order."""
        start = self.stage * self.layout.tp
        return range(start, start + self.layout.tp)

    @property
    def pp_group(self) -> range:
        """Places within the replica of the stages that this rank's activations pass through, in order."""
        return range(self.tp_rank, self.layout.pp * self.layout.tp, self.layout.tp)

    @property
    def replica_group(self) -> range:
        """World ranks of this rank's replica, in order; the first is the leader."""
        return replica_ranks(self.layout, self.replica)

    @property
    def peer_group(self) -> range:
        """World ranks at this rank's place of every replica, in order; for a leader, the leaders."""
        return range(self.replica_rank, self.layout.world_size, self.layout.pp * self.layout.tp)


def replica_ranks(layout: Layout, replica: int) -> range:
    """World ranks of a replica, in order; the first is its leader."""
    size = layout.pp * layout.tp
    return range(replica * size, (replica + 1) * size)


def resolve_layout(world_size: int, tp: int | None = None, pp: int | None = None, dp: int | None = None) -> Layout:
    """Fill in the sizes that were not given, so that dp x pp x tp = ``world_size``.

    ``pp`` and ``dp`` default to 1, ``tp`` to what is left.

    Raises:
        ConfigError: the sizes cannot make up ``world_size``; the message gives the ``mpirun -n`` that would.
    """
    tp_size, pp_size, dp_size = (1 if size is None else size for size in (tp, pp, dp))
    layout = Layout(tp_size, pp_size, dp_size)
    if tp is None:
        others = layout.pp * layout.dp
        if world_size % others:
            raise ConfigError(
                f"{world_size} rank(s) cannot be shared by pp={layout.pp} x dp={layout.dp}; "
                f"start a multiple of {others} ranks (mpirun -n {others})"
            )
        return Layout(tp=world_size // others, pp=layout.pp, dp=layout.dp)
    if layout.world_size != world_size:
        raise ConfigError(
            f"dp={layout.dp} x pp={layout.pp} x tp={layout.tp} needs {layout.world_size} rank(s) but {world_size} "
            f"started; use mpirun -n {layout.world_size}, or other sizes"
        )
    return layout
