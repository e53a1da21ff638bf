"""``--endpoint-file``: names the server that answers, and never keeps one from serving or from ending."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from phalanx.launch.announcement import Announcement
from phalanx.parallel.errors import ConfigError

URL = "http://127.0.0.1:8000"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "endpoint.json"


def test_it_is_there_while_the_server_answers(file: Path) -> None:
    announcement = Announcement("tiny", file)
    assert list(file.parent.iterdir()) == []
    announcement.publish(URL)
    assert json.loads(file.read_text()) == {"host": "127.0.0.1", "port": 8000, "url": URL, "model": "tiny"}
    assert announcement.withdraw() == ""
    assert list(file.parent.iterdir()) == []


def test_a_server_that_never_was_ready_leaves_that_of_another_one(file: Path) -> None:
    """Its port was taken by the other one, say."""
    Announcement("tiny", file).publish(URL)
    assert Announcement("tiny", file).withdraw() == ""
    assert json.loads(file.read_text())["url"] == URL


@pytest.mark.parametrize("port", [8000, 8001], ids=["same address", "other address"])
def test_a_server_that_was_replaced_leaves_that_of_its_successor(file: Path, port: int) -> None:
    old, new = Announcement("tiny", file), Announcement("tiny", file)
    old.publish(URL)
    new.publish(f"http://127.0.0.1:{port}")
    assert old.withdraw() == ""
    assert json.loads(file.read_text())["port"] == port
    assert new.withdraw() == ""
    assert not file.exists()


def test_one_that_cannot_be_written_when_the_server_is_ready_is_a_warning(
    file: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    announcement = Announcement("tiny", file)
    file.mkdir()
    with caplog.at_level(logging.WARNING):
        announcement.publish(URL)
    assert f"--endpoint-file {file} cannot be written: Is a directory" in caplog.text
    assert capfd.readouterr().err.endswith(f"READY {URL}\n")
    assert list(file.parent.iterdir()) == [file]
    assert announcement.withdraw() == ""


def test_one_that_cannot_be_removed_is_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unlink(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    announcement = Announcement("tiny", file)
    announcement.publish(URL)
    monkeypatch.setattr(Path, "unlink", unlink)
    assert f"--endpoint-file {file} cannot be removed: [Errno 13] Permission denied" in announcement.withdraw()


def test_a_full_disk_is_found_at_the_start(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, data: bytes) -> None:
        path.touch()
        if data:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        Announcement("tiny", file)
    assert list(file.parent.iterdir()) == []
