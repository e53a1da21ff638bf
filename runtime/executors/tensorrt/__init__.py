# SPDX-License-Identifier: Apache-2.0
"""The TensorRT executor: networks, engine files, and the session that runs them."""
