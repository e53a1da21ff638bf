# SPDX-License-Identifier: Apache-2.0
"""What a server says before READY, and again at ``/server_info``: what runs here, how, and why so."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import TYPE_CHECKING

import phalanx

if TYPE_CHECKING:
    from pathlib import Path

    from phalanx.parallel.communicator import Communicator
    from phalanx.runtime.replica import Replica

__all__ = ["describe", "host_names", "sequences_in_words", "start_block"]


def host_names(world: Communicator) -> str:
    """Hosts with their numbers of ranks, such as ``node1 (4), node2 (4)``. *Collective.*"""
    import socket

    from phalanx.parallel.communicator import gather_bytes

    names = Counter(name.decode() for name in gather_bytes(world, socket.gethostname().encode()))
    return ", ".join(f"{name} ({count})" for name, count in names.items())


def describe(replica: Replica, model: str, hosts: str, grpc: str) -> dict[str, str]:
    """Names and values, in the order in which they are shown; ``grpc``: where that is served, or why nowhere."""
    from phalanx.runtime.executors.base import ReportsProducts
    from phalanx.runtime.executors.registry import choose_engine, engine_reason
    from phalanx.runtime.quantisation import quantisation_in_words

    options, config, cache = replica.options, replica.config, replica.executor.cache
    layout = options.layout
    products = replica.executor.products if isinstance(replica.executor, ReportsProducts) else ""
    return {
        "version": phalanx.__version__,
        "model": f"{model} from {replica.directory}",
        "architecture": f"{config.architecture}, {config.num_layers} layers, vocabulary of {config.vocab_size:,}",
        **({"model code": f"sha256 {replica.family.code}"} if replica.family.code else {}),
        "engine": f"{choose_engine(options.engine)}: {engine_reason(options.engine)}",
        "device": replica.executor.device,
        "dtype": config.compute_dtype(options.dtype),
        "quantisation": quantisation_in_words(replica.family, config, replica.checkpoint.formats, options),
        **({"products": products} if products else {}),
        "layout": f"dp {layout.dp} x pp {layout.pp} x tp {layout.tp} = {layout.world_size} rank(s)",
        "hosts": hosts,
        "context": f"{replica.max_model_len:,} tokens",
        "cache": f"{cache.num_blocks:,} {'blocks' if cache.kind == 'paged' else 'slots'} x {cache.block_size} = "
        f"{cache.num_blocks * cache.block_size:,} tokens",
        "sequences": sequences_in_words(options.max_num_seqs, options.max_num_batched_tokens),
        **({"gRPC": grpc} if grpc else {}),
    }


def sequences_in_words(most: int, num_tokens: int) -> str:
    """How many run at once; what their number costs where each step's tokens are all theirs."""
    if most < num_tokens:
        return f"{most:,} at once, {num_tokens:,} tokens a step"
    return (
        f"{most:,} at once; with {num_tokens:,} tokens a step prompts wait once so many run: use a larger --max-num-batched-tokens, "
        f"such as {max(4096, 2 * most)}"
    )


def start_block(facts: dict[str, str], url: str, model: str, takes_texts: bool, key_file: Path | None) -> str:
    """Lines for people, the last one a command that asks the server something, with the first key of ``key_file``."""
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
    prompt = '"def main("' if takes_texts else "[1, 2, 3]"
    body = f'{{"model": "{model}", "prompt": {prompt}, "max_tokens": 16}}'
    headers = "-H 'Content-Type: application/json'"
    if key_file is not None:
        headers += f""" -H "Authorization: Bearer $(grep -m 1 '^[^#]' {shlex.quote(str(key_file))})\""""
    ask = f"curl {url}/v1/completions {headers} -d '{body}'"
    return "\n".join([*lines, f"{'ask':<{width}}  {ask}"])
