# SPDX-License-Identifier: Apache-2.0
"""Phalanx predicts held-out text exactly as well as transformers does, and would be caught if it did not.

A small trained model makes this a check that random weights cannot give: a wrong rotary base, norm, mask or cache shows
as a worse loss. The mutations below disturb one of each and expect the check to fail.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.launch.eval import evaluate
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.thread_comm import run_ranks
from phalanx.runtime.executors.numpy.attention import NumpyAttention
from phalanx.runtime.executors.numpy.scores import AttentionKind
from phalanx.runtime.llm import LLM
from phalanx.runtime.request import SamplingParams

TOLERANCE = 1e-5
"""Nats a token, float32. 1e-3 is asked for; this is tight enough that a norm epsilon of 1e-6 for 1e-5 shows."""

SHORT = ("importlib.metadata._functools.txt", "test.test_queue.txt", "tkinter.test.test_ttk.test_style.txt")


def measured_losses(
    texts: Sequence[str], tp: int = 1, pp: int = 1, model: Path | None = None, **options: Any
) -> list[float]:
    """Mean loss of each text on the NumPy engine with ranks as threads; all ranks must agree."""

    def rank(comm: Communicator) -> list[float]:
        with LLM(
            model, tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=comm, engine="numpy", **options
        ) as llm:
            context = llm.max_model_len
            return [evaluate(llm, text, context, context - 1).loss for text in texts]

    per_rank = run_ranks(tp * pp, rank)
    assert all(losses == per_rank[0] for losses in per_rank)
    return per_rank[0]


def assert_quality(reference: dict[str, Any], held_out: Path, files: Sequence[str] = SHORT, **options: Any) -> None:
    """The check: losses of the recorded excerpts within `TOLERANCE` of transformers'."""
    recorded = {entry["file"]: entry["loss"] for entry in reference["held_out"]}
    measured = measured_losses([(held_out / file).read_text("utf-8") for file in files], **options)
    np.testing.assert_allclose(measured, [recorded[file] for file in files], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)])
def test_held_out_loss_equals_transformers_in_every_layout(
    reference: dict[str, Any], held_out: Path, tp: int, pp: int
) -> None:
    assert_quality(reference, held_out, tp=tp, pp=pp)


def test_held_out_loss_equals_transformers_up_to_the_last_position(reference: dict[str, Any], held_out: Path) -> None:
    files = [entry["file"] for entry in reference["held_out"]]
    assert max(entry["num_tokens"] for entry in reference["held_out"]) == 2048
    assert_quality(reference, held_out, files)


def test_held_out_loss_does_not_depend_on_chunks_and_blocks(reference: dict[str, Any], held_out: Path) -> None:
    assert_quality(reference, held_out, max_num_batched_tokens=61, block_size=7)


def test_overlapping_windows_score_what_transformers_scores(reference: dict[str, Any], held_out: Path) -> None:
    recorded = reference["windowed"]
    text = (held_out / recorded["file"]).read_text("utf-8")
    with LLM(engine="numpy") as llm:
        evaluation = evaluate(llm, text, recorded["context"], recorded["stride"])
    assert evaluation.loss == pytest.approx(recorded["loss"], abs=TOLERANCE)
    assert evaluation.num_bytes == len(text.encode())


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_greedy_continuations_and_chat_answers_equal_transformers(reference: dict[str, Any], tp: int, pp: int) -> None:
    entries = reference["greedy"]
    assert min(entry["margin"] for entry in entries) > 1e-2, "no recorded choice hangs on rounding"
    params = [SamplingParams(max_tokens=max(48, len(entry["token_ids"])), temperature=0.0) for entry in entries]

    def rank(comm: Communicator) -> list[Any]:
        with LLM(tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=comm, engine="numpy") as llm:
            return llm.generate([entry["prompt_token_ids"] for entry in entries], params)

    for output, entry in zip(run_ranks(tp * pp, rank)[0], entries, strict=True):
        assert list(output.token_ids) == entry["token_ids"], entry["prompt"]
        assert output.text == entry["text"]
        assert output.finish_reason == entry["finish_reason"]
    assert sum(entry["finish_reason"] == "stop" for entry in entries) >= 3, "chat answers end by themselves"


def with_config(demo: Path, directory: Path, **changes: Any) -> Path:
    """The demo checkpoint with other values in its config."""
    shutil.copytree(demo, directory)
    config = json.loads((demo / "config.json").read_text("utf-8"))
    assert changes.keys() <= config.keys()
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


def test_unchanged_copy_of_the_checkpoint_passes(
    reference: dict[str, Any], held_out: Path, demo: Path, tmp_path: Path
) -> None:
    assert_quality(reference, held_out, model=with_config(demo, tmp_path / "copy"))


@pytest.mark.parametrize(
    "changes",
    [{"rope_theta": 10100.0}, {"rope_theta": 500000.0}, {"rms_norm_eps": 1e-6}, {"rms_norm_eps": 1e-3}],
    ids=str,
)
def test_disturbed_rotary_base_or_norm_epsilon_is_caught(
    reference: dict[str, Any], held_out: Path, demo: Path, tmp_path: Path, changes: dict[str, float]
) -> None:
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_quality(reference, held_out, model=with_config(demo, tmp_path / "disturbed", **changes))


def test_missing_causal_mask_is_caught(
    reference: dict[str, Any], held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AttentionKind, "shape_scores", lambda *arguments: None)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_quality(reference, held_out)


def test_mask_that_hides_the_token_itself_is_caught(
    reference: dict[str, Any], held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = AttentionKind.shape_scores

    def strict(self: AttentionKind, scores: Any, queries: Any, keys: Any, last: Any, *others: Any) -> None:
        right(self, scores, np.maximum(queries - 1, 0), keys, last, *others)

    monkeypatch.setattr(AttentionKind, "shape_scores", strict)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_quality(reference, held_out)


def swap_first_blocks(blocks: Any) -> Any:
    """The same cache blocks, the first two in each other's place."""
    return blocks if len(blocks) < 2 else np.concatenate((blocks[1::-1], blocks[2:]))


def test_disturbed_cache_order_is_caught(
    reference: dict[str, Any], held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = NumpyAttention.bind

    def bind(self: NumpyAttention, plan: Any, state: Any) -> None:
        right(self, plan, state)
        self._tiles = [dataclasses.replace(tile, blocks=swap_first_blocks(tile.blocks)) for tile in self._tiles]

    monkeypatch.setattr(NumpyAttention, "bind", bind)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_quality(reference, held_out)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_loss_of_any_text_equals_transformers_live(reference: dict[str, Any], held_out: Path, demo: Path) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))

    def live(text: str) -> float:
        token_ids = torch.tensor([tokenizer.encode(text).ids])
        with torch.no_grad():
            return float(model(token_ids, labels=token_ids).loss)

    recorded = next(entry for entry in reference["held_out"] if entry["file"] == SHORT[0])
    assert live((held_out / SHORT[0]).read_text("utf-8")) == pytest.approx(recorded["loss"], abs=1e-5)
    texts = ["Phalanx is no part of Python's library.\n", Path(__file__).read_text("utf-8")[:1500], "\u2603 " * 20]
    np.testing.assert_allclose(measured_losses(texts), [live(text) for text in texts], rtol=0, atol=TOLERANCE)
