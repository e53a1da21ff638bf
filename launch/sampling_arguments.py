# SPDX-License-Identifier: Apache-2.0
"""Sampling flags of commands, and sampling fields of JSON lines: both follow from the table of sampling fields."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from phalanx.parallel.errors import RequestError
from phalanx.runtime.sampling.fields import SAMPLING_FIELDS, SamplingParams, read_fields
from phalanx.runtime.sampling.rules import Flag, Real, Texts

__all__ = ["add_sampling_arguments", "given_fields", "sampling_params"]


def add_sampling_arguments(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    """Add a flag for each field that has one; ``defaults`` are the command's own, for the help."""
    group = parser.add_argument_group("sampling")
    for field in SAMPLING_FIELDS:
        if field.flag is None:
            continue
        metavar, text = field.flag
        options: dict[str, Any] = {"default": None, "help": text}
        if isinstance(field.rule, Flag):
            options |= {"action": "store_true"}
        elif isinstance(field.rule, Texts):
            options |= {"action": "append", "metavar": metavar}
        else:
            options |= {"type": float if isinstance(field.rule, Real) else int, "metavar": metavar}
        default = defaults.get(field.name, field.default)
        if type(default) in (int, float):
            options["help"] = f"{text} (default: {default:g})"
        group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def given_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields whose flags were given."""
    named = {field.name: getattr(args, field.name, None) for field in SAMPLING_FIELDS if field.flag is not None}
    return {name: value for name, value in named.items() if value is not None}


def sampling_params(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """Parameters of one prompt: ``fields`` that are not null, then ``defaults``, then the table's.

    Raises:
        RequestError: a field is unknown, of another type or out of range.
    """
    known = [field.name for field in SAMPLING_FIELDS]
    if unknown := sorted(set(fields) - set(known)):
        raise RequestError(f"unknown field {unknown[0]!r}; known: {', '.join(known)}", unknown[0])
    return SamplingParams(**{**defaults, **read_fields(fields)})
