"""Guided answers: each matches its guide, in every layout and batch; guides that cost too much are refused."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import RequestError
from phalanx.parallel.thread_comm import run_ranks
from phalanx.runtime import guidance
from phalanx.runtime.guidance import GuideCompiler, check_guide
from phalanx.runtime.llm import LLM
from phalanx.runtime.request import RequestOutput, SamplingParams
from phalanx.runtime.sampling.guides import MAX_GUIDE_CHARACTERS, Guide, GuideRule
from phalanx.runtime.text import Tokenizer

from ..support.hostile_guides import HOSTILE_GUIDES
from ..support.json_schemas import random_schema
from ..support.launcher import ROOT

PLAIN = SamplingParams(max_tokens=160, temperature=1.0, top_k=40)
PROMPT = "def answer():\n    return "
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GUIDES: list[tuple[dict[str, Any], Callable[[str], object]]] = [
    ({"json": PERSON}, lambda text: jsonschema.validate(json.loads(text), PERSON)),
    ({"json": json.dumps(PERSON)}, lambda text: jsonschema.validate(json.loads(text), PERSON)),
    ({"regex": "[0-9]{3}-[a-z]{4}"}, lambda text: re.fullmatch("[0-9]{3}-[a-z]{4}", text)),
    ({"choice": ["yes", "no", 'per"haps', "naïve"]}, lambda text: text in ("yes", "no", 'per"haps', "naïve")),
    ({"grammar": 'start: "a" ("b" | "c") "d"'}, lambda text: text in ("abd", "acd")),
    ({"grammar": 'root ::= "x" [0-9] "y"'}, lambda text: re.fullmatch("x[0-9]y", text)),
]


def generate(params: list[SamplingParams], tp: int = 1, pp: int = 1, **options: Any) -> list[RequestOutput]:
    def rank(comm: Communicator) -> list[RequestOutput]:
        sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 256, **options}
        with LLM(tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=comm, engine="numpy", **sizes) as llm:
            return llm.run([PROMPT] * len(params), params)

    return run_ranks(tp * pp, rank)[0]


def guided(guide: dict[str, Any], **fields: Any) -> SamplingParams:
    return dataclasses.replace(PLAIN, **{"structured_outputs": guide, **fields})


def test_every_kind_of_guide_is_followed_next_to_requests_without_one() -> None:
    params = [guided(guide, seed=number) for number, (guide, _) in enumerate(GUIDES)]
    plain = [
        dataclasses.replace(PLAIN, seed=3, max_tokens=12),
        dataclasses.replace(PLAIN, temperature=0.0, max_tokens=12),
    ]
    *outputs, sampled, greedy = generate([*params, *plain])
    for (_, matches), output in zip(GUIDES, outputs, strict=True):
        assert output.finish_reason == "stop", output.error
        assert output.text is not None
        assert matches(output.text) is not False, output.text
        assert matches(output.text) is not None or output.text.startswith("{")
    assert [output.token_ids for output in generate(plain)] == [sampled.token_ids, greedy.token_ids]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_guided_tokens_are_equal_in_every_layout_and_after_preemptions(tp: int, pp: int) -> None:
    params = [guided(guide, seed=number) for number, (guide, _) in enumerate(GUIDES[:3])]
    params.append(dataclasses.replace(PLAIN, seed=4, max_tokens=30))
    expected = [generate([one])[0].token_ids for one in params]
    outputs = generate(params, tp, pp, max_num_seqs=4, block_size=4, num_kv_blocks=64)
    assert [output.token_ids for output in outputs] == expected


def test_the_end_token_ends_a_guided_answer_whatever_ignore_eos_says() -> None:
    (output,) = generate([guided({"choice": ["yes", "no"]}, ignore_eos=True, seed=1)])
    assert (output.finish_reason, output.text in ("yes", "no")) == ("stop", True)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [24, pytest.param(1000, marks=pytest.mark.slow)])
def test_completed_answers_of_random_schemas_validate(count: int) -> None:
    """All shapes of `random_schema`; ``make test-guides`` runs a thousand."""
    schemas = [random_schema(seed) for seed in range(count)]
    outputs = generate(
        [guided({"json": schema}, seed=seed, max_tokens=400) for seed, schema in enumerate(schemas)],
        max_num_seqs=32,
        max_model_len=512,
    )
    completed = 0
    for schema, output in zip(schemas, outputs, strict=True):
        assert output.finish_reason in ("stop", "length"), (schema, output.error)
        if output.finish_reason == "stop":
            completed += 1
            assert output.text is not None
            jsonschema.validate(json.loads(output.text), schema)
    assert completed >= 0.8 * count
    print(f"{completed} of {count} answers completed")


def test_hostile_guides_are_refused_or_cost_little() -> None:
    """All of them in one process that may use 60 s of a processor and 4 GiB; each refusal is one line."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.hostile_guides"], cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = dict(json.loads(line) for line in done.stdout.splitlines())
    assert outcomes.keys() == HOSTILE_GUIDES.keys()
    refused = {name: outcome for name, outcome in outcomes.items() if outcome != "usable"}
    assert len(refused) >= 8
    assert all("\n" not in reason and reason.startswith("structured_outputs") for reason in refused.values())


