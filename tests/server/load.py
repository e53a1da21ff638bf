"""How many streamed events a second the HTTP process gives: ``python -m tests.server.load --clients 1 32 256 1024``.

The stub engine invents the tokens, the client only counts events, so the HTTP process is what is measured. Not a test.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from urllib.parse import urlsplit

from .servers import ROOT, Server, stub_server


async def count_events(host: str, port: int, num_tokens: int) -> tuple[int, float]:
    """Events of one stream, and seconds to the first."""
    started, first, num_events = time.perf_counter(), 0.0, 0
    body = json.dumps({"prompt": [30, 31], "max_tokens": num_tokens, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(head.encode() + body)
    while data := await reader.read(262_144):
        num_events += data.count(b"data: {")
        first = first or (time.perf_counter() - started if num_events else 0.0)
    writer.close()
    return num_events, first


async def measure(server: Server, num_clients: int, num_tokens: int) -> str:
    """One line of the table."""
    address = urlsplit(server.url)
    assert address.hostname is not None
    assert address.port is not None
    started = time.perf_counter()
    streams = [count_events(address.hostname, address.port, num_tokens) for _ in range(num_clients)]
    results = await asyncio.gather(*streams)
    seconds = time.perf_counter() - started
    num_events = sum(count for count, _ in results)
    assert num_events == num_clients * num_tokens, "every token is one event"
    firsts = sorted(first for _, first in results)
    last = firsts[int(0.99 * (num_clients - 1))]
    return f"{num_clients:5} streams: {num_events / seconds:8.0f} events/s, first event p99 {last * 1000:6.0f} ms"


def main() -> None:
    """Measure each number of clients in turn, against one server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 32, 256, 1024])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--model", type=Path, default=ROOT / "checkpoints" / "demo", help="whose tokenizer to use")
    args = parser.parse_args()
    limits = {"max_open_requests": max(args.clients), "max_model_len": args.tokens + 8}
    with stub_server(args.model, {}, **limits) as server:
        for num_clients in args.clients:
            print(asyncio.run(measure(server, num_clients, args.tokens)))


if __name__ == "__main__":
    main()
