"""What a careless user does, and what they get. Each row of ``docs/careless.md`` is a test here or one named below.

Everything is a real process, under mpirun where ranks matter. A mistake ends with status 2 and exactly one line on standard error,
from one rank, that has the value, the limit and the way out.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from phalanx.kernels.device import gpu_is_available
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint

from .commands import ROOT, command_line, messages, needs_mpirun, processes, rank_process, run

DEMO = ROOT / "checkpoints" / "demo"
TABLE = ROOT / "docs" / "careless.md"
MARK = "PHALANX_CARELESS_JOB"
LIMIT_SECONDS = 60.0  # what does not end by then hangs; a loaded machine takes its time
ENDLESS = ("--stream", "--prompt-token-ids", "5,6", "--max-tokens", "2000", "--ignore-eos")
no_gpu = pytest.mark.skipif(gpu_is_available(), reason="there is a GPU here")


@dataclass(frozen=True, slots=True)
class Mistake:
    """A row of the table.

    Attributes:
        did: the row's first column.
        arguments: of ``command``; ``{}`` stands for the test's directory.
        said: what the one line must contain.
        prepare: changes the model in the test's directory before.
    """

    did: str
    arguments: str
    said: tuple[str, ...]
    ranks: int = 2
    command: str = "generate"
    prepare: Callable[[Path], object] | None = None


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text)


def in_config(old: str, new: str) -> Callable[[Path], object]:
    def prepare(directory: Path) -> None:
        path = directory / "model" / "config.json"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return prepare


def demo_without(name: str) -> Callable[[Path], object]:
    def prepare(directory: Path) -> None:
        shutil.copytree(DEMO, directory / "demo")
        (directory / "demo" / name).unlink()

    return prepare


def demo_truncated(directory: Path) -> None:
    shutil.copytree(DEMO, directory / "demo")
    shard = directory / "demo" / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1000)


IDS = "--prompt-token-ids 5,6"
TINY = "--model {}/model"
MISTAKES = (
    Mistake("3 ranks for `--tp 2`", f"--tp 2 {IDS}", ("tp=2 needs 2 rank(s) but 3 started", "mpirun -n 2"), ranks=3),
    Mistake("`--pp 3` on 2 ranks", f"--pp 3 {IDS}", ("2 rank(s) cannot be shared by pp=3", "mpirun -n 3")),
    Mistake("`--tp 5` on a model with 4 heads", f"{TINY} --tp 5 {IDS}",
            ("4 query heads cannot be shared by tp_size=5", "use a tp_size of at most 4"), ranks=5),
    Mistake("more pipeline stages than layers", f"{TINY} --pp 4 {IDS}", ("num_layers=3", "pp_size=4", "at most 3"), ranks=4),
    Mistake("`--dp 0`", f"--dp 0 {IDS}", ("--data-parallel-size=0 is below 1", "use 1")),
    Mistake("a misspelt flag", f"{IDS} --max-token 4", ("unrecognized arguments: --max-token; did you mean --max-tokens?",)),
    Mistake("a flag that does not exist", f"{IDS} --speed fast", ("--speed", "launch.generate --help")),
    Mistake("a command that does not exist", "frobnicate", ("'frobnicate' is not a command", "use one of: serve"), command="main"),
    Mistake("no prompt at all", TINY, ("no prompt", "--input-file"), ranks=0),
    Mistake("a model directory that does not exist", f"--model {{}}/nowhere {IDS}", ("nowhere' does not exist", "config.json")),
    Mistake("a file for a directory", f"{TINY}/config.json {IDS}", ("is a file; give a directory",), ranks=0),
    Mistake("a shard is missing", f"--model {{}}/demo {IDS}", ("model-00002-of-00002.safetensors' is missing", "copy it there"),
            prepare=demo_without("model-00002-of-00002.safetensors")),
    Mistake("a shard was cut off while copying", f"--model {{}}/demo {IDS}",
            ("model-00002-of-00002.safetensors", "bytes, but its header describes", "copy the file again"), prepare=demo_truncated),
    Mistake("`config.json` of an architecture that Phalanx does not have", f"{TINY} {IDS}",
            ("T5ForConditionalGeneration", "supported: Llama"), prepare=in_config("LlamaForCausalLM", "T5ForConditionalGeneration")),
    Mistake("a `config.json` that is no JSON", f"{TINY} {IDS}", ("config.json' is not valid JSON", "line 1"), prepare=write("model/config.json", "{"), ranks=0),
    Mistake("a Git LFS pointer for the weights", f"{TINY} {IDS}", ("model.safetensors' is a Git LFS pointer", "git lfs pull"),
            prepare=write("model/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), ranks=0),
    Mistake("the name of a model that was not downloaded", f"--model org/none {IDS}",
            ("not in the Hugging Face cache", "`hf download org/none` gets it"), ranks=0),
    Mistake("a key of `config.json` that changes the computation", f"{TINY} {IDS}", ("is_causal=False in config.json is not supported",),
            prepare=in_config('"hidden_act"', '"is_causal": false, "hidden_act"'), ranks=0),
    Mistake("a quantised checkpoint of a kind that is not supported", f"{TINY} {IDS}", ("bitsandbytes",),
            prepare=in_config('"hidden_act"', '"quantization_config": {"quant_method": "bitsandbytes"}, "hidden_act"'), ranks=0),
    Mistake("a text for a checkpoint without `tokenizer.json`", f"{TINY} --prompt Hello", ("no tokenizer.json", "give token ids")),
    Mistake("a prompt longer than the model", f"{TINY} --max-model-len 8 --prompt-token-ids 1,2,3,4,5,6,7,8,9",
            ("prompt of 9 tokens", "of 8 tokens", "shorten the prompt")),
    Mistake("a token id outside the vocabulary", f"{TINY} --prompt-token-ids 5,101", ("prompt token 1 is 101", "from 0 to 100")),
    Mistake("a token id that no array can hold", f"{TINY} --prompt-token-ids 99999999999999999999", ("99999999999999999999", "below the vocabulary"), ranks=0),
    Mistake("an empty prompt", f"{TINY} --input-file {{}}/lines", ("the prompt has no tokens", "give at least one"),
            prepare=write("lines", '{"prompt_token_ids": []}\n')),
    Mistake("`--temperature 3`", f"{TINY} {IDS} --temperature 3", ("temperature=3.0 is out of range", "between 0.0 and 2.0"), ranks=0),
    Mistake("`--temperature hot`", f"{TINY} {IDS} --temperature hot", ("--temperature", "'hot'", "--help")),
    Mistake("an input file that cannot be read", f"{TINY} --input-file {{}}/nowhere", ("nowhere cannot be read", "check the path"), ranks=0),
    Mistake("a broken line in an input file", f"{TINY} --input-file {{}}/lines", ("line 2 is not a JSON object", "one object a line"),
            prepare=write("lines", '{"prompt_token_ids": [5]}\n{"prompt_token_ids": \n')),
    Mistake("a misspelt field in an input file", f"{TINY} --input-file {{}}/lines", ("unknown field 'heat'", "known: max_tokens, temperature"),
            prepare=write("lines", '{"prompt_token_ids": [5], "heat": 1}\n'), ranks=0),
    Mistake("an empty input file", f"{TINY} --input-file {{}}/lines", ("holds no prompt", "write lines like"), prepare=write("lines", ""), ranks=0),
    Mistake("`--engine cuda` without a GPU", f"{IDS} --engine cuda", ("the cuda engine found no GPU", "use --engine numpy")),
    Mistake("`--engine tensorrt` without a GPU", f"{IDS} --engine tensorrt", ("--engine tensorrt",)),
    Mistake("`--max-model-len` beyond the model's positions", f"{TINY} {IDS} --max-model-len 129", ("--max-model-len=129", "128 positions", "at most 128"), ranks=0),
    Mistake("a cache that cannot hold one sequence", f"{TINY} {IDS} --num-kv-blocks 1 --max-model-len 64",
            ("--max-model-len=64", "1 blocks x 16 = 16 tokens", "more --num-kv-blocks")),
    Mistake("`--block-size 0`", f"{TINY} {IDS} --block-size 0", ("--block-size=0 is below 1", "use at least 1"), ranks=0),
    Mistake("`launch.split` into a directory that exists", f"{TINY} --output {{}}/model", ("exists", "choose another name"), command="split"),
    Mistake("a server for other machines without keys", f"{TINY} --host 0.0.0.0", ("--host=0.0.0.0", "--api-key-file", "--insecure"), command="serve"),
    Mistake("a key file that does not exist", f"{TINY} --api-key-file {{}}/keys", ("keys cannot be read", "check the path"), command="serve"),
    Mistake("a port above 65535", f"{TINY} --port 70000", ("--port=70000", "0 (any free one) to 65535"), command="serve", ranks=0),
    Mistake("`--expert-parallel` for a model without experts", f"{TINY} --port 0 --expert-parallel", ("LlamaForCausalLM has no experts", "leave it out"), command="serve", ranks=0),
    Mistake("`--max-restarts` without `--supervise`", f"{TINY} --port 0 --max-restarts 3", ("--max-restarts", "no effect without --supervise"), command="serve"),
    Mistake("an empty path, as of a variable that is not set", f"{IDS} --model=", ("argument --model: the name is empty", "give one")),
    Mistake("`http://` in `--host`", f"{TINY} --port 0 --host http://127.0.0.1", ("'http://127.0.0.1' is not an address", "use 127.0.0.1"), command="serve"),
    Mistake("an `--endpoint-file` that cannot be written", f"{TINY} --port 0 --endpoint-file {{}}", ("cannot be written: Is a directory", "name a file"), command="serve"),
    Mistake("a plan for more ranks than there are", "--tp 1000000000", ("tp_size=1000000000", "use a tp_size of at most"), command="plan", ranks=0),
    Mistake("`--against` a directory without a model", f"{TINY} --text {{}}/model/config.json --against {{}}", ("'config.json' is missing from model directory",), command="eval", ranks=0),
    Mistake("`--report` where nothing can be written", "--output {}/out --scheme int8 --report {}/none/report.json", ("--report", "cannot be written", "choose another place"), command="quantize", ranks=0),
    Mistake("a load test with no server there", "serve --url http://127.0.0.1:9", ("cannot be reached", "start a server"), ranks=0, command="bench"),
)  # fmt: skip

ELSEWHERE = {
    "`--against` a model with another vocabulary or tokenizer": "tests/demo/test_eval_against.py::test_mistakes_get_one_line",
    "Ctrl-C on the server under Open MPI": "tests/server/test_serve.py::test_an_interrupted_open_mpi_ends_with_an_error",
    "standard output closed (`>&-`)": "tests/launch/test_streams.py::test_output_to_a_closed_stream_is_one_line",
    "a flag without the one that it needs": "tests/launch/test_flags_without_effect.py::test_a_flag_that_needs_another_is_refused_without_it",
    "a key that is twice in the file of `--config`": "tests/launch/test_command_line.py::test_a_broken_configuration_is_one_line",
    "`nan` or `inf` for a number": "tests/launch/test_command_line.py::test_a_number_must_be_finite",
    "`--output` names a file that exists": "tests/launch/test_results.py::test_a_file_that_is_there_is_not_overwritten",
    "`--resume` with other prompts": "tests/launch/test_results.py::test_a_run_that_was_interrupted_goes_on",
    "an output file that cannot be written": "tests/launch/test_results.py::test_an_output_that_cannot_be_written_is_found_before_the_work",
    "a full disk": "tests/launch/test_results.py::test_a_full_disk_is_one_line_and_no_traceback",
    "`launch.generate \\| head -1`": "tests/launch/test_results.py::test_a_closed_pipe_is_no_traceback",
    "`--logprobs` without `--json`": "tests/launch/test_results.py::test_flags_without_effect_are_refused",
    "`--stream` with several prompts": "tests/launch/test_results.py::test_flags_without_effect_are_refused",
    "interrupting `launch.generate`": "tests/launch/test_results.py::test_an_interrupted_run_keeps_what_it_finished",
    "Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 while a command starts": "tests/launch/test_signals.py::test_a_signal_ends_every_rank",
    "prompts on standard input, in a pipe, or on the disk of rank 0's host": "tests/launch/test_user_files.py::test_standard_input_is_a_file_too",
    "a directory where a file is expected": "tests/launch/test_user_files.py::test_a_directory_is_one_line",
    "a package missing on one host, a rank that never comes": "tests/launch/test_missing_rank.py::test_a_rank_that_does_not_come_is_not_waited_for_longer_than_the_limit",
    "an exception or an exit on one rank before MPI is up": "tests/launch/test_missing_rank.py::test_a_failure_of_one_rank_before_mpi_ends_all",
    "a port that is taken": "tests/server/test_serve.py::test_a_port_in_use_is_one_line_and_status_2",
    "Ctrl-C on the server": "tests/server/test_serve.py::test_a_signal_to_mpirun_drains",
    "Ctrl-C twice": "tests/server/test_serve.py::test_a_second_interrupt_does_not_wait",
    "`kill -9` of a rank of the server": "tests/server/test_serve.py::test_killing_a_rank_ends_everything_and_tells_clients",
    "`kill -9` of the HTTP process": "tests/server/test_serve.py::test_killing_the_http_process_ends_everything_with_a_message",
    "a request beyond the model's length, over HTTP": "tests/server/test_bad_input.py::test_context_length_has_its_code",
    "interrupting `launch.split`": "tests/checkpoints/test_split_interrupted.py::test_",
    "deleting the index file": "tests/launch/test_careless.py::test_shards_without_their_index_load",
    "`mpirun` of another MPI": "tests/launch/test_careless.py::test_a_launcher_of_another_mpi_is_named",
    "Ctrl-C on `launch.generate`": "tests/launch/test_careless.py::test_ctrl_c_ends_every_rank_without_a_traceback",
    "`kill -9` of a rank of `launch.generate`": "tests/launch/test_careless.py::test_a_killed_rank_ends_the_job",
    "a bug on one rank": "tests/launch/test_careless.py::test_an_exception_on_one_rank_ends_all_and_is_named",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Holds ``model``: 3 layers, 4 key/value heads, 101 tokens, 128 positions, no tokenizer."""
    write_checkpoint(CASES_BY_NAME["llama-plain"], tmp_path / "model")
    return tmp_path


