# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels and their thin wrappers."""
