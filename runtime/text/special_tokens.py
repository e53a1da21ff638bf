# SPDX-License-Identifier: Apache-2.0
"""Which texts are a tokenizer's special tokens, and what its class adds to a prompt when no file says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

__all__ = ["NAMED_TOKENS", "TokenizerClass", "WordSplit", "tokenizer_class"]

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that every tokenizer of transformers has a place for."""


@dataclass(frozen=True, slots=True)
class WordSplit:
    """How a class of tokenizers over tiktoken's ranks makes words of a text.

    Attributes:
        pattern: regular expression of a word.
        normalizes: the text is brought into NFC first.
    """

    pattern: str
    normalizes: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerClass:
    """Defaults of a tokenizer class of transformers.

    Attributes:
        tokens: special tokens that it has unless a file names others, or null.
        adds_bos: whether a prompt begins with BOS where neither flag nor ``tokenizer.json`` decides.
        reads_flags: whether ``add_bos_token`` and ``add_eos_token`` of ``tokenizer_config.json`` count.
        reads_prefix_space: whether ``add_prefix_space`` counts.
        own_tokens: special tokens that only its code names, whose ids follow the vocabulary's.
        begins_with: tokens that its code puts before every text.
        ends_with: tokens that its code puts after every text.
        spells_spaces: its code writes line ends, tabs and several spaces as pieces such as ``<n>`` and ``<|blank_2|>``.
        split: how texts are split where the vocabulary is a file of ranks; for ``vocab.json`` and ``merges.txt`` None is GPT-2's way.
        reads_pairs: ``vocab.json`` and ``merges.txt`` are its files.
        marks_first: a SentencePiece model puts a space before a text's first word alone, whatever ``legacy`` says.
        plain_tokens: its special tokens are matched without the blanks next to them, whatever ``lstrip`` and ``rstrip`` say.
    """

    tokens: Mapping[str, str] = field(default_factory=dict)
    adds_bos: bool = False
    reads_flags: bool = False
    reads_prefix_space: bool = False
    own_tokens: tuple[str, ...] = ()
    begins_with: tuple[str, ...] = ()
    ends_with: tuple[str, ...] = ()
    spells_spaces: bool = False
    split: WordSplit | None = None
    reads_pairs: bool = False
    marks_first: bool = False
    plain_tokens: bool = False


_END_OF_TEXT = "<|endoftext|>"
_LLAMA = TokenizerClass({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, True, True, True)
_INTERNLM = TokenizerClass({**_LLAMA.tokens, "pad_token": "</s>"}, True, True)
"""``tokenization_internlm2.py`` of its checkpoints; Baichuan's is the same without padding."""
_GEMMA = TokenizerClass(
    {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}, True, True
)
_GPT2 = TokenizerClass(
    dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END_OF_TEXT), reads_prefix_space=True, reads_pairs=True
)
_COHERE = TokenizerClass(
    {"unk_token": "<UNK>", "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>"}, True, True, True
)  # fmt: skip
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN = TokenizerClass(
    own_tokens=(_END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))),
    split=WordSplit(_WORDS.replace("DIGITS", r"\p{N}"), normalizes=True),
)
_CHATGLM = TokenizerClass(
    own_tokens=(
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "sop",
        "eop",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    ),
    begins_with=("[gMASK]", "sop"),
)
_CHATGLM1 = TokenizerClass(
    {"bos_token": "<sop>", "eos_token": "<eop>", "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "[MASK]"},
    ends_with=("[gMASK]", "<sop>"),
    spells_spaces=True,
)
_CHATGLM4 = TokenizerClass(begins_with=("[gMASK]", "<sop>"), split=WordSplit(_WORDS.replace("DIGITS", r"\p{N}{1,3}")))
_CLASSES: Mapping[str, TokenizerClass] = MappingProxyType(
    {
        "LlamaTokenizer": _LLAMA,
        "CodeLlamaTokenizer": replace(_LLAMA, marks_first=True),
        "InternLMTokenizer": _INTERNLM,
        "InternLM2Tokenizer": _INTERNLM,
        "BaichuanTokenizer": TokenizerClass(_LLAMA.tokens, True, True),
        "BaiChuanTokenizer": TokenizerClass(_LLAMA.tokens, True, True),
        "GemmaTokenizer": _GEMMA,
        "GPT2Tokenizer": _GPT2,
        "CodeGenTokenizer": _GPT2,
        "GPTNeoXTokenizer": replace(_GPT2, reads_flags=True, reads_pairs=False),
        "Qwen2Tokenizer": TokenizerClass(
            dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END_OF_TEXT),
            reads_prefix_space=True,
            reads_pairs=True,
            plain_tokens=True,
            split=_QWEN.split,
        ),
        "BloomTokenizer": TokenizerClass(
            {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        ),
        "CohereTokenizer": _COHERE,
        "QWenTokenizer": _QWEN,
        "ChatGLMTokenizer": _CHATGLM,
        "ChatGLM1Tokenizer": _CHATGLM1,
        "ChatGLM4Tokenizer": _CHATGLM4,
        "T5Tokenizer": TokenizerClass({"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}),
    }
)
_OTHER = TokenizerClass()


def tokenizer_class(name: str | None) -> TokenizerClass:
    """Defaults of the class ``name``, with or without ``Fast``; of the general class for any other."""
    return _CLASSES.get((name or "").removesuffix("Fast"), _OTHER)
