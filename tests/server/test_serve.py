"""``launch.serve`` as users start it: ranks under mpirun, a real engine, small random weights."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from phalanx import LLM, SamplingParams
from phalanx.launch.start_block import sequences_in_words, start_block
from phalanx.runtime.server.link.bridge import STATS_SECONDS
from tests.support.launcher import ROOT

from .jobs import Job, is_open_mpi, serve
from .test_lifecycle import events

PATH = "/v1/completions"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 277,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 276,
}
LONG: dict[str, Any] = {"prompt": "ab", "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="session")
def tiny(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of a few thousand parameters; its weights are made by the loader."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(model_directory, directory)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


@contextlib.contextmanager
def serve_tiny(
    tiny: Path, num_ranks: int = 4, *flags: str, wait_for: str = "READY", launcher_flags: Sequence[str] = ()
) -> Iterator[Job]:
    layout = ("--tp", "2", "--pp", "2") if num_ranks == 4 else ()
    model = ("--model", str(tiny), "--load-format", "dummy")
    with serve(num_ranks, *model, *layout, *flags, wait_for=wait_for, launcher_flags=launcher_flags) as job:
        yield job


@pytest.fixture(scope="module")
def job(tiny: Path) -> Iterator[Job]:
    """tp 2 x pp 2, with a cache for about a quarter of what 64 requests need."""
    with serve_tiny(tiny, 4, "--max-num-seqs", "16", "--block-size", "8", "--num-kv-blocks", "64") as running:
        yield running


def metric(job: Job, name: str) -> float:
    lines = job.server.get("/metrics").body.decode().splitlines()
    found = [line for line in lines if line.startswith(f"{name} ")]
    return float(found[0].split()[1]) if found else math.nan  # not before the engine's first report


def wait_until_idle(job: Job) -> None:
    """Until nothing runs, waits or holds a block, for longer than the time between two reports of the engine."""
    names = ("requests_running", "requests_waiting", "kv_cache_usage_ratio")
    limit, idle_since = time.monotonic() + 60, math.inf
    while time.monotonic() < idle_since + 2 * STATS_SECONDS:
        assert time.monotonic() < limit, [metric(job, f"phalanx_{name}") for name in names]
        idle = all(metric(job, f"phalanx_{name}") == 0 for name in names)
        idle_since = min(idle_since, time.monotonic()) if idle else math.inf


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_ranks_without_work_leave_the_processor_alone(job: Job) -> None:
    wait_until_idle(job)
    pids = [job.rank(rank) for rank in range(job.num_ranks)]
    before, observed = [processor_seconds(pid) for pid in pids], 3.0
    threading.Event().wait(observed)  # the length of the observation, not a wait for something
    used = [processor_seconds(pid) - start for pid, start in zip(pids, before, strict=True)]
    assert all(seconds < 0.05 * observed for seconds in used), used


def test_models_are_named_after_the_directory(job: Job) -> None:
    (card,) = job.server.get("/v1/models").json["data"]
    assert (card["id"], card["max_model_len"]) == ("tiny", 512)


def test_mixed_requests_together_give_the_tokens_of_each_alone(job: Job) -> None:
    draw = random.Random(5)
    requests = [
        {
            "prompt": [draw.randrange(20, 276) for _ in range(draw.randrange(1, 50))],
            "max_tokens": draw.randrange(1, 14),
            "temperature": draw.choice([0.0, 1.0]),
            "seed": draw.randrange(2**63),
            "top_k": draw.choice([0, 5]),
            "ignore_eos": draw.random() < 0.5,
            "return_token_ids": True,
            "stream": draw.random() < 0.5,
        }
        for _ in range(64)
    ]

    def token_ids(request: dict[str, Any]) -> list[int]:
        if not request["stream"]:
            answer = job.server.post(PATH, request)
            assert answer.status == 200, answer.body
            return list(answer.json["choices"][0]["token_ids"])
        chunks = job.server.stream(PATH, request)
        return [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]

    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(token_ids, requests))
    alone = [token_ids(request) for request in requests]
    assert together == alone
    assert len({len(tokens) for tokens in alone}) > 8, "lengths must differ, or this shows little"
    wait_until_idle(job)


def test_the_start_is_described_before_ready_and_at_server_info(job: Job) -> None:
    lines = job.server.lines_with("READY")[0] and job.server.lines
    block = [line for line in lines[: lines.index(job.server.wait_for("READY"))] if line.startswith("phalanx: ")]
    shown = dict(line.removeprefix("phalanx: ").rstrip().split(maxsplit=1) for line in block)
    info = job.server.get("/server_info").json
    assert list(shown) == [*info, "ask"]
    recorded = (ROOT / "docs/howto/session.md").read_text()
    names = re.findall(r"^phalanx: (\w+)  ", recorded, re.MULTILINE)
    assert [name for name in names if name != "gRPC"] == list(shown), "gRPC is declined here, by --port 0"
    assert {name: " ".join(value.split()) for name, value in info.items()} == {
        name: " ".join(value.split()) for name, value in shown.items() if name != "ask"
    }
    assert info["layout"] == "dp 1 x pp 2 x tp 2 = 4 rank(s)"
    assert info["cache"] == "64 blocks x 8 = 512 tokens"
    assert info["sequences"] == "16 at once, 2,048 tokens a step"
    assert info["quantisation"] == "weights: not quantised; cache: not quantised"
    (card,) = job.server.get("/v1/models").json["data"]
    assert card["quantization"] == info["quantisation"]
    assert info["engine"].startswith("numpy: ") or info["engine"].startswith("cuda: ")
    _, url, *_, body = shlex.split(shown["ask"])
    assert job.server.post(urlsplit(url).path, json.loads(body)).status == 200


@pytest.mark.parametrize(("takes_texts", "prompt"), [(True, "def main("), (False, [1, 2, 3])])
def test_the_start_shows_a_prompt_that_the_server_can_read(takes_texts: bool, prompt: object) -> None:
    ask = start_block({"version": "0.1.0"}, "http://127.0.0.1:8000", "demo", takes_texts, None).splitlines()[-1]
    assert json.loads(shlex.split(ask)[-1])["prompt"] == prompt


def test_the_start_shows_how_a_key_is_sent(tmp_path: Path) -> None:
    keys = tmp_path / "my keys"
    keys.write_text("# of the team\n\nfirst\nsecond\n")
    ask = start_block({"version": "0.1.0"}, "http://127.0.0.1:8000", "demo", True, keys).splitlines()[-1]
    words = ask.split(None, 1)[1].replace("curl", "printf '%s\\n'", 1)
    shown = subprocess.run(["sh", "-c", words], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "Authorization: Bearer first" in shown


def test_the_start_says_that_prompts_will_wait_where_sequences_take_all_tokens_of_a_step() -> None:
    assert "--max-num-batched-tokens" not in sequences_in_words(2047, 2048)
    assert "use a larger --max-num-batched-tokens, such as 6144" in sequences_in_words(3072, 2048)


def test_chat_and_scores(job: Job) -> None:
    answer = job.server.post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "logprobs": True, "top_logprobs": 3},
    )
    content = answer.json["choices"][0]["logprobs"]["content"]
    assert len(content) == 3
    assert all(entry["logprob"] <= entry["top_logprobs"][0]["logprob"] < 0 for entry in content)


def test_answers_match_what_clients_ask_for(job: Job) -> None:
    """A schema in a chat, streamed and whole, next to requests without one; Triton's inputs for a regular expression."""
    schema = {
        "type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"], "additionalProperties": False,
    }  # fmt: skip
    body = {
        "messages": [{"role": "user", "content": "ab"}], "seed": 1, "max_tokens": 150,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    }  # fmt: skip
    with ThreadPoolExecutor(4) as pool:
        plain = [
            pool.submit(job.server.post, PATH, {"prompt": "ab", "max_tokens": 20, "temperature": 0}) for _ in range(3)
        ]
        answered = job.server.post("/v1/chat/completions", body)
        assert answered.status == 200, answered.body
        whole = answered.json["choices"][0]
        assert len({one.result().json["choices"][0]["text"] for one in plain}) == 1
    assert whole["finish_reason"] == "stop"
    answer = json.loads(whole["message"]["content"])
    assert answer["a"] in range(100)
    assert answer["b"] in ("x", "y")
    chunks = job.server.stream("/v1/chat/completions", body | {"stream": True})
    pieces = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(pieces) == whole["message"]["content"]
    inputs = {
        "text_input": "ab", "max_tokens": 9, "guided_decoding_guide_type": "regex", "guided_decoding_guide": "[0-9]{3}",
        "exclude_input_in_output": True,
    }  # fmt: skip
    assert re.fullmatch("[0-9]{3}", job.server.post("/v2/models/ensemble/generate", inputs).json["text_output"])


