"""Split = unsplit: any layout's files give back every tensor, bit for bit, at any other layout."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from phalanx.checkpoints.checkpoint import content_checksum, open_checkpoint
from phalanx.checkpoints.checksum import checksum, combine
from phalanx.checkpoints.coverage import verify_coverage
from phalanx.checkpoints.files import ModelDirectory
from phalanx.checkpoints.manifest import MANIFEST_FILE, Manifest, read_manifest
from phalanx.checkpoints.split_source import SplitSource
from phalanx.parallel.errors import CheckpointError, ConfigError
from phalanx.runtime.models import MODELS, find_model
from tests.checkpoints.splitting import load_rank, read_all, split
from tests.support.checkpoints import CASES, CASES_BY_NAME, write_checkpoint

LLAMA = CASES_BY_NAME["llama-grouped-heads"]


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        values.dtype == b[name].dtype and values.tobytes() == b[name].tobytes() for name, values in a.items()
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Every case of the support module, written once; the path by the case's name."""
    root = tmp_path_factory.mktemp("checkpoints")

    def path(name: str) -> Path:
        directory = root / name
        return directory if directory.exists() else write_checkpoint(CASES_BY_NAME[name], directory)

    return path


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.sampled_from([case.name for case in CASES if (4, 1) in case.layouts]),
    layouts=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(1, 3)), min_size=2, max_size=3),
)
def test_any_layout_from_any_other_equals_the_unsplit_checkpoint(
    case: str, layouts: list[tuple[int, int]], checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    original = checkpoints(case)
    stored = load_file(original / "model.safetensors")
    shutil.rmtree(tmp_path, ignore_errors=True)
    tmp_path.mkdir()
    before = original
    for number, (tp, pp) in enumerate(layouts):
        after = tmp_path / f"{number}-{tp}x{pp}"
        split(before, after, tp, pp)
        assert equal(read_all(after), stored), after.name
        before = after
    tp, pp = layouts[0]
    for rank in range(tp * pp):
        ours, theirs = load_rank(before, tp, pp, rank), load_rank(original, tp, pp, rank)
        assert equal(ours, theirs), rank


@pytest.mark.parametrize("name", ["gpt_neox-parallel", "bloom-plain", "mixtral-plain", "qwen2_moe-one-dense-layer"])
def test_heads_and_experts_stored_one_by_one_are_split_and_joined(
    name: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    original = checkpoints(name)
    split(original, tmp_path / "4x1", 4, 1)
    split(tmp_path / "4x1", tmp_path / "2x2", 2, 2)
    assert equal(read_all(tmp_path / "2x2"), load_file(original / "model.safetensors"))
    for rank in range(4):
        assert equal(load_rank(tmp_path / "2x2", 4, 1, rank), load_rank(original, 4, 1, rank)), rank


def test_resplit_to_the_first_layout_gives_the_first_files(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    path = checkpoints("gemma-several-kv-heads")
    layouts = [(4, 1), (2, 2), (1, 3), (4, 1)]
    for number, (tp, pp) in enumerate(layouts):
        split(path, tmp_path / str(number), tp, pp, threads=2)
        path = tmp_path / str(number)
    names = sorted(file.name for file in (tmp_path / "0").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "3").iterdir())
    assert MANIFEST_FILE in names
    for name in names:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name


def test_identity_is_the_same_for_all_layouts_and_changes_with_a_weight(tmp_path: Path) -> None:
    path = write_checkpoint(LLAMA, tmp_path / "model")
    split(path, tmp_path / "split", 2, 3)
    changed = write_checkpoint(LLAMA, tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, changed / "model.safetensors")
    sums = []
    for directory in (path, tmp_path / "split", changed):
        with open_checkpoint(directory) as checkpoint:
            sums.append(content_checksum(checkpoint.source, chunk_bytes=1000))
    assert sums[0] == sums[1] != sums[2]


def test_manifest_describes_the_files_exactly(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    original = checkpoints("gpt2-plain")
    stored = load_file(original / "model.safetensors")
    split(original, tmp_path / "s", 2, 2)
    manifest = json.loads((tmp_path / "s" / MANIFEST_FILE).read_text())
    assert (manifest["format"], manifest["version"]) == ("phalanx-split", 2)
    assert manifest["architecture"] == "GPT2LMHeadModel"
    layout = manifest["layout"]
    assert (layout["tp"], layout["pp"]) == (2, 2)
    (first, cut), (same, last) = layout["stages"]
    assert first == 0 < cut == same < last
    assert [entry["file"] for entry in manifest["ranks"]] == [f"rank_0000{rank}.safetensors" for rank in range(4)]
    for entry in manifest["ranks"]:
        raw = (tmp_path / "s" / entry["file"]).read_bytes()
        assert len(raw) == entry["num_bytes"]
        header = np.frombuffer(raw[: entry["tensors"][0]["offset"]], np.uint8)
        assert entry["checksum"] == combine([checksum(header), *(tensor["checksum"] for tensor in entry["tensors"])])
        library = load_file(tmp_path / "s" / entry["file"])
        assert library.keys() == {tensor["name"] for tensor in entry["tensors"]}
        for tensor in entry["tensors"]:
            box = tuple(slice(*ends) for ends in zip(tensor["start"], tensor["stop"], strict=True))
            expected = stored[tensor["source"]][box]
            assert tensor["dtype"] == "F32"
            assert tuple(tensor["shape"]) == expected.shape
            data = raw[tensor["offset"] : tensor["offset"] + tensor["num_bytes"]]
            assert data == np.ascontiguousarray(expected).tobytes()
            assert tensor["chunk_checksums"] == [checksum(np.frombuffer(data, np.uint8))]
            assert tensor["checksum"] == combine(tensor["chunk_checksums"])
            np.testing.assert_array_equal(library[tensor["name"]], expected)


@pytest.mark.parametrize("name", ["llama-grouped-heads", "llama-one-kv-head-tied", "gpt2-plain", "gemma-one-kv-head"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 3)])
def test_every_element_is_held_as_often_as_the_layout_says(
    name: str, tp: int, pp: int, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    original = checkpoints(name)
    config = json.loads((original / "config.json").read_text())
    split(original, tmp_path / "s", tp, pp)
    manifest = json.loads((tmp_path / "s" / MANIFEST_FILE).read_text())
    tensors = load_file(original / "model.safetensors")
    counts = {source: np.zeros(values.shape, int) for source, values in tensors.items()}
    for entry in manifest["ranks"]:
        for tensor in entry["tensors"]:
            counts[tensor["source"]][tuple(map(slice, tensor["start"], tensor["stop"]))] += 1
    kv_heads = config.get("num_key_value_heads", config.get("n_head"))
    tied = config.get("tie_word_embeddings", "llama" not in name)
    for source, count in counts.items():
        if source.endswith(("k_proj.weight", "v_proj.weight")):
            expected = max(1, tp // kv_heads)
        elif source.endswith(("embed_tokens.weight", "wte.weight")):
            expected = 2 if tied and pp > 1 else 1
        elif (count.ndim == 2 and not source.endswith("wpe.weight")) or source.endswith(("c_attn.bias", "c_fc.bias")):
            expected = 1
        else:
            expected = tp
        assert np.all(count == expected), source


def mutate(manifest: dict[str, Any], what: str) -> None:
    ranks, piece = manifest["ranks"], manifest["ranks"][0]["tensors"][1]
    match what:
        case "piece left out":
            del ranks[1]["tensors"][2]
        case "piece twice":
            ranks[1]["tensors"].append(ranks[1]["tensors"][2])
        case "rank left out":
            del ranks[1]
        case "source left out":
            del manifest["sources"][piece["source"]]
        case "box moved":
            piece["start"][0] += 1
            piece["stop"][0] += 1
        case "box beyond the source":
            piece["stop"][0] += 1000
        case "negative start":
            piece["start"][0] = -1
        case "other dtype":
            piece["dtype"] = "BF16"
        case "file outside":
            ranks[0]["file"] = "../rank_00000.safetensors"
        case "other file":
            ranks[0]["file"] = ranks[1]["file"]
        case "checksum left out":
            piece["chunk_checksums"] = []
        case "text for a number":
            piece["offset"] = "0"
        case "unknown field":
            manifest["compression"] = "zip"
        case "newer version":
            manifest["version"] = 3
        case "no version":
            del manifest["version"]
        case "huge layout":
            manifest["layout"]["tp"] = 1 << 40
        case "zero chunk":
            manifest["chunk_bytes"] = 0
        case "copies by text":
            manifest["sources"][piece["source"]]["copies"] = {"one": 1}
        case "planned otherwise":
            manifest["sources"][piece["source"]]["copies"] = {"7": 1}
        case _:
            raise AssertionError(what)


MUTATIONS = (
    "piece left out", "piece twice", "rank left out", "source left out", "box moved", "box beyond the source",
    "negative start", "other dtype", "file outside", "other file", "checksum left out", "text for a number",
    "unknown field", "newer version", "no version", "huge layout", "zero chunk", "copies by text", "planned otherwise",
)  # fmt: skip


@pytest.fixture
def a_split(tmp_path: Path) -> Path:
    split(write_checkpoint(LLAMA, tmp_path / "model"), tmp_path / "split", 2, 1)
    return tmp_path / "split"


@pytest.mark.parametrize("what", MUTATIONS)
def test_manifest_that_does_not_add_up_is_refused(what: str, a_split: Path) -> None:
    manifest = json.loads((a_split / MANIFEST_FILE).read_text())
    mutate(manifest, what)
    (a_split / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="split again"):
        open_checkpoint(a_split)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"version": 1}', b"\xff"])
def test_manifest_that_is_no_manifest_is_refused(content: bytes, a_split: Path) -> None:
    (a_split / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        open_checkpoint(a_split)


def test_coverage_of_a_good_manifest_holds(a_split: Path) -> None:
    manifest: Manifest = read_manifest(ModelDirectory.at(a_split))
    verify_coverage(manifest)
    assert set(manifest.sources) == set(load_file(a_split.parent / "model" / "model.safetensors"))


@pytest.mark.parametrize("position", [0.0, 0.3, 0.7, 1.0])
def test_flipped_bit_is_found_by_whoever_reads_it(position: float, a_split: Path) -> None:
    manifest = json.loads((a_split / MANIFEST_FILE).read_text())
    entry = manifest["ranks"][1]
    begin = entry["tensors"][0]["offset"]
    at = begin + int(position * (entry["num_bytes"] - 1 - begin))
    with (a_split / entry["file"]).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 16]))
    load_rank(a_split, 2, 1, 0)  # reads nothing of that file
    with pytest.raises(CheckpointError, match=r"checksum of .* in 'rank_00001\.safetensors' does not match"):
        load_rank(a_split, 2, 1, 1)


@pytest.mark.parametrize("damage", ["truncate", "remove", "swap", "lengthen"])
def test_damaged_rank_file_is_refused_when_it_is_opened(damage: str, a_split: Path) -> None:
    first, second = (a_split / f"rank_0000{rank}.safetensors" for rank in range(2))
    if damage == "truncate":
        os.truncate(second, second.stat().st_size - 1)
    elif damage == "lengthen":
        os.truncate(second, second.stat().st_size + 1)
    elif damage == "remove":
        second.unlink()
    else:
        first.rename(a_split / "x")
        second.rename(first)
        (a_split / "x").rename(second)
    with pytest.raises(CheckpointError, match=r"rank_0000"):
        load_rank(a_split, 2, 1, 1)


def test_rank_reads_only_files_and_chunks_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(CASES_BY_NAME["llama-plain"], tmp_path / "model")
    split(path, tmp_path / "s", 4, 1)
    opened: list[str] = []
    real = ModelDirectory.open
    monkeypatch.setattr(ModelDirectory, "open", lambda self, name: opened.append(name) or real(self, name))
    load_rank(tmp_path / "s", 4, 1, 2)
    assert {name for name in opened if "rank" in name} == {"rank_00000.safetensors", "rank_00002.safetensors"}
    # Unsplit norms are on every rank; they come from the first.


def test_every_chunk_is_verified_once_and_before_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.checkpoints.splitter.CHUNK_BYTES", 256)
    monkeypatch.setattr("phalanx.checkpoints.rank_files.CHUNK_BYTES", 256)
    path = write_checkpoint(LLAMA, tmp_path / "model")
    split(path, tmp_path / "s", 2, 1)
    source = SplitSource(ModelDirectory.at(tmp_path / "s"))
    assert source.manifest.chunk_bytes == 256
    sums: list[int] = []
    monkeypatch.setattr("phalanx.checkpoints.split_source.checksum", _recording(sums))
    name = "model.layers.0.self_attn.q_proj.weight"
    row = 48 * 4
    source.read(name, (slice(0, 1), slice(0, 48)))
    assert len(sums) == 1
    source.read(name, (slice(0, 4), slice(0, 48)))
    assert len(sums) == 4 * row // 256
    source.read(name, (slice(0, 96), slice(0, 1)))
    assert len(sums) == 96 * row // 256
    source.read(name, (slice(0, 96), slice(0, 48)))
    assert len(sums) == 96 * row // 256
    source.close()


def _recording(sums: list[int]) -> Callable[[Any], str]:
    def recording(data: Any) -> str:
        sums.append(len(data))
        return checksum(data)

    return recording


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("BF16", ml_dtypes.bfloat16), ("F16", np.float16)])
def test_split_converts_to_the_type_asked_for(dtype: str, numpy_dtype: Any, tmp_path: Path) -> None:
    path = write_checkpoint(LLAMA, tmp_path / "model")
    split(path, tmp_path / "s", 2, 2, dtype=dtype)
    stored = load_file(path / "model.safetensors")
    for name, values in read_all(tmp_path / "s").items():
        assert values.dtype == np.dtype(numpy_dtype)
        np.testing.assert_array_equal(values, stored[name].astype(numpy_dtype), err_msg=name)
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config["torch_dtype"] == {"BF16": "bfloat16", "F16": "float16"}[dtype]


