# SPDX-License-Identifier: Apache-2.0
"""From rows to what has to be generated: the backend's names, defaults and neutral values.

Sampling fields have their names of this protocol in the table of sampling fields. An input that Phalanx cannot honour is
accepted only with a value that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from phalanx.parallel.errors import RequestError
from phalanx.runtime.sampling.fields import LOGIT_BIAS, MAX_BEAM_WIDTH, SAMPLING_FIELDS, read_fields
from phalanx.runtime.sampling.guides import GuideRule
from phalanx.runtime.sampling.rules import MAX_INT32, Whole
from phalanx.runtime.server.errors import from_request_error, invalid
from phalanx.runtime.server.kserve.contract import ModelContract
from phalanx.runtime.server.kserve.inputs import Row
from phalanx.runtime.server.openai.parsing import Generation
from phalanx.runtime.server.openai.protocol import MAX_CHOICES

__all__ = ["Query", "parse_rows", "weighted_words", "without_empty"]


@dataclass(frozen=True, slots=True)
class Query:
    """A parsed request for the models that generate.

    Attributes:
        rows: one generation each, all with the same number of answers.
        stream: tokens as they come, in several responses.
        includes_prompt: whole answers start with the prompt.
        returns_logprobs: of the generated tokens.
        counts: which of ``num_input_tokens`` and ``num_output_tokens`` to return.
    """

    rows: Sequence[Generation]
    stream: bool
    includes_prompt: bool
    returns_logprobs: bool
    counts: frozenset[str]

    @property
    def n(self) -> int:
        """Answers to each row."""
        return self.rows[0].n


_TOKEN_NAMES = MappingProxyType(
    {
        "request_output_len": "max_tokens",
        "runtime_top_k": "top_k",
        "runtime_top_p": "top_p",
        "streaming": "stream",
        "len_penalty": "length_penalty",
    }
)
"""Inputs of ``tensorrt_llm`` that ``ensemble`` calls otherwise."""

_READ = frozenset(
    {
        "text_input", "max_tokens", "end_id", "pad_id", "num_return_sequences", "exclude_input_in_output",
        "return_log_probs", "return_num_input_tokens", "return_num_output_tokens", "stream", "input_ids",
        "input_lengths", "stop_words", "stop_words_list", "bad_words", "bad_words_list",
        "guided_decoding_guide_type", "guided_decoding_guide", "embedding_bias", "embedding_bias_words",
        "embedding_bias_weights",
    }
)  # fmt: skip

_GUIDE_KINDS = MappingProxyType({"json": "json", "json_schema": "json", "regex": "regex", "ebnf_grammar": "grammar"})

_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "beam_search_diversity_rate": (0,),
        "lora_task_id": (0,),
        "prompt_table_extra_id": (0,),
        "prompt_vocab_size": (0,),
        "stop": (False,),
    }
)
"""Values, besides empty ones and false, that ask for nothing."""

_DEFAULTS = {
    field.name: field.default for field in SAMPLING_FIELDS if "triton" in field.doors and field.default is not None
}
"""Sampling defaults are the backend's: ``generation_config.json`` has no say here."""


def parse_rows(contract: ModelContract, rows: Sequence[Row], vocab_size: int) -> Query:
    """What the rows of a request ask for.

    Raises:
        ApiError: 400, naming the input.
    """
    named = [{_TOKEN_NAMES.get(name, name): value for name, value in row.items()} for row in rows]
    for row in named:
        _refuse_unsupported(row)
    first = named[0]
    for name in ("num_return_sequences", "beam_width", "stream", "exclude_input_in_output", "return_log_probs"):
        if any(row.get(name) != first.get(name) for row in named):
            raise invalid(f"{name} differs between rows; send them as separate requests", name)
    makes_tokens = contract.name == "tensorrt_llm"
    return Query(
        rows=[_generation(row, _token_prompt(row) if makes_tokens else row["text_input"], vocab_size) for row in named],
        stream=bool(first.get("stream", False)),
        includes_prompt=not first.get("exclude_input_in_output", False),
        returns_logprobs=bool(first.get("return_log_probs", False)),
        counts=frozenset(
            name for name in ("num_input_tokens", "num_output_tokens") if first.get(f"return_{name}", False)
        ),
    )


def without_empty(words: Any) -> list[str]:
    """Words as a list; clients send one empty word for none."""
    return [word for word in ([words] if isinstance(words, str) else words or ()) if word]


def weighted_words(words: list[str] | None, weights: list[float] | None, name: str) -> list[tuple[str, float]]:
    """Return words that are not empty with what is to be added to their logits; none where all weights are 0.

    Raises:
        ApiError: 400, naming ``name``: there are not as many weights as words.
    """
    words, weights = words or [], weights or []
    if not any(weights) and (weights or not any(words)):
        return []
    if len(words) != len(weights):
        raise invalid(f"{name} holds {len(words)} words for {len(weights)} weights; give one for each", name)
    return [(word, weight) for word, weight in zip(words, weights, strict=True) if word and weight]