def test_beam_search_through_every_door_gives_the_answers_of_llm(job: Job, tiny: Path) -> None:
    """Best first, each choice with its own log-probabilities; two prompts that are the same are two searches."""
    prompt = [97, 98, 99]
    with LLM(tiny, load_format="dummy", max_model_len=512) as llm:
        (output,) = llm.generate(prompt, SamplingParams(max_tokens=9, beam_width=3))
    expected = [list(hypothesis.token_ids) for hypothesis in output.hypotheses]
    asked = {"prompt": [prompt, prompt], "max_tokens": 9, "return_token_ids": True, "logprobs": 0}
    for fields in ({"use_beam_search": True, "n": 3}, {"beam_width": 3, "n": 3}):
        answer = job.server.post(PATH, asked | fields)
        assert [choice["token_ids"] for choice in answer.json["choices"]] == expected * 2
    best = job.server.post(PATH, {**asked, "prompt": prompt, "use_beam_search": True, "best_of": 3}).json["choices"]
    assert [choice["token_ids"] for choice in best] == expected[:1]
    stream = job.server.post(PATH, {**asked, "prompt": prompt, "beam_width": 3, "stream": True}).body.decode()
    streamed = [json.loads(line[6:]) for line in stream.split("\n\n") if line.startswith("data: {")]
    found = [token for event in streamed for choice in event["choices"] for token in choice.get("token_ids") or ()]
    assert found == expected[0]
    tensors = {"text_input": "abc", "max_tokens": 9, "beam_width": 3, "exclude_input_in_output": True}
    whole = job.server.post("/v2/models/ensemble/generate", tensors)
    assert whole.status == 200, whole.body
    refused = job.server.post(PATH, {"prompt": prompt, "use_beam_search": True, "n": 3, "top_p": 0.5})
    assert (refused.status, refused.error["param"]) == (400, "top_p")


