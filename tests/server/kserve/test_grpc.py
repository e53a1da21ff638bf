"""The v2 protocol over gRPC: Triton's own client, and messages by hand, against a stub engine that repeats its prompt."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.runtime.server.kserve.contract import MODELS
from tests.server.servers import Server, stub_server

grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
grpcclient = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
aioclient = pytest.importorskip("tritonclient.grpc.aio", reason="tritonclient[grpc] is not installed")
_Stream = pytest.importorskip("phalanx.runtime.server.kserve.grpc_door")._Stream
service_pb2 = grpcclient.service_pb2
service_pb2_grpc = grpcclient.service_pb2_grpc


COUNTED = 'phalanx_requests_refused_total{status="404"} '


def address(server: Server) -> str:
    return f"127.0.0.1:{server.wait_for('GRPC').split()[1]}"


@pytest.fixture(scope="module")
def grpc_server(model_directory: Path) -> Iterator[Server]:
    with stub_server(model_directory, {"grpc_port": 0}) as running:
        yield running


@pytest.fixture(scope="module")
def client(grpc_server: Server) -> Iterator[Any]:
    with grpcclient.InferenceServerClient(address(grpc_server)) as connected:
        yield connected


@pytest.fixture(scope="module")
def stub(grpc_server: Server) -> Iterator[Any]:
    with grpc.insecure_channel(address(grpc_server)) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensor(name: str, values: Any, datatype: str) -> Any:
    kinds = {"BYTES": object, "BOOL": bool}
    array = np.array(values, kinds.get(datatype) or np.dtype(datatype.lower()))
    made = grpcclient.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def text_inputs(text: str, max_tokens: int = 3, stream: bool = False) -> list[Any]:
    return [
        tensor("text_input", [[text.encode()]], "BYTES"),
        tensor("max_tokens", [[max_tokens]], "INT32"),
        tensor("stream", [[stream]], "BOOL"),
    ]


def token_inputs(token_ids: list[int], max_tokens: int) -> list[Any]:
    return [
        tensor("input_ids", [token_ids], "INT32"),
        tensor("input_lengths", [[len(token_ids)]], "INT32"),
        tensor("request_output_len", [[max_tokens]], "INT32"),
        tensor("streaming", [[True]], "BOOL"),
    ]


def text_of(result: Any) -> str:
    return b"".join(result.as_numpy("text_output").tolist()).decode()


def is_final(result: Any) -> bool:
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("ensemble")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata().name == "phalanx"
    assert client.get_model_metadata("ensemble").inputs[0].name == "text_input"
    config = client.get_model_config("tensorrt_llm").config
    assert config.model_transaction_policy.decoupled
    assert config.input[0].data_type == grpcclient.model_config_pb2.TYPE_INT32
    assert len(client.get_model_repository_index().models) == 5


def test_statistics_count(client: Any) -> None:
    def succeeded() -> int:
        return int(client.get_inference_statistics("ensemble").model_stats[0].inference_stats.success.count)

    before = succeeded()
    client.infer("ensemble", text_inputs("ab"))
    assert succeeded() == before + 1


def test_loading_is_refused(client: Any) -> None:
    with pytest.raises(grpcclient.InferenceServerException, match="UNIMPLEMENTED"):
        client.load_model("ensemble")


def test_infer(client: Any) -> None:
    result = client.infer("ensemble", text_inputs("ab"), request_id="seven")
    assert text_of(result) == "ababa"
    assert result.get_response().id == "seven"
    wanted = [grpcclient.InferRequestedOutput("text_output")]
    assert len(client.infer("ensemble", text_inputs("ab"), outputs=wanted).get_response().outputs) == 1


def test_a_unary_call_answers_a_streaming_request_in_full(client: Any) -> None:
    assert text_of(client.infer("ensemble", text_inputs("ab", stream=True))) == "ababa"


def typed_request() -> Any:
    request = service_pb2.ModelInferRequest(model_name="ensemble")
    text = request.inputs.add(name="text_input", datatype="BYTES", shape=[1, 1])
    text.contents.bytes_contents.append(b"ab")
    count = request.inputs.add(name="max_tokens", datatype="UINT32", shape=[1, 1])
    count.contents.uint_contents.append(3)
    return request


def test_typed_contents(stub: Any) -> None:
    response = stub.ModelInfer(typed_request())
    assert response.raw_output_contents[0] == b"\x05\0\0\0ababa"


def twice(request: Any) -> None:
    request.inputs.append(request.inputs[0])


def set_shape(request: Any, shape: list[int]) -> None:
    request.inputs[1].shape[:] = shape


REFUSED = {
    "one raw tensor for two inputs": lambda request: request.raw_input_contents.append(b""),
    "raw and typed": lambda request: request.raw_input_contents.extend([b"\x02\0\0\0ab", b"\3\0\0\0"]),
    "an input twice": twice,
    "a shape without elements": lambda request: set_shape(request, [0, 1]),
    "a negative shape": lambda request: set_shape(request, [-5, 1]),
    "a shape that overflows": lambda request: set_shape(request, [2**4, 2**60 + 2]),
    "too few values": lambda request: set_shape(request, [2, 1]),
    "a wrong type": lambda request: setattr(request.inputs[1], "datatype", "FP32"),
    "an unknown type": lambda request: setattr(request.inputs[1], "datatype", "INT33"),
    "a type without typed contents": lambda request: setattr(request.inputs[1], "datatype", "FP16"),
    "an unknown input": lambda request: setattr(request.inputs[1], "name", "other"),
    "an unknown output": lambda request: request.outputs.add(name="other"),
    "an output twice": lambda request: [request.outputs.add(name="text_output") for _ in range(2)],
    "text that is not UTF-8": lambda request: request.inputs[0].contents.bytes_contents.__setitem__(0, b"\xff"),
    "no inputs": lambda request: request.ClearField("inputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_requests_that_contradict_themselves_are_refused(stub: Any, name: str) -> None:
    request = typed_request()
    REFUSED[name](request)
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, refused.value.details()


def test_an_unknown_model_is_not_found(client: Any) -> None:
    with pytest.raises(grpcclient.InferenceServerException, match="NOT_FOUND"):
        client.infer("other", text_inputs("ab"))


def streamed(client: Any, model: str, inputs: list[Any], **options: Any) -> list[Any]:
    """Results or errors of one request of a stream, up to the final response."""
    arrived: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: arrived.put(error or result))
    client.async_stream_infer(model, inputs, **options)
    results = []
    try:
        while True:
            results.append(arrived.get(timeout=30))
            if isinstance(results[-1], Exception) or is_final(results[-1]):
                return results
    finally:
        client.stop_stream()


def test_a_stream_marks_its_last_response(client: Any) -> None:
    results = streamed(client, "ensemble", text_inputs("ab", stream=True))
    assert "".join(map(text_of, results)) == "aba"
    assert [is_final(result) for result in results] == [False] * (len(results) - 1) + [True]


def test_an_empty_final_response_when_asked(client: Any) -> None:
    results = streamed(client, "ensemble", text_inputs("ab", stream=True), enable_empty_final_response=True)
    assert "".join(map(text_of, results[:-1])) == "aba"
    assert list(results[-1].get_response().outputs) == []


def test_a_stream_of_a_request_that_does_not_stream_has_one_response(client: Any) -> None:
    (result,) = streamed(client, "ensemble", text_inputs("ab"))
    assert text_of(result) == "ababa"


def test_an_error_stays_with_its_request_and_the_stream_goes_on(client: Any) -> None:
    arrived: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: arrived.put(error or result))
    client.async_stream_infer("ensemble", text_inputs("ab", max_tokens=10**6))
    assert "maximum context length" in str(arrived.get(timeout=30))
    client.async_stream_infer("tensorrt_llm", token_inputs([12, 5], 9))
    made = [arrived.get(timeout=30)]
    while not isinstance(made[-1], Exception):
        made.append(arrived.get(timeout=30))
    assert "its logits are not finite" in str(made[-1])
    client.async_stream_infer("ensemble", text_inputs("ab"))
    assert text_of(arrived.get(timeout=30)) == "ababa"
    client.stop_stream()


def test_an_error_ends_a_stream_that_asked_for_it(stub: Any) -> None:
    request = typed_request()
    request.model_name = "other"
    call = stub.ModelStreamInfer(iter([request]), metadata=(("triton_grpc_error", "true"),))
    with pytest.raises(grpc.RpcError) as refused:
        next(call)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_cancelling_and_deadlines_reach_the_engine(model_directory: Path) -> None:
    with stub_server(model_directory, {"grpc_port": 0}, step_seconds=0.01) as server:
        with grpcclient.InferenceServerClient(address(server)) as client:
            with pytest.raises(grpcclient.InferenceServerException, match="Deadline Exceeded"):
                client.infer("ensemble", text_inputs("ab", 200), client_timeout=0.2)
            server.wait_for("CANCELLED", 1)
            arrived: queue.Queue[Any] = queue.Queue()
            client.start_stream(lambda result, error: arrived.put(error or result))
            client.async_stream_infer("ensemble", text_inputs("ab", 200, stream=True))
            assert text_of(arrived.get(timeout=30))
            client.stop_stream(cancel_requests=True)
            server.wait_for("CANCELLED", 2)
        assert server.drain()[0] == 0


def test_calls_are_logged_by_id_name_status_and_time(model_directory: Path) -> None:
    with (
        stub_server(model_directory, {"grpc_port": 0}) as server,
        grpcclient.InferenceServerClient(address(server)) as client,
    ):
        assert client.is_server_ready()
        client.infer("ensemble", text_inputs("secret"), headers={"x-request-id": "mine"})
        assert len(server.lines_with("mine gRPC ModelInfer OK")) == 1
        with pytest.raises(grpcclient.InferenceServerException):
            client.infer("other", text_inputs("secret"), headers={"x-request-id": "other one"})
        (line,) = server.lines_with("gRPC ModelInfer NOT_FOUND")
        assert "other one" not in line, "an id with a space could be taken for two values"
        assert not [line for line in server.lines if "secret" in line or "ServerReady" in line]


def test_errors_inside_a_stream_are_counted_as_those_of_calls_are(client: Any, grpc_server: Server) -> None:
    def refused() -> int:
        (line,) = [line for line in grpc_server.get("/metrics").body.decode().splitlines() if line.startswith(COUNTED)]
        return int(float(line.removeprefix(COUNTED)))

    before = refused()
    arrived: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: arrived.put(error or result))
    client.async_stream_infer("other", text_inputs("ab"))
    assert "unknown model" in str(arrived.get(timeout=30))
    client.stop_stream()
    assert refused() == before + 1


def test_a_client_that_leaves_while_it_is_written_to_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    ended = []

    class Gone:
        async def write(self, response: Any) -> None:
            raise grpc.aio.UsageError("RPC already finished.")

    class Endless:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: MODELS["ensemble"]

        async def stream(self, *arguments: Any) -> AsyncIterator[Any]:
            try:
                while True:
                    yield [], False
            finally:
                ended.append(True)

    request = typed_request()
    inference: Any = Endless()
    asyncio.run(_Stream(inference, Gone(), ends_at_error=False).answer(request))
    assert ended == [True]
    assert caplog.records == []


def test_a_request_ends_at_its_own_timeout(model_directory: Path) -> None:
    with (
        stub_server(model_directory, {"grpc_port": 0}, step_seconds=0.01) as server,
        grpcclient.InferenceServerClient(address(server)) as client,
    ):
        with pytest.raises(grpcclient.InferenceServerException, match=r"DEADLINE_EXCEEDED.*longer than 0.1 s"):
            client.infer("ensemble", text_inputs("ab", 200), timeout=100_000)
        assert text_of(client.infer("ensemble", text_inputs("ab", 1), timeout=60_000_000))


def test_a_timeout_that_is_no_time_is_refused_by_every_model(stub: Any) -> None:
    for model in ("preprocessing", "ensemble"):
        request = service_pb2.ModelInferRequest(model_name=model)
        request.parameters["timeout"].int64_param = -1
        with pytest.raises(grpc.RpcError, match="is not a number of microseconds"):
            stub.ModelInfer(request)
        (answer,) = stub.ModelStreamInfer(iter([request]))
        assert "is not a number of microseconds" in answer.error_message


def test_tensors_that_would_lie_in_shared_memory_or_be_ranked_are_refused(client: Any) -> None:
    elsewhere, ranked = (grpcclient.InferRequestedOutput("text_output", class_count=count) for count in (0, 3))
    elsewhere.set_shared_memory("region", 100)
    for output, said in ((elsewhere, "shared_memory_region"), (ranked, "classification")):
        with pytest.raises(
            grpcclient.InferenceServerException, match=f"{said} of tensor 'text_output' is not supported"
        ):
            client.infer("ensemble", text_inputs("ab"), outputs=[output])
    for index, name in enumerate(("text_input", "max_tokens")):
        inputs = text_inputs("ab")
        inputs[index].set_shared_memory("region", 100)
        said = f"INVALID_ARGUMENT.*shared_memory_region of tensor '{name}' is not supported"
        with pytest.raises(grpcclient.InferenceServerException, match=said):
            client.infer("ensemble", inputs)


def test_keys_cover_everything_but_health(model_directory: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    settings = {"grpc_port": 0, "api_key_file": str(keys)}
    with (
        stub_server(model_directory, settings) as server,
        grpcclient.InferenceServerClient(address(server)) as client,
    ):
        assert client.is_server_ready()
        for call in (client.get_server_metadata, lambda **more: client.infer("ensemble", text_inputs("ab"), **more)):
            with pytest.raises(grpcclient.InferenceServerException, match="UNAUTHENTICATED"):
                call()
            call(headers={"authorization": "Bearer secret"})


def test_a_full_queue_is_resource_exhausted(model_directory: Path) -> None:
    with (
        stub_server(model_directory, {"grpc_port": 0}, max_open_requests=1, step_seconds=0.01) as server,
        grpcclient.InferenceServerClient(address(server)) as client,
    ):
        server.open_stream("/v2/models/ensemble/generate_stream", {"text_input": "ab", "max_tokens": 200})
        with pytest.raises(grpcclient.InferenceServerException, match="RESOURCE_EXHAUSTED"):
            client.infer("ensemble", text_inputs("ab"))


def test_the_asynchronous_client(grpc_server: Server) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": "ensemble", "inputs": text_inputs("ab", stream=True)}

    async def talk() -> tuple[str, str]:
        async with aioclient.InferenceServerClient(address(grpc_server)) as client:
            whole = text_of(await client.infer("ensemble", text_inputs("ab")))
            pieces = []
            async for result, error in client.stream_infer(requests()):
                assert error is None
                pieces.append(text_of(result))
            return whole, "".join(pieces)

    assert asyncio.run(talk()) == ("ababa", "aba")


def test_messages_beyond_the_limit_are_refused(model_directory: Path) -> None:
    with (
        stub_server(model_directory, {"grpc_port": 0, "max_body_bytes": 100_000}) as server,
        grpcclient.InferenceServerClient(address(server)) as client,
    ):
        with pytest.raises(grpcclient.InferenceServerException, match="RESOURCE_EXHAUSTED"):
            client.infer("ensemble", text_inputs("a" * 200_000))
        assert text_of(client.infer("ensemble", text_inputs("ab"))) == "ababa"


def test_a_drain_finishes_open_calls_and_refuses_new_ones(model_directory: Path) -> None:
    with (
        stub_server(model_directory, {"grpc_port": 0}, step_seconds=0.01) as server,
        grpcclient.InferenceServerClient(address(server)) as client,
    ):
        arrived: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: arrived.put(error or result))
        client.async_stream_infer("ensemble", text_inputs("ab", 100, stream=True))
        results = [arrived.get(timeout=30)]
        server.process.terminate()
        while client.is_server_ready():
            pass
        with pytest.raises(grpcclient.InferenceServerException, match="UNAVAILABLE"):
            client.infer("ensemble", text_inputs("ab"))
        while not is_final(results[-1]):
            results.append(arrived.get(timeout=30))
        client.stop_stream()
        assert "".join(map(text_of, results)) == "ab" * 50
        assert server.wait()[0] == 0
