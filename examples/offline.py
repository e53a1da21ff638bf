# SPDX-License-Identifier: Apache-2.0
"""Continue prompts without a server: the same script runs on every rank.

    python examples/offline.py                    # one rank
    mpirun -n 4 python examples/offline.py        # four ranks, tensor-parallel

Every rank makes the `LLM` and calls `generate` with the same prompts; every rank gets all results, and one prints them.
"""

from __future__ import annotations

from phalanx import LLM, SamplingParams

PROMPTS = ["def main(", "class Queue:\n    def __init__(self", "import os\n"]


def main() -> None:
    """Greedy and sampled continuations of the demo model."""
    greedy = SamplingParams(max_tokens=24, temperature=0.0)
    sampled = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.95, seed=7)
    with LLM() as llm:  # a directory as first argument; no argument: the demo checkpoint
        outputs = llm.generate(PROMPTS, [greedy, greedy, sampled])
        if llm.is_leader:
            for prompt, output in zip(PROMPTS, outputs, strict=True):
                print(f"--- {output.finish_reason} after {len(output.token_ids)} tokens")
                print(prompt + (output.text or ""))


if __name__ == "__main__":
    main()
