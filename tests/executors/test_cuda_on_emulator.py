"""The CUDA executor, its kernels emulated: the tokens and log-probabilities of the NumPy engine, in every layout."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import CheckpointError, ConfigError
from phalanx.parallel.thread_comm import run_ranks
from phalanx.runtime.executors.cuda import build as cuda_factory
from phalanx.runtime.executors.cuda import executor as cuda_executor
from phalanx.runtime.executors.cuda import step_times
from phalanx.runtime.executors.cuda.graphs import DECODE_ROWS, GraphCache, StepKey
from phalanx.runtime.executors.cuda.stage import CudaStage
from phalanx.runtime.executors.rank_spec import RankSpec
from phalanx.runtime.llm import LLM
from phalanx.runtime.request import Logprob, RequestOutput, SamplingParams
from phalanx.runtime.scheduler.microbatches import num_microbatches
from phalanx.runtime.step.times import DeviceTimes, StepTimes
from tests.support.checkpoints import CASES_BY_NAME, CheckpointCase, write_checkpoint
from tests.support.fake_cupy import Event, HostGroup, install_fake_device
from tests.support.reference import load_reference, prompt_token_ids
from tests.support.thread_ranks import generate_on_threads

TOLERANCE = 1e-3
GPT2 = CASES_BY_NAME["gpt2-plain"]
CASES = [
    CASES_BY_NAME["llama-grouped-heads"],
    CheckpointCase("gpt2-heads-of-8", {**GPT2.config, "n_head": 6}),
    CASES_BY_NAME["gemma-one-kv-head"],
]
GREEDY, FILTERED = {"temperature": 0.0}, {"top_p": 0.9, "top_k": 5, "seed": 1}
FIVE_HEADS = CheckpointCase("gpt2-five-heads", {**GPT2.config, "n_head": 5, "n_embd": 40, "n_inner": 64})
"""As GPT-2 XL, whose 25 heads no even number of ranks divides."""
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
OTHER_FAMILIES = ("mistral-window", "gpt_neox-parallel", "gpt_neox-serial-no-bias", "gptj-plain", "bloom-six-heads",
                  "gemma2-caps", "qwen3-windows", "opt-narrow-norm-last", "falcon-one-kv-head", "falcon-alibi",
                  "gpt_bigcode-one-kv-head", "phi-plain", "qwen2-plain", "mixtral-plain", "qwen2_moe-one-dense-layer")  # fmt: skip

MORE_FAMILIES = ("gemma3-windows", "glm4-plain", "smollm3-plain", "mpt-clipped", "cohere-head-norms", "cohere2-windows",
                 "nemotron-plain", "granite-factors", "stablelm-head-norms")  # fmt: skip
"""On two ranks alone: what one rank does differently, the others show."""
SAME_OPERATIONS = ("phi3-longrope-short", "internlm2-plain", "glm-plain", "chatglm-own-keys", "qwen-plain", "baichuan-13b",
                   "gemma3_multimodal-windows", "stablelm-parallel", "megatron-rope", "megatron-llama")  # fmt: skip
"""Families that differ from others by what is loaded, which no engine does in its own way; their kernels take long to compile."""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))


def generate(
    directory: Path, tp: int, pp: int, prompts: list[tuple[int, ...]], params: Any, engine: str = "cuda"
) -> list[RequestOutput]:
    return generate_on_threads(directory, prompts, params, tp, pp, engine=engine)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tokens_and_logprobs_equal_the_numpy_engines(
    case: CheckpointCase, tp: int, pp: int, tmp_path: Path, device: None
) -> None:
    prompt = prompt_token_ids(case)
    directory = write_checkpoint(case, tmp_path)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    expected = generate(directory, 1, 1, [prompt], params, engine="numpy")[0]
    output = generate(directory, tp, pp, [prompt], params)[0]
    assert output.token_ids == expected.token_ids
    assert output.logprobs is not None
    assert expected.logprobs is not None
    assert_close_logprobs(output.logprobs, expected.logprobs)
    assert output.prompt_logprobs is not None
    assert expected.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert_close_logprobs(output.prompt_logprobs[1:], expected.prompt_logprobs[1:])


@pytest.mark.parametrize(
    ("name", "tp"),
    [
        *((name, 2) for name in (*OTHER_FAMILIES, *MORE_FAMILIES)),
        *(pytest.param(name, 1, marks=pytest.mark.slow if i % 4 else ()) for i, name in enumerate(OTHER_FAMILIES)),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in SAME_OPERATIONS),
    ],
)
def test_other_families_equal_the_numpy_engine(name: str, tp: int, tmp_path: Path, device: None) -> None:
    test_tokens_and_logprobs_equal_the_numpy_engines(CASES_BY_NAME[name], tp, 1, tmp_path, None)


@pytest.mark.parametrize("name", ["gptj-plain", "falcon-two-norms"])
def test_parallel_halves_have_buffers_of_their_own_in_every_step(name: str, tmp_path: Path, device: None) -> None:
    """vllm#592: one buffer for the sums of both halves."""
    case = CASES_BY_NAME[name]
    recorded, params = load_reference(case).greedy, SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    output = generate(write_checkpoint(case, tmp_path), 2, 1, [prompt_token_ids(case)], params)[0]
    assert output.token_ids == recorded


