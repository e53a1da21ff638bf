# SPDX-License-Identifier: Apache-2.0
"""The CUDA executor: our own kernels, whole steps in CUDA graphs, one GPU per rank."""
