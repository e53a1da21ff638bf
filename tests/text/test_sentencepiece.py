"""``tokenizer.model`` alone is a tokenizer: the same ids and texts as the SentencePiece library gives."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from phalanx.parallel.errors import CheckpointError
from phalanx.runtime.text import Tokenizer, tokenizer_end_token
from phalanx.runtime.text.sentencepiece_model import read_model

from .sentencepiece_models import ALGORITHMS, KINDS, RECORD, texts, train

PIECES = [
    ("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)),
    ("▁h", -1.0, 1), ("▁hi", -2.0, 1), ("ab", -3.0, 1), ("<|user|>", 0.0, 4), ("▁", -4.0, 1), ("h", -5.0, 1), ("i", -6.0, 1),
    ("a", -7.0, 1), ("b", -8.0, 1),
]  # fmt: skip
IDS = {text: index for index, (text, _, _) in enumerate(PIECES)}


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def model(**trainer: int) -> bytes:
    """A byte-pair model with byte fallback, as Llama's: no normalisation, a dummy prefix, spaces kept."""
    out = b""
    for text, score, kind in PIECES:
        out += field(1, field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + field(3, kind))
    fields = {3: 2, 35: 1, 40: 0, 41: 1, 42: 2} | {
        int(name.removeprefix("f")): value for name, value in trainer.items()
    }
    out += field(2, b"".join(field(number, value) for number, value in fields.items()))
    return out + field(3, field(1, b"identity") + field(3, 1) + field(4, 0))


def load(path: Path, raw: bytes) -> Tokenizer:
    (path / "tokenizer.model").write_bytes(raw)
    tokenizer = Tokenizer.from_directory(path)
    assert tokenizer is not None
    return tokenizer


def test_a_model_alone_encodes_and_decodes(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, model())
    assert tokenizer.encode("hi ab") == (IDS["<s>"], IDS["▁hi"], IDS["▁"], IDS["ab"])
    assert tokenizer.encode("é", add_special_tokens=False) == (IDS["▁"], IDS["<0xC3>"], IDS["<0xA9>"])
    assert tokenizer.encode("<|user|>hi", add_special_tokens=False) == tuple(
        IDS[text] for text in ("▁", "<|user|>", "h", "i")
    )
    assert tokenizer.decode(tokenizer.encode("hi  ab é")) == "hi  ab é"
    assert tokenizer.special_tokens == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer_end_token(tmp_path) == IDS["</s>"]


@pytest.mark.parametrize(
    "raw",
    [b"", b"\x0a", b"\xff" * 40, b"\x0a\x05abc", model()[:-3], model(f3=3), model(f40=999)],
    ids=["empty", "cut", "noise", "short", "cut at the end", "words", "no unknown token"],
)
def test_what_is_no_such_model_is_refused_with_the_way_out(raw: bytes, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.model is not a SentencePiece model .* writes tokenizer\.json"
    ):
        load(tmp_path, raw)


