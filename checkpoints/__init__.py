# SPDX-License-Identifier: Apache-2.0
"""Feeds the runtime: reading, sharding and splitting checkpoints."""
