# SPDX-License-Identifier: Apache-2.0
"""Flags of ``launch.bench serve``, apart from what needs numpy and httpx, so that ``--help`` answers at once."""

from __future__ import annotations

import math
from pathlib import Path

from phalanx.launch.parser import CommandParser

__all__ = ["add_serve_arguments"]


def add_serve_arguments(parser: CommandParser) -> None:
    """Flags of this mode only."""
    parser.add_argument("--url", required=True, metavar="http://HOST:PORT", help="address of the server")
    parser.add_argument("--served-model-name", metavar="NAME", help="default: the first model that the server lists")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="first line is sent as the bearer token")
    parser.add_argument("--max-concurrency", type=int, default=64, metavar="N", help="requests in flight at once")
    parser.add_argument("--num-clients", type=int, metavar="N",
                        help="client processes (default: one per four processors, at most eight)")  # fmt: skip
    parser.add_argument("--request-rate", type=float, metavar="R",
                        help="requests a second (default: as soon as there is room)")  # fmt: skip
    parser.add_argument("--burstiness", type=float, default=1.0, metavar="B",
                        help="with --request-rate: 1 = Poisson arrivals, less = bursts, more = even (default: 1)")  # fmt: skip
    parser.add_argument("--stream-gap", type=float, nargs="?", const=math.inf, metavar="MS",
                        help="goodput counts requests whose longest gap between two events is at most MS")  # fmt: skip
    parser.add_argument("--first-token", type=float, metavar="MS",
                        help="goodput counts requests whose first token came within MS")  # fmt: skip
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw rates and latencies: FILE.svg, or FILE.png with matplotlib"
    )
    parser.add_argument("--vocab-size", type=int, default=1000, metavar="N", help="prompt token ids are below this")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of prompts and arrival times")
    parser.no_effect("without --request-rate; add that", lambda args: args.request_rate is None, "--burstiness")
