"""What the documents tell a user to type exists, and tables that a command prints are what it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from phalanx.launch.completion import command_parsers
from phalanx.launch.plan import main as plan

from .commands import ROOT

HOWTO = ROOT / "docs" / "howto"
PAGES = sorted([ROOT / "README.md", *HOWTO.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "slurm").glob("*.md")])
LLAMA_3_70B = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


def flags_of_commands() -> dict[str, set[str]]:
    """Every flag of each command, those of its modes together."""
    flags: dict[str, set[str]] = {}
    for name, parser in command_parsers().items():
        flags.setdefault(name.partition(" ")[0], set()).update(parser._option_string_actions)
    return flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_line_has_flags_that_exist(page: Path) -> None:
    flags = flags_of_commands()
    text = page.read_text().replace("\\\n", " ")
    unknown = [
        f"{command} {flag}"
        for command, rest in re.findall(r"(?:phalanx |-m launch\.)(\w+)((?: [^\n|`;&#>]*)?)", text)
        if command in flags
        for flag in re.findall(r"(?<=\s)--[a-z][\w-]*", rest)
        if flag not in flags[command]
    ]
    assert unknown == []


def test_coming_from_another_server_leads_to_flags_that_exist() -> None:
    flags = set().union(*flags_of_commands().values()) | {"--host"}
    for line in (HOWTO / "coming-from.md").read_text().splitlines():
        ours = line.split("|")[2] if line.startswith("|") else ""
        assert [flag for flag in re.findall(r"--[a-z][\w-]*", ours) if flag not in flags] == [], line
        if ours.strip().startswith("the same"):
            theirs = line.split("|")[1].partition(", `-")[0] if "long names" in ours else line.split("|")[1]
            assert [flag for flag in re.findall(r"--[a-z][\w-]*", theirs) if flag not in flags] == [], line


def test_every_variable_that_the_code_reads_is_listed() -> None:
    """Those of flags are one row; the supervisor alone sets ``PHALANX_HTTP_PLACE``, and ``PHALANX_API`` is a name in model files."""
    listed = (HOWTO / "environment.md").read_text()
    folders = ("launch", "parallel", "runtime", "checkpoints", "kernels", "slurm", "containers")
    found = {
        name
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in (".py", ".sh", ".sbatch", ".def", "")
        for name in re.findall(r"PHALANX_[A-Z_]*[A-Z]", path.read_text())
    }
    of_flags = {
        f"PHALANX_{flag[2:].replace('-', '_').upper()}" for flags in flags_of_commands().values() for flag in flags
    }
    assert {name for name in found - of_flags if f"`{name}`" not in listed} == {"PHALANX_HTTP_PLACE", "PHALANX_API"}


def test_the_table_of_a_70b_model_is_what_plan_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_70B))
    assert plan(["--model", str(tmp_path), "--tp", "8", "--pp", "2", "--gpu-memory-gib", "80"]) == 0
    printed = capsys.readouterr().out.splitlines()
    block = (HOWTO / "70b-on-slurm.md").read_text().split("```text\n")[1].split("```")[0].splitlines()
    shown = [line for line in block if line.strip() != "..."]
    assert [line for line in printed if line in shown] == shown
    assert printed[-2:] == shown[-2:]
