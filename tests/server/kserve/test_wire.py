"""Tensors and bodies of the v2 protocol, against the serialisation of Triton's own client."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from phalanx.runtime.server.kserve.errors import InvalidTensor
from phalanx.runtime.server.kserve.tensors import DTYPES, Tensor, from_json, from_raw, to_json, to_raw
from phalanx.runtime.server.kserve.wire import HEADER_LENGTH, read_request, write_response

client = pytest.importorskip("tritonclient.http")
utils = pytest.importorskip("tritonclient.utils")

NUMBERS = sorted(DTYPES.keys() - {"BYTES"})


def body_of(inputs: list[Any], **options: Any) -> tuple[bytes, str | None]:
    """What Triton's client sends for these inputs, and its header's length."""
    body, length = client.InferenceServerClient.generate_request_body(inputs, **options)
    return body, None if length is None else str(length)


def client_input(name: str, datatype: str, array: np.ndarray, binary: bool = True) -> Any:
    tensor = client.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("datatype", [*sorted(DTYPES.keys() - {"BF16"})])
def test_what_tritons_client_sends_is_read(datatype: str, binary: bool) -> None:
    if datatype == "BYTES":
        array = np.array([[b"", "häß".encode()], [b"x" * 300, b"{}"]], object)
    else:
        array = np.arange(6).reshape(2, 3).astype(DTYPES[datatype])
    request = read_request(*body_of([client_input("a", datatype, array, binary)], request_id="7"))
    assert request.request_id == "7"
    assert request.inputs["a"].array.dtype == DTYPES[datatype]
    np.testing.assert_array_equal(request.inputs["a"].array, array)


def test_several_raw_inputs_follow_each_other_in_order() -> None:
    first, second = np.array([[3]], np.uint32), np.array([["prompt"]], object)
    body, length = body_of([client_input("n", "UINT32", first), client_input("text", "BYTES", second)])
    request = read_request(body, length)
    assert int(request.inputs["n"].array[0, 0]) == 3
    assert request.inputs["text"].array.tolist() == [[b"prompt"]]


@given(st.lists(st.binary(max_size=20), max_size=8))
def test_bytes_are_laid_out_as_tritons_client_does(elements: list[bytes]) -> None:
    array = np.array(elements, object).reshape(len(elements))
    raw = to_raw(Tensor("a", "BYTES", array))
    reference = utils.serialize_byte_tensor(array)
    assert raw == (reference.item() if reference.size else b"")
    assert from_raw("a", "BYTES", [len(elements)], memoryview(raw)).array.tolist() == elements


@given(st.data(), st.sampled_from(NUMBERS))
def test_numbers_survive_both_forms(data: st.DataObject, datatype: str) -> None:
    dtype = DTYPES[datatype]
    shape = data.draw(arrays.array_shapes(max_dims=3, min_side=0, max_side=3))
    source = np.dtype(np.float32) if datatype == "BF16" else dtype
    elements = arrays.from_dtype(source, allow_nan=False, allow_infinity=False)
    values = data.draw(arrays.arrays(source, shape, elements=elements))
    with np.errstate(over="ignore"):
        array = values.astype(dtype)
    tensor = Tensor("a", datatype, array)
    back = from_raw("a", datatype, list(shape), memoryview(to_raw(tensor)))
    np.testing.assert_array_equal(back.array, array)
    if datatype != "BF16":
        back = from_json("a", datatype, list(shape), json.loads(json.dumps(to_json(tensor))))
        np.testing.assert_array_equal(back.array, array)


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_reads_what_is_answered(binary: bool) -> None:
    outputs = [Tensor.of("text_output", "BYTES", ["ein Wörtchen"]), Tensor.of("logprobs", "FP32", [[-0.5, -1.25]])]
    asked = [client.InferRequestedOutput(output.name, binary_data=binary) for output in outputs]
    request = read_request(
        *body_of([client_input("a", "INT32", np.array([1], np.int32))], outputs=asked, request_id="q")
    )
    headers, body = write_response(request, "ensemble", outputs)
    length = headers.get(HEADER_LENGTH)
    result = client.InferResult.from_response_body(body, False, None if length is None else int(length))
    assert result.get_response()["model_name"] == "ensemble"
    assert result.get_response()["id"] == "q"
    assert result.as_numpy("text_output").tolist() == ["ein Wörtchen".encode() if binary else "ein Wörtchen"]
    np.testing.assert_array_equal(result.as_numpy("logprobs"), np.array([[-0.5, -1.25]], np.float32))


def test_only_outputs_that_were_asked_for_are_sent_and_without_a_list_all_are_raw_if_asked() -> None:
    outputs = [Tensor.of("a", "INT32", [1]), Tensor.of("b", "INT32", [2])]
    one = client_input("x", "INT32", np.array([1], np.int32))
    some = read_request(*body_of([one], outputs=[client.InferRequestedOutput("b")]))
    assert json.loads(write_response(some, "m", outputs)[1].split(b"}]}")[0] + b"}]}")["outputs"][0]["name"] == "b"
    everything = read_request(*body_of([one]))
    assert everything.binary_output
    headers, body = write_response(everything, "m", outputs)
    assert len(body) == int(headers[HEADER_LENGTH]) + 8


def infer_body(**changes: Any) -> bytes:
    tensor = {"name": "a", "datatype": "INT32", "shape": [2], "data": [1, 2]} | changes
    return json.dumps({"inputs": [{key: value for key, value in tensor.items() if value is not None}]}).encode()


@pytest.mark.parametrize(
    ("body", "header_length", "message"),
    [
        (b"{}", "-1", "is not a length"),
        (b"{}", "x", "is not a length"),
        (b"{}", "99999999999", "is not a length"),
        (b"{}", "²", "is not a length"),
        (b"{}", None, "inputs"),
        (b"[" * 100_000, None, "cannot be read"),
        (b'{"inputs": [], "inputs": 3}', None, "cannot be read"),
        (infer_body(datatype="INT33"), None, "datatype 'INT33'"),
        (infer_body(shape=[-5]), None, "from 0 up"),
        (infer_body(shape=[True]), None, "cannot be read"),
        (infer_body(shape=[1 << 4, (1 << 60) + 2]), None, "send less"),
        (infer_body(shape=[3]), None, "has 2 values"),
        (infer_body(shape=[]), None, "has 2 values"),
        (infer_body(data=[1, 2.5]), None, "2.5"),
        (infer_body(data=[1, True]), None, "True"),
        (infer_body(data=[1, 1 << 31]), None, "2147483648"),
        (infer_body(data=["1", "2"]), None, "'1'"),
        (infer_body(datatype="UINT8", data=[1, -1]), None, "-1"),
        (infer_body(datatype="FP32", data=[1, 1e39]), None, "1e"),
        (infer_body(datatype="FP16", data=[1, 65536]), None, "65536"),
        (infer_body(datatype="BOOL", data=[0, 1]), None, "value of BOOL"),
        (infer_body(datatype="BF16", data=[0, 1]), None, "BF16"),
        (infer_body(data=None), None, "no list of values"),
        (infer_body(parameters={"binary_data_size": 8}), None, "both data and binary_data_size"),
        (infer_body(data=None, parameters={"binary_data_size": 8}), None, "0 bytes are left"),
        (infer_body(data=None, parameters={"binary_data_size": -8}), None, "give a number of bytes"),
        (infer_body(data=None, parameters={"binary_data_size": 8.0}), None, "give a number of bytes"),
    ],
)
def test_a_body_that_contradicts_itself_is_refused_by_name(
    body: bytes, header_length: str | None, message: str
) -> None:
    with pytest.raises(InvalidTensor, match=message):
        read_request(body, header_length)


@pytest.mark.parametrize(
    ("raw", "shape", "message"),
    [
        (b"\x05\0\0\0abc", [1], "announces an element of 5 bytes"),
        (b"\xff\xff\xff\xffabc", [1], "announces an element of 4294967295 bytes"),
        (b"\x01\0", [1], "announces an element"),
        (b"\x01\0\0\0a", [2], "holds 1 elements"),
    ],
)
def test_lengths_of_bytes_that_lie_are_refused(raw: bytes, shape: list[int], message: str) -> None:
    with pytest.raises(InvalidTensor, match=message):
        from_raw("a", "BYTES", shape, memoryview(raw))


def test_what_follows_the_last_tensor_is_refused() -> None:
    body, length = body_of([client_input("a", "INT32", np.array([1], np.int32))])
    with pytest.raises(InvalidTensor, match="3 bytes follow the last tensor"):
        read_request(body + b"abc", length)


def test_inputs_and_outputs_are_named_once() -> None:
    one = client_input("a", "INT32", np.array([1], np.int32))
    with pytest.raises(InvalidTensor, match="'a' is given twice"):
        read_request(*body_of([one, one]))
    with pytest.raises(InvalidTensor, match="'o' is asked for twice"):
        read_request(*body_of([one], outputs=[client.InferRequestedOutput("o")] * 2))


def test_bfloat16_is_sent_raw_even_where_json_was_asked_for() -> None:
    request = read_request(infer_body(), None)
    headers, body = write_response(request, "m", [Tensor("x", "BF16", np.ones(2, ml_dtypes.bfloat16))])
    assert body[int(headers[HEADER_LENGTH]) :] == np.ones(2, ml_dtypes.bfloat16).tobytes()
