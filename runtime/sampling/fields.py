# SPDX-License-Identifier: Apache-2.0
"""The table of sampling fields: everything that a door, the plan and the samplers know about a field, in one row each.

A row gives the field's name, default, rule (type and limits), its names in the protocols, its command line flag, and how the
samplers see it. Doors read their values with `read_fields`; `SamplingParams` checks them again, so that no way in passes by the
rules. Admission records, their struct in CUDA and the question whether a row needs whole-vocabulary sampling follow from
`DEVICE_COLUMNS`. To add a field, add a row here and say in `sampling.reference` and ``sample_rows.cu`` what it does to logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from phalanx.parallel.errors import RequestError
from phalanx.runtime.sampling.guides import Guide, GuideRule
from phalanx.runtime.sampling.rules import (
    MAX_INT32,
    EarlyStopping,
    Flag,
    Real,
    Rule,
    Texts,
    TokenIds,
    TokenLists,
    TokenNumbers,
    Whole,
    shown,
)

__all__ = [
    "DEVICE_COLUMNS",
    "LOGIT_BIAS",
    "MAX_ALTERNATIVES",
    "MAX_BEAM_WIDTH",
    "MAX_LOGPROBS",
    "MAX_PLAN_BIASES",
    "MAX_TOKEN_BIASES",
    "SAMPLING_FIELDS",
    "SAMPLING_STRUCT",
    "TOKEN_BIAS_WORDS",
    "Door",
    "SamplingField",
    "SamplingParams",
    "adjusts_logits",
    "device_values",
    "read_fields",
    "restricts_tokens",
]

Door = Literal["openai", "triton", "anthropic"]

MAX_TOKEN_BIASES = 512
"""Maximum number of entries of one sequence's list of token biases (`sampling.biases`); bounds what ranks keep and what a plan carries."""

MAX_PLAN_BIASES = 128 * MAX_TOKEN_BIASES
"""Maximum number of token biases in one plan; sequences that would bring more start in the next."""

TOKEN_BIAS_WORDS = 4
"""Words of an entry."""

MAX_LOGPROBS = 20
"""Maximum number of alternatives reported per token; bounds the size of a reply."""

MAX_BEAM_WIDTH = 32

LOGIT_BIAS = TokenNumbers(128, Real(-100.0, 100.0))
"""What ``logit_bias`` may hold, by whatever name a protocol calls it."""

MAX_ALTERNATIVES = 128
"""Maximum number of alternatives that executors find for a token: beam search looks at more of them than a reply may have."""

LOWEST_TEMPERATURE = 1e-5
"""Below it the noise cannot change the order of two different float32 logits that matter: such requests are greedy."""


@dataclass(frozen=True, slots=True)
class DeviceColumn:
    """How the samplers see a field.

    Attributes:
        name: in the admission record.
        format: NumPy's name of its type there: ``<f4``, ``<i4`` or ``<u8``.
        encode: from the field's value and the vocabulary's size to the record's value; None = as it is.
        restricts: whether a value (or an array of them) leaves tokens out, which needs a whole row of logits; None = never.
        adjusts: whether a value other than 0 changes logits before a token is chosen.
    """

    name: str
    format: str
    encode: Callable[[Any, int], Any] | None = None
    restricts: Callable[[Any], Any] | None = None
    adjusts: bool = False


@dataclass(frozen=True, slots=True)
class SamplingField:
    """One row of the table.

    Attributes:
        name: attribute of `SamplingParams` and key of a line of ``launch.generate --input-file``.
        default: what an absent field means.
        rule: type and limits.
        doors: its name in a protocol; a door that is missing has no such field or spells it in its own way.
        flag: metavar and help of its flag in ``launch.generate``; None = no flag.
        device: how the samplers see it; None = the scheduler or the text side acts on it.
    """

    name: str
    default: Any
    rule: Rule
    doors: Mapping[Door, str] = dataclasses.field(default_factory=dict)
    flag: tuple[str, str] | None = None
    device: DeviceColumn | None = None


