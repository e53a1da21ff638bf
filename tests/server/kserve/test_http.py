"""The v2 protocol over HTTP: Triton's own client, and requests by hand, against a stub engine that repeats its prompt."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server.servers import Answer, Server, stub_server

httpclient = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with httpclient.InferenceServerClient(server.url.removeprefix("http://")) as connected:
        yield connected


def tensor(name: str, values: Any, datatype: str) -> Any:
    kinds = {"BYTES": object, "BOOL": bool, "FP32": np.float32}
    array = np.array(values, kinds.get(datatype) or np.dtype(datatype.lower()))
    made = httpclient.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def text_inputs(texts: list[str], max_tokens: int = 4, **more: tuple[Any, str]) -> list[Any]:
    rows = len(texts)
    return [
        tensor("text_input", [[text.encode()] for text in texts], "BYTES"),
        tensor("max_tokens", [[max_tokens]] * rows, "INT32"),
        *(tensor(name, [[value]] * rows, datatype) for name, (value, datatype) in more.items()),
    ]


def generate(server: Server, route: str = "generate", model: str = "ensemble", **fields: Any) -> Answer:
    return server.post(f"/v2/models/{model}/{route}", {"text_input": "ab", "max_tokens": 3, **fields})


def events(answer: Answer) -> list[dict[str, Any]]:
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    frames = answer.body.decode().split("\n\n")
    assert frames.pop() == ""
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def refusal(answer: Answer, status: int = 400) -> str:
    assert answer.status == status, answer.body
    assert list(answer.json) == ["error"]
    return str(answer.json["error"])


def test_health_metadata_and_index(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("ensemble")
    assert client.is_model_ready("tensorrt_llm", "1")
    assert not client.is_model_ready("ensemble", "2")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["name"] == "phalanx"
    names = {entry["name"] for entry in client.get_model_repository_index()}
    assert names == {"ensemble", "preprocessing", "tensorrt_llm", "postprocessing", "tensorrt_llm_bls"}


def test_model_metadata_and_config(client: Any) -> None:
    metadata = client.get_model_metadata("ensemble")
    inputs = {entry["name"]: entry for entry in metadata["inputs"]}
    assert inputs["text_input"] == {"name": "text_input", "datatype": "BYTES", "shape": [-1, 1]}
    assert inputs["max_tokens"]["datatype"] == "INT32"
    assert metadata["outputs"][0] == {"name": "text_output", "datatype": "BYTES", "shape": [-1, -1]}
    config = client.get_model_config("ensemble")
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert {"name": "seed", "data_type": "TYPE_UINT64", "dims": [1], "optional": True} in config["input"]


def test_statistics_are_numbers_that_count(client: Any) -> None:
    def counted() -> dict[str, Any]:
        (entry,) = client.get_inference_statistics("tensorrt_llm_bls")["model_stats"]
        return dict(entry)

    before = counted()
    client.infer("tensorrt_llm_bls", text_inputs(["a", "b"]))
    after = counted()
    assert after["execution_count"] == before["execution_count"] + 1
    assert after["inference_count"] == before["inference_count"] + 2
    assert after["inference_stats"]["success"]["ns"] > before["inference_stats"]["success"]["ns"]
    assert len(client.get_inference_statistics()["model_stats"]) == 5


def test_models_are_not_loaded_or_unloaded(client: Any) -> None:
    for call in (client.load_model, client.unload_model):
        with pytest.raises(httpclient.InferenceServerException, match=r"\[501\] models are not loaded"):
            call("ensemble")


def test_infer_answers_each_row_with_prompt_and_text(client: Any) -> None:
    result = client.infer("ensemble", text_inputs(["ab", "xyz"]), request_id="seven")
    assert result.as_numpy("text_output").tolist() == [b"ababab", b"xyzxyzx"]
    assert result.get_response()["id"] == "seven"
    assert result.as_numpy("batch_index").tolist() == [[0], [1]]


def test_infer_leaves_the_prompt_out_when_asked(client: Any) -> None:
    result = client.infer("ensemble", text_inputs(["ab"], exclude_input_in_output=(True, "BOOL")))
    assert result.as_numpy("text_output").tolist() == [b"abab"]


@pytest.mark.parametrize("datatype", ["INT32", "UINT32", "INT64"])
def test_any_width_of_integer_and_an_empty_word_for_none(client: Any, datatype: str) -> None:
    inputs = [
        tensor("text_input", [[b"ab"]], "BYTES"),
        tensor("max_tokens", [[3]], datatype),
        tensor("bad_words", [[b""]], "BYTES"),
        tensor("stop_words", [[b""]], "BYTES"),
    ]
    assert client.infer("ensemble", inputs).as_numpy("text_output").tolist() == [b"ababa"]


def test_stop_words_end_the_text(client: Any) -> None:
    inputs = [*text_inputs(["abc"], 9), tensor("stop_words", [[b"ca", b""]], "BYTES")]
    assert client.infer("ensemble", inputs).as_numpy("text_output").tolist() == [b"abcab"]


def test_json_outputs_and_requested_outputs(client: Any) -> None:
    wanted = [httpclient.InferRequestedOutput("text_output", binary_data=False)]
    result = client.infer("ensemble", text_inputs(["ab"]), outputs=wanted)
    assert result.get_response()["outputs"] == [
        {"name": "text_output", "datatype": "BYTES", "shape": [1], "data": ["ababab"]}
    ]
    for name, message in (("other", "unexpected inference output"), ("context_logits", "not supported")):
        with pytest.raises(httpclient.InferenceServerException, match=message):
            client.infer("ensemble", text_inputs(["ab"]), outputs=[httpclient.InferRequestedOutput(name)])


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests_and_answers(client: Any, algorithm: str) -> None:
    result = client.infer(
        "ensemble",
        text_inputs(["ab" * 40], 100),
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert result.as_numpy("text_output").tolist() == [b"ab" * 90]


def test_answers_are_compressed_only_when_asked(server: Server) -> None:
    body = {
        "inputs": [
            {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["ab"]},
            {"name": "max_tokens", "datatype": "INT32", "shape": [1, 1], "data": [3]},
        ]
    }
    for coding, decompress in (("gzip", gzip.decompress), ("deflate", zlib.decompress)):
        answer = server.post("/v2/models/ensemble/infer", body, **{"Accept-Encoding": coding})
        assert answer.headers["content-encoding"] == coding
        assert json.loads(decompress(answer.body))["outputs"][0]["data"] == ["ababa"]
    assert "content-encoding" not in server.post("/v2/models/ensemble/infer", body).headers


def test_several_answers_with_log_probabilities(client: Any) -> None:
    more = {
        "num_return_sequences": (2, "INT32"),
        "return_log_probs": (True, "BOOL"),
        "return_num_output_tokens": (True, "BOOL"),
    }
    result = client.infer("ensemble", text_inputs(["ab", "c"], **more))
    assert result.as_numpy("text_output").tolist() == [b"ababab"] * 2 + [b"ccccc"] * 2
    assert result.as_numpy("output_log_probs").tolist() == [[[-0.5] * 4] * 2] * 2
    assert result.as_numpy("cum_log_probs").tolist() == [[-2.0] * 2] * 2
    assert result.as_numpy("sequence_index").tolist() == [[0, 1]] * 2
    assert result.as_numpy("num_output_tokens").tolist() == [[4, 4]] * 2


def test_end_id_ends_and_one_outside_the_vocabulary_never_does(server: Server) -> None:
    token_id = server.post("/tokenize", {"prompt": "b"}).json["tokens"][0]
    assert generate(server, max_tokens=6, end_id=token_id).json["text_output"] == "aba"
    assert generate(server, max_tokens=6, end_id=1_048_576).json["text_output"] == "abababab"


def test_token_models_make_the_same_text_step_by_step(client: Any) -> None:
    query = [tensor("QUERY", [[b"ab"], [b"cde"]], "BYTES"), tensor("REQUEST_OUTPUT_LEN", [[4], [4]], "INT32")]
    before = client.infer("preprocessing", query)
    tokens, lengths = before.as_numpy("INPUT_ID"), before.as_numpy("REQUEST_INPUT_LEN")
    assert lengths.tolist() == [[2], [3]]
    made = client.infer(
        "tensorrt_llm",
        [
            tensor("input_ids", tokens, "INT32"),
            tensor("input_lengths", lengths, "INT32"),
            tensor("request_output_len", [[4], [4]], "INT32"),
            tensor("end_id", before.as_numpy("OUT_END_ID"), "INT32"),
        ],
    )
    assert made.as_numpy("sequence_length").tolist() == [[6], [7]]
    after = client.infer(
        "postprocessing",
        [
            tensor("TOKENS_BATCH", made.as_numpy("output_ids"), "INT32"),
            tensor("SEQUENCE_LENGTH", made.as_numpy("sequence_length"), "INT32"),
        ],
    )
    assert after.as_numpy("OUTPUT").tolist() == [b"ababab", b"cdecdec"]


def test_generate_answers_one_object(server: Server) -> None:
    answer = generate(server, id="nine").json
    assert answer["text_output"] == "ababa"
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("ensemble", "1", "nine")
    assert (answer["sequence_id"], answer["sequence_end"], answer["context_logits"]) == (0, False, 0.0)
    assert "id" not in generate(server).json


def test_generate_stream_sends_what_is_new_without_an_end_mark(server: Server) -> None:
    pieces = [event["text_output"] for event in events(generate(server, "generate_stream", stream=True))]
    assert "".join(pieces) == "aba"
    assert [event["text_output"] for event in events(generate(server, "generate_stream"))] == ["ababa"]


def test_the_benchmark_form_of_sglang(server: Server) -> None:
    body = {
        "accumulate_tokens": True, "text_input": "ab", "temperature": 1e-6, "top_p": 1.0, "max_tokens": 5, "stream": True,
        "min_length": 5, "end_id": 1_048_576,
    }  # fmt: skip
    answer = server.post("/v2/models/ensemble/generate_stream", body)
    assert "".join(event["text_output"] for event in events(answer)) == "ababa"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is out of range"),
        ({"bad_words": "no" * 600}, "bad_words holds a string of 1200 characters"),
        ({"return_context_logits": True}, "return_context_logits is not supported"),
        ({"lora_task_id": 3}, "lora_task_id is not supported"),
        ({"guided_decoding_guide": "{}"}, "guided_decoding_guide_type=None is not supported"),
        ({"temperature": -1}, "temperature=-1 is out of range"),
        ({"top_p": 2}, "top_p=2 is out of range"),
        ({"max_tokens": 0}, "max_tokens=0 is out of range"),
        ({"max_tokens": 10**9}, "maximum context length"),
        ({"max_tokens": "3"}, "not a value of INT32"),
        ({"max_tokens": None}, "max_tokens"),
        ({"text_input": ["a", "b"]}, "holds 2 values"),
        ({"text_input": ""}, "the prompt is empty"),
        ({"stream": 1}, "not a value of BOOL"),
        ({"num_return_sequences": 10**9}, "num_return_sequences"),
        ({"custom": {"a": 1}}, "a parameter must be a scalar"),
        ({"min_tokens": 1, "min_length": 1}, "'min_length' is given twice"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(server: Server, fields: dict[str, Any], message: str) -> None:
    for route in ("generate", "generate_stream"):
        assert message in refusal(generate(server, route, **fields))


def test_neutral_values_and_unknown_scalars_change_nothing(server: Server) -> None:
    neutral = {
        "beam_width": 1, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0, "bad_words": "",
        "stop_words": [""], "length_penalty": 1.0, "return_context_logits": False, "pad_id": 2, "lora_task_id": 0,
        "anything": "else", "parameters": {"priority": 3},
    }  # fmt: skip
    assert generate(server, **neutral).json["text_output"] == "ababa"


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b'{"text_input":"a","text_input":"b","max_tokens":1}', b'{"text_input":"\\ud800","max_tokens":1}',
     b'{"text_input":"a","max_tokens":NaN}', b'{"text_input":"\xff","max_tokens":1}', b'{"a":' * 250_000, b'{"text_input":"a"}'],
)  # fmt: skip
def test_broken_bodies_are_refused(server: Server, body: bytes) -> None:
    refusal(server.request("POST", "/v2/models/ensemble/generate", body[:90_000]))


def test_json_of_more_than_a_hundred_levels_is_refused_wherever_they_are(server: Server) -> None:
    deep = "[" * 97 + '"a"' + "]" * 97
    for data, status in ((deep, 200), (f"[{deep}]", 400)):  # in an input, in the list of inputs, in the body
        inputs = f'[{{"name":"text_input","datatype":"BYTES","shape":[1,1],"data":{data}}},' \
            '{"name":"max_tokens","datatype":"INT32","shape":[1,1],"data":[2]}]'  # fmt: skip
        answer = server.post("/v2/models/ensemble/infer", f'{{"inputs":{inputs}}}'.encode())
        assert answer.status == status, answer.body
    assert "100 levels" in answer.json["error"]
    body = f'{{"text_input":"a","max_tokens":1,"x":[[[{deep}]]]}}'
    assert "100 levels" in refusal(server.request("POST", "/v2/models/ensemble/generate", body.encode()))


def test_unknown_models_routes_and_methods_have_errors_of_this_protocol(server: Server) -> None:
    assert "'other' is not found" in refusal(server.post("/v2/models/other/infer", {}), 404)
    assert "version 9" in refusal(server.get("/v2/models/ensemble/versions/9/config"), 404)
    refusal(server.get("/v2/models/ensemble/infer"), 405)
    refusal(server.get("/v2/nothing"), 404)
    assert "takes tensors" in refusal(server.post("/v2/models/tensorrt_llm/generate", {}))


def test_without_a_tokenizer_token_ids_still_work(token_server: Server) -> None:
    inputs = [
        tensor("input_ids", [[5, 6]], "INT32"),
        tensor("input_lengths", [[2]], "INT32"),
        tensor("request_output_len", [[3]], "INT32"),
    ]
    with httpclient.InferenceServerClient(token_server.url.removeprefix("http://")) as client:
        assert client.infer("tensorrt_llm", inputs).as_numpy("output_ids").tolist() == [[[5, 6, 5, 6, 5]]]
    assert "no tokenizer" in refusal(generate(token_server))


def test_keys_cover_everything_but_health(model_directory: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with stub_server(model_directory, {"api_key_file": str(keys)}) as server:
        assert server.get("/v2/health/live").status == 200
        assert server.get("/v2/health/ready").status == 200
        for path in ("/v2", "/v2/models/ensemble", "/v2/models/stats"):
            assert "no valid API key" in refusal(server.get(path), 401)
            assert server.get(path, Authorization="Bearer secret").status == 200
        model = "/v2/models/ensemble"
        for path in (model, f"{model}/versions/1"):
            for route in ("", "/ready", "/config", "/stats"):
                refusal(server.get(path + route), 401)
            for route in ("/infer", "/generate", "/generate_stream"):
                refusal(server.post(path + route, {}), 401)
        for route in ("index", "models/ensemble/load", "models/ensemble/unload"):
            refusal(server.post(f"/v2/repository/{route}", {}), 401)


def test_a_full_queue_is_unavailable(model_directory: Path) -> None:
    with stub_server(model_directory, {}, step_seconds=0.01, max_open_requests=1) as server:
        stream = server.open_stream("/v2/models/ensemble/generate_stream", {"text_input": "ab", "max_tokens": 200})
        answer = generate(server)
        stream.close()
    assert "try again later" in refusal(answer, 503)
    assert answer.headers["retry-after"] == "1"


def test_a_request_ends_at_its_own_timeout(model_directory: Path) -> None:
    with stub_server(model_directory, {}, step_seconds=0.01) as server:
        for fields in ({"timeout": 100_000}, {"parameters": {"timeout": 100_000}}):
            assert "longer than 0.1 s" in refusal(generate(server, max_tokens=200, **fields), 503)
            streamed = generate(server, "generate_stream", max_tokens=200, stream=True, **fields)
            assert streamed.status in (200, 503), "the latter if its time was over before the first token"
            assert b"longer than 0.1 s" in streamed.body
        assert generate(server, timeout=0).status == 200
        for wrong in (-1, 0.5, "1", True, 1 << 63):
            assert "is not a number of microseconds" in refusal(generate(server, timeout=wrong))
        with (
            httpclient.InferenceServerClient(server.url.removeprefix("http://")) as client,
            pytest.raises(httpclient.InferenceServerException, match=r"503.*longer than 0.1 s"),
        ):
            client.infer("ensemble", text_inputs(["ab"], 200), timeout=100_000)


def test_text_models_have_a_timeout_too(client: Any) -> None:
    query = [tensor("QUERY", [[b"ab"]], "BYTES"), tensor("REQUEST_OUTPUT_LEN", [[4]], "INT32")]
    tokens = [
        tensor("TOKENS_BATCH", [[[30, 31]]], "INT32"),
        tensor("SEQUENCE_LENGTH", [[2]], "INT32"),
    ]
    for model, inputs in (("preprocessing", query), ("postprocessing", tokens)):
        for wrong in (-1, "x"):
            with pytest.raises(httpclient.InferenceServerException, match="is not a number of microseconds"):
                client.infer(model, inputs, timeout=wrong)
        with pytest.raises(httpclient.InferenceServerException, match=r"503.*longer than 1e-06 s"):
            client.infer(model, inputs, timeout=1)
        client.infer(model, inputs, timeout=60_000_000)


def test_tensors_that_would_lie_in_shared_memory_or_be_ranked_are_refused(client: Any) -> None:
    elsewhere, ranked = (httpclient.InferRequestedOutput("text_output", class_count=count) for count in (0, 3))
    elsewhere.set_shared_memory("region", 100)
    for output, said in ((elsewhere, "shared_memory_region"), (ranked, "classification")):
        with pytest.raises(
            httpclient.InferenceServerException, match=f"{said} of tensor 'text_output' is not supported"
        ):
            client.infer("ensemble", text_inputs(["ab"]), outputs=[output])
    inputs = text_inputs(["ab"])
    inputs[0].set_shared_memory("region", 100)
    with pytest.raises(httpclient.InferenceServerException, match="shared_memory_region of tensor 'text_input'"):
        client.infer("ensemble", inputs)


def test_a_client_that_leaves_frees_its_request(model_directory: Path) -> None:
    with stub_server(model_directory, {}, step_seconds=0.01) as server:
        server.open_stream("/v2/models/ensemble/generate_stream", {"text_input": "ab", "max_tokens": 200}).close()
        server.wait_for("CANCELLED")


HEADER = json.dumps(
    {
        "inputs": [
            {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": 6}},
            {"name": "max_tokens", "datatype": "INT32", "shape": [1, 1], "parameters": {"binary_data_size": 4}},
        ]
    }
).encode()
RAW = b"\x02\0\0\0ab" + b"\x03\0\0\0"


def post_infer(server: Server, body: bytes, length: object) -> Answer:
    headers = {"Inference-Header-Content-Length": str(length)}
    return server.request("POST", "/v2/models/ensemble/infer", body, headers)


def test_raw_tensors_by_hand_without_a_content_type(server: Server) -> None:
    assert post_infer(server, HEADER + RAW, len(HEADER)).json["outputs"][0]["data"] == ["ababa"]


@pytest.mark.parametrize(
    "length", [-1, "x", 99_999_999_999, len(HEADER) - 1, len(HEADER) + 1, len(HEADER + RAW) + 1, 0]
)
def test_header_lengths_that_lie_are_refused(server: Server, length: object) -> None:
    refusal(post_infer(server, HEADER + RAW, length))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"binary_data_size": 6', b'"binary_data_size": 5'),
        (b'"binary_data_size": 6', b'"binary_data_size": -6'),
        (b'"binary_data_size": 4', b'"binary_data_size": 400'),
        (b"\x02\0\0\0ab", b"\x03\0\0\0ab"),
        (b"\x02\0\0\0ab", b"\xff\xff\xff\xffab"),
        (b"\x02\0\0\0ab", b"\x02\0\0\0\xff\xff"),
        (b"[1, 1]", b"[0, 1]"),
        (b"[1, 1]", b"[-5, 1]"),
        (b"[1, 1]", b"[16, 1152921504606846978]"),
        (b"[1, 1]", b"[1]"),
        (b"[1, 1]", b"[1, 1, 1]"),
        (b"INT32", b"FP32"),
        (b"INT32", b"INT33"),
        (b"max_tokens", b"text_input"),
        (b"max_tokens", b"other"),
        (b'"inputs"', b'"outputs": [{"name": "text_output"}, {"name": "text_output"}], "inputs"'),
    ],
)  # fmt: skip
def test_tensors_that_lie_are_refused(server: Server, old: bytes, new: bytes) -> None:
    header, raw = HEADER.replace(old, new), RAW.replace(old, new)
    assert header + raw != HEADER + RAW
    refusal(post_infer(server, header + raw, len(header)))


def test_a_body_that_grows_beyond_the_limit_is_refused(server: Server) -> None:
    bomb = gzip.compress(b" " * 10_000_000)
    answer = server.request("POST", "/v2/models/ensemble/infer", bomb, {"Content-Encoding": "gzip"})
    assert "exceeds 100000 bytes" in refusal(answer)


def test_a_hundred_threads_of_all_three_routes_get_their_own_answers(model_directory: Path) -> None:
    with stub_server(model_directory, {}, max_open_requests=512) as server:

        def ask(number: int) -> tuple[str, str]:
            prompt = f"{number:03}"
            if number % 3 == 0:
                return prompt, generate(server, text_input=prompt, max_tokens=30).json["text_output"]
            if number % 3 == 1:
                made = events(generate(server, "generate_stream", text_input=prompt, max_tokens=30, stream=True))
                return prompt, prompt + "".join(event["text_output"] for event in made)
            with httpclient.InferenceServerClient(server.url.removeprefix("http://")) as client:
                return prompt, client.infer("ensemble", text_inputs([prompt], 30)).as_numpy("text_output")[0].decode()

        with ThreadPoolExecutor(100) as threads:
            answers = list(threads.map(ask, range(300)))
    assert all(text == prompt * 11 for prompt, text in answers)
