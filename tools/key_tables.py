"""Write docs/config_keys.md: every key of a checkpoint's JSON files that is known, and what becomes of it.

``python tools/key_tables.py`` (or ``make key-tables``) rewrites the file from the tables and families in the code; a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from phalanx.checkpoints.quantized import QUANTIZATION_KEYS
from phalanx.runtime.generation_config import GENERATION_KEYS
from phalanx.runtime.models import MODELS, Model
from phalanx.runtime.models.config_keys import FIXED_KEYS, HARMLESS_KEYS
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.rope_fields import ROPE_FIELD_KEYS
from phalanx.runtime.text.tokenizer_keys import HONOURED_KEYS, IGNORED_KEYS

PATH = Path(__file__).resolve().parent.parent / "docs" / "config_keys.md"
SIZE = 64
"""What `RecordingReader` takes for a required size."""


class RecordingReader(ConfigReader):
    """Reads an empty file as if it held every required size, to find out which keys a family asks for."""

    def exact_quotient(self, numerator: str, denominator: str) -> int:
        """Record both fields."""
        self.read_keys |= {numerator, denominator}
        return SIZE

    def _required(self, name: str, default: Any) -> Any:
        value = self.value(name, default)
        return SIZE if value is None else value


def family_keys(model: Model) -> tuple[set[str], set[str]]:
    """Keys of ``config.json`` that a family honours, and those that it ignores besides the common ones."""
    reader = RecordingReader({})
    model.read_fields(reader)
    return reader.read_keys, reader.ignored_keys


def document() -> str:
    """The text of docs/config_keys.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield from (
        "# Keys of a checkpoint's JSON files",
        "",
        "Written by `make key-tables` from the tables that the code reads by; a test compares them. What counts where one fact stands in",
        "two places is in [checkpoints.md](checkpoints.md). A key that is in no list is refused by name unless it asks for nothing: null,",
        "false, 0, empty, or 1 for a multiplier.",
        "",
        "## config.json",
        "",
        "| honoured by | keys |",
        "|---|---|",
    )
    families = {model.architecture: family_keys(model) for model in MODELS.values()}
    for name in sorted(families):
        yield f"| `{name}` | {_listed(families[name][0])} |"
    yield from ("", "| ignored | because it |", "|---|---|")
    for reason, keys in HARMLESS_KEYS.items():
        yield f"| {_listed(keys)} | {reason} |"
    for name in sorted(families):
        if families[name][1]:
            yield f"| {_listed(families[name][1])} | changes nothing in `{name}` |"
    yield from ("", "| refused | unless it is null or |", "|---|---|")
    for key, value in sorted(FIXED_KEYS.items()):
        yield f"| `{key}` | {str(value).lower()} |"
    yield f"| {_listed(QUANTIZATION_KEYS)} | empty, or a scheme that is supported |"
    yield from (
        "",
        "**Inside `rope_scaling` and `rope_parameters`**, by `rope_type`; any other key or type is refused:",
        "",
    )
    yield from ("| type | keys |", "|---|---|")
    for kind, keys in ROPE_FIELD_KEYS.items():
        yield f"| `{kind}` | {_listed(keys)} |"
    yield from ("", "## generation_config.json", "", "| | keys |", "|---|---|")
    for use in ("honoured", "ignored", "refused"):
        detail = " unless neutral" if use == "refused" else ""
        yield f"| {use}{detail} | {_listed(key for key, its_use in GENERATION_KEYS.items() if its_use == use)} |"
    yield from ("", "## tokenizer_config.json", "", "| | keys |", "|---|---|")
    yield f"| honoured | {_listed(HONOURED_KEYS)}; texts called `*_token` reach the chat template |"
    yield f"| ignored | {_listed(IGNORED_KEYS)}; numbers called `*_token_id`, `*_token_index`, `*_length`, `*_size` |"


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in sorted(keys))


if __name__ == "__main__":
    PATH.write_text(document())
