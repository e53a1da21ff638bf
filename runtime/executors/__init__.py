"""Executors: how one rank computes a step (NumPy, CUDA, TensorRT)."""