def test_a_pointer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="git lfs pull"):
        load(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n")


@pytest.mark.parametrize(
    ("flags", "text", "pieces"),
    [
        ({}, "hi</s>hi", ("▁hi", "</s>", "▁hi")),
        ({"legacy": True}, " hi</s>hi", ("▁", "▁hi", "</s>", "▁hi")),
        ({"legacy": False}, "hi</s>hi", ("▁hi", "</s>", "h", "i")),
        ({"legacy": False}, " hi</s> hi", ("▁hi", "</s>", "▁hi")),
        ({"legacy": False}, "hi<|user|>hi", ("▁hi", "<|user|>", "h", "i")),
        ({"add_prefix_space": False}, "hi</s>hi", ("h", "i", "</s>", "h", "i")),
        ({"add_prefix_space": False, "legacy": False}, "hi hi", ("h", "i", "▁hi")),
    ],
)
def test_flags_say_where_a_space_goes_before_words(
    flags: dict[str, bool], text: str, pieces: Any, tmp_path: Path
) -> None:
    """``legacy`` and ``add_prefix_space`` of transformers' LlamaTokenizer, with which these agree: transformers 4 where ``legacy`` is absent."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **flags}))
    tokenizer = load(tmp_path, model())
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == tuple(IDS[piece] for piece in pieces)


@pytest.mark.parametrize(
    ("fields", "begins"),
    [
        ({"tokenizer_class": "InternLM2Tokenizer", "pad_token": "</s>", "decode_with_prefix_space": False}, True),
        ({"tokenizer_class": "InternLMTokenizer"}, True),
        ({"tokenizer_class": "InternLM2Tokenizer", "add_bos_token": False}, False),
        ({"tokenizer_class": "BaichuanTokenizer", "add_bos_token": False, "add_eos_token": False, "use_fast": False}, False),
        ({"tokenizer_class": "BaiChuanTokenizer"}, True),
    ],
)  # fmt: skip
def test_classes_whose_code_lies_in_checkpoints_begin_texts_as_it_does(
    fields: dict[str, Any], begins: bool, tmp_path: Path
) -> None:
    """``add_bos_token`` is true in the code of InternLM and Baichuan; Baichuan's files say false, InternLM's nothing."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    tokenizer = load(tmp_path, model())
    assert tokenizer.encode("hi") == ((IDS["<s>"],) if begins else ()) + (IDS["▁hi"],)
    assert tokenizer_end_token(tmp_path) == IDS["</s>"]
    assert tokenizer.special_tokens["bos_token"] == "<s>"


@pytest.mark.parametrize("flags", [{}, {"legacy": True}, {"legacy": False}])
def test_code_llama_puts_a_space_before_the_first_word_alone(flags: dict[str, bool], tmp_path: Path) -> None:
    """CodeLlamaTokenizer of transformers 5.24.0 does not read ``legacy``."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CodeLlamaTokenizer", **flags}))
    ids = load(tmp_path, model()).encode("hi</s>hi", add_special_tokens=False)
    assert ids == (IDS["▁hi"], IDS["</s>"], IDS["h"], IDS["i"])


@pytest.mark.parametrize("normalized", [True, False])
def test_special_tokens_are_matched_before_spaces_are_marked(normalized: bool, tmp_path: Path) -> None:
    """As in LlamaTokenizer of transformers 5.24.0, which does not normalise: "hi<pad>hi" and "hi <pad> ab" with these flags."""
    pad = {"content": "<pad>", "normalized": normalized, "rstrip": True, "lstrip": False, "single_word": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": False, "pad_token": pad}))
    tokenizer, new = load(tmp_path, model()), len(PIECES)
    assert tokenizer.encode("hi<pad>hi", add_special_tokens=False) == (IDS["▁hi"], new, IDS["h"], IDS["i"])
    ids = (IDS["▁hi"], IDS["▁"], new, IDS["ab"])
    assert tokenizer.encode("hi <pad> ab", add_special_tokens=False) == ids


def test_words_marked_at_their_end_are_refused_and_so_are_spaces_without_a_mark(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"treat_whitespace_as_suffix.* is not supported"):
        load(tmp_path, model(f24=1))
    with pytest.raises(CheckpointError, match="escape_whitespaces"):
        load(tmp_path, model() + field(3, field(5, 0)))


@pytest.mark.parametrize(
    ("text", "kept"), [("hi\n", "hi\n"), ("\t hi  ab ", "\t hi ab"), ("  hi▁ ", "hi"), ("\xa0", "\xa0")]
)
def test_a_model_that_removes_spaces_removes_no_other_blanks(text: str, kept: str, tmp_path: Path) -> None:
    tokenizer = load(tmp_path, model() + field(3, field(1, b"identity") + field(4, 1)))
    assert tokenizer.decode(tokenizer.encode(text)) == kept


RECORDED = json.loads(RECORD.read_text())["models"]


@pytest.mark.parametrize(
    "recorded", RECORDED, ids=[f"{entry['algorithm']}-{number}" for number, entry in enumerate(RECORDED)]
)
def test_ids_equal_those_recorded_from_the_library(recorded: Any, tmp_path: Path) -> None:
    tokenizer = load(tmp_path, base64.b64decode(recorded["model"]))
    for text, ids in recorded["ids"].items():
        assert list(tokenizer.encode(text, add_special_tokens=False)) == ids, ascii(text)


def test_the_score_of_an_unknown_character_is_rounded_to_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids recorded from the library (0.2.3); in float64 the sums of two ways to cut compare the other way round."""
    normal = [("b", -3.0, 1), ("中中", -7.013594, 1), ("中éc", -7.647185, 1)]
    monkeypatch.setattr(f"{__name__}.PIECES", [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *normal])
    raw = model(f3=1, f35=0) + field(3, field(1, b"identity") + field(3, 0) + field(4, 1))
    text = "中b中中中中éc中écbécxx中中éc"
    ids = [0, 3, 4, 0, 5, 5, 3, 0, 5]
    assert list(load(tmp_path, raw).encode(text, add_special_tokens=False)) == ids


def test_several_threads_may_encode_at_once(tmp_path: Path) -> None:
    """`tokenizers` calls back into Python for such a model, and gives the interpreter's lock away before."""
    recorded = RECORDED[0]
    texts_and_ids = [*recorded["ids"].items()] * 5
    tokenizer = load(tmp_path, base64.b64decode(recorded["model"]))
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(
            lambda each: list(tokenizer.encode(each[0], add_special_tokens=False)) == each[1], texts_and_ids
        )
        assert all(found)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_equal_the_library(algorithm: str, kind: str, tmp_path: Path) -> None:
    library: Any = pytest.importorskip("sentencepiece")
    raw = train(algorithm, **KINDS[kind])
    reference, tokenizer = library.SentencePieceProcessor(model_proto=raw), load(tmp_path, raw)
    for text in texts(kind, 300):
        ids = reference.encode(text)
        assert list(tokenizer.encode(text, add_special_tokens=False)) == ids, ascii(text)
        decoded, stream = tokenizer.decode(ids), tokenizer.detokenizer()
        if reference.unk_id() not in ids:  # which the library shows as \u2047
            assert decoded == reference.decode(ids)
        assert "".join(map(stream.push, ids)) + stream.flush() == decoded
    assert read_model(raw, "x").eos_id == reference.eos_id()


def test_a_character_map_that_is_none_is_refused(tmp_path: Path) -> None:
    for charsmap in (b"abc", struct.pack("<I", 400) + bytes(8), struct.pack("<I", 6) + bytes(8)):
        raw = model() + field(3, field(1, b"nfkc") + field(2, charsmap))
        with pytest.raises(CheckpointError, match=r"tokenizer\.model is not a SentencePiece model"):
            load(tmp_path, raw)


def test_random_units_of_a_character_map_change_no_more_than_texts(tmp_path: Path) -> None:
    draw = random.Random(5)
    for _ in range(20):
        charsmap = struct.pack("<I", 2048) + draw.randbytes(2048) + draw.randbytes(50)
        tokenizer = load(tmp_path, model() + field(3, field(1, b"nfkc") + field(2, charsmap)))
        assert tokenizer.encode("hi ab é \u212b\u0301 日本語")


@pytest.mark.parametrize("algorithm", [1, 2])
@pytest.mark.parametrize("text", ["<0x41>", "<|user|><0x41><|user|>", "a<0x41>b", "<<0xE9>>"])
def test_a_byte_written_out_is_text_and_not_that_byte(text: str, algorithm: int, tmp_path: Path) -> None:
    tokenizer = load(tmp_path, model(f3=algorithm))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_byte_written_out_is_text_even_where_pieces_join_all_its_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = [(text, -9.0, 1) for text in ("<0", "0x", "x4", "41", "1>", *"<0x41>")]
    monkeypatch.setattr(f"{__name__}.PIECES", [*PIECES, *joined])
    tokenizer = load(tmp_path, model())
    assert tokenizer.decode(tokenizer.encode("<|user|><0x41><|user|>")) == "<|user|><0x41><|user|>"


SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
CHATGLM1 = {
    "tokenizer_class": "ChatGLMTokenizer", "bos_token": "<sop>", "eos_token": "<eop>", "end_token": "</s>",
    "gmask_token": "[gMASK]", "mask_token": "[MASK]", "pad_token": "<pad>", "unk_token": "<unk>", "num_image_tokens": 0,
}  # fmt: skip


def spelt(text: str) -> str:
    """What ChatGLM-6B's code makes of a text before the library sees it."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for count in range(80, 1, -1):
        text = text.replace(" " * count, f"<|blank_{count}|>")
    return text


def test_chatglm_6b_spells_spaces_as_pieces_and_ends_every_text(tmp_path: Path) -> None:
    library: Any = pytest.importorskip("sentencepiece")
    corpus = ["the quick brown fox jumps over the lazy dog 12 34", "你好 世界 日本語 émigré", "问答 [Round 0]"] * 20
    blanks = [f"<|blank_{count}|>" for count in range(2, 81)]
    writer = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=writer, vocab_size=460, model_type="unigram", byte_fallback=True,
        user_defined_symbols=["<n>", "<|tab|>", *blanks], control_symbols=SPECIAL, hard_vocab_limit=False, minloglevel=2,
        pad_id=3,
    )  # fmt: skip
    reference = library.SentencePieceProcessor(model_proto=writer.getvalue())
    (tmp_path / "ice_text.model").write_bytes(writer.getvalue())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CHATGLM1))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer is not None
    gmask, start, end = (reference.piece_to_id(text) for text in ("[gMASK]", "<sop>", "<eop>"))
    for text in (
        "你好 世界",
        "the  lazy\tfox\n\n  12",
        "\n问",
        "a" + " " * 81 + "b",
        "émigré 🦙 x",
        " x ",
        "",
        "日本\r\n",
        "a<0x41>\n<0x0A>",
    ):
        ids = reference.encode(spelt(text))
        assert list(tokenizer.encode(text, add_special_tokens=False)) == ids, text
        assert tokenizer.encode(text) == (*ids, gmask, start)
        expected = reference.decode(ids).replace("<n>", "\n").replace("<|tab|>", "\t")
        for count in range(2, 81):
            expected = expected.replace(f"<|blank_{count}|>", " " * count)
        assert tokenizer.decode(ids) == expected, text
        stream = tokenizer.detokenizer()
        assert "".join(map(stream.push, ids)) + stream.flush() == expected
    assert tokenizer.encode("[MASK]", add_special_tokens=False) == (reference.piece_to_id("[MASK]"),)
    assert tokenizer.decode([gmask, start, end]) == ""
    assert tokenizer_end_token(tmp_path) == end


def test_chatglm_6bs_first_revision_whose_ids_begin_with_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ice_text.model").write_bytes(model())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**CHATGLM1, "num_image_tokens": 20000}))
    with pytest.raises(CheckpointError, match="num_image_tokens=20000"):
        Tokenizer.from_directory(tmp_path)
