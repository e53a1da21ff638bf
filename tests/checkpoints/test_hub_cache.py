"""The Hugging Face cache: names of models, its directories and its links are found without any network access."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.checkpoints.hub_cache import cache_root
from phalanx.parallel.errors import CheckpointError
from tests.checkpoints.safetensors_bytes import GOOD_CONFIG, entry, file_bytes


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two revisions of org/name, of which ``refs/main`` names the second."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    root = tmp_path / "home" / "hub"
    repository = root / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb")
    (repository / "blobs" / "h1").write_text(json.dumps(GOOD_CONFIG))
    for revision, tensor in (("aaa", "old"), ("bbb", "new")):
        (repository / "blobs" / tensor).write_bytes(file_bytes({tensor: entry(0, 16)}, 16))
        (repository / "snapshots" / revision).mkdir(parents=True)
        (repository / "snapshots" / revision / "config.json").symlink_to("../../blobs/h1")
        (repository / "snapshots" / revision / "model.safetensors").symlink_to(f"../../blobs/{tensor}")
    return root


def names(path: Path) -> list[str]:
    with open_checkpoint(path) as checkpoint:
        return sorted(checkpoint.source.names())


def test_a_model_name_opens_its_newest_snapshot(cache: Path) -> None:
    assert names(Path("org/name")) == ["new"]
    with open_checkpoint(Path("org/name")) as checkpoint:
        assert checkpoint.path == cache / "models--org--name" / "snapshots" / "bbb"


def test_a_local_directory_of_that_name_takes_precedence(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"'config\.json' is missing"):
        open_checkpoint(Path("org/name"))


@pytest.mark.parametrize("name", ["org/other", "org/name.v2", "gpt2"])
def test_a_model_that_is_not_there_is_refused_with_the_command_that_gets_it(name: str, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=f"not in the Hugging Face cache .*`hf download {name}` gets it"):
        open_checkpoint(Path(name))


@pytest.mark.parametrize("name", ["../name", "a/b/c", "/nowhere", "org/na me"])
def test_paths_are_no_model_names(name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path / "home")
    with pytest.raises(
        CheckpointError, match=r"does not exist; give a directory with config\.json and \*\.safetensors$"
    ):
        open_checkpoint(Path(name))


def test_the_directory_of_a_model_in_the_cache_stands_for_its_newest_snapshot(cache: Path) -> None:
    assert names(cache / "models--org--name") == ["new"]
    assert names(cache / "models--org--name" / "snapshots" / "aaa") == ["old"]


def test_several_revisions_without_a_newest_are_listed(cache: Path) -> None:
    (cache / "models--org--name" / "refs" / "main").unlink()
    with pytest.raises(CheckpointError, match=r"2 revisions .*snapshots/aaa"):
        open_checkpoint(Path("org/name"))


def test_the_only_revision_needs_no_mark(cache: Path) -> None:
    (cache / "models--org--name" / "refs" / "main").unlink()
    for file in (cache / "models--org--name" / "snapshots" / "bbb").iterdir():
        file.unlink()
    (cache / "models--org--name" / "snapshots" / "bbb").rmdir()
    assert names(Path("org/name")) == ["old"]


def test_the_root_of_the_cache_asks_for_a_model(cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a Hugging Face cache: give the name of a model"):
        open_checkpoint(cache)


def test_links_into_the_cache_are_followed_from_anywhere(cache: Path, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.mkdir()
    (local / "config.json").symlink_to(cache / "models--org--name" / "blobs" / "h1")
    (local / "model.safetensors").symlink_to(cache / "models--org--name" / "snapshots" / "aaa" / "model.safetensors")
    assert names(local) == ["old"]
    subfolder = cache / "models--org--name" / "snapshots" / "bbb" / "sub"
    subfolder.mkdir()
    (subfolder / "config.json").symlink_to("../../../blobs/h1")
    (subfolder / "model.safetensors").symlink_to("../../../blobs/old")
    assert names(subfolder) == ["old"]


def test_other_links_out_of_the_directory_are_refused_with_the_reason(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "secret.json").write_text("{}")
    local = tmp_path / "local"
    local.mkdir()
    (local / "config.json").symlink_to(tmp_path / "blobs" / "secret.json")
    with pytest.raises(CheckpointError, match="outside the model directory; a checkpoint from elsewhere could expose"):
        open_checkpoint(local)


@pytest.mark.parametrize(
    ("variables", "root"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/b", "HF_HOME": "/c"}, "/b"),
        ({"HF_HOME": "/c"}, "/c/hub"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
        ({"HOME": "/e"}, "/e/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_hub_libraries_keep_it(
    variables: dict[str, str], root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == Path(root)
