"""`make try-models` reads what is there, lists refusals, and fails only for crashes and differences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.text import tokenizers_for_tests as made

ROOT = Path(__file__).resolve().parent.parent.parent
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip


def run(directory: Path) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools" / "tree")}
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "try_models.py"), str(directory)],
        capture_output=True,
        text=True,
        env=environment,
    )
    return result.returncode, result.stdout + result.stderr


def test_every_file_is_tried_and_counted(tmp_path: Path) -> None:
    for name, config in (("good", LLAMA), ("bad", {**LLAMA, "is_causal": False})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "good" / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.6}')
    made.byte_level().save(str(tmp_path / "good" / "tokenizer.json"))
    (tmp_path / "good" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    (tmp_path / "chatml.jinja").write_text("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}")
    status, output = run(tmp_path)
    assert status == 0, output
    assert "refused bad/config.json: is_causal=False" in output
    for line in (
        "1 config: read",
        "1 config: refused",
        "1 generation_config: read",
        "1 tokenizer: read",
        "2 template: read",
    ):
        assert line in output


def test_a_crash_fails(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    status, output = run(tmp_path)
    assert status == 1
    assert "FAILED config.json: JSONDecodeError" in output
