"""Beam search through `LLM`: the same answers whatever else runs, however short the cache is, and in any layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx import LLM, SamplingParams
from phalanx.kernels.device import gpu_is_available
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import RequestError
from phalanx.parallel.thread_comm import run_ranks
from phalanx.runtime.request import Hypothesis, Request, RequestOutput
from phalanx.runtime.scheduler.running_set import RunningSet
from phalanx.runtime.scheduler.sequences import Sequence
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint
from tests.support.fake_cupy import install_fake_device

PROMPTS = [
    np.random.default_rng(index).integers(3, 101, length).tolist() for index, length in enumerate((1, 7, 16, 31))
]
WIDTHS = (2, 3, 4, 5)
AMPLE: dict[str, Any] = {"engine": "numpy", "max_model_len": 64}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CASES_BY_NAME["llama-grouped-heads"], tmp_path_factory.mktemp("llama"))


def beams(width: int) -> SamplingParams:
    return SamplingParams(max_tokens=21, beam_width=width, logprobs=0, stop_token_ids=(17, 40))


def answers(output: RequestOutput) -> list[tuple[int, ...]]:
    return [hypothesis.token_ids for hypothesis in output.hypotheses]


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[list[tuple[int, ...]]]:
    """Each search alone."""
    with LLM(directory, **AMPLE) as llm:
        return [answers(llm.generate(prompt, beams(width))[0]) for prompt, width in zip(PROMPTS, WIDTHS, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 5},
        {"max_num_seqs": 6, "block_size": 4, "num_kv_blocks": 70, "max_num_batched_tokens": 5},
        {"max_num_seqs": 16, "block_size": 4, "num_kv_blocks": 66, "prefix_caching": False},
        {"max_num_seqs": 14, "block_size": 1, "num_kv_blocks": 266, "max_num_batched_tokens": 16},
    ],
    ids=["few rows", "few of everything", "few blocks", "blocks of one token"],
)  # fmt: skip
def test_searches_in_a_crowd_equal_each_alone(
    directory: Path, expected: list[list[tuple[int, ...]]], options: dict[str, Any]
) -> None:
    sampled = SamplingParams(max_tokens=20, seed=3)
    with LLM(directory, **AMPLE | options) as llm:
        alone = llm.generate(PROMPTS[1], sampled)[0].token_ids
        crowd = [prompt for prompt in PROMPTS for _ in range(2)]
        params = [one for width in WIDTHS for one in (beams(width), sampled)]
        outputs = llm.generate(crowd, params)
        assert [answers(output) for output in outputs[::2]] == expected
        assert outputs[3].token_ids == alone


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_searches_do_not_depend_on_the_layout(
    directory: Path, expected: list[list[tuple[int, ...]]], tp: int, pp: int
) -> None:
    def rank(comm: Communicator) -> list[list[tuple[int, ...]]]:
        with LLM(directory, comm=comm, tensor_parallel_size=tp, pipeline_parallel_size=pp, **AMPLE) as llm:
            return [answers(output) for output in llm.generate(PROMPTS, [beams(width) for width in WIDTHS])]

    assert run_ranks(tp * pp, rank) == [expected] * (tp * pp)


def test_searches_on_the_cuda_engine_find_the_same(
    directory: Path,
    expected: list[list[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """With kernels emulated where there is no GPU: forked blocks, copies, alternatives of a beam's row."""
    if not gpu_is_available():
        install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))
    sizes = {"max_num_seqs": 6, "max_num_batched_tokens": 12, "num_kv_blocks": 20}
    with LLM(directory, max_model_len=64, engine="cuda", dtype="float32", **sizes) as llm:
        outputs = llm.generate(PROMPTS[1:3], [beams(width) for width in WIDTHS[1:3]])
        assert [answers(output) for output in outputs] == expected[1:3]


def test_the_best_answer_is_the_output_and_scores_are_sums_of_its_logprobs(directory: Path) -> None:
    with LLM(directory, **AMPLE) as llm:
        (output,) = llm.generate(PROMPTS[2], beams(4))
        assert output.logprobs is not None
        best = output.hypotheses[0]
        assert (output.token_ids, output.finish_reason) == (best.token_ids, best.finish_reason)
        total = sum(logprob.logprob for logprob in output.logprobs)
        assert best.total == pytest.approx(total)
        assert best.score == pytest.approx(total / len(output.token_ids))
        scored = llm.generate([*PROMPTS[2], *best.token_ids], SamplingParams(max_tokens=0, prompt_logprobs=0))[0]
        assert scored.prompt_logprobs is not None
        again = [entry.logprob for entry in scored.prompt_logprobs[len(PROMPTS[2]) :] if entry is not None]
        assert again == pytest.approx([logprob.logprob for logprob in output.logprobs], abs=1e-5)


