# SPDX-License-Identifier: Apache-2.0
"""Which ranks share a host, by what tells machines apart even where names do not."""

from __future__ import annotations

from pathlib import Path

from phalanx.parallel.communicator import Communicator, gather_bytes

__all__ = ["host_ids"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Linux draws it when a machine starts; containers of one machine read the same."""


def host_ids(comm: Communicator) -> list[str]:
    """By rank, equal where the host is. *Collective.*"""
    return [row.decode() for row in gather_bytes(comm, _BOOT_ID.read_text().strip().encode())]
