"""Seconds from the start of ``launch.serve`` to READY, for a checkpoint of full size with random weights.

    python -m tests.gpu.measure_ready tests/gpu/models/llama-3-8b --directory /tmp/llama-3-8b [--ranks 2] [--json FILE]

The checkpoint is written to ``--directory`` first. Three starts follow: one with every cache cold (compiled kernels, timings
of matrix products, the files' pages in memory), then two warm ones. After each, a completion is asked for and the server is
told to end; it must answer and exit with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np

import launch  # noqa: F401 (makes phalanx importable where it is not installed)
from phalanx.runtime.models import find_model
from tests.support.launcher import LAUNCHER_ENVIRONMENT

TILE_VALUES = 32 << 20
READY_LIMIT_SECONDS = 300


def write_random_checkpoint(config_directory: Path, directory: Path) -> int:
    """Write ``config.json`` and one bfloat16 ``model.safetensors`` with a normal distribution; returns its size in bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(config_directory / "config.json", directory)
    config = json.loads((config_directory / "config.json").read_text())
    model = find_model(config)
    shapes = {
        part.source: part.stored_shape for spec in model.weights(model.read_config(config)) for part in spec.parts
    }
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    tile = np.random.default_rng(0).normal(0.0, 0.02, TILE_VALUES).astype(ml_dtypes.bfloat16).tobytes()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for start in range(0, offset, len(tile)):
            file.write(tile[: offset - start])
    return offset


def drop_pages(files: Iterable[Path]) -> None:
    """Have the system forget what it holds of the files in memory."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_ready(directory: Path, ranks: int, caches: Path) -> float:
    """Start the server, wait for READY, ask it once and end it."""
    command = [sys.executable, "-m", "launch.serve", "--model", str(directory), "--engine", "cuda", "--port", "0"]
    if ranks > 1:
        command = ["mpirun", "-n", str(ranks), *command]
    environment = {
        name: str(caches / name.lower()) for name in ("PHALANX_CACHE_DIR", "CUPY_CACHE_DIR", "CUDA_CACHE_PATH")
    }
    start = time.monotonic()
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, **LAUNCHER_ENVIRONMENT, **environment}
    )
    try:
        url = _wait_for_ready(process, start + READY_LIMIT_SECONDS)
        elapsed = time.monotonic() - start
        body = {"model": directory.name, "prompt": [1, 2, 3], "max_tokens": 8, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 8
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
    return elapsed


def _wait_for_ready(process: subprocess.Popen[str], limit: float) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("READY"):
            return line.split()[1]
        sys.stderr.write(line)
        if time.monotonic() > limit:
            break
    raise SystemExit(f"the server was not ready within {READY_LIMIT_SECONDS} s")


def main() -> None:
    """Print the three figures as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="directory with config.json")
    parser.add_argument("--directory", type=Path, required=True, help="where the checkpoint goes; needs room for it")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    num_bytes = write_random_checkpoint(args.config, args.directory)
    with tempfile.TemporaryDirectory() as caches:
        drop_pages(args.directory.glob("*.safetensors"))
        cold, *warm = (seconds_to_ready(args.directory, args.ranks, Path(caches)) for _ in range(3))
    result = {"bytes": num_bytes, "ranks": args.ranks, "all_caches_cold_seconds": cold, "warm_seconds": warm}
    print(json.dumps(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
