# SPDX-License-Identifier: Apache-2.0
"""The HTTP side: a process of its own beside rank 0, joined to the engine by a socket pair."""
