"""Serves requests: scheduler, executors, models, server."""
