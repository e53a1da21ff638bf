"""What the files next to ``tokenizer.json`` say about tokens is applied as transformers applies it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from phalanx.parallel.errors import CheckpointError, RequestError
from phalanx.runtime.text import Tokenizer, tokenizer_end_token

from . import tokenizers_for_tests as made

GENERAL = {"tokenizer_class": "PreTrainedTokenizerFast"}
IM_START = {
    "content": "<|im_start|>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": True,
}


def load(path: Path, backend: tokenizers.Tokenizer, config: Any = None, **files: Any) -> Tokenizer:
    """The tokenizer of a directory with these files; names are given with ``_`` for ``.``."""
    backend.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    tokenizer = Tokenizer.from_directory(path)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"added_tokens_decoder": {"NEW": IM_START}}, {}),
        ({"added_tokens_decoder": {"NEW": {"content": "<|im_start|>"}}}, {}),
        ({"additional_special_tokens": ["<|im_start|>"]}, {}),
        ({"additional_special_tokens": [IM_START]}, {}),
        ({"extra_special_tokens": ["<|im_start|>"]}, {}),
        ({"extra_special_tokens": {"image_token": "<|im_start|>"}}, {}),
        ({"eos_token": "<|im_start|>"}, {}),
        ({}, {"added_tokens": {"<|im_start|>": "NEW"}}),
        ({}, {"special_tokens_map": {"eos_token": "<|im_start|>"}}),
        ({}, {"special_tokens_map": {"additional_special_tokens": ["<|im_start|>"]}}),
    ],
)
def test_tokens_that_only_these_files_name_are_one_token(config: Any, files: Any, tmp_path: Path) -> None:
    backend = made.byte_fallback()
    new = backend.get_vocab_size()
    numbered = json.loads(json.dumps([config, files]).replace('"NEW": {', f'"{new}": {{').replace('"NEW"', str(new)))
    tokenizer = load(tmp_path, backend, {**GENERAL, **numbered[0]}, **numbered[1])
    assert tokenizer.encode("<|im_start|>", add_special_tokens=False) == (new,)


@pytest.mark.parametrize("key", ["eos_token", "pad_token"])
def test_a_named_token_is_special_whatever_its_flag_says(key: str, tmp_path: Path) -> None:
    backend = made.byte_level()
    backend.add_tokens([tokenizers.AddedToken("<|im_end|>", special=False, normalized=False)])
    number = backend.token_to_id("<|im_end|>")
    ids = [*backend.encode("ok").ids, number]
    assert load(tmp_path, backend, GENERAL).decode(ids) == "ok<|im_end|>"
    assert load(tmp_path, backend, {**GENERAL, key: "<|im_end|>"}).decode(ids) == "ok"
    flags = {str(number): {"content": "<|im_end|>", "special": True}}
    assert load(tmp_path, backend, {**GENERAL, "added_tokens_decoder": flags}).decode(ids) == "ok"


def test_a_token_whose_id_disagrees_is_refused(tmp_path: Path) -> None:
    backend = made.byte_fallback()
    wrong = str(backend.get_vocab_size() + 7)
    with pytest.raises(CheckpointError, match=rf"'<\|im_start\|>' would get the id .* instead of {wrong}"):
        load(tmp_path, backend, {"added_tokens_decoder": {wrong: IM_START}})
    with pytest.raises(CheckpointError, match="would get the id"):
        load(tmp_path, backend, {}, added_tokens={"<|im_start|>": int(wrong)})


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("LlamaTokenizer", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
        ("LlamaTokenizerFast", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
        ("PreTrainedTokenizerFast", {}),
        ("GPT2Tokenizer", {}),  # its <|endoftext|> is not in this vocabulary
        (None, {}),
    ],
)
def test_the_class_names_special_tokens_that_no_file_names(name: str | None, tokens: Any, tmp_path: Path) -> None:
    config = {} if name is None else {"tokenizer_class": name}
    assert load(tmp_path, made.byte_fallback(), config).special_tokens == tokens


def test_tokens_that_the_vocabulary_lacks_get_ids_in_transformers_order(tmp_path: Path) -> None:
    backend = made.byte_fallback()
    new = backend.get_vocab_size()
    config = {"pad_token": "<a>", "eos_token": "<b>", "bos_token": "<c>", "additional_special_tokens": ["<d>", "<e>"]}
    tokenizer = load(tmp_path, backend, config)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in ("<c>", "<b>", "<a>", "<d>", "<e>")]
    assert ids == [(new + index,) for index in range(5)]


@pytest.mark.parametrize("place", ["config", "special_tokens_map"])
@pytest.mark.parametrize(
    ("flag", "left"), [({}, "  "), ({"lstrip": True}, " "), ({"lstrip": True, "rstrip": True}, "")]
)
def test_a_named_token_takes_the_blanks_that_its_description_says(
    flag: dict[str, bool], left: str, place: str, tmp_path: Path
) -> None:
    """As in transformers 5.24.0, which reads such an object in ``tokenizer_config.json`` with the key ``__type`` alone."""
    named = {"eos_token": {"__type": "AddedToken", "content": "<tool>", **flag}}
    config, files = ({**GENERAL, **named}, {}) if place == "config" else (GENERAL, {place: named})
    tokenizer = load(tmp_path, made.byte_level(), config, **files)
    assert tokenizer.decode(tokenizer.encode("a <tool> b")) == f"a{left}b"
    assert tokenizer.special_tokens["eos_token"] == "<tool>"


def test_null_takes_a_default_away(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, made.byte_fallback(), {"tokenizer_class": "LlamaTokenizer", "bos_token": None})
    assert "bos_token" not in tokenizer.special_tokens


@pytest.mark.parametrize(
    ("config", "names", "bos"),
    [
        ({}, {"bos_token": "<s>"}, "<s>"),
        ({}, {"bos_token": {"content": "<s>", "lstrip": False}}, "<s>"),
        ({"bos_token": "<s>"}, {"bos_token": "</s>"}, "</s>"),
        ({"bos_token": "<s>", "added_tokens_decoder": {}}, {"bos_token": "</s>"}, "<s>"),
    ],
)
def test_special_tokens_map_counts_where_added_tokens_decoder_is_absent(
    config: Any, names: Any, bos: str, tmp_path: Path
) -> None:
    tokenizer = load(tmp_path, made.byte_fallback(), {**GENERAL, **config}, special_tokens_map=names)
    assert tokenizer.special_tokens["bos_token"] == bos


def test_a_models_own_tokens_reach_its_template(tmp_path: Path) -> None:
    config = {**GENERAL, "image_token": "<img>", "chat_template": "{{ image_token }}"}
    template = load(tmp_path, made.byte_fallback(), config).chat_template
    assert template is not None
    assert template.render([{"role": "user", "content": "x"}]) == "<img>"


BOS, EOS = (1, 2)


@pytest.mark.parametrize(
    ("config", "first", "last"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, True, False),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": True}, True, True),
        ({"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>"}, True, False),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False, False),
        ({"tokenizer_class": "LlamaTokenizer", "bos_token": None}, False, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "bos_token": "<s>"}, False, False),
        ({"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "<s>"}, False, False),
        ({"tokenizer_class": "GPTNeoXTokenizerFast", "add_bos_token": True, "bos_token": "<s>"}, True, False),
        ({}, False, False),
    ],
)
def test_bos_and_eos_are_added_as_class_and_flags_say(config: Any, first: bool, last: bool, tmp_path: Path) -> None:
    """lm-eval#1465: Gemma without BOS."""
    ids = load(tmp_path, made.byte_fallback(), config).encode("the fox")
    assert (ids[0] == BOS, ids[-1] == EOS) == (first, last)


