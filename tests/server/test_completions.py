"""``/v1/completions``: the stub continues a prompt with itself, so every answer is known beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phalanx.runtime.answer import Answer, TokenEvent
from phalanx.runtime.request import Logprob, SamplingParams
from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.openai import logprobs
from phalanx.runtime.server.openai.answer_format import Served
from phalanx.runtime.server.openai.completions import CompletionFormat
from phalanx.runtime.server.openai.encoding import check_prompt_logprobs, choice_params
from phalanx.runtime.server.openai.logprobs import prompt_logprobs
from phalanx.runtime.server.openai.parsing import parse_chat, parse_completion
from phalanx.runtime.server.openai.protocol import CompletionRequest

from .servers import Server, stub_server

PATH = "/v1/completions"


def complete(server: Server, **fields: Any) -> dict[str, Any]:
    answer = server.post(PATH, {"temperature": 0, **fields})
    assert answer.status == 200, answer.body
    result: dict[str, Any] = answer.json
    return result


def ids(server: Server, text: str) -> list[int]:
    tokens: list[int] = server.post("/tokenize", {"prompt": text}).json["tokens"]
    return tokens


def test_text_answer(server: Server) -> None:
    result = complete(server, prompt="abc", max_tokens=5, model="stub")
    assert result["id"].startswith("cmpl-")
    assert (result["object"], result["model"]) == ("text_completion", "stub")
    assert result["choices"] == [
        {"index": 0, "text": "abcab", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert result["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_max_tokens_is_sixteen_by_default(server: Server) -> None:
    for fields in ({}, {"max_tokens": None}):
        assert complete(server, prompt="ab", **fields)["choices"][0]["text"] == "ab" * 8


def test_token_ids_as_prompt(server: Server) -> None:
    assert complete(server, prompt=ids(server, "xyz"), max_tokens=4)["choices"][0]["text"] == "xyzx"


def test_the_last_tokens_of_a_prompt_may_be_all_that_is_kept(server: Server) -> None:
    for prompt in ("abcdef", ["abcdef"], [[30, 31, 32, 33]]):
        answer = server.post(
            PATH, {"prompt": prompt, "max_tokens": 3, "truncate_prompt_tokens": 2, "return_token_ids": True}
        ).json
        assert answer["usage"]["prompt_tokens"] == 2
        first, second, again = answer["choices"][0]["token_ids"]
        assert first == again != second
    whole = server.post(PATH, {"prompt": "ab", "max_tokens": 2, "truncate_prompt_tokens": 9}).json
    assert whole["choices"][0]["text"] == "ab"
    refused = server.post(PATH, {"prompt": "ab", "echo": True, "truncate_prompt_tokens": 1})
    assert (refused.status, refused.error["param"]) == (400, "truncate_prompt_tokens")


def test_a_prompt_may_be_cut_to_what_the_context_has_room_for(server: Server) -> None:
    fields = {"prompt": "ab" * 200, "truncate_prompt_tokens": -1, "return_token_ids": True}
    for max_tokens, kept in ((6, 250), (None, 240)):
        choice = complete(server, **fields, max_tokens=max_tokens)["choices"][0]
        assert (len(choice["prompt_token_ids"]), choice["finish_reason"]) == (kept, "length")


def test_a_prompt_that_is_cut_may_be_longer_than_the_context_can_hold(server: Server) -> None:
    long = "ab" * 25_000
    for most in (None, 100_000):
        refused = server.post(PATH, {"prompt": long, "max_tokens": 2, "truncate_prompt_tokens": most})
        assert (refused.status, refused.error["code"]) == (400, "context_length_exceeded")
        assert "50000 characters" in refused.error["message"]
    cut = server.post(PATH, {"prompt": long, "max_tokens": 2, "truncate_prompt_tokens": 4})
    assert (cut.json["usage"]["prompt_tokens"], cut.json["choices"][0]["text"]) == (4, "ab")
    body = {"messages": [{"role": "user", "content": long}], "max_tokens": 2, "truncate_prompt_tokens": 4}
    assert server.post("/v1/chat/completions", body).json["usage"]["prompt_tokens"] == 4


def test_several_prompts_times_n_are_indexed_prompt_by_prompt(server: Server) -> None:
    choices = complete(server, prompt=["ab", "cd"], n=2, max_tokens=2)["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [(0, "ab"), (1, "ab"), (2, "cd"), (3, "cd")]
    lists = complete(server, prompt=[ids(server, "ab"), ids(server, "cd")], max_tokens=2)["choices"]
    assert [choice["text"] for choice in lists] == ["ab", "cd"]


def test_usage_counts_each_prompt_once_per_answer_of_the_engine(server: Server) -> None:
    usage = complete(server, prompt=["ab", "cde"], n=2, max_tokens=2)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 8)


def test_echo_puts_the_prompt_in_front(server: Server) -> None:
    assert complete(server, prompt="é🙂", max_tokens=6, echo=True)["choices"][0]["text"] == "é🙂é🙂"


def test_a_character_cut_by_the_end_is_a_replacement_character(server: Server) -> None:
    assert complete(server, prompt="🙂", max_tokens=6)["choices"][0]["text"] == "🙂\ufffd"


def test_stop_text_ends_the_answer_and_is_not_part_of_it(server: Server) -> None:
    result = complete(server, prompt="abcdef", stop=["xx", "dea", "de"], max_tokens=100)
    choice = result["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("abc", "stop", "de")
    assert result["usage"]["completion_tokens"] == 5


def test_include_stop_str_in_output(server: Server) -> None:
    fields = {"stop": "de", "include_stop_str_in_output": True}
    assert complete(server, prompt="abcdef", max_tokens=100, **fields)["choices"][0]["text"] == "abcde"


def test_stop_token_ids_end_the_answer_after_min_tokens(server: Server) -> None:
    stop = ids(server, "b")
    choice = complete(server, prompt="abc", stop_token_ids=stop, max_tokens=50)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a", "stop", stop[0])
    later = complete(server, prompt="abc", stop_token_ids=stop, min_tokens=4, max_tokens=50)["choices"][0]
    assert later["text"] == "abca"


def test_logprobs_are_parallel_lists(server: Server) -> None:
    logprobs = complete(server, prompt="ab", max_tokens=3, logprobs=2)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "a"]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["top_logprobs"] == [{"a": -0.5, "b": -1.5}, {"b": -0.5, "c": -1.5}, {"a": -0.5, "b": -1.5}]
    assert logprobs["text_offset"] == [0, 1, 2]


def test_logprobs_zero_reports_the_chosen_token(server: Server) -> None:
    logprobs = complete(server, prompt="ab", max_tokens=1, logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"a": -0.5}]


def test_echoed_logprobs_begin_with_null(server: Server) -> None:
    fields = {"prompt": [ids(server, "ab")], "echo": True, "max_tokens": 1, "logprobs": 1}
    choice = complete(server, **fields)["choices"][0]
    assert choice["text"] == "aba"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "a"],
        "token_logprobs": [None, -0.5, -0.5],
        "top_logprobs": [None, {"b": -0.5}, {"a": -0.5}],
        "text_offset": [0, 1, 2],
    }


def test_echo_without_tokens_scores_the_prompt_only(server: Server) -> None:
    result = complete(server, prompt="ab", echo=True, max_tokens=0, logprobs=1)
    choice = result["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5]
    assert result["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_are_by_token_id_with_ranks(server: Server) -> None:
    a, b, c = ids(server, "abc")
    choices = complete(server, prompt="ab", n=2, max_tokens=1, prompt_logprobs=2)["choices"]
    expected = {
        str(b): {"logprob": -0.5, "rank": 1, "decoded_token": "b"},
        str(c): {"logprob": -1.5, "rank": 2, "decoded_token": "c"},
    }
    assert [choice["prompt_logprobs"] for choice in choices] == [[None, expected]] * 2
    (choice,) = complete(server, prompt=[[a, b]], max_tokens=0, prompt_logprobs=0)["choices"]
    assert choice["prompt_logprobs"] == [None, {str(b): {"logprob": -0.5, "rank": None, "decoded_token": "b"}}]
    assert choice["text"] == ""


@pytest.mark.parametrize(("echoed", "asked"), [(0, 3), (3, 0), (2, 2)])
def test_echo_and_prompt_logprobs_each_have_the_alternatives_they_ask_for(
    server: Server, echoed: int, asked: int
) -> None:
    fields = {"prompt": "ab", "echo": True, "max_tokens": 0, "logprobs": echoed, "prompt_logprobs": asked}
    choice = complete(server, **fields)["choices"][0]
    assert len(choice["logprobs"]["top_logprobs"][1]) == max(echoed, 1)
    assert len(choice["prompt_logprobs"][1]) == max(asked, 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 2},
        {"max_tokens": 0},
        {"max_tokens": 2, "best_of": 3},
        {"max_tokens": 0, "echo": True, "logprobs": 1},
        {"max_tokens": 2, "echo": True, "logprobs": 1},
    ],
)
def test_choices_of_a_prompt_have_its_prompt_logprobs(server: Server, fields: dict[str, Any]) -> None:
    choices = complete(server, prompt=["ab", "cd"], n=2, prompt_logprobs=0, **fields)["choices"]
    half = len(choices) // 2
    tokens = [[entry["decoded_token"] for entry in choice["prompt_logprobs"][1].values()] for choice in choices]
    assert tokens == [["b"]] * half + [["d"]] * half
    if "echo" in fields:
        assert all(choice["logprobs"]["token_logprobs"][1] == -0.5 for choice in choices)


def test_prompt_logprobs_are_computed_for_the_first_choice_of_a_prompt_alone() -> None:
    params = SamplingParams(prompt_logprobs=3, seed=1)
    assert choice_params(params, 0, shares_prompt_logprobs=True) is params
    second = choice_params(params, 1, shares_prompt_logprobs=True)
    assert (second.prompt_logprobs, second.seed) == (None, choice_params(params, 1).seed)


def test_prompt_logprobs_written_in_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [None, *(Logprob(token, -0.5, ((token, -0.5), (7, -1.0))) for token in range(9))]
    whole = prompt_logprobs(None, scores, 2)
    monkeypatch.setattr(logprobs, "_TOKENS_AT_ONCE", 3)
    assert bytes(prompt_logprobs(None, scores, 2)) == bytes(whole)
    entries = json.loads(bytes(whole))
    assert (len(entries), entries[0], list(entries[9])) == (10, None, ["8", "7"])
    assert json.loads(bytes(prompt_logprobs(None, (), 2))) == []


@pytest.mark.parametrize(("n", "num_tokens", "is_refused"), [(16, 1000, False), (16, 5000, True), (1, 49_933, True)])
def test_more_prompt_logprobs_than_an_answer_should_hold_are_refused(n: int, num_tokens: int, is_refused: bool) -> None:
    body = json.dumps({"prompt": "x", "n": n, "prompt_logprobs": 20}).encode()
    if not is_refused:
        check_prompt_logprobs(parse_completion(body), num_tokens)
        return
    count = num_tokens * 21 * n
    with pytest.raises(
        ApiError, match=f"20 alternatives in {n} choices are {count}; at most 1048576 fit .* ask for fewer"
    ):
        check_prompt_logprobs(parse_completion(body), num_tokens)
    chat = json.dumps({"messages": [{"role": "user", "content": "x"}], "n": 16, "prompt_logprobs": 20}).encode()
    check_prompt_logprobs(parse_chat(chat), 5000)


def test_a_stream_echoes_fewer_prompt_logprobs_than_an_answer_holds() -> None:
    fields = {"prompt": "x", "n": 2, "logprobs": 1, "echo": True}
    streamed, whole = (parse_completion(json.dumps({**fields, "stream": stream}).encode()) for stream in (True, False))
    check_prompt_logprobs(streamed, 16_384)
    check_prompt_logprobs(whole, 16_385)
    with pytest.raises(ApiError, match=r"in 2 choices are 65540; at most 65536 fit into a stream: .* or do not stream"):
        check_prompt_logprobs(streamed, 16_385)


def test_prompt_logprobs_do_not_stream(server: Server) -> None:
    error = server.post(PATH, {"prompt": "ab", "prompt_logprobs": 1, "stream": True}).error
    assert (error["param"], error["type"]) == ("prompt_logprobs", "invalid_request_error")


def test_echo_of_a_text_is_that_text_and_offsets_agree(begin_directory: Path) -> None:
    fields = {"prompt": "ab", "echo": True, "max_tokens": 3, "logprobs": 0, "temperature": 0}
    with stub_server(begin_directory, {}) as server:
        choice = complete(server, **fields)["choices"][0]
        assert choice["logprobs"]["tokens"][:3] == ["<|begin|>", "a", "b"]
        assert choice["text"] == "abab"
        assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2, 2, 3]
        without = complete(server, **fields, add_special_tokens=False)["choices"][0]
        assert without["logprobs"]["tokens"] == ["a", "b", "a", "b", "a"]


def test_labels_of_partial_characters_spell_their_bytes_and_offsets_count_characters(server: Server) -> None:
    logprobs = complete(server, prompt="éx", max_tokens=3, logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "x"]
    assert logprobs["text_offset"] == [0, 0, 1]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "é🙂x", "max_tokens": 9},
        {"prompt": "abcdef", "stop": "fab", "max_tokens": 30},
        {"prompt": ["ab", "cd"], "n": 2, "max_tokens": 3, "echo": True},
        {"prompt": "ab", "max_tokens": 3, "echo": True, "logprobs": 1},
        {"prompt": "ab", "max_tokens": 0, "echo": True, "logprobs": 1},
        {"prompt": "ab", "max_tokens": 3, "return_token_ids": True},
    ],
)
def test_a_stream_adds_up_to_the_whole_answer(server: Server, fields: dict[str, Any]) -> None:
    whole = complete(server, **fields)
    added: dict[int, dict[str, Any]] = {}
    for event in server.stream(PATH, {"temperature": 0, **fields}):
        for choice in event["choices"]:
            entry = added.setdefault(choice["index"], {"index": choice["index"], "text": ""})
            entry["text"] += choice["text"]
            assert "finish_reason" not in entry or entry["finish_reason"] is None, "nothing follows the end"
            entry |= {"finish_reason": choice["finish_reason"], "stop_reason": choice["stop_reason"]}
            for name in ("token_ids", "prompt_token_ids"):
                if name in choice:
                    known = entry.get(name, []) if name == "token_ids" else []
                    entry[name] = known + choice[name]
            if choice["logprobs"] is None:
                entry.setdefault("logprobs", None)
                continue
            lists = entry.setdefault("logprobs", {name: [] for name in choice["logprobs"]})
            for name, values in choice["logprobs"].items():
                lists[name] += values
    assert [added[index] for index in sorted(added)] == whole["choices"]


def test_events_of_a_stream_say_all_tokens_once_and_end_with_the_reason(server: Server) -> None:
    events = server.stream(PATH, {"prompt": "🙂", "max_tokens": 8, "return_token_ids": True})
    assert "".join(event["choices"][0]["text"] for event in events) == "🙂🙂"
    assert [token for event in events for token in event["choices"][0]["token_ids"]] == ids(server, "🙂🙂")
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["length"]


def test_usage_comes_last_in_a_stream_when_asked_for(server: Server) -> None:
    options = {"include_usage": True}
    events = server.stream(PATH, {"prompt": "ab", "max_tokens": 2, "stream_options": options})
    assert [bool(event["choices"]) for event in events] == [True] * (len(events) - 1) + [False]
    assert events[-1]["usage"]["total_tokens"] == 4
    assert all(event["usage"] is None for event in events[:-1]), "as OpenAI does; clients read the field of every chunk"
    assert all("usage" not in event for event in server.stream(PATH, {"prompt": "ab", "max_tokens": 2}))


def test_continuous_usage_counts_up(server: Server) -> None:
    options = {"continuous_usage_stats": True}
    events = server.stream(PATH, {"prompt": "ab", "max_tokens": 2, "stream_options": options})
    assert events[-1]["usage"]["completion_tokens"] == 2


def test_a_request_names_its_answer(server: Server) -> None:
    assert complete(server, prompt="ab", max_tokens=1, request_id="mine-7")["id"] == "cmpl-mine-7"
    events = server.stream(PATH, {"prompt": "ab", "max_tokens": 3, "request_id": "mine-8"})
    assert {event["id"] for event in events} == {"cmpl-mine-8"}


def test_labels_of_tokens_may_be_their_ids(server: Server) -> None:
    a, b = ids(server, "ab")
    fields = {"prompt": "ab", "max_tokens": 2, "logprobs": 1, "return_tokens_as_token_ids": True}
    logprobs = complete(server, **fields)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{a}", f"token_id:{b}"]
    assert logprobs["top_logprobs"] == [{f"token_id:{a}": -0.5}, {f"token_id:{b}": -0.5}]
    assert logprobs["text_offset"] == [0, 1]


def test_return_token_ids(server: Server) -> None:
    choice = complete(server, prompt="ab", max_tokens=3, return_token_ids=True)["choices"][0]
    a, b = ids(server, "ab")
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([a, b, a], [a, b])


def test_without_a_tokenizer_text_is_null_and_token_ids_are_given(token_server: Server) -> None:
    result = complete(token_server, prompt=[5, 6], max_tokens=3, logprobs=1)
    choice = result["choices"][0]
    assert (choice["text"], choice["token_ids"]) == (None, [5, 6, 5])
    assert choice["logprobs"]["tokens"] == ["token_id:5", "token_id:6", "token_id:5"]
    events = token_server.stream(PATH, {"prompt": [5, 6], "max_tokens": 2})
    assert [token for event in events for token in event["choices"][0]["token_ids"]] == [5, 6]


@pytest.mark.parametrize("fields", [{"prompt": "a"}, {"prompt": [5], "stop": "x"}])
def test_without_a_tokenizer_text_is_refused(token_server: Server, fields: dict[str, Any]) -> None:
    answer = token_server.post(PATH, fields)
    assert answer.status == 400
    assert "tokenizer.json" in answer.error["message"]


def test_harmless_fields_change_nothing(server: Server) -> None:
    fields = {
        "user": "u",
        "metadata": {"a": 1},
        "store": False,
        "presence_penalty": 0,
        "logit_bias": {},
        "suffix": None,
    }
    assert complete(server, prompt="ab", max_tokens=2, **fields)["choices"][0]["text"] == "ab"


def test_an_error_of_one_answer_is_the_answer(server: Server) -> None:
    answer = server.post(PATH, {"prompt": [12, 30], "max_tokens": 9})
    assert (answer.status, answer.error["code"]) == (500, "generation_failed")
    assert answer.headers["x-should-retry"] == "false"


def test_an_error_inside_a_stream_is_an_event_before_the_end(server: Server) -> None:
    events = server.stream(PATH, {"prompt": [12, 30], "max_tokens": 9})
    assert "choices" in events[0]
    assert events[-1]["error"]["code"] == "generation_failed"
    assert "logits" in events[-1]["error"]["message"]


def test_refusals_of_the_engine_have_their_status_in_streams_too(server: Server) -> None:
    for stream in (False, True):
        refused = server.post(PATH, {"prompt": [13], "stream": stream})
        assert (refused.status, refused.error["param"]) == (400, "prompt")
        full = server.post(PATH, {"prompt": [14], "stream": stream})
        assert (full.status, full.headers["retry-after"], full.headers["x-should-retry"]) == (429, "7", "true")


def candidates(*logprobs: list[float]) -> list[Answer]:
    answers = []
    for index, values in enumerate(logprobs):
        answer = Answer.start(index, (1,), SamplingParams(), None)
        answer.events = [TokenEvent(token_id, "", Logprob(token_id, value)) for token_id, value in enumerate(values)]
        answer.finish_reason = "stop"
        answers.append(answer)
    return answers


def test_best_of_returns_the_answers_most_probable_per_token_of_each_prompt() -> None:
    request = CompletionRequest(prompt=["a", "b"], n=2, best_of=3, return_token_ids=True)
    writer = CompletionFormat(Served("m", None), request, ["a", "b"], 3)
    answers = candidates([-1.0], [-0.1] * 9, [-0.5, -0.7], [-3.0], [-2.0], [-1.0])
    choices = writer.whole(answers, {})["choices"]
    assert [(choice["index"], len(choice["token_ids"])) for choice in choices] == [(0, 9), (1, 2), (2, 1), (3, 1)]
    assert [choice["logprobs"] for choice in choices] == [None] * 4


def test_best_of_counts_all_that_was_generated(server: Server) -> None:
    result = complete(server, prompt="ab", n=1, best_of=3, max_tokens=4)
    assert [choice["index"] for choice in result["choices"]] == [0]
    assert result["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize(
    "fields", [{"best_of": 1, "n": 2}, {"best_of": 2, "stream": True}, {"best_of": 2, "max_tokens": 0, "echo": True}]
)
def test_best_of_needs_answers_to_compare(server: Server, fields: dict[str, Any]) -> None:
    answer = server.post(PATH, {"prompt": "a", **fields})
    assert (answer.status, answer.error["param"]) == (400, "best_of")


def test_search_of_one_beam_is_greedy() -> None:
    asked = parse_completion(b'{"prompt": "a", "use_beam_search": true}')
    assert (asked.n, asked.sampling.get("beam_width", 1), asked.sampling["temperature"]) == (1, 1, 0.0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"use_beam_search": True, "n": 2, "best_of": 1}, "n"),
        ({"use_beam_search": True, "n": 2, "beam_width": 1}, "n"),
        ({"beam_width": 2, "n": 3}, "n"),
        ({"beam_width": 2, "best_of": 4}, "best_of"),
        ({"beam_width": 4, "best_of": 2}, "best_of"),
        ({"use_beam_search": True, "best_of": 33}, "n"),
    ],
)
def test_width_of_a_search_that_does_not_fit_its_answers_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion(json.dumps({"prompt": "a", **fields}).encode())
    assert caught.value.param == param


def test_answers_of_a_search_keep_the_order_of_their_scores() -> None:
    """No second choice by log-probability per token, which ``length_penalty`` would contradict."""
    asked = parse_completion(b'{"prompt": "a", "n": 2, "best_of": 4, "beam_width": 4}')
    assert asked.n == 2
    assert "logprobs" not in asked.sampling
