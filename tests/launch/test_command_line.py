"""The command line: settings from elsewhere, suggestions, spellings, odd values, completion, help without weight."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phalanx.launch.arguments import add_model_arguments
from phalanx.launch.bench import build_parser
from phalanx.launch.commands import COMMANDS
from phalanx.launch.completion import command_parsers
from phalanx.launch.parser import CommandParser, UsageError, _similar_variable
from phalanx.launch.settings import Settings, variable_name
from phalanx.parallel.errors import ConfigError

from .commands import ROOT, command_line, messages, run


def parse(*words: str, variables: dict[str, str] | None = None, config: dict[str, object] | None = None) -> object:
    parser = CommandParser("launch.test")
    add_model_arguments(parser)
    parser.add_argument("--max-num-seqs", type=int, help="n")
    parser.add_argument("--stop", action="append", default=[], help="texts")
    parser.add_argument("--name", nargs="+", help="names")
    parser.add_argument("--stream", action="store_true", help="flag")
    return parser.parse_settings(Settings(words, variables or {}, "file.toml" if config else "", config or {}))


def values(*words: str, **elsewhere: dict[str, object]) -> dict[str, object]:
    return vars(parse(*words, **elsewhere))  # type: ignore[arg-type]


def test_underscores_are_as_good_as_dashes() -> None:
    assert values("--max_num_seqs=4", "--load_format", "dummy")["max_num_seqs"] == 4


def test_the_command_line_wins_over_the_environment_and_that_over_the_file() -> None:
    given = {
        "variables": {"PHALANX_MAX_NUM_SEQS": "2", "PHALANX_DTYPE": "float16"},
        "config": {"max-num-seqs": 1, "seed": 5, "dtype": "float32"},
    }
    found = values("--max-num-seqs", "3", **given)  # type: ignore[arg-type]
    assert (found["max_num_seqs"], found["dtype"], found["seed"]) == (3, "float16", 5)


def test_lists_and_switches_come_from_elsewhere_too() -> None:
    found = values(variables={"PHALANX_STREAM": "yes", "PHALANX_NAME": "a 'b c'"}, config={"stop": ["x", "-y"]})
    assert (found["stream"], found["name"], found["stop"]) == (True, ["a", "b c"], ["x", "-y"])
    assert values(variables={"PHALANX_STREAM": "0"})["stream"] is False


@pytest.mark.parametrize(
    ("words", "elsewhere", "said"),
    [
        (["--max-num-seq", "4"], {}, r"unrecognized arguments: --max-num-seq; did you mean --max-num-seqs\?"),
        (["--load", "dummy"], {}, r"did you mean --load-format\?"),
        ([], {"variables": {"PHALANX_MAX_NUM_SEQ": "4"}}, r"PHALANX_MAX_NUM_SEQ is not a setting; did you mean PHALANX_MAX_NUM_SEQS\?"),
        ([], {"variables": {"PHALANX_SEDE": "4"}}, r"PHALANX_SEDE is not a setting; did you mean PHALANX_SEED\?"),
        ([], {"variables": {"PHALANX_MAX_NUM_SEQS": "x"}}, r"invalid int value: 'x' \(from PHALANX_MAX_NUM_SEQS\)"),
        ([], {"config": {"max-seqs": 4}}, r"file\.toml: 'max-seqs' is not a flag; did you mean --max-num-seqs\?"),
        ([], {"config": {"max-num-seqs": [1, 2]}}, r"has 2 values; --max-num-seqs takes one"),
        ([], {"config": {"seed": {"a": 1}}}, r"is not a value of --seed"),
        ([], {"variables": {"PHALANX_STREAM": "perhaps"}}, r"'perhaps' is neither yes nor no"),
        (["a", "--model", "b"], {}, r"two models, .*; give one"),
        (["a", "--max-num-seq", "4"], {}, r"unrecognized arguments: --max-num-seq( 4)?; did you mean --max-num-seqs\?"),
        (["--model", "a", "--max-num-seq", "4"], {}, r"unrecognized arguments: --max-num-seq; did you mean --max-num-seqs\?"),
    ],
)  # fmt: skip
def test_a_wrong_name_or_value_says_where_it_is_from(words: list[str], elsewhere: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(*words, **elsewhere)  # type: ignore[arg-type]


def test_variables_of_other_programs_are_passed_over() -> None:
    service = {
        "PHALANX_PORT": "tcp://10.0.0.1:8000",
        "PHALANX_PORT_8000_TCP_PROTO": "tcp",
        "PHALANX_SERVICE_HOST": "10.0.0.1",
        "PHALANX_SERVICE_PORT_HTTP": "8000",
    }
    assert Settings.read((), "serve", {**service, "PHALANX_SEED": "3"}).variables == {"PHALANX_SEED": "3"}
    others = {
        "PHALANX_CACHE_DIR": "/tmp",
        "PHALANX_MPI_START_SECONDS": "9",
        "PHALANX_TEST_JOB": "x",
        "PHALANX_URL": "x",
    }
    for parser in command_parsers().values():
        for name in others:
            assert _similar_variable(name, map(variable_name, parser.flags())) in ("", name)


def test_the_model_may_be_a_word_of_its_own() -> None:
    assert values("models/a", "--seed", "1")["model"] == Path("models/a")
    assert values("--seed", "1", "models/a")["model"] == Path("models/a")
    assert values()["model"] is None
    assert values("models/a", variables={"PHALANX_MODEL": "models/b"})["model"] == Path("models/a")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "seed = 5\n[serve]\nport = 80\n[eval]\nseed = 6\n"),
        ("a.yaml", "seed: 5\nserve: {port: 80}\neval: {seed: 6}\n"),
        ("a.json", '{"seed": 5, "serve": {"port": 80}, "eval": {"seed": 6}}'),
    ],
)
def test_a_table_named_after_a_command_is_for_that_command(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    words = ("--config", str(tmp_path / name))
    assert Settings.read(words, "eval").config == {"seed": 6}
    assert Settings.read(words, "serve").config == {"seed": 5, "port": 80}
    assert Settings.read((), "plan", {"PHALANX_CONFIG": words[1]}).config == {"seed": 5}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "seed =", "is not TOML"),
        ("a.yaml", "a: [", "is not YAML"),
        ("a.yaml", "- a", "is not a table"),
        ("a.yaml", "!!map foo", "is not YAML: expected a mapping node"),
        ("a.ini", "", "has an unknown suffix; name it .yaml"),
        ("a.yaml", "seed: 1\nport: 2\nseed: 3\n", "the key 'seed' is there twice.*line 3"),
        ("a.json", '{"seed": 1, "serve": {"port": 2, "port": 3}}', "the key 'port' is there twice"),
        ("a.toml", "seed = 1\nseed = 2\n", "is not TOML"),
        ("a.json", "[" * 5000, "is nested too deeply"),
    ],
)
def test_a_broken_configuration_is_one_line(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=re.compile(said, re.DOTALL)):
        Settings.read(("--config", str(tmp_path / name)), "eval")


@pytest.mark.parametrize("words", [("--config", ""), ("--config=",)])
def test_a_configuration_without_a_name_is_not_overlooked(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="--config names no file"):
        Settings.read(words, "eval")


def test_values_that_only_yaml_has_reach_other_ranks_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("served-model-name: 2026-11-28\n")
    settings = Settings.read(("--config", str(tmp_path / "a.yaml")), "serve")
    assert Settings.decode(settings.encode()).config == {"served-model-name": "2026-11-28"}


@pytest.mark.parametrize("flag", ["--model=", "--model-file=", "--engine-dir="])
def test_an_empty_path_is_not_the_working_directory(flag: str) -> None:
    with pytest.raises(UsageError, match=f"argument {flag[:-1]}: .* is empty; give one"):
        parse(flag)


def test_a_flag_of_another_mode_is_not_suggested_to_itself() -> None:
    with pytest.raises(UsageError, match=r"unrecognized arguments: --url; it belongs to serve"):
        build_parser().parse_args(["throughput", "--url", "http://127.0.0.1:1"])


def test_a_command_is_reported_as_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["throughput", "--model", "/models/a b"]
    assert build_parser().command_line(words) == "python -m launch.bench throughput --model '/models/a b'"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/phalanx", "bench", *words])
    assert build_parser().command_line(words) == "phalanx bench throughput --model '/models/a b'"


def test_a_variable_of_another_command_is_not_a_misspelling() -> None:
    """``--ranks`` is of plan, ``--rank`` of build."""
    words = Settings(("--output", "engines"), {"PHALANX_RANKS": "8"})
    assert command_parsers()["build"].parse_settings(words).rank is None


def test_an_empty_variable_of_a_path_is_named() -> None:
    with pytest.raises(UsageError, match=r"argument --model: the name is empty; .* \(from PHALANX_MODEL\)"):
        parse(variables={"PHALANX_MODEL": ""})


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generate", "--output -"),
        ("bench throughput", "--json -"),
        ("serve", "--endpoint-file -"),
        ("quantize", "--scheme int8 --output -"),
    ],
)
def test_a_dash_is_not_taken_for_a_file_of_that_name(command: str, words: str) -> None:
    with pytest.raises(UsageError, match=r"argument --[\w-]+: - does not stand for .* here; give a path"):
        command_parsers()[command].parse_args(words.split())


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_a_number_must_be_finite(value: str) -> None:
    parser = CommandParser("launch.test")
    parser.add_argument("--seconds", type=float, help="n")
    with pytest.raises(UsageError, match=f"argument --seconds: '{value}' is not a finite number; leave the flag out"):
        parser.parse_args([f"--seconds={value}"])


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_needs_nothing_heavy_and_version_answers(command: str) -> None:
    program = (
        f"import sys\nimport launch.{command} as command\ntry:\n    command.main(['--help'])\nexcept SystemExit as exit_:\n"
        "    assert exit_.code == 0\nassert not {'mpi4py.MPI', 'cupy', 'tensorrt', 'rich', 'starlette'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, timeout=60)
    assert run(command, "--version").stdout.startswith("phalanx 0.")


def test_every_flag_has_a_help_text() -> None:
    silent = [
        f"{name} {action.option_strings or action.dest}"
        for name, parser in command_parsers().items()
        for action in parser._actions
        if not action.help
    ]
    assert silent == []


@pytest.mark.parametrize(
    "flag", ["--num-kv-blocks 99999999999999999999", "--num-kv-blocks 2000000000", "--max-num-seqs 2000000000", "--block-size 2147483648"]
)  # fmt: skip
def test_a_huge_size_is_one_line(flag: str) -> None:
    result = run("generate", "--prompt", "a", *flag.split())
    assert result.returncode == 2
    assert len(messages(result.stderr)) == len(result.stderr.splitlines()) == 1, result.stderr
    assert flag.split()[0] in result.stderr


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid", "two words"])
def test_a_wrong_host_is_one_line_about_the_host(host: str) -> None:
    result = run("serve", "--insecure", "--port", "0", "--host", host)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert f"--host {host} is not an address of this machine" in result.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("line", "expected"),
    [("phalanx ser", "serve"), ("phalanx serve --max-model", "--max-model-len"), ("phalanx eval --engine nu", "numpy")],
)
def test_bash_completes_commands_flags_and_choices(line: str, expected: str) -> None:
    script = run("completion", "bash").stdout
    words = line.split()
    program = f"{script}\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _phalanx; echo ${{COMPREPLY[@]}}"
    result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [expected]


def test_a_file_called_launch_is_told_from_ours(tmp_path: Path) -> None:
    """``python -m launch.serve`` takes the working directory's; ``phalanx`` does not."""
    (tmp_path / "launch.py").write_text("")
    script = Path(sys.executable).with_name("phalanx")
    if not script.exists():
        pytest.skip("not installed: no console script")
    result = subprocess.run([script, "plan"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert command_line("plan")[1:] == ["-m", "launch.plan"]


def test_the_reference_is_what_the_code_says() -> None:
    from tools.write_reference import pages

    stale = [str(path.relative_to(ROOT)) for path, text in pages().items() if path.read_text() != text]
    assert stale == [], "run python tools/write_reference.py"