def _refuse_unsupported(row: Row) -> None:
    honoured = {field.doors.get("triton") for field in SAMPLING_FIELDS} | _READ
    for name, value in row.items():
        if name in honoured or _is_neutral(value, _NEUTRAL.get(name, ())):
            continue
        raise invalid(f"{name} is not supported by this server; leave it out", name)


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    if isinstance(value, list):
        return all(_is_neutral(item, neutral) for item in value)
    return value is False or value == "" or value in neutral


def _generation(row: Row, prompt: str | tuple[int, ...], vocab_size: int) -> Generation:
    fields = dict(row)
    for name in ("stop_words", "bad_words"):
        fields[name] = without_empty(row.get(name)) or None
    try:
        max_tokens = Whole(1, MAX_INT32).check("max_tokens", row["max_tokens"])
        beam_width = Whole(1, MAX_BEAM_WIDTH).check("beam_width", row.get("beam_width", 1))
        n = Whole(1, MAX_CHOICES).check("num_return_sequences", row.get("num_return_sequences", beam_width))
        if n > beam_width > 1:
            raise RequestError(
                f"num_return_sequences={n} is above beam_width={beam_width}; use at most that many",
                "num_return_sequences",
            )
        sampling = {**_DEFAULTS, **read_fields(fields, "triton")}
    except RequestError as error:
        raise from_request_error(error) from None
    if not any(sampling.get(name) for name in ("top_k", "min_p")) and not row.get("top_p"):
        sampling["temperature"] = 0.0  # the backend samples only where a filter asks for it
    if row.get("return_log_probs", False):
        sampling["logprobs"] = 0
    if words := _words("bad_words_list", row.get("bad_words_list")):
        sampling["bad_token_ids"] = words
    sampling |= _ends(row, vocab_size) | _guide(row) | _biases(row, vocab_size)
    return Generation(
        model=None,
        prompts=[prompt],
        n=n,
        sampling=sampling,
        max_tokens=max_tokens,
        max_tokens_name="max_tokens",
        default_max_tokens=None,
        add_special_tokens=True,
        bias_words=weighted_words(
            row.get("embedding_bias_words"), row.get("embedding_bias_weights"), "embedding_bias_words"
        ),
    )


def _biases(row: Row, vocab_size: int) -> dict[str, Any]:
    """``logit_bias`` for the model that takes a number for each token."""
    numbers = row.get("embedding_bias") or ()
    if len(numbers) > vocab_size:
        raise invalid(f"embedding_bias holds {len(numbers)} numbers for {vocab_size} tokens", "embedding_bias")
    try:
        biases = LOGIT_BIAS.check("embedding_bias", {token: number for token, number in enumerate(numbers) if number})
    except RequestError as error:
        raise from_request_error(error) from None
    return {"logit_bias": biases} if biases else {}


def _guide(row: Row) -> dict[str, Any]:
    """What the answer must match, in the backend's two inputs; a type alone is enough for any JSON."""
    kind, text = row.get("guided_decoding_guide_type"), row.get("guided_decoding_guide")
    if not kind and not text:
        return {}
    if kind == "json":
        text = "{}"
    if kind not in _GUIDE_KINDS:
        raise invalid(
            f"guided_decoding_guide_type={kind!r:.60} is not supported; use one of {', '.join(_GUIDE_KINDS)}",
            "guided_decoding_guide_type",
        )
    try:
        rule = GuideRule()
        return {"structured_outputs": rule.check("guided_decoding_guide", {_GUIDE_KINDS[str(kind)]: text or ""})}
    except RequestError as error:
        raise from_request_error(error) from None


def _ends(row: Row, vocab_size: int) -> dict[str, Any]:
    """Which tokens end an answer: ``end_id`` instead of the model's own, none if it is outside the vocabulary; and stop words."""
    stop_words = _words("stop_words_list", row.get("stop_words_list"))
    sequences = {"stop_token_sequences": longer} if (longer := [word for word in stop_words if len(word) > 1]) else {}
    stop_token_ids = tuple(word[0] for word in stop_words if len(word) == 1)
    end_id = row.get("end_id")
    if end_id is None:
        return sequences | ({"stop_token_ids": stop_token_ids} if stop_token_ids else {})
    ends = (*stop_token_ids, end_id) if 0 <= end_id < vocab_size else stop_token_ids
    return {"ignore_eos": True, "stop_token_ids": ends, **sequences}


def _words(name: str, words: list[list[int]] | None) -> list[tuple[int, ...]]:
    """Words in the backend's form: all their tokens in a row, and in a second row where each word ends; -1 pads."""
    if not words:
        return []
    token_ids, ends = words
    found, start = [], 0
    for end in ends:
        if end <= 0:
            break
        if not start < end <= len(token_ids):
            raise invalid(f"{name} says that a word ends at {end}, after {start} of {len(token_ids)} tokens", name)
        found.append(tuple(token_ids[start:end]))
        start = end
    return found


def _token_prompt(row: Row) -> tuple[int, ...]:
    token_ids, length = row.get("input_ids"), row["input_lengths"]
    if token_ids is None:
        raise invalid("model 'tensorrt_llm' needs input 'input_ids'; give it", "input_ids")
    if not 0 < length <= len(token_ids):
        raise invalid(f"input_lengths={length} does not fit input_ids of {len(token_ids)} tokens", "input_lengths")
    return tuple(token_ids[:length])
