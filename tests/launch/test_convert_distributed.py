"""``launch.convert``: distributed checkpoints of Megatron-core, as PyTorch's own writer and Zarr's specification lay them out."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import pickle
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from phalanx.checkpoints.conversion.distributed import read_distributed
from phalanx.checkpoints.conversion.files import Directory
from phalanx.checkpoints.conversion.inert_pickle import Inert, read_inert
from phalanx.parallel.errors import CheckpointError, ConfigError
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint

from .test_convert import ARGUMENTS, CORE_NAMES, NEMO, PREFIX, convert, same_model, training_state

SIZES = {
    "hidden_size": 64, "num_layers": 3, "num_attention_heads": 4, "kv_channels": 16, "ffn_hidden_size": 96,
    "max_position_embeddings": 128, "layernorm_epsilon": 1e-5,
}  # fmt: skip
OPTIONS = ("--vocab-size", "101")


def whole_tensors(name: str, directory: Path) -> dict[str, np.ndarray]:
    """A case's tensors under our names."""
    return load_file(write_checkpoint(CASES_BY_NAME[name], directory / "whole") / "model.safetensors")


def stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Megatron-core's names, the layers' tensors along a first axis, the vocabulary padded."""
    parts: dict[str, list[np.ndarray]] = {}
    for full, value in sorted(tensors.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]):
        name = full.removeprefix(PREFIX)
        for old, new in CORE_NAMES.items():
            name = name.replace(old, new)
        parts.setdefault(re.sub(r"layers\.\d+", "layers", name), []).append(value)
    core = {name: np.stack(values) if ".layers." in name else values[0] for name, values in parts.items()}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in core:
            core[name] = np.pad(core[name], ((0, 128 - len(core[name])), (0, 0)))
    return core


def boxes(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Every layer, and every half of the next axis, apart, as ranks hold them."""
    cuts = [[size] if size % 2 else [size // 2] * 2 for size in shape]
    if len(shape) == 3:
        cuts[0] = [1] * shape[0]
    edges = [np.cumsum([0, *cut]) for cut in cuts]
    for index in itertools.product(*(range(len(cut)) for cut in cuts)):
        yield tuple(slice(int(edge[at]), int(edge[at + 1])) for edge, at in zip(edges, index, strict=True))


@pytest.fixture
def torch_group() -> Iterator[Any]:
    """PyTorch with a process group of one rank, which its sharded tensors need."""
    torch = pytest.importorskip("torch")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch
    torch.distributed.destroy_process_group()


def write_torch_dist(torch: Any, core: dict[str, np.ndarray], directory: Path, prefix: str, arguments: Any) -> None:
    """Save with PyTorch's writer, in pieces, between an optimizer's state and what Transformer Engine keeps."""
    from torch.distributed import checkpoint
    from torch.distributed._shard import sharded_tensor
    from torch.distributed._shard.sharding_spec import ShardMetadata

    def pieces(value: np.ndarray) -> Any:
        shards = [
            sharded_tensor.Shard(
                torch.from_numpy(value[box].copy()),
                ShardMetadata([side.start for side in box], list(value[box].shape), "rank:0/cpu"),
            )
            for box in boxes(value.shape)
        ]
        return sharded_tensor.init_from_local_shards(shards, *value.shape)

    state: dict[str, Any] = {f"{prefix}{name}": pieces(value) for name, value in core.items()}
    state[f"optimizer.state.exp_avg.{prefix}decoder.final_layernorm.weight"] = torch.ones(64)
    state[f"{prefix}decoder.layers.self_attention.linear_qkv._extra_state/shard_0_3"] = io.BytesIO(b"scales")
    directory.mkdir(parents=True)
    checkpoint.save(state, checkpoint_id=directory)
    common = {"iteration": 7, **training_state(torch)}
    torch.save({"args": arguments, **common} if arguments else common, directory / "common.pt")
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


def write_zarr(core: dict[str, np.ndarray], directory: Path, **changes: Any) -> None:
    """Write folders as Zarr's second version describes them, with pieces that do not divide the shapes."""
    for name, value in core.items():
        folder = directory / f"model.{name}"
        folder.mkdir(parents=True)
        chunks = [max(1, -(-size * 2 // 3)) for size in value.shape]
        described = {
            "zarr_format": 2, "shape": value.shape, "chunks": chunks, "dtype": "<f4", "compressor": None, "filters": None,
            "fill_value": None, "order": "C", **changes,
        }  # fmt: skip
        (folder / ".zarray").write_text(json.dumps(described))
        counts = [-(-size // each) for size, each in zip(value.shape, chunks, strict=True)]
        padded = np.pad(
            value, [(0, n * each - size) for n, each, size in zip(counts, chunks, value.shape, strict=True)]
        )
        for index in itertools.product(*map(range, counts)):
            box = tuple(slice(at * each, (at + 1) * each) for at, each in zip(index, chunks, strict=True))
            (folder / ".".join(map(str, index))).write_bytes(padded[box].tobytes())
    (directory / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')


def check(actual: dict[str, np.ndarray], written: dict[str, Any], expected: dict[str, np.ndarray], name: str) -> None:
    assert actual.keys() == expected.keys()
    assert all(actual[key].tobytes() == expected[key].tobytes() for key in expected)
    assert same_model(written, CASES_BY_NAME[name].config)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["megatron-gpt3", "megatron-rope", "megatron-llama"])
def test_torch_dist_of_megatron_becomes_the_model_that_was_saved(name: str, tmp_path: Path, torch_group: Any) -> None:
    expected = whole_tensors(name, tmp_path)
    arguments = argparse.Namespace(**SIZES, params_dtype=torch_group.float32, **ARGUMENTS[name])
    write_torch_dist(torch_group, stacked(expected), tmp_path / "saved" / "iter_0000007", "", arguments)
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("7")
    check(*convert("megatron", tmp_path / "saved", tmp_path / "out", *OPTIONS), expected, name)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["archive", "directory"])
def test_torch_dist_of_nemo_becomes_the_model_that_was_saved(form: str, tmp_path: Path, torch_group: Any) -> None:
    name, path = "megatron-llama", tmp_path / "nemo"
    expected = whole_tensors(name, tmp_path)
    write_torch_dist(torch_group, stacked(expected), path / "model_weights", "model.", None)
    (path / "model_config.yaml").write_text(yaml.safe_dump({**SIZES, **NEMO[name]}))
    if form == "archive":
        with tarfile.open(tmp_path / "model.nemo", "w") as archive:
            archive.add(path, ".")
        path = tmp_path / "model.nemo"
    check(*convert("nemo", path, tmp_path / "out", *OPTIONS), expected, name)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_a_file_of_pieces_that_is_missing_or_cut_off_is_said_to_be(tmp_path: Path, torch_group: Any) -> None:
    arguments = argparse.Namespace(**SIZES)
    write_torch_dist(torch_group, stacked(whole_tensors("megatron-gpt3", tmp_path)), tmp_path / "saved", "", arguments)
    (pieces,) = (tmp_path / "saved").glob("*.distcp")
    pieces.write_bytes(pieces.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"distcp is cut off: it ends within a piece of .*; copy it again"):
        convert("megatron", tmp_path / "saved", tmp_path / "out")
    pieces.unlink()
    with pytest.raises(CheckpointError, match=r"distcp is missing, which holds a piece of .*; restore it"):
        convert("megatron", tmp_path / "saved", tmp_path / "out")


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_the_tree_of_files_is_listed_once_for_all_pieces(
    tmp_path: Path, torch_group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training directory on a parallel file system has thousands of pieces, and each listing visits them all."""
    core = {f"decoder.layers.{layer}.input_layernorm.weight": np.ones(64, np.float32) for layer in range(4)}
    write_torch_dist(torch_group, core, tmp_path / "saved", "", None)
    listings: list[None] = []

    def listed(files: Directory) -> list[str]:
        listings.append(None)
        return names(files)

    names = Directory.names
    monkeypatch.setattr(Directory, "names", listed)
    assert len(read_distributed(Directory(tmp_path / "saved"), "", 0)) == 4
    assert len(listings) <= 2  # which form it is, and the pieces


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_a_distributed_checkpoint_without_megatrons_arguments_is_refused_with_the_way_out(
    tmp_path: Path, torch_group: Any
) -> None:
    write_torch_dist(torch_group, {"a": np.ones(2, np.float32)}, tmp_path / "saved", "module.", None)
    with pytest.raises(
        ConfigError, match=r"without Megatron-LM's arguments in common\.pt; if NeMo 2 wrote it, give --from nemo"
    ):
        convert("megatron", tmp_path / "saved", tmp_path / "out")


def test_a_directory_of_several_distributed_checkpoints_is_refused(tmp_path: Path) -> None:
    for name in ("iter_0000007", "iter_0000014"):
        write_zarr({"decoder.final_layernorm.weight": np.ones(64, np.float32)}, tmp_path / name)
    with pytest.raises(ConfigError, match="iter_0000007 and iter_0000014 are both distributed checkpoints; name one"):
        convert("megatron", tmp_path, tmp_path / "out")


def context_of(name: str, **changes: Any) -> str:
    """``context/model.yaml`` as NeMo 2 writes it, for a case."""
    case = CASES_BY_NAME[name].config
    kind = {"megatron-gpt3": "gelu", "megatron-rope": "gelu", "megatron-llama": "silu"}[name]
    config = {
        "_target_": "nemo.collections.llm.gpt.model.llama.Llama3Config8B" if kind == "silu" else "nemo.collections.llm.gpt.model.base.GPTConfig",
        **SIZES, "seq_length": 128, "num_query_groups": case.get("num_query_groups"), "num_moe_experts": None, "window_size": None,
        "normalization": case.get("normalization", "LayerNorm").removesuffix("1P"), "gated_linear_unit": kind == "silu",
        "layernorm_zero_centered_gamma": case.get("normalization") == "LayerNorm1P",
        "activation_func": {"_target_": f"torch.nn.functional.{kind}", "_call_": False},
        "bias_activation_fusion": name != "megatron-rope", "add_bias_linear": case.get("add_bias_linear", True),
        "add_qkv_bias": case.get("add_qkv_bias", False), "position_embedding_type": case.get("position_embedding_type", "learned_absolute"),
        "rotary_base": case.get("rotary_base", 10000), "rotary_percent": case.get("rotary_percent", 1.0),
        "share_embeddings_and_output_weights": not case.get("untie_embeddings_and_output_weights", False), **changes,
    }  # fmt: skip
    given = {key: value for key, value in config.items() if value is not ...}
    return yaml.safe_dump({"_target_": "nemo.collections.llm.gpt.model.base.GPTModel", "config": given})


def write_context(directory: Path, text: str) -> None:
    (directory / "context").mkdir(parents=True)
    (directory / "context" / "model.yaml").write_text(text)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["megatron-gpt3", "megatron-rope", "megatron-llama"])
def test_a_checkpoint_of_nemo_2_becomes_the_model_that_was_saved(name: str, tmp_path: Path, torch_group: Any) -> None:
    expected = whole_tensors(name, tmp_path)
    write_context(tmp_path / "nemo", context_of(name))
    write_torch_dist(torch_group, stacked(expected), tmp_path / "nemo" / "weights", "module.", None)
    check(*convert("nemo", tmp_path / "nemo", tmp_path / "out", *OPTIONS), expected, name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_target_": "nemo.collections.llm.gpt.model.gemma.GemmaConfig2B"}, r"gemma\.GemmaConfig2B in context/model\.yaml is not supported"),
        ({"_target_": ...}, "None in context/model.yaml is not supported; supported are configurations of base, llama"),
        ({"rotary_percent": ...}, r"context/model\.yaml lacks rotary_percent; export it with NeMo's export_ckpt"),
        ({"hidden_size": None, "seq_length": ...}, "lacks hidden_size, seq_length"),
        ({"scale_factor": 8}, "scale_factor=8 in context/model.yaml is not supported"),
        ({"num_moe_experts": 8}, "num_moe_experts=8"),
        ({"window_size": [4096, 0]}, r"window_size=\[4096, 0\]"),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu"}}, "activation_func=gelu with gated_linear_unit=True"),
        ({"gated_linear_unit": False}, "activation_func=silu with gated_linear_unit=False"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type='yarn'"),
    ],
)  # fmt: skip
def test_what_a_configuration_of_nemo_2_asks_for_beyond_megatrons_gpt_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_context(tmp_path / "nemo", context_of("megatron-llama", **changes))
    write_zarr(stacked(whole_tensors("megatron-llama", tmp_path)), tmp_path / "nemo" / "weights")
    with pytest.raises(ConfigError, match=message):
        convert("nemo", tmp_path / "nemo", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "holds no config of a model"),
        ("config: 1", "holds no config of a model"),
        ("[", "is not YAML"),
        ("- 1", "is not a mapping"),
    ],
)
def test_a_damaged_configuration_of_nemo_2_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    write_context(tmp_path, text)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        convert("nemo", tmp_path, tmp_path / "out")


def test_a_checkpoint_of_nemo_2_without_configuration_or_weights_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "io.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"NeMo 2 without context/model\.yaml; export it with its export_ckpt"):
        convert("nemo", tmp_path, tmp_path / "out")
    (tmp_path / "context" / "model.yaml").write_text(context_of("megatron-llama"))
    with pytest.raises(ConfigError, match="holds no distributed checkpoint in weights/; restore it"):
        convert("nemo", tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", ["megatron-gpt3", "megatron-llama"])
def test_zarr_of_nemo_becomes_the_model_that_was_saved(name: str, tmp_path: Path) -> None:
    """No PyTorch takes part: neither folders nor pieces are pickles."""
    expected = whole_tensors(name, tmp_path)
    write_zarr(stacked(expected), tmp_path / "nemo" / "model_weights")
    (tmp_path / "nemo" / "model_config.yaml").write_text(yaml.safe_dump({**SIZES, **NEMO[name]}))
    check(*convert("nemo", tmp_path / "nemo", tmp_path / "out", *OPTIONS), expected, name)


def test_whole_tensors_do_not_depend_on_the_pipeline_having_been_interleaved(tmp_path: Path) -> None:
    """Megatron-core counts layers over all ranks and stages there (`TransformerBlock.sharded_state_dict`)."""
    name = "megatron-llama"
    expected = whole_tensors(name, tmp_path)
    write_zarr(stacked(expected), tmp_path / "nemo" / "model_weights")
    config = {**SIZES, **NEMO[name], "virtual_pipeline_model_parallel_size": 3}
    (tmp_path / "nemo" / "model_config.yaml").write_text(yaml.safe_dump(config))
    check(*convert("nemo", tmp_path / "nemo", tmp_path / "out", *OPTIONS), expected, name)


def test_pieces_of_zarr_that_are_compressed_or_missing_are_refused(tmp_path: Path) -> None:
    core = {"decoder.final_layernorm.weight": np.ones(64, np.float32)}
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(SIZES))
    write_zarr(core, tmp_path / "model_weights")
    (tmp_path / "model_weights" / "model.decoder.final_layernorm.weight" / "1").unlink()
    with pytest.raises(CheckpointError, match=r"weight/1 is missing; restore it"):
        convert("nemo", tmp_path, tmp_path / "out")
    (tmp_path / "model_weights" / "model.decoder.final_layernorm.weight" / ".zarray").unlink()
    (tmp_path / "model_weights" / "model.decoder.final_layernorm.weight" / "0").unlink()
    (tmp_path / "model_weights" / "model.decoder.final_layernorm.weight").rmdir()
    write_zarr(core, tmp_path / "model_weights", compressor={"id": "blosc"})
    with pytest.raises(ConfigError, match=r"the pieces are compressed .* save the checkpoint again as torch_dist"):
        convert("nemo", tmp_path, tmp_path / "out")


class Described:
    """An object that only has attributes, as those of ``.metadata`` do."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__ = attributes


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        Described(),
        Described(storage_data={}, state_dict_metadata=[]),
        Described(storage_data={}, state_dict_metadata={"a": 1}),
        Described(storage_data={"a": 1}, state_dict_metadata={}),
        Described(storage_data={Described(): Described()}, state_dict_metadata={}),
    ],
)
def test_a_list_of_tensors_that_is_not_pytorchs_is_one_sentence(content: Any, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"^\.metadata does not describe tensors as Megatron-core .*; copy it again$"
    ):
        read_distributed(Directory(tmp_path), "", 0)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"shape": [1], "chunks": [1, 2], "dtype": "<f4"}', '{"shape": 1}']
)
def test_a_folder_of_zarr_that_describes_no_tensor_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.a").mkdir()
    (tmp_path / "model.a" / ".zarray").write_text(content)
    with pytest.raises(CheckpointError, match=r"^model\.a/\.zarray does not describe tensors .*; copy it again$"):
        read_distributed(Directory(tmp_path), "", 0)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_a_piece_whose_file_is_not_named_is_one_sentence(tmp_path: Path, torch_group: Any) -> None:
    write_torch_dist(torch_group, {"decoder.final_layernorm.weight": np.ones(64, np.float32)}, tmp_path / "a", "", None)
    place = tmp_path / "a" / ".metadata"
    place.write_bytes(place.read_bytes().replace(b"relative_path", b"relative_tree"))
    with pytest.raises(
        CheckpointError, match=r"^\.metadata does not describe .* \(KeyError: 'relative_path'\); copy it"
    ):
        read_distributed(Directory(tmp_path / "a"), "", 0)


class Runs:
    """A pickle of it would run a command where it is loaded."""

    def __reduce__(self) -> Any:
        return (eval, ("__import__('os').abort()",))


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_is_listed_and_not_run(protocol: int) -> None:
    value = {"a": [1, 2.5, None, True, "b", (1,), {2**70: "d"}], (3, 4): Runs(), "e": argparse.Namespace(f=1)}
    value["g"] = value["a"]
    read = read_inert(pickle.dumps(value, protocol), "x")
    assert read["a"][:5] == [1, 2.5, None, True, "b"]
    assert read["g"] is read["a"]
    assert read["a"][-1] == {2**70: "d"}
    run = read[3, 4]
    assert isinstance(run, Inert)
    assert run.name.endswith("eval")
    assert run.arguments == ("__import__('os').abort()",)
    assert read["e"].state == {"f": 1}


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\x80\x04]\x94(K\x01K", b"\x80\x04\x8c", b"\x80\x040.", b"\x80\x04Qa."]
)
def test_what_is_no_pickle_of_plain_data_is_one_sentence(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"x is not a list of tensors: .*; copy it again"):
        read_inert(content, "x")