def test_tokenizer_json_decides_about_bos_where_no_flag_does(tmp_path: Path) -> None:
    backend = made.byte_fallback()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    ids = load(tmp_path, backend, {"tokenizer_class": "LlamaTokenizer"}).encode("the")
    assert (ids[0] == BOS, ids[-1] == EOS) == (False, True)


@pytest.mark.parametrize(("flag", "text"), [(True, " the"), (False, "the"), (None, "the")])
def test_add_prefix_space_of_byte_level_tokenizers(flag: bool | None, text: str, tmp_path: Path) -> None:
    backend = made.byte_level()
    config = {"tokenizer_class": "GPT2Tokenizer"} | ({} if flag is None else {"add_prefix_space": flag})
    tokenizer = load(tmp_path, backend, config)
    assert tokenizer.encode("the") == tuple(backend.encode(text).ids)


@pytest.mark.parametrize("style", ["prepend", "metaspace"])
def test_add_prefix_space_false_of_sentencepiece_tokenizers(style: str, tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "b": 3}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    if style == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", split=False)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}
    assert load(tmp_path, backend, config).encode("a b") == (1, 2, 1, 3)
    assert load(tmp_path, backend, {**config, "add_prefix_space": False}).encode("a b") == (2, 1, 3)


def test_split_special_tokens_reads_them_as_text(tmp_path: Path) -> None:
    plain = load(tmp_path, made.byte_level(), GENERAL)
    split = load(tmp_path, made.byte_level(), {**GENERAL, "split_special_tokens": True})
    assert len(plain.encode("<|end|>")) == 1
    assert len(split.encode("<|end|>")) > 1


@pytest.mark.parametrize(
    "text", ['{"model_max_length": Infinity}', '{"x": NaN}', '{"x": -Infinity}', '{"model_max_length": 1e30}']
)
def test_numbers_that_only_python_writes_are_read(text: str, tmp_path: Path) -> None:
    load(tmp_path, made.byte_level(), text)


