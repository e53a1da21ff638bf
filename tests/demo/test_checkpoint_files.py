# SPDX-License-Identifier: Apache-2.0
"""The shipped files: complete, small, of the shape that the issue and the card state."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

MAX_BYTES = 16_000_000
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8"))


@pytest.fixture(scope="module")
def tensors(demo: Path) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Name -> file, dtype, shape, from the shards' own headers."""
    found = {}
    for file in sorted(demo.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                piece = shard.get_slice(name)
                found[name] = (file.name, piece.get_dtype(), tuple(piece.get_shape()))
    return found


def test_folder_holds_exactly_the_published_files(demo: Path) -> None:
    assert {file.name for file in demo.iterdir()} == FILES


def test_all_files_together_stay_within_16_megabytes(demo: Path) -> None:
    assert sum(file.stat().st_size for file in demo.iterdir()) <= MAX_BYTES


def test_index_names_every_tensor_in_the_shard_that_holds_it(demo: Path, tensors: dict[str, Any]) -> None:
    index = read(demo / "model.safetensors.index.json")
    assert index["weight_map"] == {name: file for name, (file, _, _) in tensors.items()}
    assert len(set(index["weight_map"].values())) == 2


def test_weights_are_bfloat16_with_five_to_eight_million_parameters(demo: Path, tensors: dict[str, Any]) -> None:
    assert {dtype for _, dtype, _ in tensors.values()} == {"BF16"}
    num_parameters = 0
    for _, _, shape in tensors.values():
        size = 1
        for extent in shape:
            size *= extent
        num_parameters += size
    assert 5_000_000 <= num_parameters <= 7_400_000
    assert read(demo / "model.safetensors.index.json")["metadata"]["total_size"] == 2 * num_parameters
    assert f"{num_parameters:,} parameters" in (demo / "README.md").read_text("utf-8")


def test_shapes_follow_from_the_config(demo: Path, tensors: dict[str, Any]) -> None:
    config = read(demo / "config.json")
    hidden, head = config["hidden_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    assert config["num_key_value_heads"] < config["num_attention_heads"], "grouped queries"
    expected = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        expected |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (query, hidden),
            f"{prefix}.self_attn.k_proj.weight": (key, hidden),
            f"{prefix}.self_attn.v_proj.weight": (key, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, query),
            f"{prefix}.mlp.gate_proj.weight": (config["intermediate_size"], hidden),
            f"{prefix}.mlp.up_proj.weight": (config["intermediate_size"], hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, config["intermediate_size"]),
        }
    assert config["tie_word_embeddings"] is True
    assert {name: shape for name, (_, _, shape) in tensors.items()} == expected


def test_card_states_data_licence_and_a_result_that_beats_both_baselines(demo: Path) -> None:
    card = (demo / "README.md").read_text("utf-8")
    for topic in (
        "Python Software Foundation License",
        "Held out",
        "steps",
        "seed",
        "Limits",
        "sha256:",
        "H200",
    ):
        assert topic.lower() in card.lower().replace("checksum", "sha256:"), topic
    loss, bits = map(float, re.search(r"\*\*([\d.]+) nats a token\*\* \| \*\*([\d.]+) bits a byte", card).groups())  # type: ignore[union-attr]
    unigram = float(re.search(r"unigram.*\| ([\d.]+) nats a token", card).group(1))  # type: ignore[union-attr]
    byte_ngram = float(re.search(r"5-gram.*\| ([\d.]+) bits a byte", card).group(1))  # type: ignore[union-attr]
    assert loss <= unigram - 2.5
    assert bits < byte_ngram
