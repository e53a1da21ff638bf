# SPDX-License-Identifier: Apache-2.0
"""The text of a Slurm batch script, each line with the reason for it. What differs from site to site stays in ``slurm/settings.sh``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from phalanx.parallel.topology import Layout

__all__ = ["Job", "render"]

_WARNING_SECONDS = {"serve": 120, "generate": 60}
"""How long before the time limit Slurm warns: enough to finish open answers, or to write results."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a script asks Slurm for, and the command that its ranks run.

    Attributes:
        options: words for the command besides model and layout.
        summary: lines for the head of the script.
        time_limit: as Slurm writes it, ``hours:minutes:seconds``.
    """

    command: Literal["serve", "generate"]
    model: str
    nodes: int
    gpus_per_node: int
    layout: Layout
    cpus_per_task: int
    time_limit: str
    options: tuple[str, ...] = ()
    summary: tuple[str, ...] = ()


def render(job: Job) -> str:
    """The batch script; it sources ``slurm/settings.sh``, or the file in ``PHALANX_SETTINGS``."""
    lines = ["#!/usr/bin/env bash", *(f"# {' '.join(line.split())}" for line in job.summary), ""]
    for reason, option in _directives(job):
        lines += [f"# {reason}", f"#SBATCH {option}"]
    lines += ["", "# A command that fails ends the job, and so does a setting that is missing.", "set -euo pipefail"]
    lines += [
        "# The site's settings: environment, LAUNCHER (srun with pmix or pmi2, or mpirun), shared directory, keys."
    ]
    lines += ['source "${PHALANX_SETTINGS:-$SLURM_SUBMIT_DIR/slurm/settings.sh}"', ""]
    lines += {"serve": _serve, "generate": _generate}[job.command](job)
    return "\n".join(lines) + "\n"


def _directives(job: Job) -> Iterator[tuple[str, str]]:
    warning = _WARNING_SECONDS[job.command]
    yield "Name in squeue and of the output file.", f"--job-name=phalanx-{job.command}"
    yield "Nodes; Slurm numbers the ranks node by node.", f"--nodes={job.nodes}"
    yield "One rank per GPU.", f"--ntasks-per-node={job.gpus_per_node}"
    yield (
        "GPUs by node: bound to tasks, they could not reach each other over NVLink.",
        f"--gpus-per-node={job.gpus_per_node}",
    )
    yield (
        "Processor cores per rank: threads that read weights, tokenise and answer HTTP.",
        (f"--cpus-per-task={job.cpus_per_task}"),
    )
    yield "No other job on these nodes.", "--exclusive"
    yield "All memory of each node; --exclusive alone gives the partition's default.", "--mem=0"
    yield "Longest run time.", f"--time={job.time_limit}"
    yield "Log: name and job number.", "--output=%x-%j.out"
    yield "A requeued job continues its log.", "--open-mode=append"
    yield (
        f"{warning} s before the time limit ranks get SIGUSR1 and drain (with LAUNCHER=(mpirun): B:USR1@{warning}).",
        f"--signal=USR1@{warning}",
    )
    yield "Back into the queue when a node fails or the job is preempted.", "--requeue"


def _serve(job: Job) -> list[str]:
    return [
        *_command(
            job,
            ("Other machines may connect, so keys are required; PORT=0 takes any free port.",
             '--host 0.0.0.0 --port "$PORT" --api-key-file "$API_KEY_FILE"'),
            ("Written when the server is ready: clients read host and port from it.",
             '--endpoint-file "$SHARED_DIR/endpoint-$SLURM_JOB_ID.json"'),
            ("Options of every server of this site.", '"${SERVE_OPTIONS[@]}"'),
        ),
        "# exec: signals for the batch step reach the launcher.",
        'exec "${LAUNCHER[@]}" "${command[@]}"',
    ]  # fmt: skip


def _generate(job: Job) -> list[str]:
    return [
        "# Results so far are in the .partial file, from which a requeued job continues (--resume).",
        'results=$SHARED_DIR/results-$SLURM_JOB_ID.jsonl',
        *_command(
            job,
            ("Prompts in, results out, as JSON lines.", '--input-file "$PROMPTS" --output "$results.partial" --resume'),
            ("Options of every run of this site.", '"${GENERATE_OPTIONS[@]}"'),
        ),
        '"${LAUNCHER[@]}" "${command[@]}"',
        "# Only complete results get the final name.",
        'mv "$results.partial" "$results"',
    ]  # fmt: skip


def _command(job: Job, *parts: tuple[str, str]) -> Iterator[str]:
    """The array ``command``; options given for this job come last, so that they win over the site's."""
    layout = job.layout
    yield from (f"# One process per GPU runs launch.{job.command}.", "command=(", f"    python -m launch.{job.command}")
    place = ("Replicas x pipeline stages x ranks that share each layer.", f"--dp {layout.dp} --pp {layout.pp} --tp {layout.tp}")  # fmt: skip
    given = ("Options given for this job.", shlex.join(job.options))
    model = ("Checkpoint, on a file system that every node sees.", f"--model {shlex.quote(job.model)}")
    for reason, words in (model, place, *parts, *([given] if job.options else [])):
        yield from (f"    # {reason}", f"    {words}")
    yield ")"
