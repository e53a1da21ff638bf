# SPDX-License-Identifier: Apache-2.0
"""Choosing tokens: the table of sampling fields, and the NumPy reference that every executor's sampler must agree with."""
