# SPDX-License-Identifier: Apache-2.0
"""How the leaders of replicas find each other, and what those other than rank 0 do while they serve."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.connections import connect_ranks
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.liveness.watch import RankWatch
from phalanx.parallel.mpi_comm import survives_lost_ranks
from phalanx.parallel.topology import Layout, Topology, replica_ranks
from phalanx.runtime.engine import Engine
from phalanx.runtime.server.link.bridge import EngineBridge
from phalanx.runtime.server.link.channel import FrontendChannel, FrontendChannels, ReplicaChannel
from phalanx.runtime.server.link.messages import ModelInfo
from phalanx.runtime.server.link.router import RemoteReplica, ReplicaRouter

__all__ = ["Leader", "connect_leaders", "router_over", "serve_rank_0"]


@dataclass(frozen=True, slots=True)
class Leader:
    """A connection to the leader of another replica, and its monotonic clock less ours in seconds."""

    sock: socket.socket
    clock_offset: float


def connect_leaders(world: Communicator, topology: Topology) -> dict[int, Leader]:
    """By replica: on rank 0 all other leaders, on those rank 0, elsewhere none. *Collective over all ranks.*

    Raises:
        ConfigError: on all leaders, if one cannot reach rank 0.
    """
    peers = world.split(topology.peer_group)
    if not topology.is_leader:
        return {}
    sockets, reason = connect_ranks(peers)
    if reason is not None:
        raise ConfigError(
            f"--dp={peers.size} needs a connection to rank 0, but leader {reason}; open the network, or use --dp 1"
        )
    peers.barrier()
    clocks = peers.all_gather(np.array(time.monotonic()))
    offsets = (clocks - clocks[peers.rank]).tolist()
    return {replica: Leader(sock, offsets[replica]) for replica, sock in sockets.items()}


def serve_rank_0(leader: Leader, engine: Engine, model: ModelInfo) -> None:
    """Compute what rank 0 sends, on the leader of another replica, until it says that all is done."""
    channels = FrontendChannels([FrontendChannel(leader.sock, "rank 0")])
    EngineBridge(engine, channels).run(model, lambda: None)
    engine.release()


def router_over(
    engine: Engine, leaders: Mapping[int, Leader], layout: Layout, watch: RankWatch
) -> Engine | ReplicaRouter:
    """What rank 0 serves: its own engine, or a router over all replicas once all of them have loaded.

    Where MPI survives a lost rank, so does the server, unless it is one of replica 0, which has the HTTP side.
    """
    if not leaders:
        return engine
    others = [
        RemoteReplica(ReplicaChannel(leader.sock, f"the leader of replica {replica}"), leader.clock_offset)
        for replica, leader in sorted(leaders.items())
    ]
    router = ReplicaRouter(engine, others, survives_lost_ranks())
    router.wait_until_ready()
    if survives_lost_ranks():
        groups = [replica_ranks(layout, replica) for replica in sorted(leaders)]
        watch.spare(groups, lambda group, reason: router.lose(1 + groups.index(group), reason))
    return router
