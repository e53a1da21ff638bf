# SPDX-License-Identifier: Apache-2.0
"""A model as a row of TensorRT engines with Phalanx's own kernels between them, for a TensorRT without decoder layers."""
