"""CUDA kernels and their thin wrappers."""
