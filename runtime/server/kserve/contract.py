# SPDX-License-Identifier: Apache-2.0
"""The models that the TensorRT-LLM backend of Triton serves, as clients find them: names, types, shapes.

Source: the interface of ``inflight_batcher_llm`` (``ensemble``, ``preprocessing``, ``tensorrt_llm``, ``postprocessing``,
``tensorrt_llm_bls``). Shapes leave out the batch axis, which comes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

__all__ = ["MAX_BATCH_SIZE", "MODELS", "ModelContract", "TensorSpec"]

MAX_BATCH_SIZE = 1024
"""Rows of one request that are served as separate prompts."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output.

    Attributes:
        shape: without the batch axis; -1 = any extent.
        optional: an input that a request may leave out.
    """

    name: str
    datatype: str
    shape: tuple[int, ...] = (1,)
    optional: bool = False

    def metadata(self) -> dict[str, Any]:
        """As in a model's metadata."""
        return {"name": self.name, "datatype": self.datatype, "shape": [-1, *self.shape]}

    def config(self) -> dict[str, Any]:
        """As in a model's configuration, where BYTES is called TYPE_STRING."""
        kind = "TYPE_STRING" if self.datatype == "BYTES" else f"TYPE_{self.datatype}"
        described: dict[str, Any] = {"name": self.name, "data_type": kind, "dims": list(self.shape)}
        return described | ({"optional": True} if self.optional else {})


@dataclass(frozen=True, slots=True)
class ModelContract:
    """One model of the backend. ``decoupled``: a request may have several responses."""

    name: str
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    decoupled: bool = False

    def metadata(self) -> dict[str, Any]:
        """Body of ``GET v2/models/NAME``."""
        return {
            "name": self.name,
            "versions": ["1"],
            "platform": self.platform,
            "inputs": [tensor.metadata() for tensor in self.inputs],
            "outputs": [tensor.metadata() for tensor in self.outputs],
        }

    def config(self) -> dict[str, Any]:
        """Body of ``GET v2/models/NAME/config``, with the field names of Triton's ``ModelConfig``."""
        return {
            "name": self.name,
            "platform": self.platform,
            "backend": self.platform,
            "max_batch_size": MAX_BATCH_SIZE,
            "model_transaction_policy": {"decoupled": self.decoupled},
            "input": [tensor.config() for tensor in self.inputs],
            "output": [tensor.config() for tensor in self.outputs],
        }


def _optional(datatype: str, *names: str, shape: tuple[int, ...] = (1,)) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, datatype, shape, optional=True) for name in names)


_RETURNED = (
    "return_log_probs",
    "return_context_logits",
    "return_generation_logits",
    "return_perf_metrics",
    "return_num_input_tokens",
    "return_num_output_tokens",
)

_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")

_SHARED_INPUTS = (
    *_optional("INT32", "num_return_sequences", "end_id", "pad_id", "min_tokens", "beam_width", "prompt_vocab_size"),
    *_optional("FP32", "temperature", "min_p", *_PENALTIES),
    *_optional("UINT64", "seed", "lora_task_id"),
    *_optional("BOOL", "exclude_input_in_output", *_RETURNED),
    *_optional("FP16", "prompt_embedding_table", "lora_weights", shape=(-1, -1)),
    *_optional("INT32", "lora_config", shape=(-1, 3)),
    *_optional("BYTES", "guided_decoding_guide_type", "guided_decoding_guide"),
)

_TEXT_INPUTS = (
    TensorSpec("text_input", "BYTES"),
    TensorSpec("max_tokens", "INT32"),
    *_optional("BYTES", "decoder_text_input"),
    *_optional("BYTES", "bad_words", "stop_words", "embedding_bias_words", shape=(-1,)),
    *_optional("FP32", "embedding_bias_weights", shape=(-1,)),
    *_optional("INT32", "top_k"),
    *_optional("FP32", "top_p", "length_penalty"),
    *_optional("BOOL", "stream"),
    *_optional("UINT64", "prompt_table_extra_id"),
    *_SHARED_INPUTS,
)

