# SPDX-License-Identifier: Apache-2.0
"""Executors: how one rank computes a step (NumPy, CUDA, TensorRT)."""
