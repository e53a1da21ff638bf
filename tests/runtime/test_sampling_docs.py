"""The examples of docs/sampling.md run as they are."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tests.support.launcher import ROOT

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs/sampling.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "example.py").write_text(example)
    runpy.run_path(str(tmp_path / "example.py"))
    assert capsys.readouterr().out.strip()
