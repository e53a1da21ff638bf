# SPDX-License-Identifier: Apache-2.0
"""``launch.eval --against``: its figures equal float64 NumPy's, the divergence is a lower bound, mistakes get one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from phalanx.launch.divergence import NUM_ALTERNATIVES, compare, gather
from phalanx.runtime.request import Logprob
from tests.demo.test_eval import EXCERPT, LAUNCHERS, run_eval
from tests.support.float64_llama import Float64Llama

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def disturbed(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint with another rotary base, which changes some best tokens."""
    directory = tmp_path_factory.mktemp("eval") / "disturbed"
    shutil.copytree(demo, directory)
    config = json.loads((demo / "config.json").read_text("utf-8"))
    (directory / "config.json").write_text(json.dumps({**config, "rope_theta": 12000.0}))
    return directory


def exact_divergence(p: Array, q: Array) -> Array:
    """``[T]`` over the whole vocabulary."""
    result: Array = (np.exp(p) * (p - q)).sum(axis=1)
    return result


def merged_divergence(p: Array, q: Array, targets: list[int]) -> list[float]:
    """Place by place: the target and what is among the best of both, and the rest as one outcome."""
    result = []
    for row_p, row_q, target in zip(p, q, targets, strict=True):
        best = [set(np.argsort(-row, kind="stable")[:NUM_ALTERNATIVES].tolist()) for row in (row_p, row_q)]
        shared = sorted((best[0] & best[1]) | {target})
        others = np.setdiff1d(np.arange(len(row_p)), shared)
        own, other = (np.append(np.exp(row[shared]), np.exp(row[others]).sum()) for row in (row_p, row_q))
        result.append(float((own * np.log(own / other)).sum()))
    return result


def test_figures_equal_those_of_float64(demo: Path, disturbed: Path, held_out: Path, tokenizer: Tokenizer) -> None:
    text = held_out / EXCERPT
    finished = run_eval("--text", text, "--model", disturbed, "--against", demo, "--json")
    assert (finished.returncode, finished.stderr) == (0, "")
    against = json.loads(finished.stdout)["against"]
    token_ids = [0, *tokenizer.encode(text.read_text("utf-8"), add_special_tokens=False).ids]
    p, q = (Float64Llama(path).log_probabilities(token_ids)[:-1] for path in (demo, disturbed))
    exact, merged = exact_divergence(p, q).mean(), np.mean(merged_divergence(p, q, token_ids[1:]))
    assert against["kl_lower_bound"] == pytest.approx(merged, rel=1e-3)
    assert 0.5 * exact < against["kl_lower_bound"] < exact
    assert against["num_flips"] == (p.argmax(axis=1) != q.argmax(axis=1)).sum() > 0
    assert against["loss"] == pytest.approx(-p[np.arange(len(p)), token_ids[1:]].mean(), abs=1e-5)


def test_people_get_both_models_and_what_was_merged(demo: Path, held_out: Path) -> None:
    finished = run_eval("--text", held_out / EXCERPT, "--quantize", "int8", "--against", demo)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert ["quantize", "int8", "none"] in [line.split() for line in lines]
    assert "KL(reference || model)  at least 0.00" in finished.stdout
    assert "tokens that are not among the 20 best of both models" in lines[-1]


@pytest.mark.skipif(not LAUNCHERS, reason="no mpirun")
def test_the_reference_runs_with_the_against_flags(demo: Path, held_out: Path) -> None:
    finished = run_eval(
        "--text", held_out / EXCERPT, "--tp", 2, "--against", demo, "--against-tp", 1, "--against-pp", 2,
        "--against-kv-cache-dtype", "fp8", "--against-quantize", "fp8", "--against-dtype", "float32",
        "--against-engine", "numpy", "--json", ranks=2,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    names = ("tp", "pp", "quantize", "kv_cache_dtype", "dtype")
    assert [report[name] for name in names] == [2, 1, "none", "auto", "auto"]
    assert [report["against"][name] for name in names] == [1, 2, "fp8", "fp8", "float32"]
    assert 0.005 < report["against"]["kl_lower_bound"] < 0.05


@pytest.mark.skipif(not LAUNCHERS, reason="no mpirun")
def test_layouts_of_one_model_do_not_diverge(demo: Path, held_out: Path) -> None:
    arguments = ("--tp", 2, "--against", demo, "--against-tp", 1, "--against-pp", 2, "--json")
    finished = run_eval("--text", held_out / EXCERPT, *arguments, ranks=2)
    assert finished.returncode == 0, finished.stderr
    against = json.loads(finished.stdout)["against"]
    assert against["num_flips"] == 0
    assert abs(against["kl_lower_bound"]) < 1e-6


def test_mistakes_get_one_line(demo: Path, held_out: Path, tmp_path: Path) -> None:
    finished = run_eval("--text", held_out / EXCERPT, "--against-quantize", "fp8")
    assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)
    assert "--against-quantize: has no effect without --against" in finished.stderr
    shutil.copytree(demo, tmp_path / "other")
    tokenizer = json.loads((demo / "tokenizer.json").read_text("utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    finished = run_eval("--text", held_out / EXCERPT, "--against", tmp_path / "other")
    assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)
    assert "cuts the text into other tokens" in finished.stderr


def test_a_vocabulary_that_is_reported_whole_is_compared_exactly() -> None:
    p, q = np.log([0.7, 0.2, 0.1]), np.log([0.3, 0.6, 0.1])
    windows = [
        [Logprob(2, float(row[2]), tuple((int(i), float(row[i])) for i in np.argsort(-row, kind="stable")))]
        for row in (p, q)
    ]
    divergence = compare(*(gather([window]) for window in windows))
    np.testing.assert_allclose(divergence.kl, exact_divergence(p[None], q[None]), atol=1e-6)
    assert divergence.flips.tolist() == [True]
    assert divergence.rest[0] < 1e-6