def test_value_beyond_the_type_asked_for_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = write_checkpoint(LLAMA, tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' holds 100000\.0, beyond the range of float16"):
        split(path, tmp_path / "s", 2, 1, dtype="F16")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_fp8_values_without_a_scheme_are_refused(tmp_path: Path) -> None:
    """They mean nothing without a scale, whatever tensors lie next to them."""
    path = write_checkpoint(LLAMA, tmp_path / "model")
    stored = load_file(path / "model.safetensors")
    data, header, position = b"", {}, 0
    for name, values in stored.items():
        low = values.astype(ml_dtypes.float8_e4m3fn).tobytes()
        header[name] = {
            "dtype": "F8_E4M3",
            "shape": list(values.shape),
            "data_offsets": [position, position + len(low)],
        }
        data, position = data + low, position + len(low)
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(CheckpointError, match=r"stored as F8_E4M3, but config\.json names no quantisation scheme"):
        split(path, tmp_path / "s", 4, 2)


def test_existing_output_is_refused_and_untouched(tmp_path: Path) -> None:
    path = write_checkpoint(LLAMA, tmp_path / "model")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "precious").touch()
    with pytest.raises(ConfigError, match="exists; remove it"):
        split(path, tmp_path / "s", 1, 1)
    assert [file.name for file in (tmp_path / "s").iterdir()] == ["precious"]


