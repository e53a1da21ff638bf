# SPDX-License-Identifier: Apache-2.0
"""KServe's v2 inference protocol as Triton serves it: tensors, models, HTTP routes."""
