# SPDX-License-Identifier: Apache-2.0
"""Ask a running server with the official client.

    mpirun -n 4 python -m launch.serve --tp 2 --pp 2          # in one terminal, until it prints READY
    pip install openai && python examples/openai_client.py     # in another

Any OpenAI client works; only the base URL differs.
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main(url: str = "http://127.0.0.1:8000") -> None:
    """Complete a line of Python, then chat, both token by token."""
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id

        print(f"--- {model} completes: def main(")
        for chunk in client.completions.create(
            model=model, prompt="def main(", max_tokens=64, temperature=0, stream=True
        ):
            print(chunk.choices[0].text, end="", flush=True)

        print("\n--- and answers")
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What are you?"}],
            max_completion_tokens=64,
            temperature=0,
        )
        print(answer.choices[0].message.content)
        if answer.usage is not None:
            print(f"--- {answer.usage.prompt_tokens} + {answer.usage.completion_tokens} tokens")


if __name__ == "__main__":
    main(*sys.argv[1:2])
