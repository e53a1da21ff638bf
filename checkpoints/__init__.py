"""Feeds the runtime: reading, sharding and splitting checkpoints."""
