# SPDX-License-Identifier: Apache-2.0
"""Text at the edges of the engine: tokenizer, incremental detokeniser, stop texts, chat templates."""

from phalanx.runtime.text.chat import ChatTemplate
from phalanx.runtime.text.end_token import tokenizer_end_token
from phalanx.runtime.text.stream import TextPiece, TextStream
from phalanx.runtime.text.tokenizer import Tokenizer
from phalanx.runtime.text.words import with_word_tokens, word_biases

__all__ = [
    "ChatTemplate",
    "TextPiece",
    "TextStream",
    "Tokenizer",
    "tokenizer_end_token",
    "with_word_tokens",
    "word_biases",
]
