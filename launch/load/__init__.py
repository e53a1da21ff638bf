# SPDX-License-Identifier: Apache-2.0
"""Load on a server from several client processes: what `launch.bench serve` sends, and how it times the answers."""
