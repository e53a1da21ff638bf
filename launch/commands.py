# SPDX-License-Identifier: Apache-2.0
"""The commands there are, each a module of this folder, and what each one does."""

from __future__ import annotations

__all__ = ["COMMANDS"]

COMMANDS = {
    "serve": "answer HTTP requests (protocols of OpenAI, Anthropic and Triton)",
    "generate": "continue prompts and print the result",
    "eval": "loss and perplexity of a checkpoint on a text file",
    "bench": "throughput and latency",
    "split": "write one weight shard per rank",
    "quantize": "write a float checkpoint as fp8, int8 or 4-bit weights",
    "convert": "turn a checkpoint of Megatron-LM, NeMo or FasterTransformer into a directory that loads",
    "build": "build TensorRT engines, one per rank",
    "check": "check a model's functions and declarations before any weight is read",
    "plan": "memory per rank and how many sequences fit",
    "slurm": "a Slurm batch script for a model, each line explained",
    "tune": "show or refresh the GEMM tuning cache of this GPU",
    "completion": "a script that completes commands and flags in your shell",
    "doctor": "what works on this machine, with a fix for each failure",
}
