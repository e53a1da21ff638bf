# SPDX-License-Identifier: Apache-2.0
"""Weights as executors see them: looked up once by the names that models use, each with its format and bias."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from phalanx.checkpoints.dummy import DummySource
from phalanx.checkpoints.formats import DENSE, Format, FormatPlan, FormattedWeight, components_of, format_weights
from phalanx.checkpoints.loader import WeightSink, load_weights
from phalanx.checkpoints.resolve import check_unread
from phalanx.checkpoints.source import TensorSource
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.topology import Topology
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models import Model

__all__ = ["CollectingSink", "Weight", "Weights", "load_stage", "stage_weights"]

Array = TypeVar("Array")
_Held = TypeVar("_Held", covariant=True)


class CollectingSink(WeightSink[Any], Protocol[_Held]):
    """A sink that keeps what it is given."""

    @property
    def weights(self) -> Mapping[str, _Held]:
        """Arrays by the names given to `allocate`."""
        ...


@dataclass(frozen=True, slots=True)
class Weight(Generic[Array]):
    """One rank's share of a weight.

    Attributes:
        name: ``layers.3.qkv``.
        components: arrays by the names that ``format`` gives them; of a dense weight, ``weight`` alone. Matrices are
            ``[out, in]``. Empty if the weight has nothing but a bias.
        bias: ``[out]``; None without one.
    """

    name: str
    format: Format
    components: Mapping[str, Array]
    bias: Array | None = None


class Weights(Generic[Array]):
    """All weights of a rank. Lookups by the names that models pass to `Ops`."""

    def __init__(self, weights: Mapping[str, Weight[Array]]) -> None:
        self._weights = dict(weights)

    @classmethod
    def of(cls, declared: Sequence[FormattedWeight], arrays: Mapping[str, Array]) -> Weights[Array]:
        """Handles for what was loaded: ``arrays`` by the names of the components."""
        handles: dict[str, Weight[Array]] = {}
        for weight in declared:
            owner, kind = weight.spec.owner, weight.spec.kind
            handle = handles.get(owner) or Weight(owner, DENSE, {})
            if kind == "bias":
                handles[owner] = replace(handle, bias=arrays[weight.spec.name])
                continue
            components = {component.kind: arrays[component.name] for component in weight.components}
            chosen = weight.format if kind == "weight" else handle.format
            handles[owner] = replace(handle, format=chosen, components={**handle.components, **components})
        return cls(handles)

    @classmethod
    def dense(cls, arrays: Mapping[str, Array]) -> Weights[Array]:
        """Handles for arrays called ``<name>.weight`` and ``<name>.bias``."""
        handles: dict[str, Weight[Array]] = {}
        for full_name, array in arrays.items():
            owner, _, kind = full_name.rpartition(".")
            handle = handles.get(owner) or Weight(owner, DENSE, {})
            if kind == "bias":
                handles[owner] = replace(handle, bias=array)
            else:
                handles[owner] = replace(handle, components={**handle.components, kind: array})
        return cls(handles)

    def linear(self, name: str) -> Weight[Array]:
        """The matrix of a product, ``[out, in]`` once dequantised, with its bias.

        Raises:
            ConfigError: the model uses a weight that it does not declare.
        """
        return self._find(name)

    def norm(self, name: str) -> tuple[Array | None, Array | None]:
        """``[D]`` factors and bias of a norm, each if it is declared."""
        handle = self._weights.get(name)
        return self.array(name) if handle is not None and handle.components else None, self.bias(name)

    def bias(self, name: str) -> Array | None:
        """The bias of a matrix or a norm if it is declared."""
        handle = self._weights.get(name)
        return None if handle is None else handle.bias

    def embedding(self, name: str) -> Array:
        """Table of rows ``[V local, D]``. Raises as `linear`."""
        return self.array(name)

    def array(self, name: str, kind: str = "weight") -> Array:
        """The dense array that was declared as ``<name>.<kind>``.

        Raises:
            ConfigError: it is not declared, or its format is not dense.
        """
        components = self._find(name).components
        if kind not in components:
            raise ConfigError(
                f"the model needs {name}.{kind} as plain values, but the checkpoint holds {', '.join(components) or 'none'}"
            )
        return components[kind]

    def values(self) -> Collection[Weight[Array]]:
        """Every weight."""
        return self._weights.values()

    def arrays(self) -> dict[str, Array]:
        """Every array by its full name: ``layers.3.qkv.weight``."""
        result = {
            f"{name}.{kind}": array for name, one in self._weights.items() for kind, array in one.components.items()
        }
        return result | {f"{name}.bias": one.bias for name, one in self._weights.items() if one.bias is not None}

    def converted(self, convert: Callable[[Weight[Array]], Weight[Array]]) -> Weights[Array]:
        """Every weight as ``convert`` returns it; one that is tied is converted once."""
        done: dict[tuple[int, ...], Weight[Array]] = {}
        result = {}
        for name, weight in self._weights.items():
            key = tuple(id(array) for array in weight.components.values())
            tied = done.setdefault(key, convert(weight)) if key not in done else done[key]
            result[name] = replace(tied, name=name, bias=weight.bias)
        return Weights(result)

    def _find(self, name: str) -> Weight[Array]:
        weight = self._weights.get(name)
        if weight is None:
            raise ConfigError(
                f"the model uses a weight {name!r} that its weight functions do not declare for this stage"
            )
        return weight


def stage_weights(model: Model, config: ModelConfig, formats: FormatPlan, topology: Topology) -> list[FormattedWeight]:
    """What the pipeline stage of ``topology`` holds.

    Raises:
        ConfigError: the model cannot be split so.
    """
    layers = model.stages(config, topology.layout.pp)[topology.stage]
    specs = model.weights(config, layers, topology.is_first_stage, topology.is_last_stage)
    return format_weights(specs, formats)


def load_stage(
    source: TensorSource,
    model: Model,
    config: ModelConfig,
    formats: FormatPlan,
    topology: Topology,
    sink: CollectingSink[Array],
    on_loaded: Callable[[int, int], None] | None = None,
) -> Weights[Array]:
    """Load one rank's share of its stage into ``sink``, after accounting for every tensor of the whole model.

    ``on_loaded`` is told how many of how many weights are loaded.

    Raises:
        CheckpointError: weights are missing, superfluous, of the wrong shape or in another format than declared.
    """
    declared = stage_weights(model, config, formats, topology)
    everything = components_of(format_weights(model.weights(config), formats))
    ignored = (*model.ignored_tensors, *formats.not_used)
    if formats.unread and not isinstance(source, DummySource):
        check_unread(source, everything, ignored, formats.unread)
    load_weights(
        source, components_of(declared), topology.tp_rank, topology.layout.tp, sink, ignored, everything, on_loaded
    )  # fmt: skip
    return Weights.of(declared, sink.weights)
