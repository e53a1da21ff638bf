# SPDX-License-Identifier: Apache-2.0
"""Flags of ``launch.serve`` that are about the server, in the groups in which ``--help`` shows them."""

from __future__ import annotations

from pathlib import Path

from phalanx.launch.parser import CommandParser

__all__ = ["add_address_arguments", "add_lifetime_arguments", "add_request_arguments", "add_security_arguments"]


def add_address_arguments(parser: CommandParser) -> None:
    """Add flags for where the server listens, and for who is told."""
    group = parser.add_argument_group("address")
    group.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address to listen on (default: 127.0.0.1, this machine only)")  # fmt: skip
    group.add_argument(
        "--port", type=int, default=8000, metavar="PORT", help="TCP port; 0 = any free one, see the READY line"
    )
    group.add_argument("--grpc-port", type=int, metavar="PORT",
                       help="Triton's gRPC protocol (default: 8001; with --port 0, none); 0 = any free one")  # fmt: skip
    group.add_argument("--http-processes", type=int, metavar="N",
                       help="processes that share the port (default: one per four processors, at most eight)")  # fmt: skip
    group.add_argument("--endpoint-file", type=Path, metavar="FILE",
                       help="write host, port and model to this file when ready; removed at the end")  # fmt: skip


def add_request_arguments(parser: CommandParser) -> None:
    """Add flags for what requests may ask for, and for how they are read and counted."""
    group = parser.add_argument_group("requests")
    group.add_argument("--served-model-name", nargs="+", metavar="NAME",
                       help="names that requests may use (default: the directory's name)")  # fmt: skip
    group.add_argument("--scheduling-policy", choices=("fcfs", "priority"), default="fcfs",
                       help="priority: requests with a lower priority field start first; fcfs (default) refuses the field")  # fmt: skip
    group.add_argument(
        "--request-timeout", type=float, metavar="SECONDS", help="maximum duration of a request (default: none)"
    )
    group.add_argument("--tool-call-parser", default="auto", metavar="FORM",
                       help="how the model writes tool calls: hermes (Qwen too), llama3_json, mistral, pythonic, qwen3_coder, glm45, "
                       "deepseek_v3, none; auto (default) takes the form that the chat template teaches")  # fmt: skip
    group.add_argument("--no-generation-config", action="store_true",
                       help="ignore the sampling defaults of generation_config.json")  # fmt: skip
    group.add_argument("--metrics-compatibility", nargs="+", default=[], metavar="SERVER",
                       help="also show metrics under the names of vllm or triton")  # fmt: skip


def add_security_arguments(parser: CommandParser) -> None:
    """Add flags for who may ask, and over which connections."""
    group = parser.add_argument_group("security")
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="accepted keys, one per line")
    group.add_argument("--admin-key-file", type=Path, metavar="FILE",
                       help="keys for POST /admin/drain (default: those of --api-key-file; without either it is refused)")  # fmt: skip
    group.add_argument("--insecure", action="store_true", help="accept other machines' requests without a key")
    group.add_argument("--ssl-certfile", type=Path, metavar="FILE",
                       help="serve HTTPS, and gRPC over TLS, with this certificate chain (PEM)")  # fmt: skip
    group.add_argument("--ssl-keyfile", type=Path, metavar="FILE", help="its private key (PEM, no password)")
    group.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN",
                       help="allow requests from web pages of this origin; * = any; repeatable")  # fmt: skip


def add_lifetime_arguments(parser: CommandParser) -> None:
    """Add flags for how long start, steps and drain may take, and for who starts the ranks."""
    group = parser.add_argument_group("start, failures and end")
    group.add_argument("--start-timeout", type=float, default=1800.0, metavar="SECONDS",
                       help="end the job when the ranks are not ready by then (default: 1800)")  # fmt: skip
    group.add_argument("--stall-timeout", type=float, default=300.0, metavar="SECONDS",
                       help="end the job when a step takes longer (default: 300); a silent rank ends it after at most "
                            "30, even one that a debugger or Ctrl-Z has stopped")  # fmt: skip
    group.add_argument("--shutdown-timeout", type=float, default=25.0, metavar="SECONDS",
                       help="how long open requests may go on after a signal (default: 25, below Slurm's KillWait)")  # fmt: skip
    group.add_argument("--supervise", action="store_true",
                       help="start the ranks, and restart them after a failure; clients stay connected")  # fmt: skip
    group.add_argument("-n", "--num-ranks", type=int, metavar="N",
                       help="ranks that --supervise starts (default: dp x pp x tp)")  # fmt: skip
    group.add_argument("--launcher", metavar="COMMAND",
                       help="how --supervise starts them (default: mpirun -n N; without ranks to start, none)")  # fmt: skip
    group.add_argument("--max-restarts", type=int, default=10, metavar="N",
                       help="give up after so many restarts in a row; ten minutes of service reset the count (default: 10)")  # fmt: skip
    parser.no_effect("without --supervise, which starts ranks; add that (mpirun -n starts them, too)", lambda args: not args.supervise,
                     "--num-ranks", "--launcher", "--max-restarts")  # fmt: skip
