"""Random attention steps on the device, and what float64 NumPy says their outputs are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from phalanx.kernels.attention import PagedAttention
from phalanx.kernels.attention_shape import AttentionLimits, AttentionShape, AttentionStep

from .devices import KernelDevice

DTYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}

# Largest error as a share of sum(p |v|). Half-precision kernels round every probability and every output by at most half a
# unit in the last place, 2^-8 or 2^-11 of it, which adds up to twice that; the float32 kernel sums a few thousand products.
TOLERANCE = {"bfloat16": 1.02 * 2.0**-7, "float16": 1.05 * 2.0**-10, "float32": 2e-5}


def shape_of(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int = 16, **changes: Any) -> AttentionShape:
    """A bfloat16 shape with the usual scale, and ``changes``."""
    values = {"dtype": "bfloat16", "scale": head_dim**-0.5, **changes}
    return AttentionShape(num_heads, num_kv_heads, head_dim, block_size, **values)


@dataclass(frozen=True)
class Case:
    """One step: lengths of new tokens and of whole sequences, decode sequences first."""

    shape: AttentionShape
    new_tokens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    padding_seqs: int = 3
    has_alibi: bool = False
    seed: int = 0
    data: dict[str, np.ndarray] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        fits = all(new <= total for new, total in zip(self.new_tokens, self.seq_lens, strict=True))
        assert fits or not self.shape.causal
        self.data.update(self._make())

    @property
    def num_decode(self) -> int:
        return sum(new == 1 for new in self.new_tokens)

    def _make(self) -> dict[str, np.ndarray]:
        shape, rng = self.shape, np.random.default_rng(self.seed)
        dtype = DTYPES[shape.dtype]
        num_seqs = len(self.new_tokens) + self.padding_seqs
        blocks = [-(-total // shape.block_size) for total in self.seq_lens]
        num_blocks = sum(blocks) + 5
        order = rng.permutation(num_blocks)[: sum(blocks)]
        seq_indices = rng.permutation(num_seqs + 2)[:num_seqs]
        tables = np.full((num_seqs + 2, max(blocks) + 3), 2**30, np.int32)  # an entry never to be read
        for seq_index, count, end in zip(seq_indices, blocks, np.cumsum(blocks), strict=False):
            tables[seq_index, :count] = order[end - count : end]
        pages = (num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)
        rows = sum(self.new_tokens)
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        junk = rng.integers(2, 9, self.padding_seqs)
        prefixes = [total * (1 + seq % 3) // 3 for seq, total in enumerate(self.seq_lens)]
        stored: Any = ml_dtypes.float8_e4m3fn if shape.has_fp8_pages else dtype
        return {
            "qkv": rng.standard_normal((rows + 4, width), np.float32).astype(dtype),
            "keys": rng.standard_normal(pages, np.float32).astype(stored),
            "values": rng.standard_normal(pages, np.float32).astype(stored),
            "cu_seqlens_q": np.cumsum([0, *self.new_tokens, *junk]).astype(np.int32),
            "seq_lens": np.array([*self.seq_lens, *(junk + 99)], np.int32),
            "seq_indices": seq_indices.astype(np.int32),
            "block_tables": tables,
            "num_seqs_and_decodes": np.array([len(self.new_tokens), self.num_decode], np.int32),
            "prefix_lens": np.array([*np.repeat(prefixes, self.new_tokens), *[2**30] * 4], np.int32),
            "kv_scales": rng.uniform(0.5, 2.0, (2, shape.num_kv_heads)).astype(np.float32),
            "slopes": (0.5 ** np.linspace(1, 6, shape.num_heads)).astype(np.float32),
        }

    def poison_unwritten(self) -> None:
        """Fill every page row that belongs to no token with NaN: a kernel that lets one in shows it."""
        shape, data = self.shape, self.data
        used = np.zeros(data["keys"].shape[0] * shape.block_size, bool)
        for seq, total in enumerate(self.seq_lens):
            used[self._page_rows(seq, total)] = True
        unused = ~used.reshape(-1, 1, shape.block_size, 1) & np.ones(data["keys"].shape, bool)
        data["keys"][unused] = np.nan
        data["values"][unused] = np.nan

    def _page_rows(self, seq: int, total: int) -> np.ndarray:
        token = np.arange(total)
        size = self.shape.block_size
        return self.data["block_tables"][self.data["seq_indices"][seq], token // size] * size + token % size

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Outputs and ``sum(p |v|)``, the yardstick of their errors: float64 ``[T, H, C]`` each."""
        parts = [self._expected_of(seq) for seq in range(len(self.new_tokens))]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _expected_of(self, seq: int) -> tuple[np.ndarray, np.ndarray]:
        shape, data, new, total = self.shape, self.data, self.new_tokens[seq], self.seq_lens[seq]
        begin = sum(self.new_tokens[:seq])
        heads = data["qkv"][begin : begin + new, : shape.num_heads * shape.head_dim].astype(np.float64)
        q = heads.reshape(new, shape.num_kv_heads, -1, shape.head_dim)
        rows = self._page_rows(seq, total)
        k, v = (
            data[name].transpose(0, 2, 1, 3).reshape(-1, shape.num_kv_heads, shape.head_dim)[rows].astype(np.float64)
            for name in ("keys", "values")
        )
        if shape.has_fp8_pages:
            k, v = (pages * scales[:, None] for pages, scales in zip((k, v), data["kv_scales"], strict=True))
        scores = np.einsum("tkgc,skc->kgts", q, k) * shape.scale
        if shape.soft_cap:
            scores = shape.soft_cap * np.tanh(scores / shape.soft_cap)
        distance = np.arange(total) - np.arange(total - new, total)[:, None]
        if self.has_alibi:
            scores += data["slopes"].reshape(shape.num_kv_heads, -1, 1, 1) * distance
        hidden = (distance > 0) if shape.causal else np.zeros_like(distance, bool)
        if shape.has_prefix:
            hidden = hidden & (np.arange(total) >= data["prefix_lens"][begin])
        if shape.window:
            hidden = hidden | (distance <= -shape.window)
        scores = np.where(hidden, -np.inf, scores)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out = np.einsum("kgts,skc->tkgc", p, v), np.einsum("kgts,skc->tkgc", p, np.abs(v))
        return out[0].reshape(new, -1, shape.head_dim), out[1].reshape(new, -1, shape.head_dim)