@pytest.mark.parametrize(
    ("config", "files", "word"),
    [
        ({"eos_token": 3}, {}, "eos_token=3"),
        ({"additional_special_tokens": "<x>"}, {}, "additional_special_tokens="),
        ({"additional_special_tokens": [3]}, {}, "lists 3"),
        ({"added_tokens_decoder": [1]}, {}, "added_tokens_decoder="),
        ({"added_tokens_decoder": {"x": {"content": "y"}}}, {}, "'x'"),
        ({"a_key_of_tomorrow": 3}, {}, "a_key_of_tomorrow=3"),
        ({}, {"added_tokens": {"<x>": "3"}}, "'<x>'"),
    ],
)
def test_malformed_values_are_refused_by_name(config: Any, files: Any, word: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        load(tmp_path, made.byte_level(), config, **files)
    assert word in str(error.value)


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    "value",
    [TEMPLATE, [{"name": "rag", "template": "r"}, {"name": "default", "template": TEMPLATE}], {"default": TEMPLATE}],
)
def test_the_default_template_is_found(value: Any, tmp_path: Path) -> None:
    tokenizer = load(tmp_path, made.byte_fallback(), {"bos_token": "<s>", "chat_template": value})
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.render(MESSAGES) == "<s>x"


def test_template_files_take_precedence_in_one_order(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    places = {
        "chat_template.json": json.dumps({"chat_template": "legacy"}),
        "tokenizer_config.json": json.dumps({"chat_template": "config"}),
        "additional_chat_templates/default.jinja": "additional",
        "chat_template.jinja": "own",
    }
    seen = []
    for name, text in places.items():
        (tmp_path / name).write_text(text)
        template = load(tmp_path, made.byte_level()).chat_template
        assert template is not None
        seen.append(template.render(MESSAGES))
    assert seen == ["legacy", "config", "additional", "own"]


@pytest.mark.parametrize(
    "place", ["tokenizer_config.json", "additional_chat_templates/tool_use.jinja", "tool_use.jinja"]
)
def test_a_second_template_may_be_for_tools(place: str, tmp_path: Path) -> None:
    named = {"default": "plain", "tool_use": "with tools"}
    config = {"chat_template": named if place == "tokenizer_config.json" else "plain"}
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("with tools")
    tokenizer = load(tmp_path, made.byte_level(), config)
    assert tokenizer.chat_template is not None
    assert tokenizer.tool_template is not None
    assert tokenizer.chat_template.render(MESSAGES) == "plain"
    assert tokenizer.tool_template.render(MESSAGES) == "with tools"


def test_one_template_serves_requests_with_tools_too(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, made.byte_level(), {"chat_template": "plain"})
    assert tokenizer.tool_template is tokenizer.chat_template is not None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{% for m in messages %}", "cannot be compiled"),
        ([{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}], "rag, tool_use"),
        ([], "no template called 'default'"),
        (3, "no template called 'default'"),
        ({"default": 3}, "no template called 'default'"),
    ],
)
def test_a_bad_template_refuses_chats_and_nothing_else(value: Any, reason: str, tmp_path: Path) -> None:
    tokenizer = load(tmp_path, made.byte_level(), {"chat_template": value})
    assert tokenizer.chat_template is None
    assert reason in (tokenizer.chat_problem or "")
    assert tokenizer.encode("fox")


@pytest.mark.parametrize("data", [b"\xff\xfe", b"{% if %}"])
def test_a_bad_template_file_refuses_chats_and_nothing_else(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(data)
    tokenizer = load(tmp_path, made.byte_level())
    assert tokenizer.chat_template is None
    assert tokenizer.chat_problem


def test_no_template_is_no_problem(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, made.byte_level())
    assert (tokenizer.chat_template, tokenizer.chat_problem) == (None, None)


def test_the_end_token_is_found_without_building_the_tokenizer(tmp_path: Path) -> None:
    assert tokenizer_end_token(tmp_path) is None
    backend = made.byte_fallback()
    load(tmp_path, backend, {"tokenizer_class": "LlamaTokenizer"})
    assert tokenizer_end_token(tmp_path) == EOS
    load(tmp_path, backend, {"eos_token": "e"})
    assert tokenizer_end_token(tmp_path) == backend.token_to_id("e")
    load(tmp_path, backend, {"eos_token": None})
    assert tokenizer_end_token(tmp_path) is None
    load(tmp_path, made.unigram(), {"eos_token": "▁fox"})
    assert tokenizer_end_token(tmp_path) == made.unigram().token_to_id("▁fox")


def test_a_pointer_instead_of_the_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        Tokenizer.from_directory(tmp_path)


def test_continuing_an_unshown_message_is_refused(tmp_path: Path) -> None:
    template = load(tmp_path, made.byte_level(), {"chat_template": "hello"}).chat_template
    assert template is not None
    with pytest.raises(RequestError, match="continue_final_message"):
        template.render(MESSAGES, continue_final_message=True)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["byte_fallback", "byte_level"])
@pytest.mark.parametrize(
    "config",
    [
        {}, {"bos_token": "<s>", "add_bos_token": True}, {"add_prefix_space": True}, {"split_special_tokens": True},
        {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}, {"additional_special_tokens": ["<|im_start|>"]},
    ],
)  # fmt: skip
def test_ids_equal_transformers(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = load(tmp_path, getattr(made, kind)(), {**GENERAL, **config})
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the fox <s> a</s>", "<|im_start|>user\nhi<|im_end|>", " lead", "日 é", "<pad><unk>", ""):
        assert list(tokenizer.encode(text)) == reference(text)["input_ids"], text