_TOKEN_INPUTS = (
    TensorSpec("input_ids", "INT32", (-1,), optional=True),
    TensorSpec("input_lengths", "INT32"),
    TensorSpec("request_output_len", "INT32"),
    *_optional("INT32", "stop_words_list", "bad_words_list", shape=(2, -1)),
    *_optional("FP32", "embedding_bias", shape=(-1,)),
    *_optional("INT32", "runtime_top_k"),
    *_optional("FP32", "runtime_top_p", "len_penalty", "beam_search_diversity_rate"),
    *_optional("BOOL", "early_stopping", "stop", "streaming"),
    *_optional("UINT64", "prompt_table_extra_ids", shape=(-1,)),
    *_SHARED_INPUTS,
)

_COUNTS = (
    "batch_index",
    "sequence_index",
    "kv_cache_alloc_new_blocks",
    "kv_cache_reused_blocks",
    "kv_cache_alloc_total_blocks",
    "total_accepted_draft_tokens",
    "total_draft_tokens",
    "num_input_tokens",
    "num_output_tokens",
)

_SHARED_OUTPUTS = (
    TensorSpec("cum_log_probs", "FP32", (-1,)),
    TensorSpec("output_log_probs", "FP32", (-1, -1)),
    TensorSpec("context_logits", "FP32", (-1, -1)),
    TensorSpec("generation_logits", "FP32", (-1, -1, -1)),
    *(TensorSpec(name, "INT32") for name in _COUNTS),
    *(
        TensorSpec(f"{moment}_time_ns", "INT64")
        for moment in ("arrival", "first_scheduled", "first_token", "last_token")
    ),
    TensorSpec("acceptance_rate", "FP32"),
)

_TEXT_OUTPUTS = (TensorSpec("text_output", "BYTES", (-1,)), *_SHARED_OUTPUTS)

_PREPROCESSING = ModelContract(
    "preprocessing",
    "python",
    (
        TensorSpec("QUERY", "BYTES"),
        TensorSpec("REQUEST_OUTPUT_LEN", "INT32"),
        *_optional("BYTES", "DECODER_QUERY"),
        *_optional("BYTES", "BAD_WORDS_DICT", "STOP_WORDS_DICT", "EMBEDDING_BIAS_WORDS", shape=(-1,)),
        *_optional("FP32", "EMBEDDING_BIAS_WEIGHTS", shape=(-1,)),
        *_optional("INT32", "END_ID", "PAD_ID"),
        *_optional("UINT64", "PROMPT_TABLE_EXTRA_ID"),
    ),
    (
        TensorSpec("INPUT_ID", "INT32", (-1,)),
        TensorSpec("REQUEST_INPUT_LEN", "INT32"),
        TensorSpec("BAD_WORDS_IDS", "INT32", (2, -1)),
        TensorSpec("STOP_WORDS_IDS", "INT32", (2, -1)),
        TensorSpec("EMBEDDING_BIAS", "FP32", (-1,)),
        TensorSpec("REQUEST_OUTPUT_LEN", "INT32", (-1,)),
        TensorSpec("OUT_END_ID", "INT32"),
        TensorSpec("OUT_PAD_ID", "INT32"),
    ),
)

_POSTPROCESSING = ModelContract(
    "postprocessing",
    "python",
    (TensorSpec("TOKENS_BATCH", "INT32", (-1, -1)), TensorSpec("SEQUENCE_LENGTH", "INT32", (-1,))),
    (TensorSpec("OUTPUT", "BYTES", (-1,)),),
)

_TENSORRT_LLM = ModelContract(
    "tensorrt_llm",
    "tensorrtllm",
    _TOKEN_INPUTS,
    (
        TensorSpec("output_ids", "INT32", (-1, -1)),
        TensorSpec("sequence_length", "INT32", (-1,)),
        *_SHARED_OUTPUTS,
    ),
    decoupled=True,
)

MODELS: Mapping[str, ModelContract] = MappingProxyType(
    {
        model.name: model
        for model in (
            ModelContract("ensemble", "ensemble", _TEXT_INPUTS, _TEXT_OUTPUTS, decoupled=True),
            _PREPROCESSING,
            _TENSORRT_LLM,
            _POSTPROCESSING,
            ModelContract("tensorrt_llm_bls", "python", _TEXT_INPUTS, _TEXT_OUTPUTS, decoupled=True),
        )
    }
)
