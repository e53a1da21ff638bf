"""The table of sampling fields: every value of every field becomes one of its type or is refused by name."""

from __future__ import annotations

import dataclasses
import fractions
import math
from typing import Any

import msgspec
import numpy as np
import pytest

from phalanx.parallel.errors import RequestError
from phalanx.runtime.sampling.fields import (
    DEVICE_COLUMNS,
    SAMPLING_FIELDS,
    SAMPLING_STRUCT,
    SamplingParams,
    read_fields,
    restricts_tokens,
)
from phalanx.runtime.sampling.rules import (
    EarlyStopping,
    Flag,
    Real,
    Rule,
    Texts,
    TokenIds,
    TokenLists,
    TokenNumbers,
    Whole,
)
from phalanx.runtime.step import ADMISSION

from ..support.records import admission

NAMES = [field.name for field in SAMPLING_FIELDS]
TYPES: dict[type[Rule], type] = {
    Whole: int,
    Real: float,
    Flag: bool,
    EarlyStopping: bool,
    Texts: tuple,
    TokenIds: tuple,
    TokenLists: tuple,
    TokenNumbers: tuple,
}
ODD_VALUES: list[Any] = [
    True, False, 0, 1, -1, 2, 2.0, 2.5, -0.0, 1e-38, 1e-45, 1e-300, 1e30, 1e300, math.nan, math.inf, -math.inf, 10**400, -(10**400),
    2**31, 2**63, 2**64, "", "2", "x", "\ud800", b"x", [], [None], [""], ["x", 1], ["\udfff"], [1], [1.5], [True], [-1], [2**31],
    [math.nan], {}, {"x": 1}, (), ("a",), [[]], np.int64(3), np.float32(0.5), np.bool_(True), np.array([1, 2]), np.array(3),
    fractions.Fraction(1, 2), 1j, object(), SamplingParams,
]  # fmt: skip


def name_of(value: Any) -> str:
    """Its representation, the same in every test process."""
    return "object" if type(value) is object else repr(value)[:24]


def refusal_of(fields: dict[str, Any]) -> RequestError | None:
    try:
        read_fields(fields)
    except RequestError as error:
        return error
    return None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ODD_VALUES, ids=name_of)
def test_any_value_becomes_one_of_its_type_or_is_refused_by_name(name: str, value: Any) -> None:
    field = next(field for field in SAMPLING_FIELDS if field.name == name)
    fields = {"max_tokens": 2**31 - 1, name: value}
    refusal = refusal_of(fields)
    if refusal is not None:
        assert refusal.param == name
        assert len(str(refusal)) < 300
        with pytest.raises(RequestError):
            SamplingParams(**fields)
        return
    params, read = SamplingParams(**fields), read_fields(fields)[name]
    assert type(read) is TYPES[type(field.rule)]
    assert getattr(params, name) == read
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize("name", NAMES)
def test_none_means_the_default_and_the_default_passes(name: str) -> None:
    assert SamplingParams(**{name: None}) == SamplingParams()
    assert SamplingParams(**{name: getattr(SamplingParams(), name)}) == SamplingParams()
    assert read_fields({name: None}) == {}


def test_the_class_and_the_table_agree() -> None:
    members = {member.name: member.default for member in dataclasses.fields(SamplingParams)}
    assert members == {field.name: field.default for field in SAMPLING_FIELDS}


@pytest.mark.parametrize("value", [2.0, np.float64(2), np.int8(2), fractions.Fraction(2)])
def test_a_float_without_a_fraction_is_a_whole_number(value: Any) -> None:
    params = SamplingParams(max_tokens=value, top_k=value)
    assert (params.max_tokens, type(params.max_tokens)) == (2, int)


@pytest.mark.parametrize(
    "value", [1e-5 - 1e-9, 1e-9, 1e-30, 3e-38, 1e-38, 1e-39, 1e-42, 1.4e-45, 1e-60, 5e-324, 0.0, -0.0]
)
def test_temperatures_next_to_zero_are_greedy(value: float) -> None:
    record = admission(SamplingParams(temperature=value), 100)
    assert record["temperature"] == 0


@pytest.mark.parametrize(
    "name", [field.name for field in SAMPLING_FIELDS if isinstance(field.rule, Real) and field.rule.low <= 0]
)
def test_floats_that_a_float32_cannot_hold_normally_count_as_zero(name: str) -> None:
    tiny = np.finfo(np.float32).tiny
    assert getattr(SamplingParams(**{name: float(tiny) / 2}), name) == 0.0
    if name != "temperature":
        assert getattr(SamplingParams(**{name: float(tiny)}), name) == tiny


def test_messages_name_the_field_as_its_door_does() -> None:
    for field in SAMPLING_FIELDS:
        for door, name in field.doors.items():
            with pytest.raises(RequestError, match=name) as caught:
                read_fields({name: object()}, door)
            assert caught.value.param == name


def test_no_two_fields_share_a_name_in_a_door() -> None:
    for door in ("openai", "triton"):
        names = [field.doors[door] for field in SAMPLING_FIELDS if door in field.doors]
        assert len(names) == len(set(names))


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(RequestError, match="min_tokens=3 is above max_tokens=2"):
        SamplingParams(max_tokens=2, min_tokens=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"stop_token_ids": [1] * 65}, "holds 65 tokens; use at most 64"), ({"stop": ["a"] * 17}, "holds 17 texts; use at most 16"),
     ({"stop": "a" * 1025}, "1025 characters"), ({"logprobs": 21}, "at most 20"), ({"seed": 2**64}, "at most 1844")],
)  # fmt: skip
def test_limits_are_said(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**fields)


def test_the_struct_in_c_has_the_words_of_the_record() -> None:
    members = SAMPLING_STRUCT.replace(",", ";").count(";")
    assert 4 * members == ADMISSION.itemsize
    assert ADMISSION.names == tuple(name for name, _ in DEVICE_COLUMNS)


@pytest.mark.parametrize(
    ("fields", "restricts"),
    [({}, False), ({"top_k": 5}, True), ({"top_k": 100}, False), ({"top_k": -1}, False), ({"top_p": 0.9}, True),
     ({"top_p": 0.0}, True), ({"min_p": 0.1}, True), ({"top_k": 5, "temperature": 0.0}, False), ({"logprobs": 3}, False)],
)  # fmt: skip
def test_which_records_need_a_whole_row_of_logits(fields: dict[str, Any], restricts: bool) -> None:
    records = np.repeat(admission(SamplingParams(**fields), 100), 2)
    assert restricts_tokens(records).tolist() == [restricts, restricts]
