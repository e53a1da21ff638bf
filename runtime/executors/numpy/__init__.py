# SPDX-License-Identifier: Apache-2.0
"""The NumPy executor: the reference for the others; needs no GPU."""
