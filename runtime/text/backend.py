# SPDX-License-Identifier: Apache-2.0
"""``tokenizer.json`` (or the file of a library) with what the files next to it say about its tokens: the tokenizer that transformers would make."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors

from phalanx.checkpoints.file_kinds import HEAD_BYTES, describe_content
from phalanx.checkpoints.files import ModelDirectory
from phalanx.parallel.errors import CheckpointError
from phalanx.runtime.text.pair_files import PAIR_FILES, BytePairs, pairs_to_backend, read_pairs
from phalanx.runtime.text.rank_file import is_rank_file, ranks_to_backend, read_ranks
from phalanx.runtime.text.sentencepiece_backend import spellings, to_backend
from phalanx.runtime.text.sentencepiece_encoder import SentencePieceEncoder
from phalanx.runtime.text.sentencepiece_encoding import SentencePieceEncoding
from phalanx.runtime.text.sentencepiece_model import SentencePieceModel, read_model
from phalanx.runtime.text.tokenizer_files import AddedToken, TokenizerFiles

__all__ = ["TOKENIZER_FILE", "Backend", "has_tokenizer", "library_token_id", "load_backend"]

TOKENIZER_FILE = "tokenizer.json"
LIBRARY_FILES = ("tokenizer.model", "ice_text.model", "qwen.tiktoken")
"""A SentencePiece model, or ranks of tiktoken, which GLM-4 gives the name of the former."""
MAX_TOKENIZER_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Backend:
    """A tokenizer of the `tokenizers` library.

    Attributes:
        tokenizer: tokens, and how they become a text; it can be written as a ``tokenizer.json``.
        encoder: makes tokens of texts where these follow another library; else None.
    """

    tokenizer: tokenizers.Tokenizer
    encoder: SentencePieceEncoder | None


def has_tokenizer(directory: ModelDirectory) -> bool:
    """Whether texts can be read: ``tokenizer.json``, a library's file, or ``vocab.json`` and ``merges.txt`` are there."""
    return any(map(directory.has, (TOKENIZER_FILE, *LIBRARY_FILES))) or all(map(directory.has, PAIR_FILES))


def load_backend(directory: ModelDirectory, files: TokenizerFiles) -> Backend:
    """Load ``tokenizer.json``, or without it a library's file, and apply ``files`` to it.

    Raises:
        CheckpointError: it cannot be read, or a token would get another id than the files say.
    """
    encoding = None
    if directory.has(TOKENIZER_FILE):
        backend = _read(directory)
    else:
        backend, encoding = _convert(directory, files)
    of_library = not directory.has(TOKENIZER_FILE) and any(map(directory.has, LIBRARY_FILES))
    adds_defaults = not directory.has(TOKENIZER_FILE) and not of_library
    _add_tokens(backend, files, adds_defaults, is_literal=of_library)
    _apply_prefix_space(backend, files)
    _apply_bos_and_eos(backend, files, is_converted=not directory.has(TOKENIZER_FILE))
    if files.flags.get("split_special_tokens"):
        backend.encode_special_tokens = True
    return Backend(backend, None if encoding is None else SentencePieceEncoder(backend, encoding))


def library_token_id(directory: ModelDirectory, files: TokenizerFiles, text: str) -> int | None:
    """Return the id of a special token where there is no ``tokenizer.json``; None if it has none.

    Raises:
        CheckpointError: the vocabulary's files cannot be read.
    """
    vocabulary = _vocabulary(directory)
    if isinstance(vocabulary, BytePairs):
        return load_backend(directory, files).tokenizer.token_to_id(text)
    if isinstance(vocabulary, SentencePieceModel):
        found = next((index for index, piece in enumerate(vocabulary.pieces) if piece.text == text), None)
        if found is not None:
            return found
        size = len(vocabulary.pieces)
    else:
        size = len(vocabulary)
    own = files.tokenizer_class.own_tokens
    return size + own.index(text) if text in own else None


