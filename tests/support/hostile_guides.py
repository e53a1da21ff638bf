"""Guides that try to cost too much, and a program that compiles them under limits of the operating system.

``python -m tests.support.hostile_guides`` prints a line for each: its name, and ``usable`` or the refusal.
"""

from __future__ import annotations

import json
import resource
from typing import Any

__all__ = ["HOSTILE_GUIDES"]


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _properties(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(count)}}


HOSTILE_GUIDES: dict[str, dict[str, Any]] = {
    "repeated repetition": {"regex": "(a{1000}){1000}"},
    "a hundred million times": {"regex": "a{1,99999999}"},
    "nested stars": {"regex": "((((a+)+)+)+)+b"},
    "stars everywhere": {"regex": "(.*a){30}.*(b|c.*){30}"},
    "far apart": {"regex": ".*a.{200}b.{200}c"},
    "many letters": {"regex": r"(\w{200}){200}"},
    "alternatives": {"regex": "|".join(f"word{i}x" for i in range(5000))},
    "intersecting lookahead": {"regex": "(?=a)(?!b)" * 50},
    "back reference": {"regex": r"(a)\1"},
    "unclosed": {"regex": "(" * 1000},
    "deep": {"json": _nested(60)},
    "deeper": {"json": _nested(1000)},
    "three thousand properties": {"json": _properties(1500)},
    "product of objects": {"json": {"allOf": [_properties(40) | {"required": [f"k{i}"]} for i in range(40)]}},
    "a billion items": {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}},
    "a billion characters": {"json": {"type": "string", "minLength": 10**9}},
    "itself": {"json": {"$ref": "#"}},
    "each other": {"json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
    "elsewhere": {"json": {"$ref": "http://127.0.0.1:9/schema.json"}},
    "nothing": {"json": {"type": "integer", "minimum": 5, "maximum": 4}},
    "pattern in a schema": {"json": {"type": "string", "pattern": "(x+x+)+(y{500}){500}"}},
    "ambiguous": {"grammar": 'start: s\ns: s s s | s s | "a"'},
    "endless empty": {"grammar": 'start: a\na: a a | ""'},
    "two thousand rules": {
        "grammar": "start: "
        + "|".join(f"x{i}" for i in range(1500))
        + "".join(f'\nx{i}: "a" x{i} | "b"' for i in range(1500))
    },
    "two thousand texts": {"choice": [f"text {i} " * 2 for i in range(2000)]},
    "no grammar": {"grammar": "{" * 500},
}


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    from phalanx.parallel.errors import RequestError
    from phalanx.runtime.guidance import GuideCompiler, check_guide
    from phalanx.runtime.sampling.guides import GuideRule
    from phalanx.runtime.text import Tokenizer
    from tests.support.launcher import ROOT

    tokenizer = Tokenizer.from_directory(ROOT / "checkpoints/demo")
    assert tokenizer is not None
    compiler = GuideCompiler(lambda: tokenizer, tokenizer.vocab_size, (1,))
    for name, value in HOSTILE_GUIDES.items():
        try:
            guide = GuideRule().check("structured_outputs", value)
            check_guide(guide)
            mask = compiler.start(guide)
            mask.wait(60)
            outcome = "usable" if mask.problem is None else f"the engine: {mask.problem}"
        except RequestError as error:
            outcome = str(error)
        print(json.dumps([name, outcome]), flush=True)


if __name__ == "__main__":
    _main()