def _same(name: str, *more: Door) -> dict[Door, str]:
    return {"openai": name, "triton": name, **dict.fromkeys(more, name)}


SAMPLING_FIELDS: tuple[SamplingField, ...] = (
    SamplingField("max_tokens", 16, Whole(0, MAX_INT32), {}, ("N", "maximum number of tokens to generate; 0 scores the prompt only")),
    SamplingField(
        "temperature", 1.0, Real(0.0, 2.0), _same("temperature", "anthropic"), ("T", "0 = greedy"),
        DeviceColumn("temperature", "<f4", lambda value, _: value if value >= LOWEST_TEMPERATURE else 0.0),
    ),
    SamplingField(
        "top_k", 0, Whole(-1), _same("top_k", "anthropic"), ("K", "keep the K most probable tokens; 0 or -1 = all"),
        DeviceColumn("top_k", "<i4", lambda value, vocab_size: value if 0 < value < vocab_size else 0, lambda value: value > 0),
    ),
    SamplingField(
        "top_p", 1.0, Real(0.0, 1.0), _same("top_p", "anthropic"), ("P", "then keep the smallest set whose probability reaches P"),
        DeviceColumn("top_p", "<f4", None, lambda value: value < 1),
    ),
    SamplingField(
        "min_p", 0.0, Real(0.0, 1.0), _same("min_p"),
        ("P", "then drop tokens below P times the largest probability"),
        DeviceColumn("min_p", "<f4", None, lambda value: value > 0),
    ),
    SamplingField(
        "repetition_penalty", 1.0, Real(0.001, 1000.0), _same("repetition_penalty"),
        ("R", "divide positive logits of tokens of prompt and output by R, multiply negative ones by it"),
        DeviceColumn("repetition_penalty", "<f4", lambda value, _: 0.0 if value == 1 else value, adjusts=True),
    ),
    SamplingField(
        "presence_penalty", 0.0, Real(-2.0, 2.0), _same("presence_penalty"),
        ("P", "subtract P from logits of tokens that were generated"),
        DeviceColumn("presence_penalty", "<f4", adjusts=True),
    ),
    SamplingField(
        "frequency_penalty", 0.0, Real(-2.0, 2.0), _same("frequency_penalty"),
        ("F", "subtract F from a token's logit for each time that it was generated"),
        DeviceColumn("frequency_penalty", "<f4", adjusts=True),
    ),
    SamplingField("seed", None, Whole(-(2**63), 2**64 - 1), _same("seed")),
    SamplingField(
        "stop", (), Texts(most=16, most_characters=1024), {"openai": "stop", "triton": "stop_words", "anthropic": "stop_sequences"},
        ("TEXT", "end at this text; repeatable"),
    ),
    SamplingField("stop_token_ids", (), TokenIds(most=64), {"openai": "stop_token_ids"}),
    SamplingField("stop_token_sequences", (), TokenLists(1024)),
    SamplingField("ignore_eos", False, Flag(), {"openai": "ignore_eos"}, ("", "generate past the end token")),
    SamplingField(
        "min_tokens", 0, Whole(0, MAX_INT32), _same("min_tokens"), ("N", "no end before this many tokens")
    ),
    SamplingField("logit_bias", (), LOGIT_BIAS, {"openai": "logit_bias"}),
    SamplingField(
        "bad_words", (), Texts(most=128, most_characters=1024), _same("bad_words"),
        ("TEXT", "never generate this text; repeatable"),
    ),
    SamplingField("bad_token_ids", (), TokenLists(MAX_TOKEN_BIASES)),
    SamplingField("allowed_token_ids", None, TokenIds(most=1 << 20, least=1), {"openai": "allowed_token_ids"}),
    SamplingField("structured_outputs", None, GuideRule(), {"openai": "structured_outputs"}),
    SamplingField("include_stop", False, Flag(), {"openai": "include_stop_str_in_output"}),
    SamplingField("skip_special_tokens", True, Flag(), {"openai": "skip_special_tokens"}),
    SamplingField("spaces_between_special_tokens", True, Flag(), {"openai": "spaces_between_special_tokens"}),
    SamplingField(
        "logprobs", None, Whole(0, MAX_LOGPROBS), {}, ("K", "alternatives to report per generated token"),
        DeviceColumn("num_logprobs", "<i4", lambda value, _: -1 if value is None else value),
    ),
    SamplingField(
        "prompt_logprobs", None, Whole(0, MAX_LOGPROBS), {}, ("K", "alternatives to report per prompt token")
    ),
    SamplingField(
        "beam_width", 1, Whole(1, MAX_BEAM_WIDTH), _same("beam_width"),
        ("N", "search with this many beams instead of sampling, and print the best answer"),
    ),
    SamplingField(
        "length_penalty", 1.0, Real(-100.0, 100.0), _same("length_penalty"),
        ("P", "beams are compared by log-probability / length^P"),
    ),
    SamplingField("early_stopping", False, EarlyStopping(), _same("early_stopping")),
)  # fmt: skip

