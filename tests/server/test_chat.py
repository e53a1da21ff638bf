"""``/v1/chat/completions``: the stub repeats the prompt that the template wrote."""

from __future__ import annotations

from typing import Any

import pytest

from .servers import Server

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
PROMPT = "[user]hi>"


def chat(server: Server, **fields: Any) -> dict[str, Any]:
    answer = server.post(PATH, {"messages": HI, "temperature": 0, "max_tokens": len(PROMPT), **fields})
    assert answer.status == 200, answer.body
    result: dict[str, Any] = answer.json
    return result


def text(result: dict[str, Any]) -> str:
    content: str = result["choices"][0]["message"]["content"]
    return content


def test_whole_answer(server: Server) -> None:
    result = chat(server)
    assert result["id"].startswith("chatcmpl-")
    assert result["object"] == "chat.completion"
    assert result["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": PROMPT, "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert result["usage"]["prompt_tokens"] == len(PROMPT)


def test_content_may_be_a_list_of_text_parts(server: Server) -> None:
    parts = [{"type": "text", "text": "hi"}]
    assert text(chat(server, messages=[{"role": "user", "content": parts}])) == PROMPT


def test_developer_is_the_newer_name_of_system(server: Server) -> None:
    assert text(chat(server, messages=[{"role": "developer", "content": "x"}], max_tokens=10)) == "[system]x>"


def test_max_completion_tokens_comes_before_max_tokens(server: Server) -> None:
    assert text(chat(server, max_completion_tokens=3)) == PROMPT[:3]


def test_without_max_tokens_the_context_is_the_limit(server: Server) -> None:
    usage = chat(server, max_tokens=None)["usage"]
    assert usage["total_tokens"] == 256


def test_without_generation_prompt(server: Server) -> None:
    result = chat(server, add_generation_prompt=False)
    assert result["usage"]["prompt_tokens"] == len(PROMPT) - 1


def test_continue_final_message(server: Server) -> None:
    messages = [*HI, {"role": "assistant", "content": "yes"}]
    result = chat(server, messages=messages, continue_final_message=True, max_tokens=30)
    assert text(result).startswith("[user]hi[assistant]yes[user]")


def test_echo_begins_the_answer_with_the_turn_that_it_continues(server: Server) -> None:
    turn = {"role": "assistant", "content": [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]}
    fields = {"messages": [*HI, turn], "continue_final_message": True, "add_generation_prompt": False, "max_tokens": 6}
    assert text(chat(server, **fields, echo=True)) == "Hello" + text(chat(server, **fields))
    deltas = [event["choices"][0]["delta"] for event in server.stream(PATH, {**fields, "echo": True})]
    assert deltas[:2] == [{"role": "assistant", "content": ""}, {"content": "Hello"}]
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello" + text(chat(server, **fields))
    assert text(chat(server, echo=True)) == PROMPT, "the user's turn is not the answer's"


def test_a_request_names_its_answer(server: Server) -> None:
    assert chat(server, request_id="mine")["id"] == "chatcmpl-mine"


def test_labels_of_tokens_may_be_their_ids(server: Server) -> None:
    choice = chat(server, logprobs=True, return_tokens_as_token_ids=True, return_token_ids=True)["choices"][0]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == [
        f"token_id:{one}" for one in choice["token_ids"]
    ]


def test_several_answers(server: Server) -> None:
    choices = chat(server, n=3)["choices"]
    assert [(choice["index"], choice["message"]["content"]) for choice in choices] == [(i, PROMPT) for i in range(3)]


def test_logprobs(server: Server) -> None:
    content = chat(server, logprobs=True, top_logprobs=1, max_tokens=2)["choices"][0]["logprobs"]["content"]
    entry = {"token": "[", "logprob": -0.5, "bytes": [91]}
    assert content[0] == {**entry, "top_logprobs": [entry]}
    assert len(content) == 2


def test_stream_begins_with_the_role_and_ends_with_an_empty_delta(server: Server) -> None:
    events = server.stream(PATH, {"messages": HI, "max_tokens": 3, "stream_options": {"include_usage": True}})
    first, *deltas, last = (event["choices"][0]["delta"] for event in events if event["choices"])
    assert (first, last) == ({"role": "assistant", "content": ""}, {})
    assert [list(delta) for delta in deltas] == [["content"]] * len(deltas)
    assert "".join(delta["content"] for delta in deltas) == "[us"
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * (len(deltas) + 1) + ["length"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 3
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_stream_of_several_answers_opens_and_ends_each_once(server: Server) -> None:
    events = server.stream(PATH, {"messages": HI, "max_tokens": 3, "n": 2})
    for index in range(2):
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in own) == "[us"
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["length"]


def test_stream_with_logprobs_has_one_entry_a_token(server: Server) -> None:
    events = server.stream(PATH, {"messages": HI, "max_tokens": 3, "logprobs": True})
    entries = [event["choices"][0]["logprobs"] for event in events]
    assert entries[0] is None
    assert entries[-1] is None
    assert [token["token"] for entry in entries[1:-1] for token in entry["content"]] == ["[", "u", "s"]


def test_token_ids_of_prompt_and_answer(server: Server) -> None:
    prompt = server.post("/tokenize", {"messages": HI}).json["tokens"]
    whole = chat(server, return_token_ids=True, max_tokens=3)
    assert (whole["prompt_token_ids"], whole["choices"][0]["token_ids"]) == (prompt, prompt[:3])
    events = server.stream(PATH, {"messages": HI, "return_token_ids": True, "max_tokens": 3, "n": 2})
    assert [event["prompt_token_ids"] for event in events[:2]] == [prompt] * 2
    assert not any("prompt_token_ids" in event for event in events[2:])


def test_a_text_that_the_template_refuses_is_a_400(server: Server) -> None:
    answer = server.post(PATH, {"messages": [{"role": "assistant", "content": "x"}]})
    assert (answer.status, answer.error["param"]) == (400, "messages")
    assert "must not be the assistant's" in answer.error["message"]


def test_neutral_tools_are_accepted(server: Server) -> None:
    fields = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "parallel_tool_calls": True}
    assert text(chat(server, **fields)) == PROMPT