class DeviceCase:
    """A case's arrays on a device and the attention object that computes it."""

    def __init__(self, case: Case, device: KernelDevice, limits: AttentionLimits | None = None) -> None:
        self.case = case
        self.device = device
        bytes_of = {ml_dtypes.float8_e4m3fn: np.uint8}
        self.arrays = {
            name: device.put(value.view(bytes_of.get(value.dtype.type, value.dtype)))
            for name, value in case.data.items()
        }
        self.step = AttentionStep(
            *(
                self.arrays[name]
                for name in (
                    "cu_seqlens_q",
                    "seq_lens",
                    "seq_indices",
                    "block_tables",
                    "num_seqs_and_decodes",
                    "prefix_lens",
                )
            )
        )
        rows = case.data["qkv"].shape[0]
        limits = limits or AttentionLimits(len(case.data["seq_lens"]), rows, max(case.seq_lens))
        slopes = self.arrays["slopes"] if case.has_alibi else None
        self.attention = PagedAttention(device.library, case.shape, limits, slopes)
        self.workspace = device.poisoned((self.attention.workspace_bytes,), np.uint8)
        self.attention.bind(self.workspace)
        self.out = device.poisoned((rows, case.shape.num_heads * case.shape.head_dim), case.data["qkv"].dtype)

    def poison(self) -> None:
        """NaN in every output."""
        self.out.view(np.uint8).fill(0xFF)

    def launch(self) -> None:
        """Plan, decode and prefill on the current stream."""
        tensors = (self.arrays["qkv"], self.arrays["keys"], self.arrays["values"], self.out)
        self.attention.split_work(self.step)
        scales = self.arrays["kv_scales"] if self.case.shape.has_fp8_pages else None
        self.attention.decode(*tensors, self.step, scales)
        self.attention.prefill(*tensors, self.step, scales)

    def result(self) -> np.ndarray:
        """The output, ``[T, H C]``, on the host."""
        return self.device.get(self.out)

    def largest_error(self) -> float:
        """Error over sum(p |v|), largest over the outputs; fails where a padding row was written."""
        out = self.result().astype(np.float64)
        expected, spread = self.case.expected()
        rows = len(expected)
        assert np.isnan(out[rows:]).all(), "a row past the step's last token was written"
        error = np.abs(out[:rows].reshape(expected.shape) - expected) / np.maximum(
            spread, 1e-30
        )  # codes may all be zero
        return float(np.where(np.isnan(error), np.inf, error).max())

    def fill_from(self, other: DeviceCase) -> None:
        """Copy another case's contents into these arrays, which a captured graph reads; they may not be larger."""
        for name, array in self.arrays.items():
            source = other.arrays[name].view(np.uint8)
            array.view(np.uint8)[tuple(slice(size) for size in source.shape)] = source


def check(case: Case, device: KernelDevice) -> None:
    """Run a case once, on poisoned outputs and pages, against float64 NumPy."""
    case.poison_unwritten()
    on_device = DeviceCase(case, device)
    on_device.launch()
    error = on_device.largest_error()
    # Over fp8 pages queries times the scale are rounded to float16, too, which moves scores, and with them probabilities.
    tolerance = TOLERANCE[case.shape.dtype] * (2 if case.shape.has_fp8_pages else 1)
    assert error < tolerance, f"error {error:.2e} of sum(p |v|)"