@needs_mpirun
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.did)
def test_a_mistake_is_one_line_and_status_2(mistake: Mistake, directory: Path) -> None:
    if mistake.arguments.split("--engine ")[-1] in ("cuda", "tensorrt") and gpu_is_available():
        pytest.skip("there is a GPU here")
    if mistake.prepare is not None:
        mistake.prepare(directory)
    arguments = mistake.arguments.replace("{}", str(directory)).split()
    result = run(mistake.command, *arguments, ranks=mistake.ranks)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert messages(result.stderr) == result.stderr.splitlines()
    for words in mistake.said:
        assert words in result.stderr


@needs_mpirun
def test_shards_without_their_index_load(directory: Path) -> None:
    demo_without("model.safetensors.index.json")(directory)
    arguments = ("--prompt", "def main(", "--max-tokens", "8")
    whole, without = run("generate", *arguments), run("generate", *arguments, "--model", directory / "demo", ranks=2)
    assert (without.returncode, without.stderr) == (0, "")
    assert without.stdout == whole.stdout


@pytest.mark.parametrize(
    ("foreign", "said"),
    [
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI started 4 ranks but the MPI library is MPICH"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "Slurm started 4 ranks but MPI sees 1"),
    ],
    ids=["mpirun", "srun"],
)  # fmt: skip
def test_a_launcher_of_another_mpi_is_named(foreign: dict[str, str], said: str, directory: Path) -> None:
    """The variables of a launcher that our MPICH cannot talk to, as each of its ranks sees them."""
    result = run("generate", "--model", directory / "model", "--prompt-token-ids", "5", environ=foreign)
    assert result.returncode == 2
    assert len(messages(result.stderr)) == len(result.stderr.splitlines()) == 1
    assert said in result.stderr
    assert "use the mpirun of this environment" in result.stderr


