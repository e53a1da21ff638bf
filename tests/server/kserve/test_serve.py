"""Triton's clients against a whole job of two ranks that serves the demo checkpoint; and how gRPC is opened."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from phalanx.launch.front import GRPC_PORT
from tests.server.jobs import Job, serve

httpclient = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
grpcclient = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
aiohttp = pytest.importorskip("tritonclient.http.aio", reason="aiohttp is not installed")
aiogrpc = pytest.importorskip("tritonclient.grpc.aio", reason="tritonclient[grpc] is not installed")

PROMPT = "def main("


@pytest.fixture(scope="module")
def job() -> Iterator[Job]:
    with serve(2, "--grpc-port", "0") as running:
        yield running


def grpc_address(job: Job) -> str:
    return job.server.lines_with("gRPC ")[0].split()[-1]


def http_address(job: Job) -> str:
    return job.server.url.removeprefix("http://")


def expected(job: Job) -> str:
    """What the OpenAI door answers, prompt included."""
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "echo": True}
    return str(job.server.post("/v1/completions", body).json["choices"][0]["text"])


def inputs(kind: Any) -> list[Any]:
    text = kind.InferInput("text_input", [1, 1], "BYTES")
    text.set_data_from_numpy(np.array([[PROMPT]], object))
    count = kind.InferInput("max_tokens", [1, 1], "INT32")
    count.set_data_from_numpy(np.array([[8]], np.int32))
    return [text, count]


def first_text(result: Any) -> str:
    return str(result.as_numpy("text_output")[0].decode())


def test_the_published_client_of_the_tensorrt_llm_backend(job: Job) -> None:
    """Its inputs, types and shapes: UINT32 lengths, and empty words for none."""

    def prepare_tensor(name: str, array: Any) -> Any:
        made = httpclient.InferInput(name, array.shape, httpclient_type(array.dtype))
        made.set_data_from_numpy(array)
        return made

    from tritonclient.utils import np_to_triton_dtype as httpclient_type

    request = [
        prepare_tensor("text_input", np.array([[PROMPT]]).astype(object)),
        prepare_tensor("max_tokens", np.array([[8]]).astype(np.uint32)),
        prepare_tensor("bad_words", np.array([[""]], dtype=object)),
        prepare_tensor("stop_words", np.array([[""]], dtype=object)),
    ]
    with httpclient.InferenceServerClient(http_address(job)) as client:
        assert first_text(client.infer("ensemble", request)) == expected(job)


def test_http_and_grpc_agree_with_the_openai_door(job: Job) -> None:
    with httpclient.InferenceServerClient(http_address(job)) as client:
        assert first_text(client.infer("ensemble", inputs(httpclient))) == expected(job)
    with grpcclient.InferenceServerClient(grpc_address(job)) as client:
        assert first_text(client.infer("ensemble", inputs(grpcclient))) == expected(job)


def test_words_with_weights_bias_logits_in_every_model_as_in_the_openai_door(job: Job) -> None:
    """One word of several tokens, one that has a token of it again, and an empty one, which is padding."""
    words, weights = ["import sys", " sys", ""], [4.5, 2.0, 9.0]
    biases: dict[str, float] = {}
    for word, weight in zip(words[:2], weights[:2], strict=True):
        body = {"prompt": word, "add_special_tokens": False}
        for token_id in job.server.post("/tokenize", body).json["tokens"]:
            biases[str(token_id)] = biases.get(str(token_id), 0.0) + weight
    asked = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logit_bias": biases, "return_token_ids": True}
    (wanted,) = job.server.post("/v1/completions", asked).json["choices"]
    assert PROMPT + wanted["text"] != expected(job)

    def tensor(name: str, array: Any, datatype: str) -> Any:
        made = httpclient.InferInput(name, list(array.shape), datatype)
        made.set_data_from_numpy(array)
        return made

    with httpclient.InferenceServerClient(http_address(job)) as client:
        named = [np.array([words], object), np.array([weights], np.float32)]
        text = client.infer(
            "ensemble",
            [
                *inputs(httpclient),
                tensor("embedding_bias_words", named[0], "BYTES"),
                tensor("embedding_bias_weights", named[1], "FP32"),
            ],
        )
        assert first_text(text) == PROMPT + wanted["text"]
        before = client.infer(
            "preprocessing",
            [
                tensor("QUERY", np.array([[PROMPT]], object), "BYTES"),
                tensor("REQUEST_OUTPUT_LEN", np.array([[8]], np.int32), "INT32"),
                tensor("EMBEDDING_BIAS_WORDS", named[0], "BYTES"),
                tensor("EMBEDDING_BIAS_WEIGHTS", named[1], "FP32"),
            ],
        )
        bias = before.as_numpy("EMBEDDING_BIAS")
        assert {str(token): bias[0, token] for token in np.flatnonzero(bias[0])} == biases
        made = client.infer(
            "tensorrt_llm",
            [
                tensor("input_ids", before.as_numpy("INPUT_ID"), "INT32"),
                tensor("input_lengths", before.as_numpy("REQUEST_INPUT_LEN"), "INT32"),
                tensor("request_output_len", before.as_numpy("REQUEST_OUTPUT_LEN"), "INT32"),
                tensor("embedding_bias", bias, "FP32"),
                tensor("exclude_input_in_output", np.array([[True]]), "BOOL"),
            ],
        )
        assert made.as_numpy("output_ids")[0, 0].tolist() == wanted["token_ids"]


def test_the_asynchronous_clients(job: Job) -> None:
    async def ask() -> list[str]:
        async with aiohttp.InferenceServerClient(http_address(job)) as client:
            over_http = await client.infer("ensemble", inputs(httpclient))
        async with aiogrpc.InferenceServerClient(grpc_address(job)) as client:
            over_grpc = await client.infer("ensemble", inputs(grpcclient))
        return [first_text(over_http), first_text(over_grpc)]

    assert asyncio.run(ask()) == [expected(job)] * 2


def test_a_grpc_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with serve(0, "--grpc-port", str(port), wait_for="") as refused:
            status, text = refused.server.wait()
    assert status == 2
    assert f"--grpc-port {port} on 127.0.0.1 cannot be opened: Address already in use" in text


def test_without_the_libraries_grpc_is_refused_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from launch import front, serve
    from phalanx.parallel.errors import ConfigError

    monkeypatch.setattr(front, "find_spec", lambda name: None)
    arguments = serve.build_parser().parse_args(["--grpc-port", "9001"])
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[grpc\]'"):
        front._grpc_port(arguments)
    port, missing = front._grpc_port(serve.build_parser().parse_args([]))
    assert port is None
    assert "--grpc-port 8001 needs grpcio" in missing


def test_a_default_port_that_is_taken_is_told_of_by_a_server_that_starts_and_by_no_other() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        http_port = free.getsockname()[1]
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # then something else holds it
            held.enter_context(socket.create_server(("127.0.0.1", GRPC_PORT)))
        with serve(0, "--port", str(http_port)) as job:
            assert "none: --grpc-port 8001" in job.server.lines_with("gRPC ")[0]
        for mistake in (("--port", "70000"), ("--port", str(http_port), "--tp", "2")):
            with serve(0, *mistake, wait_for="") as refused:
                status, text = refused.server.wait()
            assert (status, text.count("\n")) == (2, 1), text
