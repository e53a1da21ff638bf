# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints: number formats, the schemes that files declare, and the packings that they use."""