def compiler() -> GuideCompiler:
    tokenizer = Tokenizer.from_directory(ROOT / "checkpoints/demo")
    assert tokenizer is not None
    return GuideCompiler(lambda: tokenizer, tokenizer.vocab_size, (1,))


def test_the_tokenizer_is_prepared_once_and_before_the_first_guide_if_that_is_wanted() -> None:
    read: list[int] = []

    def read_tokenizer() -> Tokenizer | None:
        read.append(1)
        return Tokenizer.from_directory(ROOT / "checkpoints/demo")

    prepared = GuideCompiler(read_tokenizer, 6144, (1,))
    prepared.prepare()
    for _ in range(3):
        assert prepared.start(Guide("regex", "a")).words().any()
    assert read == [1]


def test_a_sequence_whose_mask_is_late_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guided request's first mask comes only after the other request has ended."""
    may_go_on = threading.Event()
    next_mask = guidance._next_mask

    def late(matcher: Any, vocab_size: int, name: str) -> Any:
        assert may_go_on.wait(60)
        return next_mask(matcher, vocab_size, name)

    monkeypatch.setattr(guidance, "_next_mask", late)
    with LLM(engine="numpy", max_num_seqs=2, max_model_len=256) as llm:
        params = [guided({"choice": ["yes", "no"]}, seed=2), dataclasses.replace(PLAIN, max_tokens=4)]
        ended: list[int] = []

        def on_output(output: RequestOutput) -> None:
            ended.append(output.index)
            may_go_on.set()

        llm.run([PROMPT] * 2, params, on_output=on_output)
    assert ended == [1, 0]


@pytest.mark.parametrize("guide", [{"regex": "(("}, {"grammar": 'start: "a" <[99999999]>'}], ids=["malformed", "token"])
def test_what_cannot_be_compiled_ends_its_request_alone(guide: dict[str, Any]) -> None:
    """Ids that are no tokens are known to the engine alone: the HTTP side tries grammars without the tokenizer."""
    broken, fine = generate([guided(guide), guided({"choice": ["yes"]})])
    assert broken.finish_reason == "error"
    assert broken.error is not None
    assert broken.error.startswith("structured_outputs cannot be compiled")
    assert fine.text == "yes"


def test_biases_that_leave_no_token_end_the_request_with_the_reason() -> None:
    (output,) = generate([guided({"choice": ["yes"]}, bad_words=("yes", "y", "ye"))])
    assert output.finish_reason == "error"
    assert "left no token" in str(output.error)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("x", "is not an object"),
        ({}, "give one of json"),
        ({"json": {}, "regex": "a"}, "give one of json"),
        ({"xml": "a"}, "give one of json"),
        ({"json": "{"}, "is not JSON"),
        ({"json": [1]}, "use an object"),
        ({"json": {"a": float("nan")}, "json_object": 3}, "give one of json"),
        ({"json_object": 1}, "is not true"),
        ({"regex": ""}, "at least one character"),
        ({"regex": 5}, "at least one character"),
        ({"grammar": "\ud800"}, "at least one character"),
        ({"choice": []}, "is not a list of strings"),
        ({"choice": ["a", 1]}, "at least one character"),
        ({"regex": "a" * (MAX_GUIDE_CHARACTERS + 1)}, "use at most 65536"),
    ],
)
def test_malformed_guides_are_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=f"field.*{message}"):
        GuideRule().check("field", value)


def test_a_guide_is_checked_again_without_change() -> None:
    for value, _ in GUIDES:
        guide = GuideRule().check("x", value)
        assert GuideRule().check("x", guide) == guide
    assert GuideRule().check("x", {"json_object": True, "regex": None}) == Guide("json", '{"type":"object"}')


@pytest.mark.parametrize("fields", [{"min_tokens": 1}, {"allowed_token_ids": (3,)}])
def test_fields_that_say_the_same_otherwise_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="leave one of them out"):
        guided({"choice": ["a"]}, **fields)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install -e '.\[guided\]'"):
        check_guide(Guide("regex", "a"))
    mask = compiler().start(Guide("regex", "a"))
    mask.wait(60)
    assert "[guided]" in str(mask.problem)
