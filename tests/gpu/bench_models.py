"""Throughput and latency of real models' sizes with random weights: ``python -m tests.gpu.bench_models [CASE...]``.

A case is one `launch.bench` command; without names, all that the GPUs of this machine allow are run. Each measures ``--num-iters``
times in one process and reports the median run. JSON and logs go to ``--out``; a line per case to standard output, and of one that failed
what it printed last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support.gpus import num_gpus
from tests.support.launcher import LAUNCHER_ENVIRONMENT
from tests.support.logs import why_it_failed

MODELS = Path(__file__).parent / "models"


@dataclass(frozen=True, slots=True)
class Case:
    """What `launch.bench` is asked for; ``max_num_seqs=1`` is one request at a time."""

    model: str
    input_len: int
    num_prompts: int
    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 2048
    tp: int = 1
    pp: int = 1
    output_len: int = 128
    quantize: str = "none"
    kv_cache_dtype: str = "auto"

    def command(self, num_iters: int, result: Path) -> list[str]:
        """The process to start."""
        mode = "latency" if self.max_num_seqs == 1 else "throughput"
        ranks = self.tp * self.pp
        launcher = ["mpirun", "-n", str(ranks)]
        options = {
            "model": MODELS / self.model, "load-format": "dummy", "engine": "cuda", "tp": self.tp, "pp": self.pp,
            "input-len": self.input_len, "output-len": self.output_len, "num-prompts": self.num_prompts,
            "max-num-seqs": self.max_num_seqs, "max-num-batched-tokens": self.max_num_batched_tokens,
            "quantize": self.quantize, "kv-cache-dtype": self.kv_cache_dtype, "num-iters": num_iters, "json": result,
        }  # fmt: skip
        flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [*(launcher if ranks > 1 else []), sys.executable, "-m", "launch.bench", mode, *flags]


FLOAT_CASES = {
    "gemma-2b": Case("gemma-2b", 128, 8192),
    "gemma-7b": Case("gemma-7b", 128, 2048),
    "llama-3-8b": Case("llama-3-8b", 128, 4096),
    "llama-3-8b-2048": Case("llama-3-8b", 2048, 256, max_num_seqs=256, max_num_batched_tokens=16384),
    "llama-3-8b-2048-steady": Case("llama-3-8b", 2048, 1024, max_num_seqs=512, max_num_batched_tokens=16384),
    "llama-3-8b-2048-at-once": Case("llama-3-8b", 128, 8192, max_num_seqs=2048, max_num_batched_tokens=4096),
    "llama-3-8b-one": Case("llama-3-8b", 128, 3, max_num_seqs=1),
    "gemma-2b-one": Case("gemma-2b", 128, 3, max_num_seqs=1),
    "llama-3-8b-tp2": Case("llama-3-8b", 128, 4096, tp=2),
    "llama-3-8b-pp2": Case("llama-3-8b", 128, 4096, pp=2),
    "llama-3-8b-tp2-one": Case("llama-3-8b", 128, 3, max_num_seqs=1, tp=2),
    "llama-2-70b-tp2": Case("llama-2-70b", 128, 1024, tp=2),
    "llama-2-70b-pp2": Case("llama-2-70b", 128, 1024, pp=2),
    "llama-2-70b-pp2-at-once": Case("llama-2-70b", 128, 4096, max_num_seqs=2048, max_num_batched_tokens=4096, pp=2),
    "llama-2-70b-pp4-at-once": Case("llama-2-70b", 128, 8192, max_num_seqs=4096, max_num_batched_tokens=8192, pp=4),
    "llama-2-70b-tp2-one": Case("llama-2-70b", 128, 2, max_num_seqs=1, tp=2),
    "llama-2-70b-tp4": Case("llama-2-70b", 128, 2048, tp=4),
    "llama-2-70b-pp4": Case("llama-2-70b", 128, 2048, pp=4),
    "llama-2-70b-tp4-one": Case("llama-2-70b", 128, 2, max_num_seqs=1, tp=4),
    "gpt-j-6b": Case("gpt-j-6b", 128, 2048),
    "qwen3-8b": Case("qwen3-8b", 128, 2048),
    "gemma-2-9b": Case("gemma-2-9b", 128, 2048),
    "bloom-7b1": Case("bloom-7b1", 128, 1024, max_num_seqs=512),
    "falcon-7b": Case("falcon-7b", 128, 2048),
    "falcon-7b-tp2": Case("falcon-7b", 128, 2048, tp=2),
    "falcon-7b-tp4": Case("falcon-7b", 128, 2048, tp=4),
    "qwen3-30b-a3b": Case("qwen3-30b-a3b", 128, 2048),
    "qwen3-30b-a3b-one": Case("qwen3-30b-a3b", 128, 2, max_num_seqs=1),
    "mixtral-8x7b-tp2": Case("mixtral-8x7b", 128, 2048, tp=2),
    "mixtral-8x7b-tp2-2048": Case("mixtral-8x7b", 2048, 256, max_num_seqs=256, max_num_batched_tokens=8192, tp=2),
    "mixtral-8x7b-tp2-one": Case("mixtral-8x7b", 128, 2, max_num_seqs=1, tp=2),
    "llama-2-70b-tp8": Case("llama-2-70b", 128, 2048, tp=8),
    "llama-2-70b-tp4-pp2": Case("llama-2-70b", 128, 2048, tp=4, pp=2),
    "llama-2-70b-tp2-pp4": Case("llama-2-70b", 128, 4096, max_num_seqs=2048, tp=2, pp=4),
    "llama-2-70b-pp8": Case("llama-2-70b", 128, 4096, max_num_seqs=2048, pp=8),
    "llama-2-70b-tp8-one": Case("llama-2-70b", 128, 2, max_num_seqs=1, tp=8),
    "llama-2-70b-tp8-294": Case(
        "llama-2-70b", 294, 4096, max_num_seqs=2048, max_num_batched_tokens=4096, tp=8, output_len=292
    ),
    "gemma-2b-tp8-one": Case("gemma-2b", 128, 3, max_num_seqs=1, tp=8),
}
EXPERT_CASES = {
    f"{name}-{scheme}": replace(case, kv_cache_dtype="fp8", **options)
    for name, case in {
        "mixtral-8x7b": Case("mixtral-8x7b", 128, 2048),
        "mixtral-8x7b-2048": Case("mixtral-8x7b", 2048, 256, max_num_seqs=256, max_num_batched_tokens=8192),
        "mixtral-8x7b-one": Case("mixtral-8x7b", 128, 2, max_num_seqs=1),
        "qwen3-30b-a3b": FLOAT_CASES["qwen3-30b-a3b"],
        "qwen3-30b-a3b-one": FLOAT_CASES["qwen3-30b-a3b-one"],
    }.items()
    for scheme, options in {
        "fp8": {"quantize": "fp8"},
        "int8": {"quantize": "int8"},
        "w4a16": {"model": f"{case.model}-w4a16"},
    }.items()
}
"""Experts as codes, which let a Mixtral of 47 billion weights run on one GPU."""
DENSE_CASES = {name: case for name, case in FLOAT_CASES.items() if not name.startswith(("mixtral", "qwen3-30b"))}
CASES = (
    FLOAT_CASES
    | EXPERT_CASES
    | {f"{name}-fp8": replace(case, quantize="fp8", kv_cache_dtype="fp8") for name, case in DENSE_CASES.items()}
    | {f"{name}-int8": replace(case, quantize="int8", kv_cache_dtype="fp8") for name, case in DENSE_CASES.items()}
    | {
        f"{name}-{form}": replace(case, model=f"{case.model}-{form}", kv_cache_dtype="fp8")
        for form in ("w4a16", "blocks")
        for name, case in DENSE_CASES.items()
        if (MODELS / f"{case.model}-{form}").is_dir()
    }
)
"""Every case as it is, and with fp8 or int8 weights and activations, with fp8 blocks, or with 4-bit weights, and with an fp8 cache."""


class CaseError(Exception):
    """A command that failed, and what it said."""


def run(name: str, num_iters: int, out: Path, timeout: float) -> str:
    """Run a case; one line about the result.

    Raises:
        CaseError: with the last lines of the command's output.
    """
    result, log = out / f"{name}.json", out / f"{name}.log"
    result.unlink(missing_ok=True)
    try:
        with open(log, "w") as file:
            command = CASES[name].command(num_iters, result)
            environment = {**os.environ, **LAUNCHER_ENVIRONMENT}
            subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=timeout, check=True, env=environment)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise CaseError(f"{name} failed: {why_it_failed(error, log)}") from None
    report = json.loads(result.read_text())
    runs = " ".join(f"{rate:,.1f}" for rate in report["runs_output_tokens_per_second"])
    idle = report["gpu_idle_fraction"]
    return (
        f"{name}: {report['output_tokens_per_second']:,.1f} tok/s (runs {runs}; steady "
        f"{report['steady_output_tokens_per_second']:,.0f}), {report['time_per_output_token_ms']['p50']:.3f} ms/token, "
        f"step {report['mean_step_ms']:.3f} ms, idle {idle:.3%}, {report['kv_blocks']} blocks"
    )


def those_that_fit(most: int) -> list[str]:
    """Cases of plain weights for at most so many GPUs."""
    return [name for name, case in FLOAT_CASES.items() if case.tp * case.pp <= most]


def main() -> int:
    """Run the cases that were named, or all that fit; exit status 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--num-iters", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one case")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"unknown cases {sorted(unknown)}; there are {', '.join(CASES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    status = 0
    for name in args.cases or those_that_fit(num_gpus()):
        try:
            line = run(name, args.num_iters, args.out, args.timeout)
        except CaseError as error:
            line, status = str(error), 1
        print(line, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
