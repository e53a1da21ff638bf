"""A flag that would change nothing is refused, wherever it came from; with what it needs it is taken."""

from __future__ import annotations

import pytest

from phalanx.launch.completion import command_parsers
from phalanx.launch.parser import UsageError
from phalanx.launch.settings import Settings

CASES = [
    ("serve", "--max-restarts 3", "--supervise"),
    ("serve", "--max-restarts 10", "--supervise"),  # the default, but given
    ("serve", "-n 8", "--supervise"),
    ("serve", "-n8", "--supervise"),
    ("serve", "--num-ranks 8", "--supervise"),
    ("serve", "--launcher srun", "--supervise"),
    ("serve", "--engine-dir engines", "--engine tensorrt"),
    ("generate", "--engine-dir engines", "--engine tensorrt"),
    ("generate", "--length-penalty 2", "--beam-width 4"),
    ("generate", "--top-p 0.9", "--temperature 0.7"),
    ("generate", "--top-k 5", "--temperature 0.7"),
    ("generate", "--min-p 0.1", "--input-file lines.jsonl"),
    ("plan", "--ranks 8", "--optimise latency"),
    ("plan", "--gpu h100", "--optimise latency"),
    ("plan", "--input-len 5", "--optimise throughput"),
    ("plan", "--output-len 5", "--optimise throughput"),
    ("build", "--output engines --seed 5", "--load-format dummy"),
    ("tune", "--again", "--model model"),
    ("tune", "--tp 2", "--model model"),
    ("tune", "--dtype float16", "--model model"),
    ("tune", "--tokens 1,2", "--model model"),
    ("bench serve", "--url http://127.0.0.1:1 --burstiness 2", "--request-rate 5"),
    ("eval", "--text text --against-quantize none", "--against model"),
    ("eval", "--text text --against-kv-cache-dtype fp8", "--against model"),
    ("eval", "--text text --against-dtype float32", "--against model"),
    ("eval", "--text text --against-engine numpy", "--against model"),
    ("eval", "--text text --against-tp 2", "--against model"),
    ("eval", "--text text --against-pp 2", "--against model"),
    ("quantize", "--output out --scheme int8 --calibration text", "--method smoothquant"),
]


@pytest.mark.parametrize(("command", "words", "needed"), CASES)
def test_a_flag_that_needs_another_is_refused_without_it(command: str, words: str, needed: str) -> None:
    with pytest.raises(UsageError, match=r"argument --?[\w/-]+: has no effect .*, or leave --?[\w-]+ out"):
        command_parsers()[command].parse_args(words.split())
    command_parsers()[command].parse_args([*words.split(), *needed.split()])


@pytest.mark.parametrize("flag", ["--tp", "--pp", "--dp"])
def test_a_plan_of_all_layouts_takes_no_layout(flag: str) -> None:
    parser = command_parsers()["plan"]
    parser.parse_args([flag, "2"])
    with pytest.raises(UsageError, match=f"has no effect with --optimise, .* or leave {flag} out"):
        parser.parse_args([flag, "2", "--optimise", "latency", "--ranks", "8"])


def test_a_variable_without_effect_is_named() -> None:
    with pytest.raises(UsageError, match=r"argument --max-restarts: .* \(from PHALANX_MAX_RESTARTS\)"):
        command_parsers()["serve"].parse_settings(Settings((), {"PHALANX_MAX_RESTARTS": "3"}))
