# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tokenizer: text to token ids and back, one token at a time where a stream needs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from phalanx.parallel.errors import CheckpointError, RequestError
from phalanx.runtime.text.chat import ChatTemplate
from phalanx.runtime.text.decoding_rules import DecodingRules, read_rules
from phalanx.runtime.text.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from phalanx.runtime.text.stream import TextStream

__all__ = ["Tokenizer"]

_CONTEXT_TOKENS = 8
"""Prompt tokens that a continuation is decoded after: enough for the bytes of a split character."""

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Encodes and decodes with a ``tokenizer.json``; safe to use from several threads.

    Attributes:
        vocab_size: one more than the largest token id.
        special_tokens: texts of the named special tokens, for chat templates.
        chat_template: the checkpoint's template, or None.
        max_token_characters: length of the longest token; a prompt of n tokens has at most n times as many.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: dict[str, str],
        chat_template: ChatTemplate | None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._backend = backend
        self._rules = _decoding_rules(backend)
        self._known_bytes: dict[int, bytes] = {}
        self._special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.max_token_characters = max(map(len, vocabulary), default=1)
        self.special_tokens = special_tokens
        self.chat_template = chat_template

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer | None:
        """Read ``tokenizer.json`` (None without it), ``tokenizer_config.json`` and ``chat_template.jinja``.

        Raises:
            CheckpointError: a file is there but broken.
        """
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"{file} cannot be read: {error}; restore it, or remove it to use token ids"
            ) from None
        config = _read_config(Path(path) / "tokenizer_config.json")
        special_tokens = {name: text for name in _SPECIAL_NAMES if (text := _token_text(config.get(name))) is not None}
        source = _template_source(Path(path), config)
        template = ChatTemplate.compile(source, special_tokens) if source is not None else None
        return cls(backend, special_tokens, template)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, max_characters: int | None = None
    ) -> tuple[int, ...]:
        """Token ids of ``text``. Takes about 0.5 s per million characters: call it outside an event loop.

        Raises:
            RequestError: more than ``max_characters``, or lone surrogates, which are no Unicode text.
        """
        if max_characters is not None and len(text) > max_characters:
            raise RequestError(f"prompt has {len(text)} characters; at most {max_characters} can fit", "prompt")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError("prompt holds a lone surrogate, which is no Unicode text; remove it", "prompt") from None
        return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The whole text of ``token_ids``, as a stream of them would give it. Unknown ids are empty."""
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

    def detokenizer(self, *, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()) -> Detokenizer:
        """An incremental detokeniser; with ``prompt_token_ids`` it gives only what follows them."""
        detokenizer: Detokenizer
        if self._rules is None:
            detokenizer = WindowDetokenizer(
                lambda ids: self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
            )
        else:
            detokenizer = ByteDetokenizer(
                self._rules, self._visible_bytes if skip_special_tokens else self._spelt_bytes
            )
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
    ) -> TextStream:
        """The growing text of a request that continues ``prompt_token_ids``; see `TextStream`."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens, prompt_token_ids=prompt_token_ids)
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


def _decoding_rules(backend: tokenizers.Tokenizer) -> DecodingRules | None:
    class Head(msgspec.Struct):
        decoder: Any = None

    return read_rules(msgspec.json.decode(backend.to_str(), type=Head).decoder)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; restore it") from None


def _token_text(value: Any) -> str | None:
    """A special token's text, given plainly or as an added-token object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template_source(path: Path, config: dict[str, Any]) -> str | None:
    """``chat_template.jinja`` before ``chat_template``, which is one template or a list of named ones."""
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}; restore it") from None
    match config.get("chat_template"):
        case None:
            return None
        case str(source):
            return source
        case [*entries]:
            named = {e.get("name"): e.get("template") for e in entries if isinstance(e, dict)}
            if isinstance(default := named.get("default"), str):
                return default
    raise CheckpointError(
        f"chat_template in {path / 'tokenizer_config.json'} is neither a text nor a list with a 'default'"
    )
