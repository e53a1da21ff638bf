# SPDX-License-Identifier: Apache-2.0
"""``launch.eval --against``: its figures over the whole vocabulary equal float64 NumPy's at any layout, mistakes get one line."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from phalanx.kernels.device import gpu_is_available
from phalanx.launch.divergence import Divergence, PartialSums, compare
from phalanx.launch.kept_logits import KeptLogits
from phalanx.launch.scoring import Window, scored_tokens, windows_over
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.thread_comm import run_ranks
from phalanx.runtime.llm import LLM
from tests.demo.test_eval import EXCERPT, LAUNCHERS, run_eval
from tests.support.fake_cupy import install_fake_device
from tests.support.float64_llama import Float64Llama
from tests.support.short_demo import write_short_demo

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


def test_figures_equal_those_of_float64(demo: Path, disturbed: Path, held_out: Path, tokenizer: Tokenizer) -> None:
    text = held_out / EXCERPT
    finished = run_eval("--text", text, "--model", disturbed, "--against", demo, "--json")
    assert (finished.returncode, finished.stderr) == (0, "")
    against = json.loads(finished.stdout)["against"]
    token_ids = [0, *tokenizer.encode(text.read_text("utf-8"), add_special_tokens=False).ids]
    p, q = (Float64Llama(path).log_probabilities(token_ids)[:-1] for path in (demo, disturbed))
    assert against["kl"] == pytest.approx(exact_divergence(p, q).mean(), rel=1e-4)
    assert against["quantisation"] == "weights: not quantised; cache: not quantised"
    assert against["kl_largest"] == pytest.approx(exact_divergence(p, q).max(), rel=1e-3)
    assert against["num_flips"] == (p.argmax(axis=1) != q.argmax(axis=1)).sum() > 0
    assert against["top1_agreement"] == pytest.approx((p.argmax(axis=1) == q.argmax(axis=1)).mean())
    assert against["loss"] == pytest.approx(-p[np.arange(len(p)), token_ids[1:]].mean(), abs=1e-5)


def test_no_divergence_is_not_written_with_a_sign() -> None:
    divergence = Divergence(np.full(3, -1e-12), np.zeros(3, np.bool_))
    assert (
        "KL(reference || model)  0.00000 nats a token (standard error 0.00000; largest 0.0000)"
        in divergence.description
    )


def test_people_get_both_models_and_their_divergence(demo: Path, held_out: Path) -> None:
    finished = run_eval("--text", held_out / EXCERPT, "--quantize", "int8", "--against", demo)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert ["quantize", "int8", "none"] in [line.split() for line in lines]
    assert "weights         int8 by row, activations by token  not quantised" in lines
    assert "KL(reference || model)  0.00" in finished.stdout
    assert lines[-1].startswith("same best token         9")


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
    assert 0.005 < report["against"]["kl"] < 0.05


@pytest.mark.skipif(not LAUNCHERS, reason="no mpirun")
def test_layouts_of_one_model_do_not_diverge(demo: Path, held_out: Path) -> None:
    arguments = ("--tp", 2, "--against", demo, "--against-tp", 1, "--against-pp", 2, "--json")
    finished = run_eval("--text", held_out / EXCERPT, *arguments, ranks=2)
    assert finished.returncode == 0, finished.stderr
    against = json.loads(finished.stdout)["against"]
    assert against["num_flips"] == 0
    assert abs(against["kl"]) < 1e-9


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--against-tp", 2), "needs 2 rank(s) but 1 started"),
        (
            ("--dtype", "float32", "--against-dtype", "bfloat16", "--against-kv-cache-dtype", "float16"),
            "is neither fp8 nor",
        ),
        (("--against-kv-cache-dtype", "float16"), "is neither fp8 nor the compute type bfloat16"),
        (("--against-tp", 0), "--tensor-parallel-size=0 is below 1"),
        (("--against-pp", 0), "--pipeline-parallel-size=0 is below 1"),
        pytest.param(
            ("--against-engine", "cuda"),
            "no GPU can be used",
            marks=pytest.mark.skipif(gpu_is_available(), reason="a GPU is here"),
        ),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_the_reference_are_found_before_the_model_runs(
    demo: Path, tmp_path: Path, flags: tuple[object, ...], said: str
) -> None:
    """The text is not even read: there is none."""
    finished = run_eval("--text", tmp_path / "nowhere", "--against", demo, *flags)
    assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)
    assert finished.stderr.startswith(f"phalanx: --against {demo} (with the model's flags")
    assert said in finished.stderr


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
    config = json.loads((demo / "config.json").read_text("utf-8"))
    section = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    flags = ("--against", tmp_path / "other", "--against-quantize", "int8")
    finished = run_eval("--text", held_out / EXCERPT, *flags)
    assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)
    assert "--against-quantize=int8: the checkpoint holds int4 in groups of 16 weights already" in finished.stderr
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "vocab_size": 6200}))
    finished = run_eval("--text", held_out / EXCERPT, "--against", tmp_path / "other")
    assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)
    assert "has a vocabulary of 6200 tokens, but the model one of 6144" in finished.stderr


def test_windows_are_those_that_both_take(demo: Path, held_out: Path, tmp_path: Path) -> None:
    shutil.copytree(demo, tmp_path / "short")
    config = json.loads((demo / "config.json").read_text("utf-8"))
    (tmp_path / "short" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100}))
    arguments = ("--text", held_out / EXCERPT, "--against", tmp_path / "short")
    finished = run_eval(*arguments, "--json")
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert (report["context"], report["stride"]) == (100, 99)
    assert report["against"]["kl"] == pytest.approx(0, abs=1e-9)
    finished = run_eval(*arguments, "--context", 101)
    assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)
    assert f"--context=101 is beyond the 100 tokens that --against {tmp_path / 'short'} takes" in finished.stderr


def test_mistakes_of_the_reference_are_named_as_such(demo: Path, held_out: Path, tmp_path: Path) -> None:
    """Found before the model runs, and while the reference does: its final norm makes no finite number."""

    def not_finite(tensors: dict[str, Array]) -> None:
        tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)

    write_short_demo(tmp_path / "short", 1)
    write_short_demo(tmp_path / "other", 1, not_finite)
    arguments = ("--text", held_out / EXCERPT, "--model", tmp_path / "short", "--against", tmp_path / "other")
    finished = run_eval(*arguments)
    assert (finished.returncode, finished.stdout) == (2, "")
    last = finished.stderr.splitlines()[-1]
    assert last.startswith(f"phalanx: --against {tmp_path / 'other'}: tokens 0 to")
    assert "not finite" in last
    (tmp_path / "other" / "tokenizer.json").unlink()
    finished = run_eval(*arguments)
    assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)
    assert f"--against {tmp_path / 'other'}: the checkpoint has no tokenizer.json" in finished.stderr


TOKENS = [0, 17, 5000, 8, 431, 99, 2, 77, 1023, 5, 640, 3000, 12]


def kept(
    path: Path, comm: Communicator, layout: Sequence[int], context: int, tokens: Sequence[int] = TOKENS, **options: Any
) -> KeptLogits:
    """What a rank keeps of ``tokens``."""
    windows = list(windows_over(len(tokens), context, 3))
    logits = KeptLogits(io.BytesIO(), windows, len(tokens) - 1)
    arguments = {"engine": "numpy", "block_size": 16, "num_kv_blocks": 8, "max_num_batched_tokens": 5, **options}
    sizes = zip(("tensor", "pipeline", "data"), layout, strict=False)
    with LLM(path, comm=comm, **{f"{name}_parallel_size": size for name, size in sizes}, **arguments) as llm:
        list(scored_tokens(llm, tokens, context, 3, logits))
    return logits


def by_hand(path: Path, context: int, tokens: Sequence[int] = TOKENS) -> Array:
    """``[T, V]`` log-probabilities of the windows, one after the other."""
    rows = []
    for window in windows_over(len(tokens), context, 3):
        logs = Float64Llama(path).log_probabilities(tokens[window.start : window.stop])
        rows += list(logs[window.first_scored - window.start - 1 : -1])
    return np.array(rows)


@pytest.mark.parametrize(
    ("model", "reference"),
    [((1, 1), (1, 1)), ((2, 1), (1, 2)), ((3, 1), (3, 1)), ((2, 2), (4, 1)), ((1, 3), (3, 1)), ((1, 1, 2), (2, 1, 1))],
    ids=str,
)  # fmt: skip
def test_ranks_that_hold_parts_of_the_vocabulary_find_what_float64_does(
    short: Path, short_disturbed: Path, model: tuple[int, ...], reference: tuple[int, ...]
) -> None:
    """At layouts (tp, pp, dp) that cut the vocabulary alike or not, with windows that overlap, in steps of five tokens."""
    size = int(np.prod(model))

    def rank(comm: Communicator) -> Any:
        own, other = (kept(path, comm, layout, 7) for path, layout in
                      ((short_disturbed, model), (short, reference)))  # fmt: skip
        assert other.num_tokens in (0, *(-(-6144 // reference[0]) - i for i in range(2)))
        return compare(other, own, comm)

    p, q = (by_hand(path, 7) for path in (short, short_disturbed))
    for divergence in run_ranks(size, rank):
        np.testing.assert_allclose(divergence.kl, exact_divergence(p, q), rtol=1e-4, atol=2e-6)
        np.testing.assert_array_equal(divergence.flips, p.argmax(axis=1) != q.argmax(axis=1))


@pytest.mark.parametrize(("model", "reference"), [((2, 1), (1, 2)), ((3, 1), (1, 3))], ids=str)
def test_rows_that_pad_a_vocabulary_count_for_nothing(
    tmp_path: Path, model: tuple[int, ...], reference: tuple[int, ...]
) -> None:
    """101 tokens, which neither two nor three ranks share without padding: 6,144 need none at any layout."""

    def change(tensors: dict[str, Array]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:101].copy()

    paths = tmp_path / "reference", tmp_path / "model"
    for path, epsilon in zip(paths, (1e-5, 2e-3), strict=True):
        write_short_demo(path, 3, change)
        config = json.loads((path / "config.json").read_text("utf-8"))
        (path / "config.json").write_text(json.dumps({**config, "vocab_size": 101, "rms_norm_eps": epsilon}))
    tokens = [token % 101 for token in TOKENS]

    def rank(comm: Communicator) -> Any:
        own, other = (
            kept(path, comm, layout, 7, tokens) for path, layout in zip(paths[::-1], (model, reference), strict=True)
        )
        return own.num_tokens, compare(other, own, comm)

    p, q = (by_hand(path, 7, tokens) for path in paths)
    assert p.shape[1] == 101
    results = run_ranks(int(np.prod(model)), rank)
    assert sum(num_tokens for num_tokens, _ in results) == 101
    for _, divergence in results:
        np.testing.assert_allclose(divergence.kl, exact_divergence(p, q), rtol=1e-4, atol=2e-6)
        np.testing.assert_array_equal(divergence.flips, p.argmax(axis=1) != q.argmax(axis=1))


def test_the_cuda_engine_shows_its_logits(short: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))

    def rank(comm: Communicator) -> Any:
        options = {"engine": "cuda", "dtype": "float32", "max_num_seqs": 2}
        return compare(kept(short, comm, (1, 1), 7), kept(short, comm, (1, 1), 7, **options), comm)

    divergence = run_ranks(1, rank)[0]
    assert np.abs(divergence.kl).max() < 1e-6
    assert not divergence.flips.any()


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_short_demo(tmp_path_factory.mktemp("short") / "demo", 3)


@pytest.fixture(scope="module")
def short_disturbed(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("short") / "disturbed"
    shutil.copytree(short, directory)
    config = json.loads((short / "config.json").read_text("utf-8"))
    (directory / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 2e-3}))
    return directory


@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_sums_over_parts_of_a_vocabulary_add_up(seed: int, cuts: int) -> None:
    """Whatever the range of logits: a part may be thousands below another."""
    random = np.random.default_rng(seed)
    a, b = (random.normal(0, random.choice([1, 30, 3000]), (4, 50)).astype(np.float32) for _ in range(2))
    edges = np.sort(random.choice(np.arange(1, 50), cuts, replace=False))
    total = PartialSums.empty(4)
    for start, stop in zip([0, *edges], [*edges, 50], strict=True):
        total += PartialSums.of(a[:, start:stop], b[:, start:stop], int(start))
    p, q = (
        wide - np.logaddexp.reduce(wide, axis=1, keepdims=True) for wide in (a.astype(np.float64), b.astype(np.float64))
    )
    divergence = total.divergence()
    np.testing.assert_allclose(divergence.kl, exact_divergence(p, q), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(divergence.flips, a.argmax(axis=1) != b.argmax(axis=1))


def test_logits_that_find_no_room_are_a_mistake_with_a_way_out() -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    logits = KeptLogits(Full(), [Window(0, 3, 1)], 2)
    with pytest.raises(ConfigError, match=r"logits of 2 tokens, 32 bytes a rank, cannot be kept in .*: No space left"):
        logits(np.array([0], np.uint64), np.array([1], np.int32), 0, np.zeros((1, 4), np.float32))