@pytest.mark.parametrize(
    ("case", "tp"),
    [(FIVE_HEADS, 2), (CASES[0], 3), (CASES_BY_NAME["bloom-six-heads"], 4)],
    ids=["five", "two-kv", "six"],
)
def test_ranks_with_more_heads_than_others_equal_the_numpy_engine(
    case: CheckpointCase, tp: int, tmp_path: Path, device: None
) -> None:
    test_tokens_and_logprobs_equal_the_numpy_engines(case, tp, 1, tmp_path, None)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_a_prefix_that_sees_all_of_itself_equals_the_numpy_engines(
    tp: int, pp: int, tmp_path: Path, device: None
) -> None:
    """Prompts share steps; the second begins with the first's prefix, the third's is two tokens long, and what follows is cut."""
    case = CASES_BY_NAME["chatglm1-prefix"]
    directory, prompt = write_checkpoint(case, tmp_path), prompt_token_ids(case)
    prompts = [prompt, (*prompt[:14], 9, 8), (7, *case.prefix_end, *prompt[3:9])]
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=3)
    expected = generate_on_threads(directory, prompts, params, max_num_batched_tokens=15)
    outputs = generate_on_threads(directory, prompts, params, tp, pp, engine="cuda", max_num_batched_tokens=15)
    for one, other in zip(outputs, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs is not None
        assert other.logprobs is not None
        assert_close_logprobs(one.logprobs, other.logprobs)


def assert_close_logprobs(actual: Sequence[Logprob | None], expected: Sequence[Logprob | None]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one is not None
        assert other is not None
        assert one.token_id == other.token_id
        assert abs(one.logprob - other.logprob) < TOLERANCE
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        np.testing.assert_allclose([value for _, value in one.top], [value for _, value in other.top], atol=TOLERANCE)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_sampled_tokens_equal_the_numpy_engines(tp: int, pp: int, tmp_path: Path, device: None) -> None:
    case = CASES_BY_NAME["llama-grouped-heads"]
    directory = write_checkpoint(case, tmp_path)
    prompt = prompt_token_ids(case)
    prompts = [prompt, prompt[:7], prompt[3:4], prompt[5:], prompt[2:9]]
    for params in (
        SamplingParams(max_tokens=9, temperature=0.8, seed=11, ignore_eos=True),
        SamplingParams(max_tokens=6, temperature=1.2, seed=5, top_k=9, top_p=0.8, min_p=0.02, ignore_eos=True),
    ):
        expected = generate(directory, 1, 1, prompts, params, engine="numpy")
        outputs = generate(directory, tp, pp, prompts, params)
        assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_tokens_with_biases_equal_the_numpy_engines(tp: int, pp: int, tmp_path: Path, device: None) -> None:
    case = CASES_BY_NAME["llama-grouped-heads"]
    directory = write_checkpoint(case, tmp_path)
    prompt = prompt_token_ids(case)
    prompts = [prompt, prompt[:7], prompt[3:4], prompt[5:], prompt[2:9]]
    plain = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    ends = generate(directory, 1, 1, prompts, plain, engine="numpy")[0].token_ids
    for fields in ({"logprobs": 2}, {"temperature": 0.9, "seed": 3}, {"temperature": 0.9, "seed": 3, "top_k": 9}):
        params = dataclasses.replace(plain, min_tokens=5, stop_token_ids=ends, **fields)
        expected = generate(directory, 1, 1, prompts, params, engine="numpy")
        outputs = generate(directory, tp, pp, prompts, params)
        assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
        assert not set(ends) & {token for output in outputs for token in output.token_ids[:5]}


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_penalised_tokens_equal_the_numpy_engines(tp: int, pp: int, tmp_path: Path, device: None) -> None:
    """Prompts share a prefix, come in chunks and run next to one with bad words and a mask; the first comes again, for its blocks."""
    case = CASES_BY_NAME["llama-grouped-heads"]
    directory = write_checkpoint(case, tmp_path)
    prompt = prompt_token_ids(case)
    prompts = [prompt * 2, prompt[:7], prompt * 2 + prompt[:3], prompt[5:], prompt[2:9]]
    prompts.append(prompts[0])
    plain = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
    params = [
        dataclasses.replace(plain, **fields)
        for fields in (
            {"repetition_penalty": 1.7},
            {"presence_penalty": 1.0, "frequency_penalty": 0.4, "logprobs": 2},
            {"repetition_penalty": 0.7, "frequency_penalty": 1.4, "temperature": 0.9, "seed": 3},
            {"bad_token_ids": ((32, 32), (89, 60), (40,)), "allowed_token_ids": (32, 89, 60, 40, 3, 100)},
            {"repetition_penalty": 1.3, "temperature": 0.9, "seed": 5, "top_k": 9, "logit_bias": {7: 3.0}},
        )
    ]
    params.append(params[0])
    expected = generate(directory, 1, 1, prompts, params, engine="numpy")
    outputs = generate(directory, tp, pp, prompts, params)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    assert any(output.num_cached_tokens for output in outputs)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (1, 2), (2, 2)])
