# SPDX-License-Identifier: Apache-2.0
"""Bodies of the ``infer`` route: a JSON header, and after it the raw tensors that it announces.

Source: Triton's binary tensor data extension. ``Inference-Header-Content-Length`` says where the JSON ends; without it the
whole body is JSON. An output is raw if its ``binary_data`` parameter, else the request's ``binary_data_output``, says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import msgspec

from phalanx.runtime.server.kserve.errors import InvalidTensor
from phalanx.runtime.server.kserve.parameters import check_tensor_parameters
from phalanx.runtime.server.kserve.tensors import Tensor, from_json, from_raw, to_json, to_raw
from phalanx.runtime.server.web.json_body import decode_json

__all__ = ["HEADER_LENGTH", "InferHeader", "InferRequest", "read_request", "write_response"]

HEADER_LENGTH = "Inference-Header-Content-Length"
_NO_PARAMETERS: Mapping[str, Any] = MappingProxyType({})


class InferInput(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor, whose data follow the JSON unless they are in it."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class RequestedOutput(msgspec.Struct, forbid_unknown_fields=True):
    """An output that the answer is to hold."""

    name: str
    parameters: dict[str, Any] | None = None


class InferHeader(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON part of the body of ``infer``."""

    inputs: list[InferInput]
    id: str = ""
    outputs: list[RequestedOutput] | None = None
    parameters: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A parsed ``infer`` request.

    Attributes:
        inputs: by name.
        outputs: name -> whether it is wanted raw; empty = every output, raw if ``binary_output``.
    """

    inputs: Mapping[str, Tensor]
    request_id: str = ""
    outputs: Mapping[str, bool] = field(default_factory=dict)
    binary_output: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def is_raw(self, name: str) -> bool:
        """Whether output ``name`` is sent in the raw form."""
        return self.outputs.get(name, self.binary_output)

    def wants(self, name: str) -> bool:
        """Whether output ``name`` is part of the answer."""
        return not self.outputs or name in self.outputs


def read_request(body: bytes, header_length: str | None) -> InferRequest:
    """Parse a body. Arrays of numbers alias it.

    Raises:
        InvalidTensor: the header is not what the protocol says, or the tensors are not what the header says.
    """
    end = len(body) if header_length is None else _header_end(header_length, len(body))
    try:
        header: InferHeader = decode_json(body[:end], InferHeader)
    except (msgspec.MsgspecError, ValueError) as error:
        raise InvalidTensor(f"the request's JSON cannot be read: {error}") from None
    inputs, position = {}, end
    for described in header.inputs:
        if described.name in inputs:
            raise InvalidTensor(f"input '{described.name}' is given twice; name each input once")
        check_tensor_parameters(described.name, described.parameters or {})
        num_bytes = _raw_size(described)
        if num_bytes is None:
            tensor = from_json(described.name, described.datatype, described.shape, described.data)
        else:
            if position + num_bytes > len(body):
                raise InvalidTensor(
                    f"input '{described.name}' announces binary_data_size={num_bytes}, "
                    f"but {len(body) - position} bytes are left in the body"
                )
            raw = memoryview(body)[position : position + num_bytes]
            tensor = from_raw(described.name, described.datatype, described.shape, raw)
            position += num_bytes
        inputs[described.name] = tensor
    if position != len(body):
        raise InvalidTensor(f"{len(body) - position} bytes follow the last tensor; announce all of the body")
    parameters = header.parameters or {}
    binary_output = _flag(parameters, "binary_data_output", False)
    return InferRequest(inputs, header.id, _outputs(header, binary_output), binary_output, parameters)


def _header_end(value: str, body_length: int) -> int:
    if not (value.isascii() and value.isdigit()) or int(value) > body_length:
        raise InvalidTensor(f"{HEADER_LENGTH}: {value:.40} is not a length within the body of {body_length} bytes")
    return int(value)


def _raw_size(described: InferInput) -> int | None:
    """Bytes of the tensor after the header; None if its values are in the header."""
    parameters = described.parameters or {}
    if "binary_data_size" not in parameters:
        return None
    size = parameters["binary_data_size"]
    if type(size) is not int or size < 0:
        raise InvalidTensor(f"input '{described.name}' has binary_data_size={size!r}; give a number of bytes")
    if described.data is not None:
        raise InvalidTensor(f"input '{described.name}' has both data and binary_data_size; send one of them")
    return size


def _outputs(header: InferHeader, binary_output: bool) -> dict[str, bool]:
    wanted: dict[str, bool] = {}
    for output in header.outputs or ():
        if output.name in wanted:
            raise InvalidTensor(f"output '{output.name}' is asked for twice; name each output once")
        check_tensor_parameters(output.name, output.parameters or {})
        wanted[output.name] = _flag(output.parameters or {}, "binary_data", binary_output)
    return wanted


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidTensor(f"parameter {name}={value!r} is neither true nor false")
    return value


def write_response(
    request: InferRequest, model_name: str, outputs: Iterable[Tensor], parameters: Mapping[str, Any] = _NO_PARAMETERS
) -> tuple[dict[str, str], bytes]:
    """Headers and body that answer ``request`` with the ``outputs`` that it wants."""
    described, raw = [], []
    for tensor in outputs:
        if not request.wants(tensor.name):
            continue
        entry: dict[str, Any] = {
            "name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.array.shape)
        }  # fmt: skip
        if request.is_raw(tensor.name) or tensor.datatype == "BF16":
            raw.append(to_raw(tensor))
            entry["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            entry["data"] = to_json(tensor)
        described.append(entry)
    answer: dict[str, Any] = {"model_name": model_name, "model_version": "1", "outputs": described}
    if request.request_id:
        answer["id"] = request.request_id
    if parameters:
        answer["parameters"] = dict(parameters)
    header = msgspec.json.encode(answer)
    if not raw:
        return {"content-type": "application/json"}, header
    return {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(header))}, b"".join((header, *raw))