_DEVICE_FIELDS = tuple((field, field.device) for field in SAMPLING_FIELDS if field.device is not None)

DEVICE_COLUMNS: tuple[tuple[str, str], ...] = (
    ("seq_index", "<i4"),
    *((device.name, device.format) for _, device in _DEVICE_FIELDS),
    ("num_prompt", "<i4"),
    ("num_prefix", "<i4"),
    ("num_biases", "<i4"),
    ("seed", "<u8"),
)
"""The admission record: names and NumPy types; all bits 0 is greedy and changes no logit. Always there: tokens of the prompt, those
of its prefix (`AttentionSpec.prefix_end`), how many token biases the sequence has (`sampling.biases`), and its seed, drawn where the
request has none."""

_C_DECLARATIONS = {
    "<i4": "int {0};",
    "<f4": "float {0};",
    "<u8": "unsigned int {0}_low, {0}_high;",  # as two words: records need not be aligned to eight bytes
}

SAMPLING_STRUCT = " ".join(_C_DECLARATIONS[format].format(name) for name, format in DEVICE_COLUMNS)
"""The members of the same record in CUDA C."""


_FIELDS_OF_BEAM_SEARCH = frozenset({
    "max_tokens", "seed", "stop", "stop_token_ids", "stop_token_sequences", "ignore_eos", "min_tokens", "include_stop", "skip_special_tokens",
    "spaces_between_special_tokens", "logprobs", "prompt_logprobs", "beam_width", "length_penalty", "early_stopping",
})  # fmt: skip
"""What a beam search acts on; any other field would be ignored, so it is refused."""


def device_values(params: SamplingParams, vocab_size: int) -> tuple[Any, ...]:
    """The columns of an admission record between the sequence's index and its number of prompt tokens."""
    return tuple(
        value if device.encode is None else device.encode(value, vocab_size)
        for field, device in _DEVICE_FIELDS
        for value in (getattr(params, field.name),)
    )


def restricts_tokens(records: Any) -> Any:
    """Which records leave tokens out when they sample: a boolean for each, or one for a single record."""
    found: Any = False
    for _, device in _DEVICE_FIELDS:
        if device.restricts is not None:
            found = found | device.restricts(records[device.name])
    return found & (records["temperature"] > 0)


def adjusts_logits(records: Any) -> Any:
    """Which records change logits before a token is chosen (token biases, penalties): a boolean for each, or one for one."""
    found: Any = records["num_biases"] != 0
    for _, device in _DEVICE_FIELDS:
        if device.adjusts:
            found = found | (records[device.name] != 0)
    return found