@contextlib.contextmanager
def generating(command: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A job that has printed something, and its mark; gone at the end, or the test fails."""
    mark = f"{MARK}={uuid.uuid4().hex}"
    name, value = mark.split("=")
    environment = {**os.environ, name: value, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        with process:
            yield process, mark
    finally:
        deadline = time.monotonic() + LIMIT_SECONDS
        while (left := processes(mark)) and time.monotonic() < deadline:
            continue
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not left


@needs_mpirun
@pytest.mark.parametrize("ranks", [0, 3])
def test_ctrl_c_ends_every_rank_without_a_traceback(ranks: int) -> None:
    with generating(command_line("generate", *ENDLESS, *(["--pp", "3"] if ranks else []), ranks=ranks)) as (process, _):
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 130
    assert "Traceback" not in errors


@needs_mpirun
@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_rank_ends_the_job(rank: int) -> None:
    with generating(command_line("generate", *ENDLESS, "--pp", "3", ranks=3)) as (process, mark):
        assert process.stdout is not None
        assert process.stdout.read(1)
        os.kill(rank_process(mark, rank), signal.SIGKILL)
        process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode not in (0, 2)


FAULT = """
import sys, launch
from phalanx.launch import generate
from phalanx.launch.arguments import run_command
from phalanx.parallel.launcher import launch_info
from phalanx.runtime.executors.numpy.executor import NumpyExecutor

class Faulty(NumpyExecutor):
    steps = 0

    def execute(self, plan):
        self.steps += 1
        if launch_info().rank == {rank} and self.steps == 5:
            raise ZeroDivisionError("planted for a test")
        super().execute(plan)

import phalanx.runtime.executors.numpy.build as build
build.NumpyExecutor = Faulty
run_command(generate.main, sys.argv[1:])
"""


@needs_mpirun
@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_rank_ends_all_and_is_named(rank: int, tmp_path: Path) -> None:
    (tmp_path / "fault.py").write_text(FAULT.format(rank=rank))
    command = command_line("generate", *ENDLESS, "--pp", "2", ranks=2)
    command[command.index("-m") : command.index("launch.generate") + 1] = [str(tmp_path / "fault.py")]
    with generating(command) as (process, _):
        assert process.stderr is not None
        first = process.stderr.readline()
        process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 1
    said = rf"phalanx: rank {rank} (\(.*, pid \d+\) )?failed \(in step 4\) .*ZeroDivisionError: planted for a test$"
    assert re.match(said, first)


def test_the_rows_of_the_readme_are_rows_of_the_table() -> None:
    section = (ROOT / "README.md").read_text().split("## What a careless user does")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert [row for row in rows if row not in TABLE.read_text().splitlines()] == []
    assert f"{len(rows)} of the cases" in section


def test_every_row_of_the_table_has_a_test() -> None:
    rows = [line.split(" | ")[0].removeprefix("| ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    assert sorted(rows[1:]) == sorted([mistake.did for mistake in MISTAKES] + list(ELSEWHERE))
    for test in ELSEWHERE.values():
        file, name = test.split("::")
        assert f"def {name}" in (ROOT / file).read_text()
