# SPDX-License-Identifier: Apache-2.0
"""How quantised checkpoints pack codes, scales and zero points into tensors.

Sources: compressed-tensors ``compressors/quantized_compressors/pack_quantized.py``; AutoAWQ ``utils/packing_utils.py``; AutoGPTQ
``nn_modules/qlinear/qlinear_cuda_old.py``; ModelOpt ``torch/export/quant_utils.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from phalanx.checkpoints.encoding import Block
from phalanx.parallel.errors import CheckpointError

if TYPE_CHECKING:
    from phalanx.checkpoints.source import Array

__all__ = ["AWQ_ORDER", "INPUT_SCALE_NAMES", "GroupIndex", "NibbleRows", "PackedWords", "Scales", "scale_names"]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of a word holds value ``AWQ_ORDER[i]`` of its eight."""


_WEIGHT_SCALES = ("weight_scale", "weight_scale_inv", "scale", "qscale_weight")
"""Of 8-bit weights: compressed-tensors and ModelOpt, Hugging Face, DeepSeek-V4, Mistral (transformers ``quantizer_finegrained_fp8.py``)."""
INPUT_SCALE_NAMES = ("input_scale", "activation_scale", "qscale_act")
"""Of inputs of products, likewise."""


def scale_names(usual: str) -> tuple[str, ...]:
    """What checkpoints call the scale of a weight that a format calls ``usual``, that name first."""
    return (usual, *(name for name in _WEIGHT_SCALES if name != usual)) if usual in _WEIGHT_SCALES else (usual,)


@dataclass(frozen=True, slots=True)
class Scales:
    """One float for ``rows`` rows and ``columns`` columns of scales, widened to float32; axes as declared, ``[O]`` or ``[O, G]``.

    Weights may have scales of zero, of which all values are zero; by those of inputs one divides.
    """

    rows: int = 1
    columns: int = 1
    of: Literal["weights", "inputs"] = "weights"
    dtypes: ClassVar[frozenset[str]] = frozenset({"F32", "F16", "BF16", "F8_E8M0"})

    def blocks(self, extents: tuple[int, ...]) -> tuple[Block, ...]:
        """A stored scale repeats along both axes."""
        return (Block(1, self.rows), Block(1, self.columns))[: len(extents)]

    def decode(self, stored: Array) -> Array:
        """Exact: every float format widens to float32.

        Raises:
            CheckpointError: a scale is no number that values or inputs can have.
        """
        import numpy as np

        scales = stored.astype(np.float32)
        useful = np.isfinite(scales) & (scales > 0) if self.of == "inputs" else np.isfinite(scales)
        if not useful.all():
            wanted = "finite and above zero" if self.of == "inputs" else "finite"
            raise CheckpointError(
                f"holds {scales[~useful][0]} for a scale, which has to be {wanted}; copy the checkpoint again"
            )
        wide: Array = np.repeat(scales, self.rows, axis=0)
        return wide if wide.ndim == 1 else np.repeat(wide, self.columns, axis=1)


