# SPDX-License-Identifier: Apache-2.0
"""The demo tokenizer: nothing is lost, prompts are cut as training text was, chats as they were trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

TOKENIZER = Tokenizer.from_file(
    str(Path(__file__).resolve().parents[2] / "checkpoints" / "demo" / "tokenizer.json")
)  # hypothesis wants no function-scoped fixtures


def round_trip(text: str) -> str:
    return TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_unicode_text_comes_back_unchanged(text: str) -> None:
    assert round_trip(text) == text


@given(st.text(alphabet=" \t\r\n\fabc(){}[].:_\"'#0123456789<>é日🎉\0"))
def test_code_like_text_comes_back_unchanged(text: str) -> None:
    assert round_trip(text) == text


def test_every_byte_has_a_token_for_characters_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.token_to_id(f"<0x{value:02X}>") for value in range(256)]
    assert None not in ids
    assert len(set(ids)) == 256
    assert tokenizer.encode("🦀", add_special_tokens=False).tokens == [f"<0x{byte:02X}>" for byte in "🦀".encode()]


def test_vocabulary_matches_the_model(tokenizer: Tokenizer, demo: Path) -> None:
    config = json.loads((demo / "config.json").read_text("utf-8"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("<s>") == config["bos_token_id"]
    assert tokenizer.token_to_id("</s>") == config["eos_token_id"]


def test_text_begins_with_the_begin_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("def main(").tokens == ["<s>", "def", " main", "("]


@pytest.mark.parametrize("spaces", [4, 8, 12, 16, 20])
def test_line_ends_and_indentation_are_tokens_of_their_own(tokenizer: Tokenizer, spaces: int) -> None:
    text = "\n" + " " * spaces + "return"
    assert tokenizer.encode(text, add_special_tokens=False).tokens == ["\n", " " * spaces, "return"]


@pytest.mark.parametrize("prompt", ["def main(", "import os\nos.", "class A:\n", "def f():\n    ", "x = [", "d = {"])
def test_prompt_tokens_are_a_prefix_of_the_continued_texts_tokens(tokenizer: Tokenizer, prompt: str) -> None:
    whole = tokenizer.encode(prompt + "name").ids
    assert whole[: len(tokenizer.encode(prompt).ids)] == tokenizer.encode(prompt).ids


@pytest.fixture(scope="module")
def template(demo: Path) -> Any:
    """The chat template, compiled in a sandbox as a server would."""
    config = json.loads((demo / "tokenizer_config.json").read_text("utf-8"))
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    compiled = environment.from_string(config["chat_template"])
    return lambda messages, prompt: compiled.render(
        messages=messages,
        add_generation_prompt=prompt,
        bos_token=config["bos_token"],
        eos_token=config["eos_token"],
    )


def test_chat_template_renders_turns_as_they_were_trained(template: Any) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": " Q\n"}]
    assert template(messages, True) == "<s><|system|>S</s><|user|>Q</s><|assistant|>"
    messages.append({"role": "assistant", "content": "A"})
    assert template(messages, False) == "<s><|system|>S</s><|user|>Q</s><|assistant|>A</s>"


def test_chat_template_refuses_an_unknown_role(template: Any) -> None:
    with pytest.raises(TemplateError, match="role tool is unknown; use system, user or assistant"):
        template([{"role": "tool", "content": "x"}], True)


def test_role_markers_are_single_special_tokens(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("<s><|user|>print</s><|assistant|>", add_special_tokens=False).tokens
    assert tokens == ["<s>", "<|user|>", "print", "</s>", "<|assistant|>"]
    assert tokenizer.decode([0, 3, 1, 4], skip_special_tokens=True) == ""


def test_recorded_prompts_encode_as_recorded(tokenizer: Tokenizer, reference: dict[str, Any]) -> None:
    for entry in reference["greedy"]:
        ids = tokenizer.encode("<s>" + entry["prompt"], add_special_tokens=False).ids
        assert ids == entry["prompt_token_ids"]
        assert tokenizer.decode(entry["token_ids"]) == entry["text"]


def test_recorded_excerpts_have_the_recorded_number_of_tokens(
    tokenizer: Tokenizer, reference: dict[str, Any], held_out: Path
) -> None:
    for entry in reference["held_out"]:
        assert len(tokenizer.encode((held_out / entry["file"]).read_text("utf-8")).ids) == entry["num_tokens"]
