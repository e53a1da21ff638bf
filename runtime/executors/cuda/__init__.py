"""The CUDA executor: our own kernels, whole steps in CUDA graphs, one GPU per rank."""
