# SPDX-License-Identifier: Apache-2.0
"""FasterTransformer's binary directories: ``config.ini``, and a file without a header for each tensor and tensor-parallel rank.

Source: ``examples/pytorch/gpt/utils/huggingface_gpt_convert.py``, ``examples/pytorch/gptj/utils/huggingface_gptj_ckpt_convert.py`` and
``examples/pytorch/gptneox/utils/huggingface_gptneox_convert.py`` of FasterTransformer 5.3; for ``[llama]`` the converter of its forks. Matrices are stored ``[in, out]``; q, k and v as ``[D, 3, H C / R]`` of each
of R ranks.
"""

from __future__ import annotations

import configparser
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phalanx.checkpoints.conversion.whole import WholeModel, config_dtype
from phalanx.checkpoints.dtypes import FLOAT_DTYPES
from phalanx.checkpoints.source import Array
from phalanx.parallel.errors import CheckpointError, ConfigError

__all__ = ["read_faster_transformer"]

FILE = "config.ini"
_DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu"}


def read_faster_transformer(directory: Path, vocab_size: int) -> WholeModel:
    """Join the ranks' files of a ``[gpt]``, ``[gptj]``, ``[gptneox]`` or ``[llama]`` model. ``vocab_size``: as in `launch.convert`; 0 = that of the file.

    Raises:
        ConfigError: ``config.ini`` is missing or names another kind of model.
        CheckpointError: a file is missing, or has another size than ``config.ini`` says.
    """
    parser = configparser.ConfigParser(interpolation=None)
    try:
        is_there = parser.read(directory / FILE, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{directory / FILE} cannot be read: {str(error).splitlines()[0]}; copy it again"
        ) from None
    if not is_there:
        raise ConfigError(f"--input {str(directory)!r} holds no {FILE}; give the directory of a layout, such as 2-gpu")
    kinds = {"gpt": _gpt, "gptj": _gptj, "gptneox": _gptneox, "llama": _llama}
    kind = next((name for name in parser.sections() if name in kinds), None)
    if kind is None:
        raise ConfigError(
            f"{directory / FILE} describes {parser.sections()}; [{']['.join(kinds)}] can be converted; of other models use the checkpoint "
            "of Hugging Face that FasterTransformer's own converter read"
        )
    files = _Files.of(directory, parser[kind], vocab_size)
    return kinds[kind](files)


