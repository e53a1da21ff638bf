# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tokenizer: text to token ids and back, one token at a time where a stream needs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from phalanx.checkpoints.files import ModelDirectory
from phalanx.parallel.errors import CheckpointError, RequestError
from phalanx.runtime.text.backend import has_tokenizer, load_backend
from phalanx.runtime.text.chat import ChatTemplate
from phalanx.runtime.text.decoding_rules import DecodingRules, read_rules
from phalanx.runtime.text.detokenizer import ByteDetokenizer, Detokenizer, JoinedSpecials, WindowDetokenizer
from phalanx.runtime.text.sentencepiece_encoder import SentencePieceEncoder
from phalanx.runtime.text.stream import TextStream
from phalanx.runtime.text.tokenizer_files import read_tokenizer_files
from phalanx.runtime.text.windows import WINDOW

__all__ = ["Tokenizer"]

_CONTEXT_TOKENS = 8
"""Prompt tokens that a continuation is decoded after: enough for the bytes of a split character."""


class Tokenizer:
    """Encodes and decodes with a ``tokenizer.json``; safe to use from several threads.

    Attributes:
        vocab_size: one more than the largest token id.
        special_tokens: texts of the named special tokens, for chat templates.
        chat_template: the checkpoint's template, or None.
        tool_template: the template for requests with tools: a second one called ``tool_use``, or the same.
        chat_problem: why there is no template, or it cannot be used; None where there is one.
        max_token_characters: length of the longest token; a prompt of n tokens has at most n times as many.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: dict[str, str],
        chat_template: ChatTemplate | None,
        chat_problem: str | None = None,
        tool_template: ChatTemplate | None = None,
        encoder: SentencePieceEncoder | None = None,
    ) -> None:
        """``encoder`` makes tokens of texts in place of ``backend``."""
        backend.no_truncation()
        backend.no_padding()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._backend = backend
        self._encoder = encoder
        self._rules = _decoding_rules(backend)
        self._known_bytes: dict[int, bytes] = {}
        self._known_texts: dict[bool, dict[int, str]] = {False: {}, True: {}}
        added = backend.get_added_tokens_decoder()
        self._added_texts = {token_id: token.content for token_id, token in added.items()}
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.max_token_characters = max(map(len, vocabulary), default=1)
        self.special_tokens = special_tokens
        self.chat_template = chat_template
        self.chat_problem = chat_problem
        self.tool_template = tool_template or chat_template

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer | None:
        """Read ``tokenizer.json``, or without it a library's files, and what is next to it; None without any. ``path`` is as `ModelDirectory.at` takes it.

        Raises:
            CheckpointError: a file is there but broken. A broken chat template is no such error: see ``chat_problem``.
        """
        directory = ModelDirectory.at(Path(path))
        if not has_tokenizer(directory):
            return None
        files = read_tokenizer_files(directory)
        backend = load_backend(directory, files)
        vocabulary = backend.tokenizer.get_vocab(with_added_tokens=True)
        special_tokens = {
            name: text
            for name, text in files.special_tokens.items()
            if name not in files.defaults or text in vocabulary
        }
        template, problem = _compiled(files.template.text, special_tokens)
        tool_template, tool_problem = _compiled(files.template.tool_text, special_tokens)
        problem = files.template.problem or problem or tool_problem
        return cls(backend.tokenizer, special_tokens, template, problem, tool_template, backend.encoder)

    def to_json(self) -> str:
        """The content of a ``tokenizer.json`` that does the same, added tokens included."""
        return self._backend.to_str()

    def encode(
        self, text: str, *, add_special_tokens: bool = True, max_characters: int | None = None, last: int | None = None
    ) -> tuple[int, ...]:
        """Token ids of ``text``, of which the ``last`` ones. Takes about 0.5 s per million characters: call it outside an event loop.

        Raises:
            RequestError: more than ``max_characters``, or lone surrogates, which are no Unicode text; or a SentencePiece model cannot encode
                a text of this length.
        """
        if max_characters is not None and len(text) > max_characters:
            raise RequestError(f"prompt has {len(text)} characters; at most {max_characters} can fit", "prompt")
        try:
            for begin in range(0, len(text), WINDOW):
                text[begin : begin + WINDOW].encode()
        except UnicodeEncodeError:
            raise RequestError(
                "prompt holds a lone surrogate, which is not valid Unicode; remove it", "prompt"
            ) from None
        if self._encoder is not None:
            return self._encoder.encode(text, add_special_tokens, last)
        token_ids = tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        return token_ids if last is None else token_ids[max(0, len(token_ids) - last) :]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the whole text of ``token_ids``. Unknown ids are empty.

        Where the decoder works on whole texts, a stream of the same tokens may differ in what a later token changes.
        """
        if self._rules is None:
            return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for inside a text; special tokens are spelt out, unknown ids are empty."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._rules is None or token_id in self._special_ids:
            return token.encode()
        return self._rules.token_bytes(token)

    def token_id(self, text: str) -> int | None:
        """The id of the token that is spelt ``text``; None if there is none."""
        token_id: int | None = self._backend.token_to_id(text)
        return token_id

    def spelling(self, token_id: int) -> str:
        """How the vocabulary spells a token; empty for an unknown id."""
        return self._backend.id_to_token(token_id) or ""

    def special_id(self, text: str) -> int | None:
        """The same of a special token, which plain text never becomes; None if ``text`` is none."""
        token_id = self.token_id(text)
        return token_id if token_id in self._special_ids else None

    def detokenizer(
        self,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
    ) -> Detokenizer:
        """An incremental detokeniser; with ``prompt_token_ids`` it gives only what follows them.

        ``spaces_between_special_tokens``: False = none, where the decoder would put some.
        """
        detokenizer: Detokenizer
        if self._rules is None:
            detokenizer = WindowDetokenizer(
                lambda ids: self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
            )
            if not (skip_special_tokens or spaces_between_special_tokens):
                detokenizer = JoinedSpecials(detokenizer, self._added_texts)
        else:
            token_bytes = self._visible_bytes if skip_special_tokens else self._spelt_bytes
            detokenizer = ByteDetokenizer(self._rules, token_bytes, self._known_texts[skip_special_tokens])
        for token_id in prompt_token_ids[-_CONTEXT_TOKENS:]:
            detokenizer.push(token_id)
        return detokenizer

    def text_stream(
        self,
        prompt_token_ids: Sequence[int] = (),
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> TextStream:
        """The growing text of a request that continues ``prompt_token_ids``; see `TextStream`."""
        detokenizer = self.detokenizer(
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
            prompt_token_ids=prompt_token_ids,
        )
        return TextStream(detokenizer, stop, include_stop=include_stop, min_tokens=min_tokens)

    def _visible_bytes(self, token_id: int, first: bool) -> bytes | None:
        return None if token_id in self._special_ids else self._spelt_bytes(token_id, first)

    def _spelt_bytes(self, token_id: int, first: bool) -> bytes | None:
        """What a token adds to a text. Remembered, because every generated token comes through here."""
        data = None if first else self._known_bytes.get(token_id)
        if data is None:
            token = self._backend.id_to_token(token_id)
            if token is None or self._rules is None:
                return None
            data = self._rules.token_bytes(token, first=first)
            if not first:
                self._known_bytes[token_id] = data
        return data


def _compiled(text: str | None, special_tokens: dict[str, str]) -> tuple[ChatTemplate | None, str | None]:
    """The template, or why it cannot be used."""
    try:
        return (None if text is None else ChatTemplate.compile(text, special_tokens)), None
    except CheckpointError as error:
        return None, str(error)


def _decoding_rules(backend: tokenizers.Tokenizer) -> DecodingRules | None:
    class Head(msgspec.Struct):
        decoder: Any = None

    return read_rules(msgspec.json.decode(backend.to_str(), type=Head).decoder)