def test_followers_get_the_next_best_answers_and_end_with_their_leader(directory: Path) -> None:
    with LLM(directory, **AMPLE) as llm:
        engine = llm._replica.engine
        assert engine is not None

        def run(ids: list[str], cancelled: str | None = None) -> dict[str, Any]:
            for request_id in ids:
                first = None if request_id == ids[0] else ids[0]
                engine.submit(Request(request_id, tuple(PROMPTS[1]), beams(3), fork_from=first))
            found = []
            for _ in range(4):
                found += engine.step()
            if cancelled is not None:
                engine.cancel(cancelled)
            while engine.has_work:
                found += engine.step()
            found += engine.scheduler.take_deltas()
            return {delta.request_id: delta for delta in found}

        deltas = run(["a", "b", "c"])
        hypotheses: tuple[Hypothesis, ...] = deltas["a"].hypotheses
        assert [deltas[name].token_ids for name in "abc"] == [one.token_ids for one in hypotheses]
        deltas = run(["d", "e", "f"], cancelled="e")
        assert (deltas["e"].finish_reason, deltas["f"].token_ids) == ("cancelled", hypotheses[2].token_ids)
        deltas = run(["g", "h"], cancelled="g")
        assert [deltas[name].finish_reason for name in "gh"] == ["cancelled"] * 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_p": 0.5}, r"top_p=0.5 cannot be combined with beam_width=2"),
        (
            {"structured_outputs": {"regex": "a+"}},
            r"^structured_outputs cannot be combined with beam_width=2; leave one of them out$",
        ),
        ({"logit_bias": {1: 5.0}}, r"logit_bias=.* cannot be combined"),
        ({"repetition_penalty": 1.1}, r"repetition_penalty=1.1 cannot be combined"),
        ({"temperature": 0.7}, r"temperature=0.7 cannot be combined"),
        ({"beam_width": 33}, r"beam_width=33 is out of range; use at most 32"),
        ({"early_stopping": "soon"}, r"early_stopping='soon' is not supported"),
    ],
)
def test_fields_that_a_search_would_ignore_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**{"beam_width": 2, **fields})


def test_a_search_that_can_never_fit_is_refused(directory: Path) -> None:
    with LLM(directory, **AMPLE | {"max_num_seqs": 3, "block_size": 16, "num_kv_blocks": 4}) as llm:
        with pytest.raises(RequestError, match="beam_width=4 needs 4 of 3 sequences at once"):
            llm.generate(PROMPTS[0], beams(4))
        with pytest.raises(RequestError, match="beam_width=3 needs 6 of 4 cache blocks"):
            llm.generate(PROMPTS[0], beams(3))
        assert len(llm.generate(PROMPTS[0], beams(2))[0].hypotheses) == 2


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_answers_and_scores_equal_transformers(directory: Path, early: Any, length_penalty: float) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    ends = (17, 40)
    with LLM(directory, **AMPLE) as llm:
        for prompt, width in zip(PROMPTS, WIDTHS, strict=True):
            params = SamplingParams(
                max_tokens=21, beam_width=width, length_penalty=length_penalty, early_stopping=early, ignore_eos=True,
                stop_token_ids=ends,
            )  # fmt: skip
            (output,) = llm.generate(prompt, params)
            found = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), num_beams=width,
                num_return_sequences=width, max_new_tokens=21, do_sample=False, early_stopping=early, eos_token_id=list(ends),
                length_penalty=length_penalty, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            expected = [_until_end(tokens, ends) for tokens in found.sequences[:, len(prompt) :].tolist()]
            assert answers(output) == expected
            scores = [hypothesis.score for hypothesis in output.hypotheses]
            np.testing.assert_allclose(scores, found.sequences_scores.numpy(), rtol=2e-6, atol=2e-4)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("early", [False, True, "never"])
def test_stop_sequences_end_beams_as_stopping_criteria_of_transformers_do(directory: Path, early: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    class Sequences(StoppingCriteria):  # type: ignore[misc]
        def __init__(self, num_prompt: int, sequences: list[list[int]]) -> None:
            self.num_prompt, self.sequences = num_prompt, sequences

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            rows = input_ids[:, self.num_prompt :].tolist()
            return torch.tensor([any(row[-len(one) :] == one for one in self.sequences) for row in rows])

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with LLM(directory, **AMPLE) as llm:
        for prompt, width in zip(PROMPTS, WIDTHS, strict=True):
            params = SamplingParams(max_tokens=21, beam_width=width, early_stopping=early, ignore_eos=True)
            (free,) = llm.generate(prompt, params)
            sequences = [list(free.hypotheses[0].token_ids[4:7]), list(free.hypotheses[1].token_ids[9:11])]
            stopping = dataclasses.replace(params, stop_token_sequences=tuple(map(tuple, sequences)))
            (output,) = llm.generate(prompt, stopping)
            found = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), num_beams=width,
                num_return_sequences=width, max_new_tokens=21, do_sample=False, early_stopping=early, eos_token_id=None,
                stopping_criteria=StoppingCriteriaList([Sequences(len(prompt), sequences)]), pad_token_id=0,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            rows = found.sequences[:, len(prompt) :].tolist()
            assert [tuple(row[: len(one)]) for row, one in zip(rows, answers(output), strict=True)] == answers(output)
            padding = {token for row, one in zip(rows, answers(output), strict=True) for token in row[len(one) :]}
            assert padding <= {-1}, "what transformers writes after the end where there is no end token"
            scores = [hypothesis.score for hypothesis in output.hypotheses]
            np.testing.assert_allclose(scores, found.sequences_scores.numpy(), rtol=2e-6, atol=2e-4)
            assert "stop" in {hypothesis.finish_reason for hypothesis in output.hypotheses}


