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


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Today's <weather> é",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "default": None}}},
        },
    }
]
CALL = {"id": "a1B2c3D4e", "type": "function", "function": {"name": "weather", "arguments": {"city": "Tromsø"}}}
WITH_CALLS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "How is it?"}],
    [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "-3", "tool_call_id": "a1B2c3D4e"},
    ],
    [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": "Both.", "tool_calls": [CALL, CALL]},
        {"role": "user", "content": "So?"},
    ],
]


@pytest.mark.torch
@pytest.mark.parametrize("conversation", WITH_CALLS)
@pytest.mark.parametrize("tools", [TOOLS, None])
@pytest.mark.parametrize("name", chat_templates.WITH_TOOLS)
def test_tools_and_calls_are_written_as_transformers_writes_them(
    name: str, conversation: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> None:
    transformers = pytest.importorskip("transformers")
    source = chat_templates.WITH_TOOLS[name]
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made.byte_fallback(), bos_token="<s>", eos_token="</s>", chat_template=source
    )
    try:
        expected = reference.apply_chat_template(conversation, tools=tools, tokenize=False, add_generation_prompt=True)
    except Exception:
        with pytest.raises(RequestError):
            render(source, conversation, tools=tools)
        return
    assert render(source, conversation, tools=tools) == expected


@pytest.mark.parametrize("message", [{"content": None}, {}])
def test_no_content_is_the_empty_text(message: dict[str, Any]) -> None:
    source = "{% for m in messages %}{{ '<' + m.role + '>' + m['content'] }}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", **message, "tool_calls": [CALL]}]
    assert render(source, messages) == "<user>xx<assistant>"


PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
WALKS = [
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}"
    "{% endif %}{% endfor %}",
    "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% set c = m.content %}{% for p in c %}{{ p.text }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for p in m.content[:9] %}{{ p.text }}{% endfor %}{% endfor %}",
    "{% macro show(content) %}{% if content is string %}{{ content }}{% else %}{% for p in content %}{{ p.text }}{% endfor %}{% endif %}"
    "{% endmacro %}{% for m in messages %}{{ show(m.content) }}{% endfor %}",
    "{% for m in messages %}{% set c = m.get('content') %}{% for p in c %}{{ p.text }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for p in m.content or [] %}{{ p.text }}{% endfor %}{% endfor %}",
    "{% macro show(x, y) %}{% for p in y %}{{ p.text }}{% endfor %}{% endmacro %}{% for m in messages %}{{ show(1, m.content) }}{% endfor %}",
    "{% macro show(y) %}{% for p in y %}{{ p.text }}{% endfor %}{% endmacro %}{% for m in messages %}{{ show(y=m['content']) }}{% endfor %}",
    "{% macro show(m) %}{% set body = m.content if m.content else [] %}{% for p in body %}{{ p.text }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ show(m) }}{% endfor %}",
]
JOINED = [
    "{{ messages[0].content }}",
    "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "{% for m in messages %}{% for line in m.content.split('|') %}{{ line }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{{ m.content | trim }}{% for x in range(0) %}{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("source", WALKS)
def test_a_template_that_walks_through_parts_gets_them_as_they_are(source: str) -> None:
    assert render(source, [{"role": "user", "content": PARTS}]) == "onetwo"


@pytest.mark.parametrize("source", JOINED)
def test_other_templates_get_the_parts_joined_by_newlines(source: str) -> None:
    assert render(source, [{"role": "user", "content": PARTS}]) == "one\ntwo"


@pytest.mark.parametrize("source", [WALKS[0], WALKS[5], *JOINED])
def test_a_text_stays_a_text(source: str) -> None:
    assert render(source, [{"role": "user", "content": "one"}]) == "one"


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


@pytest.mark.parametrize("name", ["chatml", "headers", "instruct"])
@pytest.mark.parametrize(
    "text", ["<", ">", "|", "e", "end", "eot", "assistant", "{", "[", "\n<", "/", "</s>", "Sure", "a\nb", " x"]
)
def test_the_message_to_continue_is_marked_not_searched(name: str, text: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
    whole = render(
        chat_templates.ALL[name], [messages[0], {"role": "assistant", "content": "\u2603"}], add_generation_prompt=False
    )
    trimmed = text if name == "instruct" else text.strip()
    assert (
        render(chat_templates.ALL[name], messages, continue_final_message=True)
        == whole[: whole.index("\u2603")] + trimmed
    )


@pytest.mark.parametrize(("text", "end"), [("Sure\n", "Sure\n"), ("Sure ", "Sure "), ("  ", "  ")])
def test_space_at_the_end_of_the_message_stays_where_the_template_keeps_it(text: str, end: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
    assert (
        render("{% for m in messages %}[{{ m.content }}]{% endfor %}", messages, continue_final_message=True)
        == "[Hi][" + end
    )


def test_the_last_of_several_parts_is_continued() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": PARTS}]
    assert render(WALKS[0], messages, continue_final_message=True) == "Hionetwo"
    assert render(JOINED[1], messages, continue_final_message=True) == "Hione\ntwo"


def test_a_template_may_know_the_mark_of_a_message_that_goes_on() -> None:
    source = "{% for m in messages %}{{ 'calls' if m.content.endswith('CONTINUE_FINAL_MESSAGE_TAG ') }}{{ m.content }}{% endfor %}"
    assert render(source, [{"role": "assistant", "content": "Sure"}], continue_final_message=True) == "callsSure"


@pytest.mark.parametrize("content", [None, "", []])
def test_a_message_without_content_cannot_be_continued(content: Any) -> None:
    with pytest.raises(RequestError, match="continue_final_message"):
        render("{{ messages[0].role }}", [{"role": "assistant", "content": content}], continue_final_message=True)