def _convert(
    directory: ModelDirectory, files: TokenizerFiles
) -> tuple[tokenizers.Tokenizer, SentencePieceEncoding | None]:
    """A vocabulary, followed by the tokens that only the code of its class names; and how a SentencePiece model encodes."""
    vocabulary, kind, encoding = _vocabulary(directory), files.tokenizer_class, None
    if isinstance(vocabulary, BytePairs):
        if not kind.reads_pairs:
            raise CheckpointError(
                f"{directory.path!s} holds vocab.json and merges.txt, but not how texts are split, which is known for GPT2Tokenizer, "
                "CodeGenTokenizer and Qwen2Tokenizer alone; add a tokenizer.json"
            )
        return pairs_to_backend(vocabulary, kind.split, files.flags.get("add_prefix_space", False)), None
    if isinstance(vocabulary, SentencePieceModel):
        marks_first = kind.marks_first or files.flags.get("legacy") is False
        if kind.reads_prefix_space and files.flags.get("add_prefix_space") is False:
            vocabulary = replace(vocabulary, dummy_prefix=False)
        spelt = spellings(vocabulary) if kind.spells_spaces else []
        backend = to_backend(vocabulary, spelt)
        encoding = SentencePieceEncoding(vocabulary, spelt, marks_first)
    elif kind.split is None:
        raise CheckpointError(
            f"{directory.path!s} holds tiktoken's ranks, but not how texts are split, which is known for QWenTokenizer and "
            "ChatGLM4Tokenizer alone; add a tokenizer.json"
        )
    else:
        backend = ranks_to_backend(vocabulary, kind.split)
    # Words such as ChatGLM's "sop" are part of other words, too.
    backend.add_tokens(
        [
            tokenizers.AddedToken(text, special=True, normalized=False, single_word=text.isalpha())
            for text in kind.own_tokens
        ]
    )
    return backend, encoding


def _vocabulary(directory: ModelDirectory) -> SentencePieceModel | dict[bytes, int] | BytePairs:
    name = next(filter(directory.has, LIBRARY_FILES), None)
    if name is None:
        return read_pairs(directory)
    raw = directory.read(name, MAX_TOKENIZER_BYTES)
    if (reason := describe_content(raw[:HEAD_BYTES])) is not None:
        raise CheckpointError(f"{directory.path / name!s} is {reason}")
    reads = read_ranks if is_rank_file(raw) else read_model
    return reads(raw, str(directory.path / name))


def _read(directory: ModelDirectory) -> tokenizers.Tokenizer:
    raw = directory.read(TOKENIZER_FILE, MAX_TOKENIZER_BYTES)
    try:
        return tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:  # the library raises bare Exception
        reason = describe_content(raw[:HEAD_BYTES])
        what = f"is {reason}" if reason else f"cannot be read: {error}; restore it, or remove it to use token ids"
        raise CheckpointError(f"{directory.path / TOKENIZER_FILE!s} {what}") from None


def _add_tokens(backend: tokenizers.Tokenizer, files: TokenizerFiles, adds_defaults: bool, is_literal: bool) -> None:
    """Add tokens that are missing, and describe those anew that are there with other flags.

    ``adds_defaults``: also special tokens that only the class names, which it adds to ``vocab.json`` where that lacks them.
    ``is_literal``: tokens are matched before the text is normalised, whatever ``normalized`` says: transformers marks spaces of a
    library's model in a later step than here.
    """
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    named: dict[str, AddedToken] = {}
    for name, token in files.named_tokens.items():
        if adds_defaults or name not in files.defaults or token.content in vocabulary:
            named.setdefault(token.content, token)
    described = {token.content: token for token in files.added_tokens}
    for text, native in known.items():
        flags = (native.special, native.normalized, native.lstrip, native.rstrip, native.single_word)
        described.setdefault(text, AddedToken(text, None, *flags))
    for token in (*named.values(), *files.extra_tokens):
        described.setdefault(token.content, token)
    if files.tokenizer_class.plain_tokens:
        for text in (*named, *(extra.content for extra in files.extra_tokens)):
            described[text] = AddedToken(text, described[text].id, special=True, normalized=False)
    backend.add_tokens(
        [
            native
            for native in (_native(token, named, is_literal) for token in described.values())
            if repr(native) != repr(known.get(native.content))
        ]
    )
    for text, number in ((text, token.id) for text, token in described.items() if token.id is not None):
        if (given := backend.token_to_id(text)) != number:
            raise CheckpointError(
                f"added token {text!r} would get the id {given} instead of {number}; tokenizer.json is of another "
                "tokenizer than tokenizer_config.json or added_tokens.json"
            )


