# SPDX-License-Identifier: Apache-2.0
"""The HTTP side: a separate process next to rank 0, joined to the engine by a socket pair."""
