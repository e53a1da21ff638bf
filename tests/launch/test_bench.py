"""``launch.bench``: the fields of its JSON, and load against a running ``launch.serve``."""

from __future__ import annotations

import json
import shlex
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest

from phalanx.launch.load.client import arrival_times
from phalanx.launch.load.messages import Load
from tests.server.servers import Server, start
from tests.support.short_demo import DEMO

from .commands import messages, needs_mpirun, run

MEASURED = {
    "model", "engine", "dtype", "tp", "pp", "dp", "input_len", "output_len", "num_prompts", "num_microbatches", "seconds",
    "output_tokens_per_second", "total_tokens_per_second", "steady_output_tokens_per_second", "mean_step_ms",
    "time_to_first_token_ms", "time_per_output_token_ms", "gpu_idle_fraction", "kv_blocks", "device", "versions", "command",
}  # fmt: skip
LOAD = ("--input-len", "5", "--output-len", "6", "--num-prompts", "7")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The demo checkpoint behind ``launch.serve``, on one rank."""
    command = [
        sys.executable,
        "-m",
        "launch.serve",
        "--port",
        "0",
        "--max-num-seqs",
        "4",
        "--max-queued-requests",
        "64",
    ]
    with start(command) as running:
        running.wait_for("READY")
        yield running


def checked_latencies(report: dict[str, Any], *names: str) -> None:
    for name in names:
        assert sorted(report[name]) == ["mean", "p50", "p99"]
        assert 0 <= report[name]["p50"] <= report[name]["p99"]  # 0: tokens that arrived in one event
        assert report[name]["p99"] > 0
        assert report[name]["mean"] <= 1e3 * report["seconds"]


@needs_mpirun
@pytest.mark.parametrize(("mode", "ranks"), [("throughput", 2), ("latency", 0)])
def test_measured_fields(mode: str, ranks: int, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    result = run("bench", mode, *LOAD, "--json", file, ranks=ranks)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    report = json.loads(result.stdout)
    assert json.loads(file.read_text()) == report
    assert set(report) >= MEASURED
    assert (report["tp"], report["pp"], report["dp"]) == (max(1, ranks), 1, 1)
    assert (report["engine"], report["input_len"], report["output_len"], report["num_prompts"]) == ("numpy", 5, 6, 7)
    assert report["output_tokens_per_second"] == pytest.approx(42 / report["seconds"])
    assert report["total_tokens_per_second"] == pytest.approx((42 + 35) / report["seconds"])
    words = shlex.join([mode, *LOAD, "--json", str(file)])
    assert report["command"] == f"mpirun -n {max(1, ranks)} python -m launch.bench {words}"
    checked_latencies(report, "time_to_first_token_ms", "time_per_output_token_ms")


def test_a_report_says_how_the_checkpoint_is_quantised(tmp_path: Path) -> None:
    """Its flags say nothing of it: they are the defaults."""
    config = json.loads((DEMO / "config.json").read_text("utf-8"))
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    section = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "kv_cache_scheme": cache}
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "quantization_config": {**section, "ignore": ["lm_head"]}})
    )
    result = run(
        "bench", "latency", *LOAD, "--model", tmp_path, "--load-format", "dummy", "--json", tmp_path / "report.json"
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["quantize"], report["kv_cache_dtype"]) == ("none", "auto")
    assert report["quantisation"] == "weights: int4 in groups of 16; cache: fp8 with the checkpoint's scales"


@pytest.mark.parametrize("mode", ["throughput", "latency"])
def test_of_several_iterations_the_median_is_reported(mode: str) -> None:
    result = run("bench", mode, *LOAD, "--num-iters", "3")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    rates = report["runs_output_tokens_per_second"]
    assert len(set(rates)) == 3
    assert report["output_tokens_per_second"] == sorted(rates)[1] == pytest.approx(42 / report["seconds"])
    assert report["num_microbatches"] == 1


def test_no_iteration_is_refused() -> None:
    result = run("bench", "latency", *LOAD, "--num-iters", "0")
    assert result.returncode == 2
    assert "--num-iters=0 is below 1; use at least 1" in result.stderr


def test_load_on_a_server_counts_what_the_server_generated(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    result = run("bench", "serve", "--url", server.url, *LOAD, "--max-concurrency", "3", "--json", file)
    assert result.returncode == 0, result.stderr
    assert "output tokens per second" in result.stderr
    report = json.loads(result.stdout)
    assert json.loads(file.read_text()) == report
    assert (report["model"], report["max_concurrency"]) == ("phalanx-demo", 3)
    assert (report["completed_requests"], report["failed_requests"], report["errors"]) == (7, 0, [])
    assert report["output_tokens"] == 42
    assert report["total_tokens_per_second"] == pytest.approx(77 / report["seconds"])
    checked_latencies(report, "time_to_first_token_ms", "time_per_output_token_ms", "inter_token_latency_ms")
    metrics = server.get("/metrics").body.decode()
    assert "phalanx_generation_tokens_total 48.0" in metrics  # 42 and the warm-up


def test_several_clients_share_the_load_and_draw_a_plot(server: Server, tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    load = [*LOAD, "--num-clients", "3", "--max-concurrency", "7", "--request-rate", "500", "--burstiness", "0.5"]
    result = run("bench", "serve", "--url", server.url, *load, "--stream-gap", "60000", "--plot", plot)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["num_clients"], report["request_rate"], report["burstiness"]) == (3, 500.0, 0.5)
    assert (report["completed_requests"], report["output_tokens"]) == (7, 42)
    assert 1.0 <= report["output_tokens_per_event"] <= 6.0
    assert report["good_requests_per_second"] == report["requests_per_second"]
    assert report["stream_gap_ms"]["mean"] >= report["inter_token_latency_ms"]["mean"]
    panels = ElementTree.parse(plot).getroot().findall(".//{*}polyline")
    assert [len(panel.attrib["points"].split()) for panel in panels] == [100, 201, 201]


def test_goodput_leaves_out_what_is_too_late(server: Server) -> None:
    result = run("bench", "serve", "--url", server.url, *LOAD, "--first-token", "0.001")
    assert json.loads(result.stdout)["good_requests_per_second"] == 0


def test_arrivals_have_the_rate_and_burstiness_that_were_asked_for_whatever_the_number_of_clients() -> None:
    def times(burstiness: float, num_clients: int) -> list[float]:
        load = Load("", "", "", 0, num_clients, 1, 20_000, 1, 1, 1, 0, 100.0, burstiness)
        clients = [msgspec.structs.replace(load, client=client) for client in range(num_clients)]
        return sorted(time for client in clients for time in arrival_times(client))

    for burstiness in (0.25, 1.0, 4.0):
        gaps = np.diff(times(burstiness, 1))
        assert np.mean(gaps) == pytest.approx(0.01, rel=0.05)
        assert np.var(gaps) / np.mean(gaps) ** 2 == pytest.approx(1 / burstiness, rel=0.1)
        assert times(burstiness, 3) == times(burstiness, 1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--num-clients", "0"], "--num-clients=0 is below 1"),
        (["--request-rate", "0"], "--request-rate=0.0 is not above 0"),
        (["--plot", "plot.txt"], "ends in neither .svg nor .png"),
        (["--plot", "/nowhere/plot.svg"], "cannot be written"),
        (["--vocab-size", "1000000000"], "change --input-len, --output-len or --vocab-size"),
        (["--output-len", "5000"], "2048"),
        (["--served-model-name", "other"], "give --served-model-name"),
        (["--max-concurrency", "0"], "--max-concurrency=0 is below 1"),
        (["--num-prompts", "0"], "--num-prompts=0 is below 1"),
        (["--api-key-file", "/nowhere/key"], "/nowhere/key cannot be read"),
        (["--json", "/nowhere/result.json"], "cannot be written: No such file"),
        (["--url", "http://127.0.0.1:9"], "start a server"),
        (["--url", "127.0.0.1:9"], "http://HOST:PORT"),
    ],
)
def test_what_cannot_run_is_one_line_before_the_load(server: Server, arguments: list[str], expected: str) -> None:
    result = run("bench", "serve", "--url", server.url, *LOAD, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert messages(result.stderr) == result.stderr.splitlines()
    assert len(result.stderr.splitlines()) == 1
    assert expected in result.stderr


@needs_mpirun
def test_load_under_mpirun_is_refused_once(server: Server) -> None:
    result = run("bench", "serve", "--url", server.url, *LOAD, ranks=2)
    assert result.returncode == 2
    assert [line for line in messages(result.stderr) if "start it without mpirun" in line] == messages(result.stderr)
    assert len(messages(result.stderr)) == 1


class _Flaky(BaseHTTPRequestHandler):
    """Answers two requests and then fails in turn: with a status, inside a stream, by ending too early."""

    asked = 0

    def log_message(self, format: str, *args: Any) -> None:
        """Keep standard error clean."""

    def do_GET(self) -> None:
        """One model."""
        self._send(200, b'{"data": [{"id": "flaky"}]}')

    def do_POST(self) -> None:
        """A stream of one token, whole or broken."""
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).asked += 1
        token = b'data: {"choices": [{"text": "a"}]}\n\n'
        match type(self).asked:
            case 1 | 2:
                self._send(200, token + b'data: {"choices": [], "usage": {"completion_tokens": 1}}\n\ndata: [DONE]\n\n')
            case 3:
                self._send(500, b"out of luck")
            case 4:
                self._send(200, token + b'data: {"error": {"message": "lost a rank"}}\n\ndata: [DONE]\n\n')
            case _:
                self._send(200, b"data: [DONE]\n\n")

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_failed_requests_are_counted_and_are_no_part_of_the_rates() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Flaky) as flaky:
        threading.Thread(target=flaky.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{flaky.server_port}"
        result = run(
            "bench", "serve", "--url", url, "--num-prompts", "4", "--output-len", "1", "--max-concurrency", "1"
        )
        flaky.shutdown()
    assert result.returncode == 1, result.stderr
    assert "failed requests" in result.stderr
    report = json.loads(result.stdout)
    assert (report["completed_requests"], report["failed_requests"], report["output_tokens"]) == (1, 3, 1)
    assert report["time_per_output_token_ms"] is None
    assert [error.split(";")[0] for error in report["errors"]] == [
        "500 out of luck", "lost a rank", "the stream ended without a token",
    ]  # fmt: skip
