"""Stop texts: found wherever tokens cut them, never shown in part, independent of the cutting."""

from __future__ import annotations

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.runtime.text import TextPiece, TextStream, Tokenizer
from phalanx.runtime.text.stop import StopMatcher

from . import tokenizers_for_tests as made


def stop_by_search(text: str, stop: tuple[str, ...], include_stop: bool) -> tuple[str, str | None]:
    """The first stop text to end, and the longest of those, by looking at every end."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end if include_stop else end - len(longest)], longest
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("ab.", max_size=4), max_size=12),
    stop=st.lists(st.text("ab.", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple),
    include_stop=st.booleans(),
)
def test_result_is_that_of_a_search_in_the_whole_text(
    pieces: list[str], stop: tuple[str, ...], include_stop: bool
) -> None:
    matcher = StopMatcher(stop, include_stop=include_stop)
    shown, found = "", None
    for piece in pieces:
        text, found = matcher.push(piece)
        shown += text
        if found is not None:
            break
    else:
        shown += matcher.flush()
    assert (shown, found) == stop_by_search("".join(pieces), stop, include_stop)


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.text("ab.", max_size=3), max_size=10))
def test_nothing_is_held_back_longer_than_needed(pieces: list[str]) -> None:
    stop = ("aab.", "bb")
    matcher = StopMatcher(stop)
    shown, seen = "", ""
    for piece in pieces:
        seen += piece
        text, found = matcher.push(piece)
        shown += text
        if found is not None:
            return
        held = seen[len(shown) :]
        assert shown + held == seen
        assert held == "" or any(s.startswith(held) for s in stop)


def stream(stop: tuple[str, ...], include_stop: bool = False, min_tokens: int = 0) -> tuple[Tokenizer, TextStream]:
    tokenizer = Tokenizer(made.byte_fallback(), {}, None)
    return tokenizer, tokenizer.text_stream(stop=stop, include_stop=include_stop, min_tokens=min_tokens)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """One byte token per byte: the worst cut."""
    return [3 + byte for byte in text.encode()]


def test_stop_text_across_tokens_is_never_shown() -> None:
    tokenizer, text_stream = stream(("END",))
    pieces = [text_stream.push([token_id]) for token_id in ids_of(tokenizer, "so E ENDED")]
    assert [piece.text for piece in pieces[:7]] == ["s", "o", " ", "", "E ", "", ""]
    assert pieces[7] == TextPiece("", "END", 1)
    assert pieces[7].stopped


def test_text_after_the_stop_in_the_same_push_is_dropped_and_its_tokens_do_not_count() -> None:
    tokenizer, text_stream = stream(("END",))
    assert text_stream.push(ids_of(tokenizer, "a.END.b")) == TextPiece("a.", "END", 5)


def test_include_stop_shows_the_stop_text_itself() -> None:
    tokenizer, text_stream = stream(("END",), include_stop=True)
    assert text_stream.push(ids_of(tokenizer, "a.END.b")) == TextPiece("a.END", "END", 5)


def test_finish_gives_what_was_held_back() -> None:
    tokenizer, text_stream = stream(("END",))
    assert text_stream.push(ids_of(tokenizer, "so EN")).text == "so "
    assert text_stream.finish() == TextPiece("EN", None, 0)


def test_a_stop_text_of_several_bytes_per_character() -> None:
    tokenizer, text_stream = stream(("🙂!",))
    piece = text_stream.push(ids_of(tokenizer, "é🙂🙂!x"))
    assert piece == TextPiece("é🙂", "🙂!", 11)


def test_stop_texts_do_not_count_before_min_tokens() -> None:
    tokenizer, text_stream = stream((".",), min_tokens=4)
    assert text_stream.push(ids_of(tokenizer, "a..b.c")) == TextPiece("a..b", ".", 5)


@settings(max_examples=200, deadline=None)
@given(
    backend=st.sampled_from([made.byte_level(), made.byte_fallback(), made.wordpiece()]),
    spaces=st.booleans(),
    before=st.lists(st.integers(0, 300), max_size=8),
    after=st.lists(st.integers(0, 300), max_size=8),
    others=st.lists(st.integers(0, 300), max_size=8),
)
def test_a_fork_goes_on_as_the_stream_would_have_whatever_the_stream_does(
    backend: tokenizers.Tokenizer, spaces: bool, before: list[int], after: list[int], others: list[int]
) -> None:
    def begun() -> TextStream:
        tokenizer = Tokenizer(backend, {}, None)
        stream = tokenizer.text_stream(stop=("ab", "e "), min_tokens=3, spaces_between_special_tokens=spaces)
        stream.push(before)
        return stream

    original = begun()
    fork = original.fork()
    original.push(others)
    alone = begun()
    assert fork.push(after) == alone.push(after)
    assert fork.finish() == alone.finish()
