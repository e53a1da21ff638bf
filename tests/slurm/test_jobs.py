"""The repository's own batch scripts, run by a real Slurm on two nodes with two fake GPUs each."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.launch.commands import ROOT, run
from tests.support.launcher import LAUNCHER_ENVIRONMENT

from .cluster import KILL_WAIT_SECONDS, Cluster, missing, start_cluster, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

RENDERED = "launch.slurm"
FITTED = ("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
"""What a script written for eight GPUs is told on the command line."""
PROMPT = {"model": "demo", "prompt": "def main(", "max_tokens": 8, "temperature": 0}
NUM_PROMPTS = 32
SHARED_CORES = {"MPIR_CVAR_ENABLE_HEAVY_YIELD": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
"""Nobody sees that both nodes are this machine: ranks that wait must leave it to those that work."""
HEADERS = {"Authorization": "Bearer key"}


@dataclass(frozen=True, slots=True)
class Site:
    """The directory jobs are submitted from, with ``slurm/settings.sh`` in it."""

    cluster: Cluster
    directory: Path

    def submit(self, name: str, command: str, *options: str) -> str:
        """Submit a script of the repository on both nodes, or one that ``launch.slurm`` renders for them."""
        environ = {
            **LAUNCHER_ENVIRONMENT,
            **SHARED_CORES,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        if name != RENDERED:
            words = ["--nodes=2", *FITTED, *options, str(ROOT / "slurm" / f"{name}.sbatch")]
            return self.cluster.submit(*words, environ=environ, cwd=self.directory)
        rendered = self.directory / "rendered.sbatch"
        rendered.write_text(
            run("slurm", "--run", command, "--nodes=2", "--gpus-per-node=2", "--cpus-per-task=1").stdout
        )
        return self.cluster.submit(*options, rendered, environ=environ, cwd=self.directory)

    def log(self, job: str) -> str:
        """Everything that the job has printed."""
        return "".join(path.read_text() for path in self.directory.glob(f"*-{job}.out"))

    def wait_for_endpoint(self, job: str) -> str:
        """The server's URL."""
        path = self.directory / f"endpoint-{job}.json"
        wait_until(lambda: path.exists() or self.cluster.job(job)["JobState"] == "FAILED", "READY", 60)
        assert path.exists(), self.log(job)
        url: str = json.loads(path.read_text())["url"]
        return url


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with start_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Iterator[Site]:
    """The example's settings with this machine's values and the PMI of its MPI library."""
    (tmp_path / "keys").write_text("key\n")
    prompts = [json.dumps({"prompt_token_ids": [5 + number, 6]}) for number in range(NUM_PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    example = (ROOT / "slurm" / "settings.example.sh").read_text()
    settings = re.sub(r"^source .*$", f"export PATH={Path(sys.executable).parent}:$PATH", example, flags=re.MULTILINE)
    settings = re.sub(r"^LAUNCHER=", "# LAUNCHER=", settings, flags=re.MULTILINE)
    settings = re.sub(rf"^# (LAUNCHER=\(srun --mpi={_pmi()} )", r"\1", settings, flags=re.MULTILINE)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "settings.sh").write_text(
        f"{settings}\nMODEL={ROOT}/checkpoints/demo\nAPI_KEY_FILE={tmp_path}/keys\n"
        "SERVE_OPTIONS=(--max-num-seqs 4)\nGENERATE_OPTIONS=(--max-tokens 6 --ignore-eos --max-num-seqs 2)\n"
    )
    yield Site(cluster, tmp_path)
    cluster.end_jobs()


def _pmi() -> str:
    program = "from mpi4py import rc; rc.initialize = False; from mpi4py import MPI; print(MPI.get_vendor()[0])"
    vendor = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return "pmix" if "Open MPI" in vendor else "pmi2"


@pytest.mark.parametrize("name", ["serve-multi-node", RENDERED])
def test_a_server_on_two_nodes_answers_and_scancel_drains_it(name: str, site: Site) -> None:
    job = site.submit(name, "serve")
    url = site.wait_for_endpoint(job)
    assert_four_ranks_answer_as_one(url)
    long = {**PROMPT, "max_tokens": 40, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=long, headers=HEADERS, timeout=60) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        site.cluster.run("scancel", job)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert sum('"text"' in line for line in rest) >= 30, rest
    assert not any("error" in line for line in rest)
    site.cluster.wait_for_state(job, "CANCELLED", "COMPLETED", seconds=KILL_WAIT_SECONDS)
    wait_until(lambda: not (site.directory / f"endpoint-{job}.json").exists(), "no endpoint file", KILL_WAIT_SECONDS)


def test_a_signal_to_the_steps_drains(site: Site) -> None:
    job = site.submit("serve-multi-node", "serve")
    url = site.wait_for_endpoint(job)
    assert_drained_by(site, url, "scancel", "--signal=USR1", job)
    fields = site.cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=60)
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), site.log(job)


