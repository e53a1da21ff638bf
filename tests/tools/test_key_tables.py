"""docs/config_keys.md and the tables of engines in docs/models.md and README.md say what the code does."""

from __future__ import annotations

import runpy
from pathlib import Path

from phalanx.runtime.models import MODELS

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_documented_keys_are_those_of_the_code() -> None:
    tables = runpy.run_path(str(ROOT / "tools" / "key_tables.py"))
    assert (ROOT / "docs" / "config_keys.md").read_text() == tables["document"](), "run `make key-tables`"


def test_the_documented_engines_of_each_family_are_those_that_accept_it() -> None:
    from tools.engine_matrix import documents

    for path, text in documents().items():
        assert path.read_text() == text, "run `make key-tables`"


def test_every_family_has_a_paragraph_with_its_name_in_config_json() -> None:
    text = (ROOT / "docs" / "models.md").read_text().split("## Heads over ranks")[0]
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.startswith("**")]
    for model in MODELS.values():
        assert any(f"`{model.architecture}" in paragraph for paragraph in paragraphs), model.architecture


def test_no_key_has_two_uses() -> None:
    from phalanx.runtime.generation_config import GENERATION_KEYS
    from phalanx.runtime.models.config_keys import FIXED_KEYS, HARMLESS_KEYS
    from phalanx.runtime.text.tokenizer_keys import HONOURED_KEYS, IGNORED_KEYS

    harmless = [key for keys in HARMLESS_KEYS.values() for key in keys]
    assert not set(harmless) & FIXED_KEYS.keys()
    assert not set(HONOURED_KEYS) & set(IGNORED_KEYS)
    assert set(GENERATION_KEYS.values()) == {"honoured", "ignored", "refused"}
