# SPDX-License-Identifier: Apache-2.0
"""What the JSON files next to ``tokenizer.json`` say about tokens, in transformers' order of precedence.

Source: ``PreTrainedTokenizerBase._from_pretrained`` and ``TokenizersBackend.__init__`` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from phalanx.checkpoints.files import ModelDirectory
from phalanx.parallel.errors import CheckpointError
from phalanx.runtime.text.special_tokens import NAMED_TOKENS, TokenizerClass, tokenizer_class
from phalanx.runtime.text.template_files import TemplateSource, read_template
from phalanx.runtime.text.tokenizer_keys import check_keys
from phalanx.runtime.token_fields import shown

__all__ = ["AddedToken", "TokenizerFiles", "read_tokenizer_files"]

CONFIG = "config.json"
CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is matched in a text before anything else. ``id`` is None where no file says it."""

    content: str
    id: int | None = None
    special: bool = False
    normalized: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Tokens and flags of ``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json``.

    Attributes:
        named_tokens: special tokens by name (``bos_token``, also a model's own such as ``image_token``), in the order in which they
            get ids if the vocabulary lacks them.
        defaults: names of those that only the tokenizer's class gives.
        added_tokens: tokens that the files add or describe anew, by id.
        extra_tokens: further special tokens, by text alone.
        tokenizer_class: defaults of the class.
        flags: ``add_bos_token``, ``add_eos_token``, ``add_prefix_space``, ``legacy``, ``split_special_tokens``, where they are set.
        template: the chat template.
    """

    named_tokens: Mapping[str, AddedToken]
    defaults: frozenset[str]
    added_tokens: tuple[AddedToken, ...]
    extra_tokens: tuple[AddedToken, ...]
    tokenizer_class: TokenizerClass
    flags: Mapping[str, bool]
    template: TemplateSource

    @property
    def special_tokens(self) -> dict[str, str]:
        """Texts of the named tokens, as chat templates see them."""
        return {name: token.content for name, token in self.named_tokens.items()}


def read_tokenizer_files(directory: ModelDirectory) -> TokenizerFiles:
    """Read the files that are there.

    Raises:
        CheckpointError: one is not JSON, a value has the wrong type, or a key is unknown and not empty.
    """
    config = directory.read_json(CONFIG_FILE) if directory.has(CONFIG_FILE) else {}
    check_keys(config)
    fields = dict(config)
    listed = config.get("added_tokens_decoder")
    if listed is None and directory.has(MAP_FILE):  # transformers reads this file only where the other says nothing
        fields.update(directory.read_json(MAP_FILE))
    kind = tokenizer_class(_class_name(directory, config))
    own = sorted(key for key in fields if key.endswith("_token") and key not in NAMED_TOKENS)
    named = {key: _named_token(key, fields[key]) for key in (*NAMED_TOKENS, *own) if key in fields}
    defaults = frozenset(kind.tokens.keys() - fields.keys())
    given = {**{key: _named_token(key, text) for key, text in kind.tokens.items()}, **named}
    tokens = {key: token for key in (*NAMED_TOKENS, *own) if (token := given.get(key)) is not None}
    extra = _extra_tokens(fields)
    added = (
        _decoder_tokens(listed)
        if listed is not None
        else _legacy_tokens(directory, {token.content for token in (*tokens.values(), *extra)})
    )
    return TokenizerFiles(
        named_tokens=tokens,
        defaults=defaults,
        added_tokens=tuple(sorted(added, key=lambda token: token.id or 0)),
        extra_tokens=extra,
        tokenizer_class=kind,
        flags={key: fields[key] for key in _FLAGS if isinstance(fields.get(key), bool)},
        template=read_template(directory, config),
    )


_FLAGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "split_special_tokens")


def _class_name(directory: ModelDirectory, config: Mapping[str, Any]) -> str | None:
    """The class that the file names; a SentencePiece model alone is Llama's, and ChatGLM's first has its own file's name.

    Of ``vocab.json`` and ``merges.txt`` alone, Qwen's ``model_type`` in ``config.json`` tells its class from GPT-2's.
    """
    if directory.has("ice_text.model"):
        return "ChatGLM1Tokenizer"
    name = config.get("tokenizer_class")
    if isinstance(name, str):
        return name
    if directory.has("tokenizer.json"):
        return None
    if directory.has("tokenizer.model"):
        return "LlamaTokenizer"
    if not directory.has("merges.txt"):
        return None
    model_type = directory.read_json(CONFIG).get("model_type") if directory.has(CONFIG) else None
    return "Qwen2Tokenizer" if str(model_type).startswith("qwen") else "GPT2Tokenizer"


def _named_token(key: str, value: Any) -> AddedToken | None:
    """A special token, given as its text or as an added-token object. Flags such as ``add_bos_token`` are no tokens."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is None:
        return None
    if isinstance(text, str):
        described = value if isinstance(value, dict) else {"content": text}
        return _described({**described, "content": _unicode(key, text), "special": True}, None)
    if key in NAMED_TOKENS:
        raise CheckpointError(f"{key}={shown(text)} in {CONFIG_FILE} is not a string; correct it or remove the key")
    return None


def _unicode(key: str, text: str) -> str:
    """``text``, which JSON may have made of half a character."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise CheckpointError(
            f"{key}={shown(text)} in {CONFIG_FILE} holds a lone surrogate, which is not valid Unicode; correct it"
        )
    return text


def _decoder_tokens(listed: Any) -> list[AddedToken]:
    """``added_tokens_decoder``: id to description."""
    if not isinstance(listed, dict):
        raise CheckpointError(f"added_tokens_decoder={shown(listed)} in {CONFIG_FILE} is not an object; remove the key")
    tokens = []
    for number, entry in listed.items():
        if not (isinstance(entry, dict) and isinstance(entry.get("content"), str) and str(number).isdecimal()):
            raise CheckpointError(
                f"added_tokens_decoder in {CONFIG_FILE} describes no token under {shown(number)}; restore it"
            )
        tokens.append(_described(entry, int(number)))
    return tokens


def _described(entry: Mapping[str, Any], number: int | None, special: bool = False) -> AddedToken:
    special = entry.get("special", special) is True
    flags = {name: entry.get(name) is True for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(
        _unicode("added token", entry["content"]),
        number,
        special,
        entry.get("normalized", not special) is True,
        **flags,
    )


def _legacy_tokens(directory: ModelDirectory, special: Iterable[str]) -> list[AddedToken]:
    """``added_tokens.json``: text to id."""
    if not directory.has(ADDED_FILE):
        return []
    names = set(special)
    tokens = []
    for text, number in directory.read_json(ADDED_FILE).items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise CheckpointError(f"{shown(text)} has the id {shown(number)} in {ADDED_FILE}; ids are whole numbers")
        tokens.append(AddedToken(text, number, text in names, text not in names))
    return tokens


def _extra_tokens(fields: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    """``extra_special_tokens`` (older: ``additional_special_tokens``): a list of texts or descriptions, or named ones."""
    value = fields.get("extra_special_tokens") or fields.get("additional_special_tokens") or []
    entries = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(entries, list):
        raise CheckpointError(f"additional_special_tokens={shown(value)} in {CONFIG_FILE} is not a list; correct it")
    tokens = []
    for entry in entries:
        described = {"content": entry} if isinstance(entry, str) else entry
        if not (isinstance(described, dict) and isinstance(described.get("content"), str)):
            raise CheckpointError(
                f"additional_special_tokens in {CONFIG_FILE} lists {shown(entry)}, which is not a token; correct it"
            )
        tokens.append(_described({**described, "special": True}, None))
    return tuple(tokens)
