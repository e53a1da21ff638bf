"""The table of matrix product timings: what is kept, found again and shared by ranks."""

import json

import pytest

from phalanx.kernels.cublaslt import Algorithm, GemmProblem
from phalanx.kernels.gemv import GemvShape
from phalanx.kernels.tuning import GemmChoice, GemmTimings, timings_path


def problem(num_tokens, **options):
    return GemmProblem(num_tokens, 4096, 14336, "bfloat16", "bfloat16", **options)


LARGE = GemmChoice(Algorithm((1, 2**63, 3, 4, 5, 6, 7, 8), 1 << 20), 31.25, 32.5)
SMALL = GemmChoice(GemvShape(8, 2, 4), 5.5, 6.0)


def test_choices_come_back_from_the_file_as_they_were(tmp_path):
    path = timings_path(tmp_path, "NVIDIA H200 (x)", 130100)
    assert path.name == "nvidia-h200-x-cublaslt130100-kernels3.json"
    GemmTimings(path).add({problem(1): SMALL, problem(64): LARGE})
    again = GemmTimings(path)
    assert again.find(problem(1)) == SMALL
    assert again.find(problem(64)) == LARGE
    assert again.find(problem(2)) is None
    assert [key for key, _ in again.items()] == sorted([problem(1).key, problem(64).key])


def test_each_option_of_a_problem_has_a_timing_of_its_own():
    variants = [
        problem(1), problem(2), problem(1, has_bias=True),
        GemmProblem(1, 4096, 14336, "float16", "float16"), GemmProblem(1, 4096, 14336, "bfloat16", "float32"),
        GemmProblem(1, 14336, 4096, "bfloat16", "bfloat16"),
    ]  # fmt: skip
    assert len({variant.key for variant in variants}) == len(variants)


def test_ranks_that_tune_at_once_keep_each_others_results(tmp_path):
    path = tmp_path / "timings.json"
    first, second = GemmTimings(path), GemmTimings(path)
    first.add({problem(1): SMALL})
    second.add({problem(2): LARGE})
    assert len(GemmTimings(path)) == 2
    assert second.find(problem(1)) == SMALL


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": {}}', '{"a": {"kind": "gemv"}}', '{"a": 3}'])
def test_a_damaged_file_is_an_empty_table(tmp_path, text):
    path = tmp_path / "timings.json"
    path.write_text(text)
    timings = GemmTimings(path)
    assert len(timings) == 0
    timings.add({problem(1): SMALL})
    assert list(json.loads(path.read_text())) == [problem(1).key]


def test_an_entry_of_another_version_does_not_cost_the_others(tmp_path):
    path = tmp_path / "timings.json"
    GemmTimings(path).add({problem(1): SMALL, problem(2): LARGE})
    entries = json.loads(path.read_text())
    del entries[problem(1).key]["prefetch_bytes"]
    path.write_text(json.dumps(entries))
    assert GemmTimings(path).find(problem(1)) is None
    assert GemmTimings(path).find(problem(2)) == LARGE


def test_the_next_larger_problem_is_found_within_the_limit():
    timings = GemmTimings(None)
    timings.add({problem(n): GemmChoice(GemvShape(n), n, n) for n in (4, 64, 128, 512)})
    timings.add({problem(40, has_bias=True): SMALL})
    assert timings.find_above(problem(33), 256) == timings.find(problem(64))
    assert timings.find_above(problem(64), 256) == timings.find(problem(128))
    assert timings.find_above(problem(200), 256) is None
    assert timings.find_above(problem(200), 512) == timings.find(problem(512))
