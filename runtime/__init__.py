# SPDX-License-Identifier: Apache-2.0
"""Serves requests: scheduler, executors, models, server."""