def test_echoed_scores_are_those_of_generation(job: Job) -> None:
    fields = {"temperature": 0, "logprobs": 1, "ignore_eos": True, "return_token_ids": True}
    prompt = [30, 40, 50]
    first = job.server.post(PATH, {"prompt": prompt, "max_tokens": 8, **fields}).json["choices"][0]
    whole = prompt + first["token_ids"]
    echo = job.server.post(PATH, {"prompt": whole, "max_tokens": 1, "echo": True, **fields}).json["choices"][0]
    scored = echo["logprobs"]["token_logprobs"]
    assert scored[0] is None
    assert scored[3:11] == pytest.approx(first["logprobs"]["token_logprobs"], abs=1e-4)


def test_an_engine_limit_is_a_400(job: Job) -> None:
    answer = job.server.post(PATH, {"prompt": [30] * 500, "max_tokens": 13})
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")


def test_clients_that_leave_free_their_blocks(job: Job) -> None:
    for _ in range(5):
        streams = [job.server.open_stream(PATH, LONG) for _ in range(6)]
        for stream in streams:
            stream.close()
    wait_until_idle(job)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_mpirun_drains(tiny: Path, number: signal.Signals) -> None:
    if is_open_mpi() and number != signal.SIGUSR1:
        pytest.skip("Open MPI's mpirun does not wait for ranks to drain; SIGUSR1 is the way")
    with serve_tiny(tiny) as job:
        streams = [job.server.open_stream(PATH, LONG | {"max_tokens": 100}) for _ in range(4)]
        job.server.process.send_signal(number)
        for stream in streams:
            assert events(stream)[-1]["choices"][0]["finish_reason"] == "length"
        status, errors = job.server.wait()
        assert (status, "Traceback" in errors) == (0, False), errors
        assert errors.count("phalanx: draining") == errors.count("phalanx: ended, every request was answered") == 1
        assert job.seconds_until_gone() < 10


def test_an_interrupted_open_mpi_ends_with_an_error(tiny: Path) -> None:
    if not is_open_mpi():
        pytest.skip("of Open MPI's mpirun only")
    with serve_tiny(tiny) as job:
        stream = job.server.open_stream(PATH, LONG)
        job.server.process.send_signal(signal.SIGINT)
        assert "error" in events(stream)[-1]
        status, errors = job.server.wait()
        assert status != 0
        assert "Traceback" not in errors


def assert_killing_a_rank_ends_everything(job: Job, rank: int) -> None:
    streams = [job.server.open_stream(PATH, LONG) for _ in range(8)]
    os.kill(job.rank(rank), signal.SIGKILL)
    for stream in streams:
        assert events(stream)[-1]["error"]["code"] == "engine_failed"
    assert job.seconds_until_gone() < 10
    assert job.server.wait()[0] != 0


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_killing_a_rank_ends_everything_and_tells_clients(tiny: Path, rank: int) -> None:
    with serve_tiny(tiny) as job:
        assert_killing_a_rank_ends_everything(job, rank)