STOPPING: dict[str, Any] = {"max_tokens": 24, "beam_width": 3, "stop": ("name", "):"), "ignore_eos": True}
DEFINITIONS = ("import os\n\ndef ", "class Reader:\n    def ")


def test_stop_texts_end_beams_while_they_are_searched() -> None:
    """An answer that ends early leaves its place to others, so none is there twice."""
    with LLM(engine="numpy") as llm:
        assert llm.tokenizer is not None
        for output in llm.generate(DEFINITIONS, SamplingParams(**STOPPING)):
            for answer in output.hypotheses:
                text = llm.tokenizer.decode(answer.token_ids)
                before = llm.tokenizer.decode(answer.token_ids[:-1])
                found = [stop for stop in STOPPING["stop"] if stop in text]
                assert (answer.finish_reason, answer.stop in found) == (("stop", True) if found else ("length", False))
                assert not any(stop in before for stop in STOPPING["stop"])
            assert len(set(answers(output))) == 3
            best = output.hypotheses[0]
            assert (output.token_ids, output.finish_reason, output.stop_reason) == (
                best.token_ids,
                best.finish_reason,
                best.stop,
            )
            assert output.text is not None
            assert not any(stop in output.text for stop in STOPPING["stop"])
            assert "stop" in {answer.finish_reason for answer in output.hypotheses}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_stop_texts_are_stop_strings_of_transformers() -> None:
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    directory = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with LLM(directory, engine="numpy", dtype="float32") as llm:
        assert llm.tokenizer is not None
        for prompt in DEFINITIONS:
            token_ids = llm.tokenizer.encode(prompt)
            (output,) = llm.generate([token_ids], SamplingParams(**STOPPING))
            found = model.generate(
                torch.tensor([token_ids]), attention_mask=torch.ones(1, len(token_ids), dtype=torch.long), num_beams=3,
                num_return_sequences=3, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0,
                stop_strings=list(STOPPING["stop"]), tokenizer=tokenizer, return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            rows = found.sequences[:, len(token_ids) :].tolist()
            assert [tuple(token for token in row if token != -1) for row in rows] == answers(output)
            scores = [answer.score for answer in output.hypotheses]
            np.testing.assert_allclose(scores, found.sequences_scores.numpy(), rtol=1e-5, atol=2e-4)


def _until_end(token_ids: list[int], ends: tuple[int, ...]) -> tuple[int, ...]:
    first = next((index for index, token in enumerate(token_ids) if token in ends), len(token_ids) - 1)
    return tuple(token_ids[: first + 1])


MANY = [np.random.default_rng(100 + index).integers(3, 101, 20).tolist() for index in range(10)]


@pytest.mark.parametrize("block_size", [1, 4])
def test_preempted_searches_find_the_same_and_leave_in_the_cache_what_its_keys_say(
    directory: Path, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beams that were preempted, went on and were given up: prompts that begin like their answers continue as in a fresh engine."""
    release = RunningSet.release

    def checked_release(running: RunningSet, sequence: Sequence) -> None:
        seq_index, table = sequence.seq_index, running._table
        filled = table.known_tokens(seq_index)[: table.num_filled(seq_index)].copy() if seq_index >= 0 else None
        release(running, sequence)
        if filled is not None:
            keys: list[bytes] = []
            running._cache.extend_keys(keys, filled, sequence.salt)
            assert sequence.keys[: len(keys)] == keys, "blocks are shared under keys of other tokens"

    monkeypatch.setattr(RunningSet, "release", checked_release)
    crowded = {"max_num_seqs": 40, "block_size": block_size, "num_kv_blocks": 180 // block_size}
    searching = SamplingParams(max_tokens=21, beam_width=4, ignore_eos=True)
    greedy = SamplingParams(max_tokens=3, temperature=0.0, logprobs=0, ignore_eos=True)
    with LLM(directory, **AMPLE | crowded) as llm:
        outputs = llm.generate(MANY, searching)
        assert llm._replica.engine is not None
        assert llm._replica.engine.stats().num_preemptions > 0
        longer = [
            [*output.prompt_token_ids, *answer.token_ids[:length]]
            for output in reversed(outputs)
            for answer in output.hypotheses
            for length in range(1, len(answer.token_ids), 2)
        ]
        found = [llm.generate(prompt, greedy)[0] for prompt in longer]
        assert sum(output.num_cached_tokens for output in found) > 0
    with LLM(directory, **AMPLE, prefix_caching=False) as llm:
        assert [answers(output) for output in outputs] == [
            answers(llm.generate(prompt, searching)[0]) for prompt in MANY
        ]
        expected = llm.generate(longer, greedy)
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs is not None
        assert other.logprobs is not None
        measured, wanted = ([entry.logprob for entry in logprobs] for logprobs in (one.logprobs, other.logprobs))
        assert measured == pytest.approx(wanted, abs=1e-4)
