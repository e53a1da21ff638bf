"""Everything here is about TensorRT."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder; the hook sees those of others too."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.tensorrt)
