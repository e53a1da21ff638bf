"""Chat templates render as transformers renders them, and cannot be used against the server."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.parallel.errors import CheckpointError, RequestError
from phalanx.runtime.text import ChatTemplate

from . import chat_templates
from . import tokenizers_for_tests as made

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATIONS = [
    [{"role": "user", "content": "  Hi <there> & 'you' é🙂 "}],
    [
        {"role": "user", "content": 'Say "x"\n'},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "Again"},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    [{"role": "user", "content": str(turn)} for turn in range(6)],
]


def render(source: str, messages: list[dict[str, Any]], **arguments: Any) -> str:
    return ChatTemplate.compile(source, SPECIAL_TOKENS).render(messages, **arguments)


@pytest.mark.torch
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("name", chat_templates.ALL)
def test_text_equals_that_of_transformers(
    name: str, conversation: list[dict[str, str]], generation_prompt: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    source = chat_templates.ALL[name]
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made.byte_fallback(), bos_token="<s>", eos_token="</s>", chat_template=source
    )
    for options in ({}, {"enable_thinking": False}):
        try:
            expected = reference.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=generation_prompt, **options
            )
        except Exception:
            with pytest.raises(RequestError):
                render(source, conversation, add_generation_prompt=generation_prompt, options=options)
            continue
        text = render(source, conversation, add_generation_prompt=generation_prompt, options=options)
        assert text == expected


def test_parts_of_a_content_list_are_joined_by_newlines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    text = render("{{ messages[0].content }}", [{"role": "user", "content": parts}])
    assert text == "one\ntwo"


@pytest.mark.parametrize(
    "content",
    [
        3,
        {"type": "text"},
        ["plain"],
        [{"type": "image_url", "image_url": {"url": "x"}}],
        [{"type": "text", "text": 1}],
    ],
)
def test_content_that_is_no_text_is_refused(content: Any) -> None:
    with pytest.raises(RequestError, match="content"):
        render("{{ messages[0].content }}", [{"role": "user", "content": content}])


def test_json_is_not_escaped_for_html() -> None:
    assert render("{{ messages[0].content | tojson }}", [{"role": "user", "content": "<é&>"}]) == '"<é&>"'


def test_raise_exception_becomes_a_request_error_with_its_message() -> None:
    with pytest.raises(RequestError, match="Roles must alternate"):
        render(chat_templates.INSTRUCT, [{"role": "assistant", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].nothing.more }}",
        "{{ messages[9].role }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ none() }}",
    ],
)
def test_any_error_inside_a_template_is_the_requests(source: str) -> None:
    with pytest.raises(RequestError):
        render(source, [{"role": "user", "content": "x"}])


@pytest.mark.parametrize("source", ["{% for x in %}", "{{ unclosed", "{% unknown_tag %}"])
def test_a_template_that_does_not_compile_is_the_checkpoints(source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate.compile(source, SPECIAL_TOKENS)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(RequestError):
        render(source, [{"role": "user", "content": "x"}])


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ [1] * 10**9 }}",
        "{{ 9 ** 64 ** 64 ** 64 ** 64 }}",
        "{% for m in range(99999999) %}{% endfor %}",
    ],
)
def test_a_template_that_runs_away_is_stopped(source: str) -> None:
    with pytest.raises(RequestError, match="chat template"):
        render(source, [{"role": "user", "content": "x"}], max_seconds=0.2, max_characters=10_000)


def test_only_listed_options_reach_the_template() -> None:
    assert render("{{ enable_thinking }}", [], options={"enable_thinking": True}) == "True"
    with pytest.raises(RequestError, match="'messages'") as caught:
        render("{{ messages }}", [], options={"messages": []})
    assert caught.value.param == "chat_template_kwargs"
    with pytest.raises(RequestError, match="single value"):
        render("", [], options={"enable_thinking": {"a": 1}})


def test_continue_final_message_ends_with_that_message() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure, the "}]
    text = render(chat_templates.CHATML, messages, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nSure, the")
    with pytest.raises(RequestError, match="continue_final_message"):
        render("nothing of it", messages, continue_final_message=True)