@pytest.mark.parametrize("name", ["generate", RENDERED])
def test_a_requeued_batch_goes_on_where_it_was(name: str, site: Site) -> None:
    job = site.submit(name, "generate")
    results = site.directory / f"results-{job}.jsonl"
    partial = site.directory / f"results-{job}.jsonl.partial"
    wait_until(lambda: partial.exists() and partial.read_text().count("\n") >= 4, "four results", 60)
    site.cluster.run("scontrol", "requeue", job)
    site.cluster.wait_for_state(job, "PENDING", seconds=KILL_WAIT_SECONDS + 30)
    kept = [line for line in partial.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert 4 <= len(kept) < NUM_PROMPTS
    # Slurm itself would wait two minutes. Within the second in which it revokes a job's credential its nodes take no new one.
    site.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")
    fields = site.cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=120)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), site.log(job)
    lines = results.read_text().splitlines(keepends=True)
    assert set(kept) <= set(lines)
    assert [json.loads(line)["index"] for line in lines] == list(range(NUM_PROMPTS))


def test_doctor_finds_every_rank_and_node(site: Site) -> None:
    job = site.submit("doctor", "doctor")
    site.cluster.wait_for_state(job, "COMPLETED", "FAILED")
    text = site.log(job)
    assert f"job {job}" in text
    assert "nodes 2, tasks 4, tasks per node 2(x2)" in text


def test_ranks_that_mpi_does_not_join_are_refused_in_one_sentence(site: Site) -> None:
    """``srun`` without a PMI starts as many jobs of one rank as there are tasks."""
    result = step(site, "--nodes=2", "--ntasks-per-node=2", "--mpi=none", ranks=4)
    assert result.returncode != 0
    assert result.stdout == ""
    assert re.search(
        "Slurm started 4 ranks but (MPI sees 1|the MPI library is Open MPI 5, which needs PMIx)", result.stderr
    )
    said = [line for line in result.stderr.splitlines() if not line.startswith("srun:")]
    assert len(set(said)) == 1, result.stderr


def test_mpirun_in_a_batch_script_serves_on_both_nodes_and_drains_on_a_signal(site: Site) -> None:
    """The script of the repository with ``LAUNCHER=(mpirun)``; ``--signal=B:USR1`` would send the signal of this test."""
    with (site.directory / "slurm" / "settings.sh").open("a") as settings:
        settings.write("LAUNCHER=(mpirun)\n")
    job = site.submit("serve-multi-node", "serve", "--signal=B:USR1@120")
    url = site.wait_for_endpoint(job)
    assert_four_ranks_answer_as_one(url)
    assert_drained_by(site, url, "scancel", "--batch", "--signal=USR1", job)
    fields = site.cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=60)
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), site.log(job)


def test_a_supervised_server_starts_its_ranks_again_by_srun_and_scancel_drains_it(site: Site) -> None:
    """The supervisor takes the place of the batch script; each job of ranks is a step."""
    launcher = f"srun --mpi={_pmi()} --kill-on-bad-exit=1 --distribution=block --ntasks=4"
    with (site.directory / "slurm" / "settings.sh").open("a") as settings:
        settings.write(f'LAUNCHER=()\nSERVE_OPTIONS+=(--supervise --launcher "{launcher}")\n')
    job = site.submit("serve-multi-node", "serve", "--signal=B:USR1@120")
    url = site.wait_for_endpoint(job)
    (lost,) = tasks(job, 3)
    os.kill(lost, signal.SIGKILL)
    wait_until(lambda: "READY again" in site.log(job), "READY again", 60)
    assert_four_ranks_answer_as_one(url)
    assert_drained_by(
        site, url, "scancel", job
    )  # SIGTERM to the ranks, and to the supervisor, which passes it on to them
    site.cluster.wait_for_state(job, "CANCELLED", "COMPLETED", seconds=60)
    assert re.search(r"rank 3 \(.*has ended", site.log(job))