def read_fields(given: Mapping[str, Any], door: Door | None = None) -> dict[str, Any]:
    """The sampling fields among ``given``, checked, by their own names; absent and null ones are left out.

    ``door`` says under which names they come; None = their own.

    Raises:
        RequestError: a value has the wrong type or is out of range; the message has the door's name of the field.
    """
    found: dict[str, Any] = {}
    for field in SAMPLING_FIELDS:
        name = field.name if door is None else field.doors.get(door)
        if name is not None and given.get(name) is not None:
            found[field.name] = field.rule.check(name, given[name])
    return found


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop. None in any field means its default.

    Attributes:
        max_tokens: maximum number of tokens to generate; 0 scores the prompt only.
        temperature: 0 = greedy, and so is anything below 1e-5.
        top_k: keep the k most probable tokens; 0 or -1 = all.
        top_p: then keep the smallest set whose probability reaches p; 0 keeps the most probable token only.
        min_p: then drop tokens below ``min_p`` times the largest probability.
        repetition_penalty: logits of tokens that occur in prompt or output are divided by it where positive, else multiplied.
        presence_penalty: subtracted from the logits of tokens that occur in the output.
        frequency_penalty: subtracted from them once for each time that they occur there.
        seed: same seed, same tokens, whatever else runs and in any layout; None = drawn by the engine.
        stop: texts that end the generation; left out of the text unless ``include_stop``.
        stop_token_ids: tokens that end it, besides the model's own end tokens.
        stop_token_sequences: lists of tokens that end it where the output ends in one.
        ignore_eos: generate past the model's end tokens.
        min_tokens: no end token is chosen, and no stop text counts, before this many tokens.
        logit_bias: tokens and numbers from -100 to 100 that are added to their logits before one is chosen; a mapping or pairs.
        bad_words: texts that are not generated, at the start of a word or inside: the last token of each is not chosen where the output
            ends in the others.
        bad_token_ids: the same as lists of token ids.
        allowed_token_ids: choose none but these tokens; None = any. The model's end tokens count only if they are listed.
        structured_outputs: what the answer must match: a mapping with one of ``json`` (a schema), ``json_object`` (true), ``regex``,
            ``grammar`` and ``choice``. The model's end tokens then end the answer whatever ``ignore_eos`` says.
        include_stop: keep a stop text, or the text of a stop token, in the answer.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: False = where they are in the text, put no space between two of them; only some tokenizers' decoders
            (WordPiece, or none) put one.
        logprobs: alternatives to report per generated token; None = none, 0 = the chosen one only.
        prompt_logprobs: the same for prompt tokens.
        beam_width: above 1, search for the most probable answers with so many beams instead of sampling.
        length_penalty: of beam search, as `early_stopping`; an answer's score is its log-probability / length ^ length_penalty.
        early_stopping: False = end when no beam of the present length beats the worst answer; True = once there are
            ``beam_width`` answers; ``"never"`` = when none of any length can.

    Raises:
        RequestError: a value is not of its type or is out of range.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_token_sequences: tuple[tuple[int, ...], ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str, ...] = ()
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    structured_outputs: Guide | None = None
    include_stop: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    beam_width: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        for field in SAMPLING_FIELDS:
            value = getattr(self, field.name)
            checked = field.default if value is None else field.rule.check(field.name, value)
            object.__setattr__(self, field.name, checked)
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}; use at most that many",
                "min_tokens",
            )
        for name in ("min_tokens", "allowed_token_ids"):
            if self.structured_outputs is not None and getattr(self, name):
                raise RequestError(
                    f"{name} and structured_outputs both say which tokens may come; leave one of them out", name
                )
        self._check_beams()

    def _check_beams(self) -> None:
        """Refuse fields that would have no effect."""
        if self.beam_width == 1:
            return
        others = {field.name for field in SAMPLING_FIELDS if getattr(self, field.name) != field.default}
        if self.temperature == 0 or self.top_k == -1:
            others -= {name for name in ("temperature", "top_k") if getattr(self, name) in (0, -1)}
        if wrong := sorted(others - _FIELDS_OF_BEAM_SEARCH):
            name, value = wrong[0], getattr(self, wrong[0])
            name, given = (value.name, "") if isinstance(value, Guide) else (name, f"={shown(value)}")
            raise RequestError(
                f"{name}{given} cannot be combined with beam_width={self.beam_width}; leave one of them out", name
            )
