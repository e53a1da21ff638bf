"""A directory in the making when a signal comes while it is made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phalanx.checkpoints.partial_directory import PartialDirectory


@pytest.mark.parametrize("moment", ["open", "listdir"])
@pytest.mark.parametrize("has_leftover", [False, True])
def test_an_interrupt_while_it_is_made_leaves_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, has_leftover: bool
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    partial = PartialDirectory(tmp_path / "out", lambda name: name == "ours")
    if has_leftover:
        partial.path.mkdir()
        (partial.path / "ours").touch()
    monkeypatch.setattr(os, moment, interrupt)
    with pytest.raises(KeyboardInterrupt), partial.written():
        pytest.fail("it was never made")
    monkeypatch.undo()
    is_locked = moment == "listdir"  # then all in it is ours
    assert os.listdir(tmp_path) == (["out.partial"] if has_leftover and not is_locked else [])