@dataclass(frozen=True, slots=True)
class _Files:
    """The directory, its section of ``config.ini``, and the sizes that all kinds have."""

    directory: Path
    section: Mapping[str, str]
    dtype: np.dtype[Any]
    num_ranks: int
    vocab_size: int

    @classmethod
    def of(cls, directory: Path, section: Mapping[str, str], vocab_size: int) -> _Files:
        stored = section.get("weight_data_type", "fp32")
        if stored not in _DTYPES:
            raise ConfigError(f"weight_data_type={stored} in {FILE} is not supported; supported: {', '.join(_DTYPES)}")
        num_ranks = len(list(directory.glob("model.layers.0.attention.dense.weight.*.bin")))
        files = cls(directory, section, FLOAT_DTYPES[_DTYPES[stored]], num_ranks, 0)
        named = files.size("tensor_para_size", num_ranks)
        if not num_ranks or named != num_ranks:
            raise CheckpointError(
                f"{directory} holds {num_ranks} files model.layers.0.attention.dense.weight.*.bin of tensor_para_size={named}; "
                "restore the missing ones"
            )
        return cls(directory, section, files.dtype, num_ranks, vocab_size or files.size("vocab_size"))

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of ``config.ini``."""
        value = self.section.get(key, "" if default is None else str(default))
        if not value.isdecimal():
            raise ConfigError(f"{key}={value!r} in {FILE} is not a whole number; correct it")
        return int(value)

    def number(self, key: str, default: float) -> float:
        """A number of ``config.ini``."""
        try:
            return float(self.section.get(key, default))
        except ValueError:
            raise ConfigError(f"{key}={self.section[key]!r} in {FILE} is not a number; correct it") from None

    def refuse_unless(self, key: str, *values: str) -> None:
        """Refuse a switch that has none of these values; absent is the first."""
        if (value := self.section.get(key, values[0])).lower() not in values:
            raise ConfigError(f"{key}={value} in {FILE} is not supported; only {' or '.join(values)} is")

    @property
    def width(self) -> int:
        """D, which is H C here."""
        return self.size("head_num") * self.size("size_per_head")

    def has(self, name: str) -> bool:
        """Whether ``name`` is there, whole."""
        return (self.directory / f"model.{name}.bin").is_file()

    def whole(self, name: str, *shape: int) -> Array:
        """A tensor that is stored once; with a first size of -1 it has as many rows as the file holds."""
        return self._read(f"model.{name}.bin", shape)

    def split(self, name: str, axis: int, *shape: int) -> Array:
        """A tensor of which each rank stores its share along ``axis``."""
        if shape[axis] % self.num_ranks:
            raise CheckpointError(f"{name} of {shape} cannot be in {self.num_ranks} files; {FILE} is of another model")
        own = tuple(size // self.num_ranks if place == axis else size for place, size in enumerate(shape))
        return np.concatenate([self._read(f"model.{name}.{rank}.bin", own) for rank in range(self.num_ranks)], axis)

    def shared(self, name: str, *shape: int) -> Array:
        """A bias that is stored once, divided by the number of ranks, which all add it."""
        summed: Array = self.whole(name, *shape) * np.array(self.num_ranks, self.dtype)
        return summed

    def table(self, name: str) -> Array:
        """Rows of the vocabulary without padding: ``[V, D]``."""
        rows = self.whole(name, -1, self.width)
        if len(rows) < self.vocab_size:
            raise CheckpointError(f"model.{name}.bin has {len(rows)} rows, but {self.vocab_size} tokens are wanted")
        return rows[: self.vocab_size]

    def _read(self, name: str, shape: tuple[int, ...]) -> Array:
        path = self.directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; restore it")
        wanted, rest = abs(int(np.prod(shape))) * self.dtype.itemsize, path.stat().st_size
        if rest % wanted if shape[0] == -1 else rest - wanted:
            raise CheckpointError(
                f"{path} has {rest} bytes, but {self.dtype} {shape} takes {wanted}; {FILE} is of another model or type"
            )
        return np.fromfile(path, self.dtype).reshape(shape)


def _qkv(files: _Files, layer: str) -> Array:
    """``[3 D, D]``: q, then k, then v of all ranks."""
    d = files.width
    rows: Array = files.split(f"{layer}.attention.query_key_value.weight", 2, d, 3, d).reshape(d, 3 * d).T
    return rows


def _gpt(files: _Files) -> WholeModel:
    """As GPT-2 of transformers, whose matrices are ``[in, out]``, too."""
    files.refuse_unless("layernorm_type", "pre_layernorm")
    files.refuse_unless("has_post_decoder_layernorm", "1", "true")
    files.refuse_unless("has_positional_encoding", "1", "true")
    files.refuse_unless("use_attention_linear_bias", "0", "false")
    files.refuse_unless("moe_layers", "", "[]")
    activation = files.section.get("activation_type", "gelu").lower()
    if activation not in _ACTIVATIONS:
        raise ConfigError(
            f"activation_type={activation} in {FILE} is not supported; supported: {', '.join(_ACTIVATIONS)}"
        )
    d, f = files.width, files.size("inter_size")
    tensors = {"transformer.wte.weight": files.table("wte"), "transformer.wpe.weight": files.whole("wpe", -1, d)}
    tensors |= dict(_norm(files, "final_layernorm", "transformer.ln_f"))
    if files.has("lm_head.weight"):
        tensors["lm_head.weight"] = files.table("lm_head.weight")
    for number in range(files.size("num_layer")):
        layer, name = f"layers.{number}", f"transformer.h.{number}"
        tensors |= dict(_norm(files, f"{layer}.input_layernorm", f"{name}.ln_1"))
        tensors |= dict(_norm(files, f"{layer}.post_attention_layernorm", f"{name}.ln_2"))
        tensors |= {
            f"{name}.attn.c_attn.weight": _qkv(files, layer).T,
            f"{name}.attn.c_attn.bias": files.split(f"{layer}.attention.query_key_value.bias", 1, 3, d).reshape(3 * d),
            f"{name}.attn.c_proj.weight": files.split(f"{layer}.attention.dense.weight", 0, d, d),
            f"{name}.attn.c_proj.bias": files.whole(f"{layer}.attention.dense.bias", d),
            f"{name}.mlp.c_fc.weight": files.split(f"{layer}.mlp.dense_h_to_4h.weight", 1, d, f),
            f"{name}.mlp.c_fc.bias": files.split(f"{layer}.mlp.dense_h_to_4h.bias", 0, f),
            f"{name}.mlp.c_proj.weight": files.split(f"{layer}.mlp.dense_4h_to_h.weight", 0, f, d),
            f"{name}.mlp.c_proj.bias": files.whole(f"{layer}.mlp.dense_4h_to_h.bias", d),
        }
    own = {"n_inner": f, "activation_function": _ACTIVATIONS[activation], "n_positions": len(tensors["transformer.wpe.weight"]),
           "layer_norm_epsilon": files.number("layernorm_eps", 1e-5),
           "tie_word_embeddings": "lm_head.weight" not in tensors}  # fmt: skip
    return _model(files, "GPT2LMHeadModel", "gpt2", tensors, _GPT_KEYS, own)


def _gptj(files: _Files) -> WholeModel:
    """GPT-J: one norm, no biases in attention."""
    d, f = files.width, files.size("inter_size")
    tensors = {"transformer.wte.weight": files.table("wte"), "lm_head.weight": files.table("lm_head.weight"),
               "lm_head.bias": files.whole("lm_head.bias", -1)[: files.vocab_size]}  # fmt: skip
    tensors |= dict(_norm(files, "final_layernorm", "transformer.ln_f"))
    for number in range(files.size("num_layer")):
        layer, name = f"layers.{number}", f"transformer.h.{number}"
        tensors |= dict(_norm(files, f"{layer}.input_layernorm", f"{name}.ln_1"))
        for letter, rows in zip("qkv", np.split(_qkv(files, layer), 3), strict=True):
            tensors[f"{name}.attn.{letter}_proj.weight"] = rows
        tensors |= {
            f"{name}.attn.out_proj.weight": files.split(f"{layer}.attention.dense.weight", 0, d, d).T,
            f"{name}.mlp.fc_in.weight": files.split(f"{layer}.mlp.dense_h_to_4h.weight", 1, d, f).T,
            f"{name}.mlp.fc_in.bias": files.split(f"{layer}.mlp.dense_h_to_4h.bias", 0, f),
            f"{name}.mlp.fc_out.weight": files.split(f"{layer}.mlp.dense_4h_to_h.weight", 0, f, d).T,
            f"{name}.mlp.fc_out.bias": files.whole(f"{layer}.mlp.dense_4h_to_h.bias", d),
        }
    own = {"n_inner": f, "rotary_dim": files.size("rotary_embedding"), "n_positions": files.size("max_pos_seq_len", 2048),
           "layer_norm_epsilon": files.number("layernorm_eps", 1e-5), "tie_word_embeddings": False}  # fmt: skip
    return _model(files, "GPTJForCausalLM", "gptj", tensors, _GPT_KEYS, own)


def _gptneox(files: _Files) -> WholeModel:
    """GPT-NeoX, whose q, k and v of a head lie together; each rank's bias after a sum is stored as its share of it."""
    d, f, heads = files.width, files.size("inter_size"), files.size("head_num")
    tensors = {"gpt_neox.embed_in.weight": files.table("wte"), "embed_out.weight": files.table("lm_head.weight")}
    tensors |= dict(_norm(files, "final_layernorm", "gpt_neox.final_layer_norm"))
    for number in range(files.size("num_layer")):
        layer, name = f"layers.{number}", f"gpt_neox.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors |= dict(_norm(files, f"{layer}.{norm}", f"{name}.{norm}"))
        bias = files.split(f"{layer}.attention.query_key_value.bias", 1, 3, d)
        tensors |= {
            f"{name}.attention.query_key_value.weight": _by_head(_qkv(files, layer), heads),
            f"{name}.attention.query_key_value.bias": _by_head(bias.reshape(3 * d), heads),
            f"{name}.attention.dense.weight": files.split(f"{layer}.attention.dense.weight", 0, d, d).T,
            f"{name}.attention.dense.bias": files.shared(f"{layer}.attention.dense.bias", d),
            f"{name}.mlp.dense_h_to_4h.weight": files.split(f"{layer}.mlp.dense_h_to_4h.weight", 1, d, f).T,
            f"{name}.mlp.dense_h_to_4h.bias": files.split(f"{layer}.mlp.dense_h_to_4h.bias", 0, f),
            f"{name}.mlp.dense_4h_to_h.weight": files.split(f"{layer}.mlp.dense_4h_to_h.weight", 0, f, d).T,
            f"{name}.mlp.dense_4h_to_h.bias": files.shared(f"{layer}.mlp.dense_4h_to_h.bias", d),
        }
    # FasterTransformer knows GELU by its tanh form, this base and this epsilon alone.
    own = {"intermediate_size": f, "hidden_act": "gelu_fast", "rotary_emb_base": 10000, "rotary_pct": _share(files),
           "use_parallel_residual": files.size("use_gptj_residual", 1) == 1, "layer_norm_eps": 1e-5,
           "max_position_embeddings": files.size("max_pos_seq_len", 2048), "tie_word_embeddings": False}  # fmt: skip
    return _model(files, "GPTNeoXForCausalLM", "gpt_neox", tensors, _LLAMA_KEYS, own)


