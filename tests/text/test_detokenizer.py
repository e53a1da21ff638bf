"""Streams of tokens give exactly the text that decoding them at once gives, piece by whole character."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from phalanx.runtime.text import Tokenizer

from . import tokenizers_for_tests as made

BYTE_LEVEL = made.byte_level()
LLAMA2 = made.byte_fallback()
GEMMA = made.byte_fallback(strip=False)
UNIGRAM = made.unigram()
METASPACE = made.metaspace()
WORDPIECE = made.wordpiece()

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def token_lists(backend: tokenizers.Tokenizer) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, backend.get_vocab_size() + 3), max_size=24)


def streamed(tokenizer: Tokenizer, token_ids: Sequence[int], skip_special_tokens: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
    return [*map(detokenizer.push, token_ids), detokenizer.flush()]


def has_invalid_byte_run(backend: tokenizers.Tokenizer, token_ids: Sequence[int]) -> bool:
    """Whether some run of byte tokens is no UTF-8, where byte-fallback decoders blank the whole run."""
    spelt = [token for i in token_ids if (token := backend.id_to_token(i)) is not None and token not in ("<s>", "</s>")]
    run = b""
    for token in [*spelt, ""]:
        if match := BYTE_TOKEN.fullmatch(token):
            run += bytes.fromhex(match[1])
            continue
        try:
            run.decode()
        except UnicodeDecodeError:
            return True
        run = b""
    return False


@settings(max_examples=300, deadline=None)
@given(token_ids=token_lists(BYTE_LEVEL), skip=st.booleans())
def test_byte_level_stream_equals_the_library_for_any_tokens(token_ids: list[int], skip: bool) -> None:
    known = [token_id for token_id in token_ids if BYTE_LEVEL.id_to_token(token_id) is not None]
    pieces = streamed(Tokenizer(BYTE_LEVEL, {}, None), token_ids, skip)
    assert "".join(pieces) == BYTE_LEVEL.decode(known, skip_special_tokens=skip)


@pytest.mark.parametrize("backend", [LLAMA2, GEMMA, UNIGRAM], ids=["llama2", "gemma", "unigram"])
def test_byte_fallback_stream_equals_the_library_for_any_valid_bytes(backend: tokenizers.Tokenizer) -> None:
    compared = 0

    @settings(max_examples=300, deadline=None)
    @given(token_ids=token_lists(backend), text=st.text(max_size=12))
    def check(token_ids: list[int], text: str) -> None:
        nonlocal compared
        mixed = [i for i in token_ids if not BYTE_TOKEN.fullmatch(backend.id_to_token(i) or "")]
        byte_tokens = [backend.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
        mixed[len(mixed) // 2 : len(mixed) // 2] = byte_tokens
        assert "".join(streamed(Tokenizer(backend, {}, None), mixed)) == backend.decode(mixed)
        compared += len(byte_tokens)

    check()
    assert compared > 0


@settings(max_examples=300, deadline=None)
@given(token_ids=token_lists(LLAMA2))
def test_byte_fallback_blanks_only_the_bytes_that_make_no_character(token_ids: list[int]) -> None:
    text = "".join(streamed(Tokenizer(GEMMA, {}, None), token_ids))
    if not has_invalid_byte_run(GEMMA, token_ids):
        assert text == GEMMA.decode(token_ids)
    raw = b"".join(
        bytes.fromhex(match[1]) if (match := BYTE_TOKEN.fullmatch(token)) else token.replace("▁", " ").encode()
        for i in token_ids
        if (token := GEMMA.id_to_token(i)) is not None and token not in ("<s>", "</s>")
    )
    assert text == raw.decode(errors="replace")


@settings(max_examples=300, deadline=None)
@given(token_ids=token_lists(METASPACE), skip=st.booleans())
def test_metaspace_stream_equals_the_library(token_ids: list[int], skip: bool) -> None:
    pieces = streamed(Tokenizer(METASPACE, {}, None), token_ids, skip)
    assert "".join(pieces) == METASPACE.decode(token_ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(token_ids=token_lists(WORDPIECE))
def test_other_decoders_stream_through_a_window(token_ids: list[int]) -> None:
    assert "".join(streamed(Tokenizer(WORDPIECE, {}, None), token_ids)) == WORDPIECE.decode(token_ids)


@pytest.mark.parametrize("backend", [BYTE_LEVEL, LLAMA2, UNIGRAM], ids=["byte_level", "llama2", "unigram"])
@pytest.mark.parametrize("text", ["日本 🙂🙃 é", "fox  foxé\n🙂", "👩‍👩‍👧"])
def test_no_piece_splits_a_character(backend: tokenizers.Tokenizer, text: str) -> None:
    tokenizer = Tokenizer(backend, {}, None)
    pieces = streamed(tokenizer, tokenizer.encode(text))
    assert "" in pieces[:-1], "some character must take several tokens, or this shows nothing"
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces).lstrip(" ") == text


def test_each_character_comes_with_its_last_byte() -> None:
    tokenizer = Tokenizer(LLAMA2, {}, None)
    pieces = streamed(tokenizer, [LLAMA2.token_to_id(f"<0x{byte:02X}>") for byte in "🙂é".encode()])
    assert pieces == ["", "", "", "🙂", "", "é", ""]


def test_flush_gives_an_unfinished_character_as_replacement() -> None:
    tokenizer = Tokenizer(LLAMA2, {}, None)
    pieces = streamed(tokenizer, [LLAMA2.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode()[:3]])
    assert pieces == ["", "", "", "\ufffd"]


def test_a_continuation_keeps_the_space_that_a_new_text_would_lose() -> None:
    tokenizer = Tokenizer(LLAMA2, {}, None)
    prompt, fox = tokenizer.encode("the"), [LLAMA2.token_to_id("▁fox")]
    assert tokenizer.decode(fox) == "fox"
    continuation = tokenizer.detokenizer(prompt_token_ids=prompt)
    assert continuation.push(fox[0]) == " fox"


def test_a_continuation_completes_the_character_that_the_prompt_began() -> None:
    tokenizer = Tokenizer(LLAMA2, {}, None)
    token_ids = [LLAMA2.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    continuation = tokenizer.detokenizer(prompt_token_ids=token_ids[:3])
    assert continuation.push(token_ids[3]) == "🙂"


def test_token_bytes_of_one_token() -> None:
    tokenizer = Tokenizer(LLAMA2, {}, None)
    assert tokenizer.token_bytes(LLAMA2.token_to_id("<0xF0>")) == b"\xf0"
    assert tokenizer.token_bytes(LLAMA2.token_to_id("▁fox")) == b" fox"
    assert tokenizer.token_bytes(LLAMA2.token_to_id("</s>")) == b"</s>"
    assert tokenizer.token_bytes(10**6) == b""


@pytest.mark.parametrize(
    "steps",
    [
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Replace("  ", " ")],
        [decoders.Fuse(), decoders.Replace("▁", " ")],
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Replace("fo", "FO"), decoders.Replace("e t", "E")],
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("h", "H")],
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.ByteFallback()],
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 0, 1)],
    ],
)
def test_a_decoder_that_works_on_the_whole_text_is_not_taken_for_rules_of_tokens(steps: list[Any]) -> None:
    backend = made.byte_fallback()
    backend.decoder = decoders.Sequence(steps)
    tokenizer = Tokenizer(backend, {}, None)
    for text in ("the fox", "e  the the", "é日!"):
        ids = backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == backend.decode(ids)


@pytest.mark.parametrize("silent", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_tokens_without_text_do_not_cut_a_character(silent: int, place: int) -> None:
    backend = made.byte_level()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), decoders.Replace("~", "-")])
    [(spelt, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("🦙")
    ids = [backend.token_to_id(character) for character in spelt]
    assert len(ids) == 4
    ids[place:place] = [backend.token_to_id("<|end|>")] * silent
    assert "".join(streamed(Tokenizer(backend, {}, None), ids)) == "🦙"


@pytest.mark.parametrize(("spaces", "between"), [(True, " "), (False, "")])
def test_special_tokens_are_joined_where_the_decoder_parts_them_and_the_request_says_so(
    spaces: bool, between: str
) -> None:
    ids = [WORDPIECE.token_to_id(token) for token in ("the", "fox", "[SEP]", "[SEP]", "[SEP]", "jump", "##ed", "[SEP]")]
    stream = Tokenizer(WORDPIECE, {}, None).text_stream(
        ids[:1], skip_special_tokens=False, spaces_between_special_tokens=spaces
    )
    text = stream.extend(ids[1:]) + stream.finish().text
    assert text == f" fox [SEP]{between}[SEP]{between}[SEP] jumped [SEP]"


@pytest.mark.parametrize("backend", [BYTE_LEVEL, LLAMA2, METASPACE], ids=["byte_level", "llama2", "metaspace"])
def test_decoders_of_language_models_put_nothing_between_special_tokens(backend: tokenizers.Tokenizer) -> None:
    special = next(iter(backend.get_added_tokens_decoder()))
    tokenizer, ids = Tokenizer(backend, {}, None), [5, special, special, 5]
    texts = {
        tokenizer.text_stream((), skip_special_tokens=False, spaces_between_special_tokens=spaces).extend(ids)
        for spaces in (True, False)
    }
    assert texts == {backend.decode(ids, skip_special_tokens=False)}