def _native(token: AddedToken, named: Collection[str], is_literal: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
        normalized=token.normalized and not is_literal, special=token.special or token.content in named,
    )  # fmt: skip


def _apply_prefix_space(backend: tokenizers.Tokenizer, files: TokenizerFiles) -> None:
    """``add_prefix_space``: a space before the first word, for byte-level and SentencePiece-like tokenizers."""
    wanted = files.flags.get("add_prefix_space")
    if wanted is None or not files.tokenizer_class.reads_prefix_space:
        return
    steps: dict[str, Any] = json.loads(backend.to_str())
    step: dict[str, Any] = steps.get("pre_tokenizer") or {}
    if step.get("type") == "ByteLevel":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=wanted, trim_offsets=step.get("trim_offsets", True), use_regex=step.get("use_regex", True)
        )
    elif step.get("type") == "Metaspace" and not wanted:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(step["replacement"], "never", step.get("split", True))
    if not wanted and (normalizer := _without_prepend(steps.get("normalizer"))) is not None:
        backend.normalizer = normalizer


def _without_prepend(normalizer: Any) -> normalizers.Normalizer | None:
    """The SentencePiece normalizer (Prepend, Replace) without its first step; None for any other."""
    match normalizer:
        case {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend"},
                {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)},
            ],
        }:
            return normalizers.Replace(old, new)
    return None


def _apply_bos_and_eos(backend: tokenizers.Tokenizer, files: TokenizerFiles, is_converted: bool) -> None:
    """Put BOS before and EOS after each text where a flag says so, or where the class does and ``tokenizer.json`` says nothing.

    ``is_converted``: there is no ``tokenizer.json``, so the flags of every class count.
    """
    kind, flags = files.tokenizer_class, files.flags
    if (kind.begins_with or kind.ends_with) and backend.post_processor is None:
        begin, end = (
            [(text, number) for text in texts if (number := backend.token_to_id(text)) is not None]
            for texts in (kind.begins_with, kind.ends_with)
        )
        _surround(backend, begin, end)
        return
    told = (kind.reads_flags or is_converted) and ("add_bos_token" in flags or "add_eos_token" in flags)
    if not told and (backend.post_processor is not None or not kind.adds_bos):
        return
    bos = _end(backend, files, "bos_token", flags.get("add_bos_token", kind.adds_bos))
    _surround(backend, bos, _end(backend, files, "eos_token", flags.get("add_eos_token", False)))


def _surround(
    backend: tokenizers.Tokenizer, bos: Sequence[tuple[str, int]], eos: Sequence[tuple[str, int]] = ()
) -> None:
    single, pair = (
        [*(f"{text}:{n}" for text, _ in bos), f"${letter}:{n}", *(f"{text}:{n}" for text, _ in eos)]
        for n, letter in enumerate("AB")
    )
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, *pair], special_tokens=list({*bos, *eos})
    )


def _end(backend: tokenizers.Tokenizer, files: TokenizerFiles, name: str, wanted: bool) -> list[tuple[str, int]]:
    text = files.special_tokens.get(name)
    number = None if text is None or not wanted else backend.token_to_id(text)
    return [] if text is None or number is None else [(text, number)]
