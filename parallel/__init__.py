"""Connects ranks: topology, sharding, communicators, errors."""