def test_second_writer_is_refused(tmp_path: Path) -> None:
    import fcntl

    path = write_checkpoint(LLAMA, tmp_path / "model")
    (tmp_path / "s.partial").mkdir()
    descriptor = os.open(tmp_path / "s.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another process is writing"):
        split(path, tmp_path / "s", 1, 1)
    os.close(descriptor)
    assert split(path, tmp_path / "s", 1, 1).replaced_leftovers is False


def test_directory_of_that_name_that_no_split_wrote_is_left_alone(tmp_path: Path) -> None:
    path = write_checkpoint(LLAMA, tmp_path / "model")
    (tmp_path / "s.partial").mkdir()
    (tmp_path / "s.partial" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        split(path, tmp_path / "s", 1, 1)
    assert (tmp_path / "s.partial" / "thesis.tex").exists()


def test_missing_parent_of_the_output_is_one_clear_error(tmp_path: Path) -> None:
    path = write_checkpoint(LLAMA, tmp_path / "model")
    with pytest.raises(ConfigError, match="No such file or directory"):
        split(path, tmp_path / "nowhere" / "s", 1, 1)


def test_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(LLAMA, tmp_path / "model")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1000, 990, 10))
    with pytest.raises(ConfigError, match="has 10 left"):
        split(path, tmp_path / "s", 1, 1)
    assert not (tmp_path / "s.partial").exists()