@dataclass(frozen=True, slots=True)
class GroupIndex:
    """The group of each column ``[I]``, for all of ``rows`` rows: GPTQ's ``g_idx``, values as declared ``[rows, I]``.

    Where all indices are -1 (compressed-tensors: unset), each ``group`` consecutive columns make one.
    """

    rows: int
    group: int
    dtypes: ClassVar[frozenset[str]] = frozenset({"I32"})

    def blocks(self, extents: tuple[int, ...]) -> tuple[Block, ...]:
        """One row of indices for all rows, read whole: the place of a column counts where indices are unset."""
        return Block(1, self.rows), Block(extents[1], extents[1])

    def decode(self, stored: Array) -> Array:
        """The same indices in every row.

        Raises:
            CheckpointError: there is no such group.
        """
        import numpy as np

        index, columns = stored.astype(np.int32), stored.shape[1]
        if (index == -1).all():
            index[:] = np.arange(columns, dtype=np.int32) // self.group
        groups = -(-columns // self.group)
        wrong = index[(index < 0) | (index >= groups)]
        if wrong.size:
            raise CheckpointError(f"says that a column is in group {wrong[0]} of {groups}; copy the checkpoint again")
        return np.repeat(index, self.rows, axis=0)


@dataclass(frozen=True, slots=True)
class NibbleRows:
    """Signed codes of 4 bits, two rows in a byte ``[O / 2, I]``: the even row in the low half (ModelOpt)."""

    bits: ClassVar[int] = 4
    dtypes: ClassVar[frozenset[str]] = frozenset({"U8"})

    def blocks(self, extents: tuple[int, ...]) -> tuple[Block, ...]:
        """A byte along the rows."""
        return Block(1, 2), Block()

    def decode(self, stored: Array) -> Array:
        """int8 codes; two's complement."""
        import numpy as np

        both = np.stack(((stored << 4).view(np.int8) >> 4, stored.view(np.int8) >> 4), axis=1)
        return both.reshape(2 * len(stored), stored.shape[1])


@dataclass(frozen=True, slots=True)
class PackedWords:
    """Unsigned codes of ``bits`` bits in 32-bit words, element j of a word at bits ``bits * j``.

    Attributes:
        axis: along which values are packed, in ``[out, in]`` orientation.
        offset: subtracted, so that 8-bit codes fit int8 too.
        added: added before, modulo ``2 ** bits`` (GPTQ v1 stores zero points less one).
        order: place of each element of a word among its values; empty = in order.
        is_middle: zero points of symmetric GPTQ codes, which are half the range. Writers disagree about whether to store them less one,
            whatever they call the format: both are taken, nothing else is.
        columns: that share a value, where values are packed along rows (zero points of groups).
    """

    bits: int
    axis: int
    offset: int = 0
    added: int = 0
    order: tuple[int, ...] = ()
    is_middle: bool = False
    columns: int = 1
    dtypes: ClassVar[frozenset[str]] = frozenset({"I32"})

    def blocks(self, extents: tuple[int, ...]) -> tuple[Block, ...]:
        """A word along the packed axis."""
        word = Block(1, 32 // self.bits)
        return (word, Block(1, self.columns)) if self.axis == 0 else (Block(), word)

    def decode(self, stored: Array) -> Array:
        """int8 codes."""
        import numpy as np

        per_word, mask = 32 // self.bits, (1 << self.bits) - 1
        words, fields = stored.astype(np.uint32), np.empty((*stored.shape, per_word), np.uint8)
        for i, place in enumerate(self.order or range(per_word)):
            fields[..., place] = (words >> np.uint32(self.bits * i)) & np.uint32(mask)
        if self.is_middle:
            fields = _middle(fields, 1 << (self.bits - 1), self.added)
        fields += np.uint8(self.added)
        fields &= np.uint8(mask)
        fields -= np.uint8(self.offset)  # modulo 256, as int8 has it
        codes = fields.view(np.int8)
        if self.axis == 0:
            codes = codes.transpose(0, 2, 1)
        rows, columns = stored.shape
        shape = (rows * per_word, columns) if self.axis == 0 else (rows, columns * per_word)
        codes = codes.reshape(shape)
        return codes if self.columns == 1 else np.repeat(codes, self.columns, axis=1)


def _middle(fields: Array, half: int, added: int) -> Array:
    """``fields`` that stand for ``half`` once ``added`` is added, if all of them are ``half`` or all are one less.

    Raises:
        CheckpointError: they are something else.
    """
    import numpy as np

    if fields.size and not ((fields == half).all() or (fields == half - 1).all()):
        raise CheckpointError(
            f"quantization_config says sym=true, but zero points are {np.unique(fields)[:4].tolist()}, not all {half - 1} or all {half}; "
            "restore its config.json, or copy the checkpoint again"
        )
    return np.full_like(fields, half - added)