def tasks(job: str, rank: int) -> list[int]:
    """Process ids of one rank of a job's step, as Slurm counts tasks."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environ = set((path / "environ").read_bytes().split(b"\0"))
            if wanted <= environ and b"launch.serve" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


def test_mpirun_in_a_shell_of_salloc_serves_on_both_nodes(site: Site) -> None:
    endpoint = site.directory / "endpoint-salloc.json"
    flags = ["--port", "0", "--api-key-file", str(site.directory / "keys"), "--endpoint-file", str(endpoint)]
    with allocation(site, serve_command("mpirun", *flags)) as process:
        wait_until(lambda: endpoint.exists() or process.poll() is not None, "READY", 60)
        assert endpoint.exists(), process.communicate()
        url = json.loads(endpoint.read_text())["url"]
        assert_four_ranks_answer_as_one(url)
        assert httpx.post(f"{url}/admin/drain", headers=HEADERS, timeout=30).status_code == 202
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 0, errors


def test_the_mpirun_of_another_mpi_is_refused_in_one_sentence(site: Site) -> None:
    """It would start as many servers of one rank as there are ranks."""
    here = Path(sys.executable).parent
    others = [path for path in ROOT.glob(".venv*/bin/mpirun") if path.parent != here]
    if not others:
        pytest.skip("needs environments with Slurm, MPICH and Open MPI: .venv and .venv-openmpi")
    with allocation(site, serve_command(str(others[0]), "--port", "0")) as process:
        errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert len(re.findall("started 4 ranks but (MPI sees 1|the MPI library is)", errors)) == 1, errors
    assert "READY" not in errors


def assert_four_ranks_answer_as_one(url: str) -> None:
    alone = run("generate", "--prompt", str(PROMPT["prompt"]), "--max-tokens", "8", "--json").stdout
    answer = httpx.post(f"{url}/v1/completions", json=PROMPT, headers=HEADERS, timeout=60).json()
    assert answer["choices"][0]["text"] == json.loads(alone)["text"]
    info = httpx.get(f"{url}/server_info", headers=HEADERS, timeout=60).json()
    assert "pp 2 x tp 2" in info["layout"]


def assert_drained_by(site: Site, url: str, *command: str) -> None:
    """A stream that is open when the command is run ends as if nothing had happened."""
    body = {**PROMPT, "max_tokens": 16, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=HEADERS, timeout=60) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        site.cluster.run(*command)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert not any("error" in line for line in rest)


def serve_command(mpirun: str, *flags: str) -> list[str]:
    model = ["--model", f"{ROOT}/checkpoints/demo", "--tp", "2", "--pp", "2"]
    return [mpirun, "-n", "4", sys.executable, "-m", "launch.serve", *model, *flags]


@contextmanager
def allocation(site: Site, command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A command in two tasks' places on each node, as in a shell of ``salloc``."""
    words = ["salloc", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", *command]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = {**site.cluster.environ, **LAUNCHER_ENVIRONMENT, **SHARED_CORES, "PATH": path, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        words, env=environ, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        site.cluster.end_jobs()
        process.communicate(timeout=60)


def test_unequal_nodes_compute_the_same(site: Site) -> None:
    alone = run("generate", "--prompt", "def main(", "--max-tokens", "8").stdout
    result = step(site, "--nodes=2", "--ntasks=3", f"--mpi={_pmi()}", "--distribution=block", ranks=3)
    assert (result.returncode, result.stdout) == (0, alone), result.stderr


def step(site: Site, *options: str, ranks: int) -> subprocess.CompletedProcess[str]:
    """``launch.generate`` as one step, with a pipeline stage per rank."""
    command = [
        sys.executable, "-m", "launch.generate", "--prompt", "def main(", "--max-tokens", "8", "--pp", str(ranks),
        "--tp", "1",
    ]  # fmt: skip
    return subprocess.run(
        ["srun", *options, "--gpus-per-node=2", *command], env={**site.cluster.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
