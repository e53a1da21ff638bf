"""What the HTTP side alone carries: ``python -m tests.server.load --streams 3000 --step 0.06 --http-processes 2``. Not a test.

A stub engine gives every stream a token each step, as a GPU does (paced), or with ``--step 0`` as fast as they go (unpaced: many
events share a write). `launch.bench serve` is the client. One line: rates, gaps, ``/health``, processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .servers import ROOT, stub_server

VOCAB_SIZE = 12
"""From its token 12 on, the stub engine does strange things to requests."""


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Load:
    """How many streams of how many tokens, and how they come.

    Attributes:
        step_seconds: from token to token; 0 = as fast as they go.
        request_rate: requests a second; None = all at once.
        model: whose tokenizer to use.
    """

    streams: int = 3000
    step_seconds: float = 0.06
    tokens: int = 200
    http_processes: int = 1
    clients: int = 1
    request_rate: float | None = None
    model: Path = ROOT / "checkpoints" / "demo"


def measure(load: Load) -> tuple[dict[str, Any], list[float]]:
    """The report of `launch.bench serve`, and processor seconds of the stub engine and of each HTTP process."""
    options = {
        "max_open_requests": load.streams + 8,
        "max_model_len": load.tokens + 16,
        "step_seconds": load.step_seconds,
    }
    with stub_server(load.model, {"num_processes": load.http_processes}, vocab_size=6144, **options) as server:
        pids = [server.process.pid, *server.http_processes()]
        command = [
            sys.executable, "-m", "launch.bench", "serve", "--url", server.url, "--input-len", "8",
            "--output-len", str(load.tokens), "--num-prompts", str(load.streams), "--max-concurrency", str(load.streams),
            "--num-clients", str(load.clients), "--vocab-size", str(VOCAB_SIZE),
        ]  # fmt: skip
        if load.request_rate is not None:
            command += ["--request-rate", str(load.request_rate)]
        before = [processor_seconds(pid) for pid in pids]
        report: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True, cwd=ROOT).stdout)
        used = [processor_seconds(pid) - start for pid, start in zip(pids, before, strict=True)]
    return report, used


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=3000)
    parser.add_argument("--step", type=float, default=0.06, help="seconds")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--http-processes", type=int, default=1)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--request-rate", type=float, help="default: all at once")
    parser.add_argument("--model", type=Path, default=ROOT / "checkpoints" / "demo", help="whose tokenizer to use")
    args = parser.parse_args()
    load = Load(args.streams, args.step, args.tokens, args.http_processes, args.clients, args.request_rate, args.model)
    report, used = measure(load)
    cost = 1e6 * sum(used[1:]) / report["output_tokens"]
    print(
        f"{args.streams} streams, {args.http_processes} processes, {'paced' if args.step else 'unpaced'}: "
        f"{report['output_tokens_per_second']:,.0f} events/s, {cost:.1f} us of processor an event; rank 0 {used[0]:.1f} s, HTTP "
        f"{', '.join(f'{seconds:.1f}' for seconds in used[1:])} s of {report['seconds']:.1f}"
    )
    for name in ("time_to_first_token_ms", "inter_token_latency_ms", "stream_gap_ms", "health_ms"):
        print(f"  {name}: " + ", ".join(f"{key} {value:.0f}" for key, value in (report[name] or {}).items()))


if __name__ == "__main__":
    main()
