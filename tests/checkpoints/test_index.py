"""The index of a sharded checkpoint: names stay inside the directory, and the files' own headers say what they hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.checkpoints.directory import INDEX_FILE
from phalanx.parallel.errors import CheckpointError
from tests.checkpoints.safetensors_bytes import GOOD_CONFIG, entry, file_bytes

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

TRAVERSALS = (
    "../secret.safetensors",
    "../../secret.safetensors",
    "/etc/passwd",
    "/{outside}/secret.safetensors",
    "./model-00001-of-00002.safetensors",
    "sub/model.safetensors",
    "sub/../../secret.safetensors",
    "..",
    ".",
    "",
    "..\\secret.safetensors",
    "C:\\secret.safetensors",
    "model\0.safetensors",
    "model.safetensors/../../secret.safetensors",
    "file:///etc/passwd.safetensors",
    "\ud800.safetensors",
    "x" * 300 + ".safetensors",
    "~/secret.safetensors",
    "link.safetensors",
    "chain.safetensors",
    "linked-folder.safetensors",
    "pipe.safetensors",
    "folder.safetensors",
    "config.json",
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards with an index, and a readable secret next to the directory."""
    directory = tmp_path / "model"
    directory.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(file_bytes({"secret": entry(0, 16)}, 16))
    (directory / "config.json").write_text(json.dumps(GOOD_CONFIG))
    for shard, name in zip(SHARDS, "ab", strict=True):
        (directory / shard).write_bytes(file_bytes({name: entry(0, 16)}, 16))
    write_index(directory, {"a": SHARDS[0], "b": SHARDS[1]})
    return directory


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map}))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every path that is opened through ``os.open`` while the test runs."""
    paths: list[str] = []
    real = os.open

    def recording(path: Any, *args: Any, **kwargs: Any) -> int:
        paths.append(os.fspath(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", recording)
    return paths


def test_good_index_opens_its_files_only(model: Path, opened: list[str]) -> None:
    with open_checkpoint(model) as checkpoint:
        assert sorted(checkpoint.source.names()) == ["a", "b"]
    assert {Path(path).parent for path in opened} == {model}


@pytest.mark.parametrize("name", TRAVERSALS, ids=repr)
def test_index_cannot_name_anything_outside_the_directory(name: str, model: Path, opened: list[str]) -> None:
    (model / "link.safetensors").symlink_to("../secret.safetensors")
    (model / "chain.safetensors").symlink_to("link.safetensors")
    (model / "up").symlink_to("..")
    (model / "linked-folder.safetensors").symlink_to("up/secret.safetensors")
    (model / "folder.safetensors").mkdir()
    os.mkfifo(model / "pipe.safetensors")
    write_index(model, {"a": SHARDS[0], "b": SHARDS[1], "secret": name.format(outside=model.parent)})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model)
    assert "\n" not in str(caught.value)
    assert {Path(path).parent for path in opened} == {model}


def test_config_cannot_be_a_link_out_of_the_directory(model: Path) -> None:
    (model.parent / "secret.json").write_text("{}")
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("../secret.json")
    with pytest.raises(CheckpointError, match="outside the model directory"):
        open_checkpoint(model)


def test_links_within_the_directory_and_a_linked_directory_are_fine(model: Path) -> None:
    (model / SHARDS[0]).rename(model / "blob")
    (model / SHARDS[0]).symlink_to("blob")
    (model.parent / "alias").symlink_to(model)
    with open_checkpoint(model.parent / "alias") as checkpoint:
        assert sorted(checkpoint.source.names()) == ["a", "b"]


BROKEN_INDEXES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "JSON"),
    "no JSON": (b"{", "JSON"),
    "a list": (b"[]", "object"),
    "no weight_map": (b"{}", "weight_map"),
    "weight_map is a list": (b'{"weight_map": ["a"]}', "weight_map"),
    "weight_map is empty": (b'{"weight_map": {}}', "weight_map"),
    "file is a number": (b'{"weight_map": {"a": 1}}', "safetensors"),
    "file is null": (b'{"weight_map": {"a": null}}', "safetensors"),
    "tensor twice": (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "twice"),
    "nested deeply": (b'{"weight_map": ' * 100_000, "JSON"),
    "17 MB": (b" " * (17 << 20), "bytes"),
}


@pytest.mark.parametrize("name", BROKEN_INDEXES)
def test_broken_index_is_refused(name: str, model: Path) -> None:
    data, expected = BROKEN_INDEXES[name]
    (model / INDEX_FILE).write_bytes(data)
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(model)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]},
        {"a": SHARDS[1], "b": SHARDS[0]},
        {"a": SHARDS[0], "c": SHARDS[1]},
        {"a": "old-00001-of-00003.safetensors", "b": "old-00002-of-00003.safetensors"},
    ],
    ids=["a tensor more", "other files", "a tensor not listed", "none of the files is there"],
)
def test_an_index_that_disagrees_with_complete_files_does_no_harm(weight_map: dict[str, str], model: Path) -> None:
    write_index(model, weight_map)
    with open_checkpoint(model) as checkpoint:
        assert sorted(checkpoint.source.names()) == ["a", "b"]


def test_a_stale_index_does_not_hide_a_missing_shard(model: Path) -> None:
    write_index(model, {"a": "old-00001-of-00003.safetensors"})
    (model / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors"):
        open_checkpoint(model)


def test_an_index_without_any_file_is_named(model: Path) -> None:
    for shard in SHARDS:
        (model / shard).unlink()
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors, though .*index\.json names 2 file"):
        open_checkpoint(model)


def test_a_whole_file_takes_precedence_over_shards(model: Path) -> None:
    (model / "model.safetensors").write_bytes(file_bytes({"whole": entry(0, 16)}, 16))
    with open_checkpoint(model) as checkpoint:
        assert sorted(checkpoint.source.names()) == ["whole"]


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_files_that_are_no_part_of_the_model_are_left_out(name: str, model: Path) -> None:
    (model / INDEX_FILE).unlink()
    (model / name).write_bytes(file_bytes({"other": entry(0, 16)}, 16))
    with open_checkpoint(model) as checkpoint:
        assert sorted(checkpoint.source.names()) == ["a", "b"]


def test_tensor_in_two_files(model: Path) -> None:
    (model / SHARDS[1]).write_bytes(file_bytes({"b": entry(0, 16), "a": entry(16, 32)}, 32))
    with pytest.raises(CheckpointError, match=r"'a' is in .*00001.* and in .*00002"):
        open_checkpoint(model)


def test_missing_shard_is_named(model: Path) -> None:
    (model / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors.* missing"):
        open_checkpoint(model)


def test_without_an_index_all_shards_are_read(model: Path) -> None:
    (model / INDEX_FILE).unlink()
    with open_checkpoint(model) as checkpoint:
        assert sorted(checkpoint.source.names()) == ["a", "b"]


def test_without_an_index_a_missing_shard_is_named(model: Path) -> None:
    (model / INDEX_FILE).unlink()
    (model / SHARDS[0]).unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors"):
        open_checkpoint(model)


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b'{"a": 1, "a": 2}', b"\xff", b"nul"])
def test_wrong_config_is_one_clear_error(content: bytes | None, model: Path) -> None:
    (model / "config.json").unlink()
    if content is not None:
        (model / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(model)


@pytest.mark.parametrize(("make", "expected"), [(lambda path: None, "does not exist"), (Path.touch, "is a file")])
def test_path_that_is_no_directory(make: Any, expected: str, tmp_path: Path) -> None:
    make(tmp_path / "model")
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(tmp_path / "model")
