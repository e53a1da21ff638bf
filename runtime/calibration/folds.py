# SPDX-License-Identifier: Apache-2.0
"""Which norms can take over factors of the columns of the products that they feed, found by running a model on shapes."""

from __future__ import annotations

from dataclasses import dataclass, field

from phalanx.runtime.config import Activation, ModelConfig
from phalanx.runtime.models import Model
from phalanx.runtime.models.shapes import Shape, ShapeOps
from phalanx.runtime.ops import AttentionSpec, ExpertsSpec

__all__ = ["Fold", "find_folds"]


@dataclass(slots=True)
class Fold:
    """A norm whose output only products read.

    Attributes:
        norm: its name, ``layers.3.mlp_norm``.
        weight_offset: what is added to its stored weight (Gemma).
        products: names of the weights that its output is multiplied by.
    """

    norm: str
    weight_offset: float
    products: list[str] = field(default_factory=list)


def find_folds(model: Model, config: ModelConfig) -> list[Fold]:
    """Every norm of the decoder whose output goes to column-linear products of its layer and nowhere else."""
    ops = _NormOps({spec.name: spec for spec in model.weights(config)})
    x, residual = model.decode.run(ops, config, model.decode.layers(config))
    model.decode.head(ops, config, x, residual)
    return [fold for name, fold in ops.folds.items() if fold.products and name not in ops.read_elsewhere]


@dataclass(slots=True)
class _Normed(Shape):
    """The output of a norm."""

    norm: str = ""


class _NormOps(ShapeOps):
    """Operations on shapes that follow the outputs of norms to their readers."""

    folds: dict[str, Fold]
    read_elsewhere: set[str]

    def __init__(self, *parts: dict[str, object]) -> None:
        super().__init__(*parts)  # type: ignore[arg-type]
        self.folds, self.read_elsewhere = {}, set()

    def rms_norm(self, x: Shape, name: str, eps: float, weight_offset: float = 0.0) -> Shape:
        return self._normed(super().rms_norm(self._read(x), name, eps, weight_offset), name, weight_offset)

    def layer_norm(self, x: Shape, name: str, eps: float, weight_offset: float = 0.0) -> Shape:
        return self._normed(super().layer_norm(self._read(x), name, eps, weight_offset), name, weight_offset)

    def linear(self, x: Shape, name: str) -> Shape:
        return super().linear(self._multiplied(x, name), name)

    def column_linear(self, x: Shape, name: str) -> Shape:
        return super().column_linear(self._multiplied(x, name), name)

    def row_linear_partial(self, x: Shape, name: str) -> Shape:
        return super().row_linear_partial(self._read(x), name)

    def position_embedding(self, x: Shape, name: str) -> Shape:
        return super().position_embedding(self._read(x), name)

    def add(self, x: Shape, y: Shape) -> Shape:
        return super().add(self._read(x), self._read(y))

    def scale(self, x: Shape, factor: float) -> Shape:
        return super().scale(self._read(x), factor)

    def clip(self, x: Shape, limit: float) -> Shape:
        return super().clip(self._read(x), limit)

    def activation(self, x: Shape, kind: Activation) -> Shape:
        return super().activation(self._read(x), kind)

    def gated_activation(self, x: Shape, kind: Activation) -> Shape:
        return super().gated_activation(self._read(x), kind)

    def attention(self, qkv: Shape, name: str, layer: int, spec: AttentionSpec) -> Shape:
        return super().attention(self._read(qkv), name, layer, spec)

    def experts(self, x: Shape, name: str, spec: ExpertsSpec) -> Shape:
        return super().experts(self._read(x), name, spec)

    def sigmoid_gate(self, x: Shape, y: Shape, name: str) -> Shape:
        return super().sigmoid_gate(self._read(x), self._read(y), name)

    def logits(self, x: Shape, name: str, soft_cap: float = 0.0) -> Shape:
        return super().logits(self._read(x), name, soft_cap)

    def _normed(self, x: Shape, name: str, weight_offset: float) -> Shape:
        if f"{name}.weight" not in self._declared:  # factors need a weight to go into
            return x
        self.folds[name] = Fold(name, weight_offset)
        return _Normed(x.width, x.kind, norm=name)

    def _multiplied(self, x: Shape, name: str) -> Shape:
        if isinstance(x, _Normed):
            self.folds[x.norm].products.append(name)
        return x

    def _read(self, x: Shape) -> Shape:
        """``x`` for an operation that factors of columns would change."""
        if isinstance(x, _Normed):
            self.read_elsewhere.add(x.norm)
        return x