def test_without_a_tokenizer_chat_is_refused(token_server: Server) -> None:
    answer = token_server.post(PATH, {"messages": HI})
    assert (answer.status, answer.error["param"]) == (400, "messages")


@pytest.mark.parametrize("special", [None, False, True])
def test_tokenize_and_detokenize_are_inverse(server: Server, special: bool | None) -> None:
    tokens = server.post("/tokenize", {"prompt": "é🙂 x", "add_special_tokens": special}).json
    assert (tokens["count"], tokens["max_model_len"]) == (len(tokens["tokens"]), 256)
    assert server.post("/detokenize", {"tokens": tokens["tokens"]}).json == {"prompt": "é🙂 x"}


def test_tokenize_spells_tokens_and_renders_as_chat_does(server: Server) -> None:
    answer = server.post("/tokenize", {"prompt": "a b", "return_token_strs": True}).json
    assert answer["token_strs"] == ["a", "\u0120", "b"]
    turns = [*HI, {"role": "assistant", "content": "He"}]
    body = {"messages": turns, "continue_final_message": True, "add_generation_prompt": False}
    assert server.post("/tokenize", body).json["count"] == len("[user]hi[assistant]He")
    refused = server.post("/tokenize", {"messages": HI, "chat_template_kwargs": {"tools": []}})
    assert (refused.status, refused.error["param"]) == (400, "chat_template_kwargs")


def test_tokenize_messages_as_chat_would(server: Server) -> None:
    tokens = server.post("/tokenize", {"messages": HI}).json["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json == {"prompt": PROMPT}
