# SPDX-License-Identifier: Apache-2.0
"""Tensors in the messages of the gRPC protocol, raw and typed.

Source: ``grpc_service.proto`` of Triton, as ``tritonclient.grpc`` ships it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from phalanx.runtime.server.kserve.errors import InvalidTensor
from phalanx.runtime.server.kserve.parameters import check_tensor_parameters
from phalanx.runtime.server.kserve.tensors import Tensor, check_header, from_json, from_raw, to_raw

__all__ = ["read_inputs", "read_parameters", "wanted_outputs", "write_response"]

_CONTENTS: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
        "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
        "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
    }
)  # fmt: skip
"""The field of ``InferTensorContents`` that holds a data type's values; FP16 and BF16 have none."""


def read_inputs(request: Any) -> dict[str, Tensor]:
    """The inputs of a ``ModelInferRequest``. If any is raw, all must be.

    Raises:
        InvalidTensor: the data are not what the request says.
    """
    for described in request.inputs:
        check_tensor_parameters(described.name, read_parameters(described))
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidTensor(
            f"raw_input_contents holds {len(raw)} tensors for {len(request.inputs)} inputs; send one for each"
        )
    tensors: dict[str, Tensor] = {}
    for index, described in enumerate(request.inputs):
        if described.name in tensors:
            raise InvalidTensor(f"input '{described.name}' is given twice; name each input once")
        if not raw:
            tensors[described.name] = _typed(described)
            continue
        if described.contents.ByteSize():
            raise InvalidTensor(f"input '{described.name}' has both contents and raw_input_contents; send one of them")
        data = memoryview(raw[index])
        tensors[described.name] = from_raw(described.name, described.datatype, list(described.shape), data)
    return tensors


def _typed(described: Any) -> Tensor:
    name, datatype, shape = described.name, described.datatype, list(described.shape)
    _, extents = check_header(name, datatype, shape)
    if datatype not in _CONTENTS:
        raise InvalidTensor(f"input '{name}' of {datatype} has no typed contents; send it in raw_input_contents")
    values = list(getattr(described.contents, _CONTENTS[datatype]))
    if datatype != "BYTES":
        return from_json(name, datatype, shape, values)
    if len(values) != math.prod(extents):
        raise InvalidTensor(
            f"input '{name}' has {len(values)} values, but its shape {shape} needs {math.prod(extents)}"
        )
    array = np.empty(len(values), object)
    array[:] = values
    return Tensor(name, datatype, array.reshape(extents))


def wanted_outputs(request: Any) -> list[str]:
    """Names of the outputs that a request asks for; none = all.

    Raises:
        InvalidTensor: one is named twice, or has a parameter that is not supported.
    """
    names = [output.name for output in request.outputs]
    for name in names:
        if names.count(name) > 1:
            raise InvalidTensor(f"output '{name}' is asked for twice; name each output once")
    for output in request.outputs:
        check_tensor_parameters(output.name, read_parameters(output))
    return names


def read_parameters(message: Any) -> dict[str, Any]:
    """Return the parameters of a request or a tensor, as they are in JSON."""
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "", None)
        for name, value in message.parameters.items()
    }


def write_response(request: Any, outputs: Iterable[Tensor], *, final: bool | None = None) -> Any:
    """A ``ModelInferResponse`` with the outputs that ``request`` wants; ``final`` says whether it is a stream's last."""
    response = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
    if final is not None:
        response.parameters["triton_final_response"].bool_param = final
    wanted = {output.name for output in request.outputs}
    for tensor in outputs:
        if not wanted or tensor.name in wanted:
            response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.array.shape)
            response.raw_output_contents.append(to_raw(tensor))
    return response
