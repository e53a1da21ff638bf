# SPDX-License-Identifier: Apache-2.0
"""The models that only turn text into tokens and back: ``preprocessing`` and ``postprocessing``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from phalanx.runtime.server.errors import invalid
from phalanx.runtime.server.kserve.inputs import Row
from phalanx.runtime.server.kserve.parsing import weighted_words, without_empty
from phalanx.runtime.server.kserve.tensors import Tensor
from phalanx.runtime.server.services import Services
from phalanx.runtime.text import Tokenizer, word_biases

__all__ = ["postprocess", "preprocess"]


async def preprocess(services: Services, rows: Sequence[Row]) -> list[Tensor]:
    """Token ids ``[rows, tokens]`` of the queries, padded at the end, and words in the backend's form ``[rows, 2, tokens]``.

    Raises:
        ApiError: 400: the checkpoint has no tokenizer, a query is longer than the context, or a word with a bias has a token that the
            model lacks.
    """
    tokenizer = services.need_tokenizer("QUERY")
    if any(without_empty(row.get("DECODER_QUERY")) for row in rows):
        raise invalid("DECODER_QUERY is not supported by this server; leave it out", "DECODER_QUERY")
    queries = [await services.encode(row["QUERY"], add_special_tokens=True, name="QUERY") for row in rows]
    end_ids = [row.get("END_ID", _end_id(tokenizer)) for row in rows]
    pad_ids = [row.get("PAD_ID", end_id) for row, end_id in zip(rows, end_ids, strict=True)]
    width = max(map(len, queries))
    padded = [[*query, *[pad_id] * (width - len(query))] for query, pad_id in zip(queries, pad_ids, strict=True)]
    return [
        Tensor.of("INPUT_ID", "INT32", padded),
        Tensor.of("REQUEST_INPUT_LEN", "INT32", [[len(query)] for query in queries]),
        Tensor.of("BAD_WORDS_IDS", "INT32", _words(tokenizer, [row.get("BAD_WORDS_DICT") for row in rows])),
        Tensor.of("STOP_WORDS_IDS", "INT32", _words(tokenizer, [row.get("STOP_WORDS_DICT") for row in rows])),
        Tensor.of("EMBEDDING_BIAS", "FP32", _biases(services, tokenizer, rows)),
        Tensor.of("REQUEST_OUTPUT_LEN", "INT32", [[row["REQUEST_OUTPUT_LEN"]] for row in rows]),
        Tensor.of("OUT_END_ID", "INT32", [[end_id] for end_id in end_ids]),
        Tensor.of("OUT_PAD_ID", "INT32", [[pad_id] for pad_id in pad_ids]),
    ]


async def postprocess(services: Services, rows: Sequence[Row]) -> list[Tensor]:
    """Texts ``[rows x answers]`` of token ids.

    Raises:
        ApiError: 400: the checkpoint has no tokenizer, a token id is outside the vocabulary, or a length does not fit.
    """
    tokenizer = services.need_tokenizer("TOKENS_BATCH")
    texts = []
    for row in rows:
        answers, lengths = row["TOKENS_BATCH"], row["SEQUENCE_LENGTH"]
        if len(lengths) != len(answers):
            raise invalid(f"SEQUENCE_LENGTH has {len(lengths)} values for {len(answers)} answers", "SEQUENCE_LENGTH")
        for token_ids, length in zip(answers, lengths, strict=True):
            if not 0 <= length <= len(token_ids):
                raise invalid(f"SEQUENCE_LENGTH holds {length}, of {len(token_ids)} tokens", "SEQUENCE_LENGTH")
            services.check_token_ids(token_ids[:length], "TOKENS_BATCH")
            texts.append(await _decode(services, tokenizer, token_ids[:length]))
    return [Tensor.of("OUTPUT", "BYTES", texts)]


async def _decode(services: Services, tokenizer: Tokenizer, token_ids: list[int]) -> str:
    return await services.in_worker(lambda: tokenizer.decode(token_ids))


def _end_id(tokenizer: Tokenizer) -> int:
    """The token that ends a text; -1 if the checkpoint names none."""
    end = tokenizer.special_tokens.get("eos_token")
    token_ids = tokenizer.encode(end, add_special_tokens=False) if end else ()
    return token_ids[0] if len(token_ids) == 1 else -1


def _biases(services: Services, tokenizer: Tokenizer, rows: Sequence[Row]) -> np.ndarray[Any, Any]:
    """``[rows, V]`` what is added to each token's logit; ``[rows, 0]`` if no row has words for it."""
    biases = [
        word_biases(
            tokenizer,
            weighted_words(row.get("EMBEDDING_BIAS_WORDS"), row.get("EMBEDDING_BIAS_WEIGHTS"), "EMBEDDING_BIAS_WORDS"),
        )
        for row in rows
    ]
    table = np.zeros((len(rows), services.model.vocab_size if any(biases) else 0), np.float32)
    for target, of_row in zip(table, biases, strict=True):
        services.check_token_ids(tuple(of_row), "EMBEDDING_BIAS_WORDS")
        for token_id, bias in of_row.items():
            target[token_id] = bias
    return table


def _words(tokenizer: Tokenizer, rows: Sequence[Any]) -> np.ndarray[Any, Any]:
    """For each row all words' tokens in a row, and below where each word ends: padded with 0 and -1."""
    encoded = [[tokenizer.encode(word, add_special_tokens=False) for word in without_empty(row)] for row in rows]
    width = max(1, *(sum(map(len, words)) for words in encoded))
    table = np.zeros((len(rows), 2, width), np.int32)
    table[:, 1] = -1
    for target, words in zip(table, encoded, strict=True):
        flat = [token_id for word in words for token_id in word]
        target[0, : len(flat)] = flat
        target[1, : len(words)] = np.cumsum([len(word) for word in words])
    return table
