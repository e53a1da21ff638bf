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
from pathlib import Path

from .servers import ROOT, stub_server

VOCAB_SIZE = 12
"""From its token 12 on, the stub engine does strange things to requests."""


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
    options = {"max_open_requests": args.streams + 8, "max_model_len": args.tokens + 16, "step_seconds": args.step}
    with stub_server(args.model, {"num_processes": args.http_processes}, vocab_size=6144, **options) as server:
        pids = [server.process.pid, *server.http_processes()]
        command = [
            sys.executable, "-m", "launch.bench", "serve", "--url", server.url, "--input-len", "8",
            "--output-len", str(args.tokens), "--num-prompts", str(args.streams), "--max-concurrency", str(args.streams),
            "--num-clients", str(args.clients), "--vocab-size", str(VOCAB_SIZE),
        ]  # fmt: skip
        if args.request_rate is not None:
            command += ["--request-rate", str(args.request_rate)]
        before = [processor_seconds(pid) for pid in pids]
        report = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        used = [processor_seconds(pid) - start for pid, start in zip(pids, before, strict=True)]
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
