# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other programs as whole tensors and a ``config.json``, for `launch.convert`."""

from __future__ import annotations

from phalanx.checkpoints.conversion.faster_transformer import read_faster_transformer
from phalanx.checkpoints.conversion.megatron_files import read_megatron
from phalanx.checkpoints.conversion.nemo import read_nemo
from phalanx.checkpoints.conversion.whole import WRITTEN_FILES, WholeModel, write_directory

__all__ = ["WRITTEN_FILES", "WholeModel", "read_faster_transformer", "read_megatron", "read_nemo", "write_directory"]
