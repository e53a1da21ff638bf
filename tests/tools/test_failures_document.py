"""docs/failures.md: every fault of the table names the tests that show what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "failures.md"
ROWS = [line.strip("|").split(" | ") for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")][1:]
LINK = re.compile(r"\[(test_\w+)\]\((\S+?)\)((?:,? `\w+`)+)")


def test_the_table_has_five_columns() -> None:
    assert len(ROWS) > 25
    assert {len(row) for row in ROWS} == {5}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
def test_the_tests_of_a_fault_exist(row: list[str]) -> None:
    links = LINK.findall(row[-1])
    assert links, row[-1]
    for name, link, fragments in links:
        path = (DOCUMENT.parent / link).resolve()
        assert path.stem == name
        tests = re.findall(r"^def (test_\w+)", path.read_text(), flags=re.MULTILINE)
        for fragment in re.findall(r"\w+", fragments):
            assert any(fragment in test for test in tests), fragment