def test_killing_mpirun_ends_everything_and_tells_clients(tiny: Path) -> None:
    with serve_tiny(tiny) as job:
        stream = job.server.open_stream(PATH, LONG)
        job.server.process.kill()
        assert events(stream)[-1]["error"]["code"] == "engine_failed"
        assert job.seconds_until_gone() < 10


def test_killing_the_http_process_ends_everything_with_a_message(tiny: Path) -> None:
    with serve_tiny(tiny) as job:
        os.kill(job.http_process(), signal.SIGKILL)
        assert job.seconds_until_gone() < 10
        status, errors = job.server.wait()
        assert status != 0
        assert re.search(r"HTTP process \d+ \(pid \d+\) is gone", errors)


def test_the_pipeline_is_occupied_while_it_generates_and_empty_afterwards(tiny: Path) -> None:
    with serve_tiny(tiny, 2) as job:
        while not 0 < metric(job, "phalanx_pipeline_occupancy_ratio") <= 1:
            assert job.server.post(PATH, LONG).status == 200
        assert metric(job, 'phalanx_replica_pipeline_occupancy_ratio{replica="0"}') >= 0
        while metric(job, "phalanx_pipeline_occupancy_ratio"):
            continue


def test_one_process_without_mpirun_serves_and_drains(tiny: Path) -> None:
    with serve_tiny(tiny, 0) as job:
        assert job.server.post(PATH, {"prompt": "a", "max_tokens": 2}).status == 200
        assert job.server.drain()[0] == 0


def test_the_port_answers_503_before_the_engine_is_ready(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serve_tiny(tiny, 0, "--port", str(port), wait_for="") as job:
        job.server.url = f"http://127.0.0.1:{port}"
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                answer = job.server.get("/health")
                break
        assert (answer.status, answer.error["code"]) == (503, "unavailable")
        job.server.wait_for("READY")
        assert job.server.get("/health").status == 200


@pytest.mark.parametrize("num_ranks", [0, 4])
def test_a_port_in_use_is_one_line_and_status_2(tiny: Path, num_ranks: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with serve_tiny(tiny, num_ranks, "--port", port, wait_for="") as job:
            status, errors = job.server.wait()
    assert status == 2
    assert_one_line(errors, f"--port {port} on 127.0.0.1 cannot be opened: Address already in use")


@pytest.mark.parametrize("num_ranks", [0, 4])
def test_a_broken_checkpoint_is_one_line_and_status_2(tiny: Path, tmp_path: Path, num_ranks: int) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (broken / "model.safetensors").write_bytes(b"\xff" * 64)
    layout = ("--tp", "2", "--pp", "2") if num_ranks else ()
    with serve(num_ranks, "--model", str(broken), *layout, wait_for="") as job:
        status, errors = job.server.wait()
    assert status == 2
    assert_one_line(errors, "model.safetensors")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tp", "3"), "3"),
        (("--host", "0.0.0.0"), "--insecure"),
        (("--port", "70000"), "70000"),
        (("--request-timeout", "-1"), "--request-timeout"),
        (("--api-key-file", "/nowhere"), "/nowhere"),
        (("--model", "/nowhere"), "/nowhere"),
        (("--no-such-flag",), "--no-such-flag"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_on_four_ranks(tiny: Path, flags: tuple[str, ...], message: str) -> None:
    with serve(4, "--model", str(tiny), "--load-format", "dummy", *flags, wait_for="") as job:
        status, errors = job.server.wait()
    assert status == 2, errors
    assert_one_line(errors, message)


def test_a_second_interrupt_does_not_wait(tiny: Path) -> None:
    with serve_tiny(tiny, 0) as job:
        stream = job.server.open_stream(PATH, LONG | {"max_tokens": 500})
        job.server.process.send_signal(signal.SIGINT)
        while job.server.get("/ready").status == 200:
            continue
        job.server.process.send_signal(signal.SIGINT)
        assert events(stream)[-1].get("error", {}).get("code") == "engine_failed"
        assert job.server.wait()[0] == 130


def assert_one_line(errors: str, message: str) -> None:
    """Ours is one line; a launcher may add its own block about the exit status."""
    ours = [line for line in errors.splitlines() if line.startswith(("phalanx: ", "launch.serve: "))]
    assert len(ours) == 1, errors
    assert message in ours[0]
    assert "Traceback" not in errors
