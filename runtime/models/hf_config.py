# SPDX-License-Identifier: Apache-2.0
"""Reading Hugging Face ``config.json``: typed access with one clear error each, and nothing unread that could matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict, cast

from phalanx.checkpoints.config_files import stored_dtype
from phalanx.checkpoints.formats import read_formats
from phalanx.checkpoints.quantized import QUANTIZATION_KEYS
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import Activation, ComputeDType, RopeConfig
from phalanx.runtime.models.config_keys import FIXED_KEYS, asks_for_nothing, is_harmless
from phalanx.runtime.models.rope_fields import ROPE_KEYS, RopeFields, read_rope
from phalanx.runtime.token_fields import is_finite_number, optional_token_id, shown, token_ids

__all__ = ["ConfigReader"]

FILE = "config.json"
LARGEST_SIZE = 2**31 - 1

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


class _Common(TypedDict):
    dtype: ComputeDType
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


class ConfigReader:
    """Typed access to one parsed ``config.json``, which remembers what was read.

    A family declares the keys that it honours by reading them, and those that mean nothing to it with `ignore`; `finish` refuses
    the rest. Every method raises `ConfigError` naming the field and its value.

    Attributes:
        raw: the parsed file. Keys taken from here directly are not remembered: use `value`.
        read_keys: keys that were asked for, whether the file has them or not.
        ignored_keys: keys passed to `ignore`.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.read_keys: set[str] = set()
        self.ignored_keys: set[str] = set()

    def value(self, name: str, default: Any = None) -> Any:
        """Return a field as it is; absent or null means ``default``."""
        self.read_keys.add(name)
        value = self.raw.get(name)
        return default if value is None else value

    def either(self, *names: str) -> str:
        """Return whichever of several spellings of one field the file uses; the first where it uses none."""
        self.read_keys.update(names)
        present = [name for name in names if self.raw.get(name) is not None] or [names[0]]
        for other in present[1:]:
            if self.raw[other] != self.raw[present[0]]:
                raise ConfigError(
                    f"{present[0]}={self.raw[present[0]]!r} and {other}={self.raw[other]!r} in {FILE} are two spellings of "
                    "one field and disagree; remove the wrong one"
                )
        return present[0]

    def ignore(self, *names: str) -> None:
        """Declare fields that do not change what this family computes."""
        self.ignored_keys.update(names)

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        """Return a whole number; absent or null means ``default``, without which the field is required."""
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name}={shown(value)} in {FILE} is not a whole number; the file is damaged")
        if not minimum <= value <= LARGEST_SIZE:
            limit = f"below {minimum}" if value < minimum else f"above {LARGEST_SIZE}"
            raise ConfigError(f"{name}={shown(value)} in {FILE} is {limit}; the file is damaged")
        return value

    def nullable(self, name: str, default: int) -> int:
        """Return a whole number; absent means ``default``, null means 0 (``sliding_window``)."""
        is_null = name in self.raw and self.raw[name] is None
        self.read_keys.add(name)
        return 0 if is_null else self.integer(name, default)

    def nullable_number(self, name: str, default: float) -> float:
        """Return a finite number; absent means ``default``, null means 0 (soft caps)."""
        is_null = name in self.raw and self.raw[name] is None
        self.read_keys.add(name)
        return 0.0 if is_null else self.number(name, default)

    def windows(self, num_layers: int, window: int, slides: Callable[[int], bool]) -> tuple[int, ...]:
        """Return each layer's window, 0 = none: by ``layer_types`` where the file has it, else by the family's rule ``slides``.

        ``window`` 0: the model has none, and ``layer_types`` must not ask for one.
        """
        kinds = self.value("layer_types")
        if kinds is None:
            return tuple(window if slides(layer) else 0 for layer in range(num_layers))
        known = {"sliding_attention": window, "full_attention": 0}
        if window == 0 and isinstance(kinds, list) and "sliding_attention" in kinds:
            raise ConfigError(
                f"layer_types in {FILE} has sliding_attention, but there is no window: sliding_window is null, or use_sliding_window "
                "false; give the window, or say full_attention"
            )
        if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
            raise ConfigError(f"layer_types={shown(kinds)} in {FILE} is not one of {', '.join(known)} for each layer")
        return tuple(known[kind] for kind in kinds)

    def number(self, name: str, default: float | None = None) -> float:
        """Return a finite number; absent or null means ``default``, without which the field is required."""
        value = self._required(name, default)
        if not is_finite_number(value):
            raise ConfigError(f"{name}={shown(value)} in {FILE} is not a finite number; the file is damaged")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean."""
        value = self.value(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={shown(value)} in {FILE} is neither true nor false; the file is damaged")
        return value

    def activation(self, name: str, default: str) -> Activation:
        """Return an activation function, given under any of its published names."""
        value = self.value(name, default)
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise ConfigError(f"{name}={shown(value)} in {FILE} is not supported; supported: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]

    def exact_quotient(self, numerator: str, denominator: str) -> int:
        """Return one field divided by another, which must divide exactly."""
        quotient, rest = divmod(self.integer(numerator), self.integer(denominator))
        if rest:
            raise ConfigError(
                f"{numerator}={self.integer(numerator)} in {FILE} is not a multiple of "
                f"{denominator}={self.integer(denominator)}; the file is damaged"
            )
        return quotient

    def head_dim(self, name: str = "head_dim") -> int:
        """Return field ``name``, or where it is absent ``hidden_size / num_attention_heads``, which must divide exactly."""
        if self.value(name) is None:
            return self.exact_quotient("hidden_size", "num_attention_heads")
        return self.integer(name)

    def refuse_unless(self, name: str, expected: object) -> None:
        """Refuse a feature that the family's functions do not have; absent or null is ``expected``."""
        value = self.value(name, expected)
        if value != expected or isinstance(value, bool) != isinstance(expected, bool):
            raise ConfigError(f"{name}={shown(value)} in {FILE} is not supported; only {expected!r} is")

    def common(self) -> _Common:
        """Return the fields that every family has: stored dtype and special tokens."""
        self.read_keys |= {"dtype", "torch_dtype"}
        return {
            "dtype": cast(ComputeDType, stored_dtype(self.raw)),
            "bos_token_id": optional_token_id("bos_token_id", self.value("bos_token_id"), FILE),
            "eos_token_ids": token_ids("eos_token_id", self.value("eos_token_id"), FILE),
        }

    def rope(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        partial: float | None = None,
        layer_type: str | None = None,
        is_scaled: bool = True,
        theta_key: str = "rope_theta",
        partial_key: str = "partial_rotary_factor",
        original: int | None = None,
    ) -> RopeConfig:
        """Return the rotary parameters, from ``rope_scaling`` or ``rope_parameters`` and the keys next to them.

        Args:
            head_dim: size of a head.
            theta: the family's default base.
            partial: the family's default share of a head that is rotated; None for a family that always rotates all of it, which
                refuses any other share.
            layer_type: which entry applies where ``rope_parameters`` holds one for each kind of layer.
            is_scaled: whether ``rope_scaling`` applies; False for kinds of layers that it leaves alone.
            theta_key, partial_key: names of the two fields at the top level (GPT-NeoX: ``rotary_emb_base``, ``rotary_pct``).
            original: the family's default trained length at the top level (Phi 3).
        """
        self.read_keys.update(ROPE_KEYS)
        fields = RopeFields(self.value(theta_key, theta), self.value(partial_key), partial, partial_key, original)
        raw = self.raw if is_scaled else {key: value for key, value in self.raw.items() if key != "rope_scaling"}
        return read_rope(raw, head_dim, fields, layer_type)

    def finish(self, architecture: str) -> None:
        """Refuse every key that was never read, is not known to be harmless, and asks for something."""
        read_formats(self.raw)
        self.read_keys |= QUANTIZATION_KEYS
        for key, value in self.raw.items():
            if key in self.read_keys or key in self.ignored_keys or is_harmless(key):
                continue
            if FIXED_KEYS.get(key):
                self.refuse_unless(key, FIXED_KEYS[key])
            elif not asks_for_nothing(key, value):
                raise ConfigError(
                    f"{key}={shown(value)} in {FILE} is not supported for {architecture} and may change what it computes; "
                    "if it does not, remove the key from the file"
                )

    def _required(self, name: str, default: Any) -> Any:
        value = self.value(name, default)
        if value is None:
            raise ConfigError(f"{name} is missing from {FILE}; the file is damaged or belongs to another architecture")
        return value
