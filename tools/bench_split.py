"""Speed of ``launch.split`` against ``cp -r`` on the same files, page cache warm, the two alternating in one run.

    python tools/bench_split.py [--gigabytes 2] [--tp 2] [--pp 2] [--rounds 5] [--directory /tmp] [--json FILE]

Prints the ratio of the best speeds; the acceptance bound is 0.5. Neither flushes to the disk. Needs idle processors: cp takes
one, the split as many threads as there are (at most four), and the start of the interpreter counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; exit status 1 if the ratio is below the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write (default: the system's temporary directory)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        result = compare(Path(folder), args.gigabytes, args.tp, args.pp, args.rounds)
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(result["ratio"] < 0.5)


def compare(folder: Path, gigabytes: float, tp: int, pp: int, rounds: int) -> dict[str, Any]:
    """Best of ``rounds`` each (other work on the machine only ever adds time), after one round that warms the cache."""
    model = folder / "model"
    num_bytes = make_checkpoint(model, gigabytes)
    split = [
        sys.executable,
        "-m",
        "launch.split",
        "--model",
        str(model),
        "--tp",
        str(tp),
        "--pp",
        str(pp),
        "--output",
    ]
    seconds: dict[str, list[float]] = {"cp": [], "split": [], "start": []}
    for number in range(rounds + 1):
        for name, command in (("cp", ["cp", "-r", str(model)]), ("split", split)):
            taken = timed([*command, str(folder / name)])
            shutil.rmtree(folder / name)
            if number:
                seconds[name].append(taken)
        seconds["start"].append(timed([sys.executable, "-c", "import launch.split, numpy, ml_dtypes, msgspec"]))
    best = {name: min(times) for name, times in seconds.items()}
    return {
        "gigabytes": round(num_bytes / 1e9, 3),
        "tp": tp,
        "pp": pp,
        "cp_gigabytes_per_second": round(num_bytes / 1e9 / best["cp"], 2),
        "split_gigabytes_per_second": round(num_bytes / 1e9 / best["split"], 2),
        "interpreter_start_seconds": round(best["start"], 2),
        "ratio": round(best["cp"] / best["split"], 2),
        "rounds": {name: [round(taken, 3) for taken in times] for name, times in seconds.items()},
    }


def timed(command: Sequence[str]) -> float:
    """Wall seconds of a command that must succeed, dirty pages of earlier ones written first."""
    subprocess.run(["sync"], check=True)
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def make_checkpoint(path: Path, gigabytes: float) -> int:
    """A Llama-shaped bfloat16 checkpoint of about ``gigabytes`` in two shards; returns its size in bytes."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    layers = max(2, round(gigabytes * 1e9 / (2 * 26.8e6)) // 2 * 2)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 1408,
        "intermediate_size": 4352,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(0)

    def tensor(*shape: int) -> Any:
        return generator.integers(0, 1 << 14, shape, np.uint16).view(ml_dtypes.bfloat16)

    for shard, numbers in enumerate((range(layers // 2), range(layers // 2, layers)), 1):
        tensors = {f"model.layers.{n}.{name}": tensor(*shape) for n in numbers for name, shape in block().items()}
        if shard == 1:
            tensors["model.embed_tokens.weight"] = tensor(32000, 1408)
        else:
            tensors["lm_head.weight"] = tensor(32000, 1408)
            tensors["model.norm.weight"] = tensor(1408)
        save_file(tensors, path / f"model-0000{shard}-of-00002.safetensors")
    return sum(file.stat().st_size for file in path.iterdir())


def block() -> dict[str, tuple[int, ...]]:
    """Names and shapes of one decoder block."""
    d, f = 1408, 4352
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{letter}_proj.weight": (d, d) for letter in "qkvo"}
    shapes |= {"mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f)}
    return shapes | {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}


if __name__ == "__main__":
    raise SystemExit(main())