def test_pipeline_measures_its_steps_and_chooses_micro_batches(tp: int, pp: int, tmp_path: Path, device: None) -> None:
    directory = write_checkpoint(CASES[0], tmp_path)

    def rank(comm: Communicator) -> tuple[StepTimes | None, DeviceTimes | None, int | None]:
        with LLM(
            directory, tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=comm, engine="cuda", max_num_seqs=7,
            max_num_batched_tokens=12, num_kv_blocks=8,
        ) as llm:  # fmt: skip
            replica = llm._replica
            number = replica.engine.scheduler.num_microbatches(7) if replica.engine else None
            return replica.executor.step_times, replica.executor.device_times, number

    (times, device_times, number), *others = run_ranks(tp * pp, rank)
    assert all(other[0] == times for other in others), "the slowest stage counts, whichever rank it is of"
    assert device_times == DeviceTimes(), "what was run to measure is no step"
    if pp == 1:
        assert (times, number) == (None, 1)
        return
    assert times is not None
    assert (times.num_stages, times.rows) == (2, (1, 2, 4))
    assert all(seconds > 0 for seconds in times.stage_seconds + times.latency_seconds)
    assert number == num_microbatches(np.array([7]), 3, times)[0]


@pytest.mark.parametrize("pp", [1, 2])
def test_a_start_captures_every_decoding_step_with_filters_and_without(
    pp: int, tmp_path: Path, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request with ``top_p`` meets no step that runs without a graph once its prompt is computed."""
    captured, run = defaultdict[int, set[StepKey]](set), defaultdict[int, list[StepKey]](list)
    original = GraphCache.run

    def recorded(self: GraphCache[Any], key: StepKey, program: Any, **options: Any) -> Any:
        run[id(self)].append(key)
        return original(self, key, program, **options)

    monkeypatch.setattr(GraphCache, "run", recorded)
    monkeypatch.setattr(GraphCache, "_capture", lambda self, key, *_: captured[id(self)].add(key))
    directory = write_checkpoint(CASES[0], tmp_path)

    def rank(comm: Communicator) -> tuple[set[StepKey], set[StepKey]]:
        with LLM(
            directory, pipeline_parallel_size=pp, comm=comm, engine="cuda", max_num_seqs=5, max_num_batched_tokens=8, num_kv_blocks=20,
        ) as llm:  # fmt: skip
            cache = id(llm._replica.executor._graphs)
            at_start = set(captured[cache])
            del run[cache][:]
            greedy, filtered = (SamplingParams(max_tokens=6, ignore_eos=True, **one) for one in (GREEDY, FILTERED))
            llm.generate([(5, 6)] * 5, [filtered, filtered, greedy, greedy, greedy])
            return at_start, {key for key in run[cache] if not key.has_prefill}

    *others, (at_start, decoding) = run_ranks(pp, rank)
    sizes = {StepKey(size, size, False, filters) for size in DECODE_ROWS.sizes(5) for filters in (False, True)}
    assert sizes == {key for key in at_start if not key.has_prefill}
    assert any(key.filters for key in decoding)
    assert decoding <= at_start
    for at_start, _ in others:
        assert not any(key.filters for key in at_start), "stages without logits run both as one graph"


class RankClock(threading.local):
    """A rank's time, which passes while its stage runs and while it receives."""

    seconds = 0.0

    def pass_before(self, function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            self.seconds += seconds
            return function(*args, **options)

        return timed


def test_stage_times_hold_no_waiting_for_other_stages(
    tmp_path: Path, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_seconds, receive_seconds, clock = 0.25, 64.0, RankClock()
    monkeypatch.setattr(CudaStage, "run", clock.pass_before(CudaStage.run, stage_seconds))
    monkeypatch.setattr(HostGroup, "recv", clock.pass_before(HostGroup.recv, receive_seconds))
    monkeypatch.setattr(Event, "record", lambda event, stream: setattr(event, "seconds", clock.seconds))
    monkeypatch.setattr(step_times, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    directory = write_checkpoint(CASES[0], tmp_path)

    def rank(comm: Communicator) -> StepTimes | None:
        with LLM(
            directory, tensor_parallel_size=2, pipeline_parallel_size=2, comm=comm, engine="cuda", max_num_seqs=2,
            max_num_batched_tokens=4, num_kv_blocks=4,
        ) as llm:  # fmt: skip
            return llm._replica.executor.step_times

    assert run_ranks(4, rank)[0] == StepTimes(2, (1,), (stage_seconds,), (stage_seconds + receive_seconds,))


@pytest.mark.parametrize("way", [0.0, 1.0], ids=["two micro-batches", "three"])
def test_tokens_do_not_depend_on_what_was_measured(
    way: float, tmp_path: Path, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = StepTimes(2, (1, 4), (1e-3, 2e-3), (2e-3 + way, 4e-3 + way))
    monkeypatch.setattr(cuda_executor, "measure_step_times", lambda *_: times)
    case = CASES_BY_NAME["llama-grouped-heads"]
    directory = write_checkpoint(case, tmp_path)
    prompt = prompt_token_ids(case)
    prompts = [prompt[:5], prompt[:7], prompt[3:4], prompt[5:], prompt[2:9]]
    params = SamplingParams(max_tokens=9, temperature=0.8, seed=11, ignore_eos=True)
    expected = generate(directory, 1, 1, prompts, params, engine="numpy")
    outputs = generate(directory, 1, 2, prompts, params)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


def test_timeline_of_all_ranks_is_one_chrome_trace(tmp_path: Path, device: None) -> None:
    directory = write_checkpoint(CASES[0], tmp_path / "model")
    trace = tmp_path / "trace.json"

    def rank(comm: Communicator) -> None:
        with LLM(
            directory, tensor_parallel_size=1, pipeline_parallel_size=2, comm=comm, engine="cuda", max_num_seqs=2,
            max_num_batched_tokens=12, num_kv_blocks=8, trace=True,
        ) as llm:  # fmt: skip
            llm.generate([(3, 4, 5)], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
            llm._replica.executor.write_trace(trace, comm)

    run_ranks(2, rank)
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in spans} == {0, 1}
    assert {"GEMM", "attention", "bubble", "communication", "host", "other"} == {event["cat"] for event in spans}
    assert all(event["dur"] >= 0 for event in spans)


@pytest.fixture
def group_ends(monkeypatch: pytest.MonkeyPatch, device: None) -> dict[HostGroup, list[str]]:
    """How each group of GPUs was released."""
    ends: dict[HostGroup, list[str]] = defaultdict(list)
    monkeypatch.setattr(HostGroup, "abort", lambda group: ends[group].append("abort"))
    monkeypatch.setattr(HostGroup, "close", lambda group: ends[group].append("close"))
    return ends


def load(directory: Path, **options: Any) -> None:
    """An engine of 2 x 2 ranks, closed again."""

    def rank(comm: Communicator) -> None:
        LLM(
            directory, tensor_parallel_size=2, pipeline_parallel_size=2, comm=comm, engine="cuda", block_size=16,
            max_num_seqs=3, max_num_batched_tokens=12, **options,
        ).close()  # fmt: skip

    run_ranks(4, rank)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_blocks": (1 << 31) - 1}, "2147483647 blocks of .* do not fit"),
        ({"num_kv_blocks": 1, "max_model_len": 17}, "--max-model-len=17 does not fit the cache"),
    ],
)
def test_sizes_that_do_not_fit_leave_no_group_open(
    options: dict[str, int], message: str, tmp_path: Path, group_ends: dict[HostGroup, list[str]]
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write_checkpoint(CASES[0], tmp_path), **options)
    assert list(group_ends.values()) == [["abort", "close"]] * 4 * 3


def test_a_failure_of_one_rank_leaves_no_group_open(
    tmp_path: Path, group_ends: dict[HostGroup, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_weights = cuda_factory._load

    def fails_on_one_rank(spec: RankSpec, library: Any) -> Any:
        if spec.comm.rank == 1:
            raise CheckpointError("a shard is missing")
        return load_weights(spec, library)

    monkeypatch.setattr(cuda_factory, "_load", fails_on_one_rank)
    with pytest.raises(CheckpointError, match="a shard is missing"):
        load(write_checkpoint(CASES[0], tmp_path), num_kv_blocks=20)
    assert list(group_ends.values()) == [["abort", "close"]] * 4 * 3


def test_a_group_that_cannot_be_opened_closes_those_before_it_and_what_goes_wrong_then_hides_nothing(
    tmp_path: Path, group_ends: dict[HostGroup, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot_open(comm: Communicator, members: range) -> None:
        raise ConfigError("NCCL cannot be loaded")

    def cannot_abort(group: HostGroup) -> None:
        group_ends[group].append("abort")
        raise RuntimeError("cudaErrorIllegalAddress")

    monkeypatch.setattr(cuda_factory, "open_device_group", cannot_open)
    monkeypatch.setattr(HostGroup, "abort", cannot_abort)
    with pytest.raises(ConfigError, match="NCCL cannot be loaded"):
        load(write_checkpoint(CASES[0], tmp_path), num_kv_blocks=20)
    # The first rank to fail ends the others, some of them before they open a group.
    assert group_ends
    assert all(ends == ["abort", "close"] for ends in group_ends.values())


def test_an_engine_closes_each_group_once(tmp_path: Path, group_ends: dict[HostGroup, list[str]]) -> None:
    load(write_checkpoint(CASES[0], tmp_path), num_kv_blocks=20)
    assert list(group_ends.values()) == [["close"]] * 4 * 3


def test_guided_tokens_equal_the_numpy_engines_next_to_sequences_that_run_ahead(device: None) -> None:
    """The demo model: a guided sequence waits for each of its tokens, the other is planned before its last is known."""
    params = [
        SamplingParams(max_tokens=12, seed=3, structured_outputs={"regex": "[0-9]{3}-[a-z]{4}"}),
        SamplingParams(max_tokens=12, seed=4, ignore_eos=True),
        SamplingParams(max_tokens=12, seed=5, structured_outputs={"choice": ["yes", "no"]}, repetition_penalty=1.3),
    ]
    prompts = [(5, 6, 7, 8), (9, 10, 11), (5, 6, 7, 8, 9)]

    def tokens(engine: str, comm: Communicator) -> list[tuple[int, ...]]:
        with LLM(comm=comm, engine=engine, max_num_seqs=3, max_num_batched_tokens=16, num_kv_blocks=12, max_model_len=48,
                 dtype="float32") as llm:  # fmt: skip
            return [output.token_ids for output in llm.generate(prompts, params)]

    (expected,) = run_ranks(1, lambda comm: tokens("numpy", comm))
    assert run_ranks(1, lambda comm: tokens("cuda", comm))[0] == expected
