# SPDX-License-Identifier: Apache-2.0
"""The demo checkpoint, its recorded reference values, and the training program's modules on the path."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))


@pytest.fixture(scope="session")
def demo() -> Path:
    """The checkpoint's folder."""
    return REPOSITORY / "checkpoints" / "demo"


@pytest.fixture(scope="session")
def tokenizer(demo: Path) -> Tokenizer:
    """The checkpoint's tokenizer, through the library it was made with."""
    return Tokenizer.from_file(str(demo / "tokenizer.json"))


@pytest.fixture(scope="session")
def reference() -> dict[str, Any]:
    """What transformers computed in float32 (tools/record_demo_reference.py)."""
    return json.loads((Path(__file__).parent / "reference.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def held_out() -> Path:
    """The folder of the held-out excerpts."""
    return Path(__file__).parent / "held_out"