def test_disk_that_fills_up_meanwhile_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(LLAMA, tmp_path / "model")
    real, left = os.pwrite, 50_000

    def filling(descriptor: int, data: Any, offset: int) -> int:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[:1000], offset)  # short writes are completed, too

    monkeypatch.setattr(os, "pwrite", filling)
    with pytest.raises(ConfigError, match="No space left on device"):
        split(path, tmp_path / "s", 2, 1, threads=2)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_layout_that_the_heads_refuse_leaves_nothing(tmp_path: Path) -> None:
    path = write_checkpoint(LLAMA, tmp_path / "model")
    with pytest.raises(ConfigError, match="6 query heads cannot be shared by tp_size=7"):
        split(path, tmp_path / "s", 7, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_tokenizer_and_configuration_come_along(tmp_path: Path) -> None:
    path = write_checkpoint(LLAMA, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (path / name).write_text('{"eos_token_id": 5}')
    (path / "optimizer.pt").touch()
    split(path, tmp_path / "s", 1, 1)
    assert {file.name for file in (tmp_path / "s").iterdir()} == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
        "manifest.json", "rank_00000.safetensors",
    }  # fmt: skip
    with open_checkpoint(tmp_path / "s") as checkpoint:
        assert checkpoint.is_split
        assert checkpoint.generation_config == {"eos_token_id": 5}


def test_rank_files_without_their_manifest_do_not_load(a_split: Path) -> None:
    (a_split / MANIFEST_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"without its manifest\.json"):
        open_checkpoint(a_split)


def test_cases_cover_every_family() -> None:
    assert {find_model(case.config).architecture for case in CASES} == set(MODELS)


def test_templates_in_a_subdirectory_are_taken_over(tmp_path: Path) -> None:
    source = write_checkpoint(CASES_BY_NAME["llama-plain"], tmp_path / "model")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (source / "additional_chat_templates" / "default.jinja").write_text("{{ messages }}")
    split(source, tmp_path / "split", 1, 1)
    assert (tmp_path / "split" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "split" / "tool_use.jinja").read_text() == "{{ tools }}"
