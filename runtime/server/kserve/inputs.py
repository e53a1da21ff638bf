# SPDX-License-Identifier: Apache-2.0
"""From tensors or JSON fields to rows: for each prompt of a request, the value of each input that was given."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from phalanx.runtime.server.kserve.contract import MAX_BATCH_SIZE, ModelContract, TensorSpec
from phalanx.runtime.server.kserve.errors import InvalidTensor
from phalanx.runtime.server.kserve.tensors import Tensor
from phalanx.runtime.server.web.json_body import decode_json

__all__ = ["GenerateBody", "Row", "read_fields_body", "tensor_rows"]

Row = dict[str, Any]
"""Inputs by name: a scalar for an input of shape [1], else a list, nested where the shape is. BYTES are text."""

_INTEGERS = tuple(f"{kind}{bits}" for kind in ("INT", "UINT") for bits in (8, 16, 32, 64))
_FLOATS = ("FP16", "BF16", "FP32", "FP64")
_ALIASES = MappingProxyType({"min_length": "min_tokens"})
"""Older names of inputs that clients still send."""


class GenerateBody(msgspec.Struct):
    """Body of ``generate`` and ``generate_stream``: a value for each input of the model that is given; other members are parameters.

    Describes the route only: which inputs there are depends on the model, and `read_fields_body` checks them by its contract.
    """

    text_input: str
    max_tokens: int | None = None
    stream: bool | None = None
    id: str | None = None


def tensor_rows(contract: ModelContract, tensors: Mapping[str, Tensor]) -> list[Row]:
    """The rows of an ``infer`` request.

    Raises:
        InvalidTensor: an input is unknown, missing, or of another type or shape than the model declares.
    """
    specs = {spec.name: spec for spec in contract.inputs}
    for name in tensors:
        if name not in specs:
            raise InvalidTensor(f"unexpected inference input '{name}' for model '{contract.name}'; leave it out")
    _check_required(contract, tensors)
    num_rows = {_check_tensor(specs[name], tensor) for name, tensor in tensors.items()}
    if len(num_rows) != 1:
        raise InvalidTensor(f"inputs have {sorted(num_rows)} rows; give all of them the same first dimension")
    (count,) = num_rows
    if not 1 <= count <= MAX_BATCH_SIZE:
        raise InvalidTensor(f"the request has {count} rows; use 1 to {MAX_BATCH_SIZE}")
    columns = {name: _values(specs[name], tensor) for name, tensor in tensors.items()}
    return [{name: values[row] for name, values in columns.items()} for row in range(count)]


def _check_required(contract: ModelContract, given: Mapping[str, Any]) -> None:
    missing = [spec.name for spec in contract.inputs if not spec.optional and spec.name not in given]
    if missing:
        raise InvalidTensor(f"model '{contract.name}' needs input '{missing[0]}'; give it")


def _check_tensor(spec: TensorSpec, tensor: Tensor) -> int:
    """The tensor's number of rows."""
    if tensor.datatype not in _accepted(spec):
        raise InvalidTensor(f"input '{spec.name}' has datatype {tensor.datatype}; use {spec.datatype}")
    shape = tensor.array.shape
    declared = [-1, *spec.shape]
    fits = len(shape) == len(declared) and all(want in (-1, got) for want, got in zip(declared, shape, strict=True))
    if not fits:
        raise InvalidTensor(f"input '{spec.name}' has shape {list(shape)}; use {declared} (-1 = any)")
    return int(shape[0])


def _accepted(spec: TensorSpec) -> tuple[str, ...]:
    """Clients of different versions send different widths of numbers."""
    for family in (_INTEGERS, _FLOATS):
        if spec.datatype in family:
            return family
    return (spec.datatype,)


def _values(spec: TensorSpec, tensor: Tensor) -> list[Any]:
    values: list[Any] = _texts(spec.name, tensor.array.tolist()) if spec.datatype == "BYTES" else tensor.array.tolist()
    return [value[0] for value in values] if spec.shape == (1,) else values


def _texts(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_texts(name, item) for item in value]
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidTensor(f"input '{name}' holds bytes that are not UTF-8; send text") from None


def read_fields_body(contract: ModelContract, body: bytes) -> tuple[Row, str, dict[str, Any]]:
    """The row of a ``generate`` request, its id, and its parameters: scalars that are no inputs.

    Raises:
        InvalidTensor: no JSON object; a key is given twice; a value is nested, or of another type than the model declares.
    """
    fields = _decode(body)
    request_id = fields.pop("id", "")
    if not isinstance(request_id, str):
        raise InvalidTensor(f"id={request_id!r:.60} is not a text; send one or leave it out")
    parameters = fields.pop("parameters", None) or {}
    if not isinstance(parameters, dict):
        raise InvalidTensor("parameters is not an object; send one or leave it out")
    row: Row = {}
    others: dict[str, Any] = {}
    specs = {spec.name: spec for spec in contract.inputs}
    for given, value in (*fields.items(), *parameters.items()):
        name = _ALIASES.get(given, given)
        if name in row:
            raise InvalidTensor(f"'{given}' is given twice; give it once")
        if name in specs:
            row[name] = _field(specs[name], given, value)
        elif isinstance(value, (dict, list)):
            raise InvalidTensor(f"'{given}' is no input of model '{contract.name}', and a parameter must be a scalar")
        else:
            others[given] = value
    given_values = {name: value for name, value in row.items() if value is not None}
    _check_required(contract, given_values)
    return given_values, request_id, others


def _decode(body: bytes) -> dict[str, Any]:
    try:
        decode_json(body)  # refuses NaN, invalid UTF-8, lone surrogates and deep nesting
        fields = json.loads(body.removeprefix(BOM_UTF8), object_pairs_hook=_without_duplicates)
    except (msgspec.MsgspecError, ValueError) as error:
        raise InvalidTensor(f"the request's JSON cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidTensor("the body is not a JSON object; send one")
    return fields


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise InvalidTensor(f"key '{name}' is given twice; give it once")
        fields[name] = value
    return fields


def _field(spec: TensorSpec, name: str, value: Any) -> Any:
    """A JSON value as an input: one element may stand for a list of it, and a list of one for a scalar."""
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    for item in items:
        if not _is_of(spec.datatype, item):
            raise InvalidTensor(f"'{name}' holds {item!r:.60}, which is not a value of {spec.datatype}")
    if spec.shape != (1,):
        return items
    if len(items) != 1:
        raise InvalidTensor(f"'{name}' holds {len(items)} values; give one")
    return items[0]


def _is_of(datatype: str, value: Any) -> bool:
    if datatype == "BYTES":
        return isinstance(value, str)
    if datatype == "BOOL" or isinstance(value, bool):
        return datatype == "BOOL" and isinstance(value, bool)
    return isinstance(value, int) if datatype in _INTEGERS else isinstance(value, (int, float))
