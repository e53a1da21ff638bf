# SPDX-License-Identifier: Apache-2.0
"""Connects ranks: topology, sharding, communicators, errors."""