def _by_head(rows: Array, heads: int) -> Array:
    """``[3, H, C]`` rows as ``[H, 3, C]``."""
    return rows.reshape(3, heads, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


def _share(files: _Files) -> float:
    """The rotated share of a head, of which the head's size makes the whole number again."""
    rotated, size = files.size("rotary_embedding"), files.size("size_per_head")
    share = rotated / size
    return share if int(size * share) == rotated else math.nextafter(share, math.inf)


def _llama(files: _Files) -> WholeModel:
    """Llama with as many key/value heads as query heads."""
    for key in ("kv_head_num", "num_kv_heads"):
        files.refuse_unless(key, files.section.get("head_num", ""))
    d, f = files.width, files.size("inter_size")
    files.refuse_unless("rotary_embedding", files.section.get("size_per_head", ""))
    tensors = {"model.embed_tokens.weight": files.table("wte"), "lm_head.weight": files.table("lm_head.weight"),
               "model.norm.weight": files.whole("final_layernorm.weight", d)}  # fmt: skip
    for number in range(files.size("num_layer")):
        layer = f"layers.{number}"
        for letter, rows in zip("qkv", np.split(_qkv(files, layer), 3), strict=True):
            tensors[f"model.{layer}.self_attn.{letter}_proj.weight"] = rows
        for kind, axis, shape in (("gate", 1, (d, f)), ("up", 1, (d, f)), ("down", 0, (f, d))):
            name = f"{layer}.mlp.{kind}_proj.weight"
            tensors[f"model.{name}"] = files.split(name, axis, *shape).T
        tensors[f"model.{layer}.self_attn.o_proj.weight"] = files.split(f"{layer}.attention.dense.weight", 0, d, d).T
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            tensors[f"model.{layer}.{norm}"] = files.whole(f"{layer}.{norm}", d)
    own = {"intermediate_size": f, "rms_norm_eps": files.number("layernorm_eps", 1e-6), "tie_word_embeddings": False,
           "max_position_embeddings": files.size("max_pos_seq_len", 2048)}  # fmt: skip
    return _model(files, "LlamaForCausalLM", "llama", tensors, _LLAMA_KEYS, own)


_GPT_KEYS = ("n_embd", "n_layer", "n_head")
_LLAMA_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads")


def _norm(files: _Files, name: str, new: str) -> Iterator[tuple[str, Array]]:
    for kind in ("weight", "bias"):
        yield f"{new}.{kind}", files.whole(f"{name}.{kind}", files.width)


def _model(
    files: _Files, architecture: str, model_type: str, tensors: dict[str, Array], keys: tuple[str, str, str], own: dict[str, Any]
) -> WholeModel:  # fmt: skip
    width, layers, heads = keys
    tokens = {
        new: files.size(old)
        for old, new in (("start_id", "bos_token_id"), ("end_id", "eos_token_id"))
        if old in files.section
    }
    config = {
        "architectures": [architecture], "model_type": model_type, "vocab_size": files.vocab_size, width: files.width,
        layers: files.size("num_layer"), heads: files.size("head_num"), **own, **tokens,
        "torch_dtype": config_dtype(next(iter(tensors.values()))),
    }  # fmt: skip
    return WholeModel(tensors, config)
