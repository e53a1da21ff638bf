"""Each operation on every executor against float64 NumPy; once with the arguments that it owns poisoned after the call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from phalanx.runtime.alibi import alibi_slopes
from phalanx.runtime.attention import AttentionSpec, HeadNorm
from phalanx.runtime.config import RopeConfig
from phalanx.runtime.ops import ExpertsSpec
from tests.ops.executors import EXECUTORS, Executor, attend, open_executor

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(5)
ROWS, WIDTH = 7, 24


def normal(*shape: int) -> Array:
    return RANDOM.normal(size=shape).astype(np.float32)


X, Y = normal(ROWS, WIDTH), normal(ROWS, WIDTH)
WEIGHTS: Mapping[str, Array] = {
    "n.weight": normal(WIDTH), "n.bias": normal(WIDTH), "w.weight": normal(WIDTH), "l.weight": normal(17, WIDTH), "l.bias": normal(17),
    "m.weight": normal(17, WIDTH), "m.bias": normal(17), "e.weight": normal(50, WIDTH), "b.bias": normal(WIDTH),
    "b.weight": normal(WIDTH, 8), "x.router.weight": normal(5, WIDTH), "x.gate_up.weight": normal(5 * 2 * 9, WIDTH),
    "x.down.weight": normal(5 * WIDTH, 9), "x.gate.weight": normal(1, WIDTH) / 4, "p.weight": normal(13, 23), "p.bias": normal(13), "q.weight": normal(23),
    "q.bias": normal(23),
}  # fmt: skip
WIDE = {name: array.astype(np.float64) for name, array in WEIGHTS.items()}
POSITIONS = (8, 0, 4, 49, 1, 1, 30)


def rms(x: Array, offset: float = 0.0) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * (WIDE["n.weight"] + offset)


def layer(x: Array, offset: float = 0.0, name: str = "n") -> Array:
    return centred(x) * (WIDE[f"{name}.weight"] + offset) + WIDE[f"{name}.bias"]


def centred(x: Array) -> Array:
    around = x - x.mean(-1, keepdims=True)
    return around / np.sqrt((around**2).mean(-1, keepdims=True) + 1e-3)


def product(x: Array, name: str = "l") -> Array:
    return x @ WIDE[f"{name}.weight"].T


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def mixture(x: Array, renormalise: bool) -> Array:
    """Three of five experts for each token."""
    out = np.zeros_like(x)
    gate_up, down = (np.split(WIDE[f"x.{kind}.weight"], 5) for kind in ("gate_up", "down"))
    for row, logits in zip(range(len(x)), product(x, "x.router"), strict=True):
        chances = np.exp(logits) / np.exp(logits).sum()
        chosen = np.argsort(-chances)[:3]
        for expert in chosen:
            gate, up = np.split(gate_up[expert] @ x[row], 2)
            share = chances[expert] / (chances[chosen].sum() if renormalise else 1)
            out[row] += share * (down[expert] @ (ACTIVATIONS["silu"](gate) * up))
    return out


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": gelu,
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}

# name: the operation, its formula in float64, how many tensors it takes
OPERATIONS: dict[str, tuple[Any, Any, int]] = {
    "embedding": (lambda o: o.embedding("e"), lambda: WIDE["e.weight"][list(POSITIONS)], 0),
    "embedding scaled": (lambda o: o.embedding("e", 2.5), lambda: 2.5 * WIDE["e.weight"][list(POSITIONS)], 0),
    "position_embedding": (
        lambda o, x: o.position_embedding(x, "e"), lambda x: x + WIDE["e.weight"][list(POSITIONS)], 1,
    ),
    "rms_norm": (lambda o, x: o.rms_norm(x, "n", 1e-3), rms, 1),
    "rms_norm offset": (lambda o, x: o.rms_norm(x, "n", 1e-3, 1.0), lambda x: rms(x, 1.0), 1),
    "layer_norm": (lambda o, x: o.layer_norm(x, "n", 1e-3), layer, 1),
    "layer_norm offset": (lambda o, x: o.layer_norm(x, "n", 1e-3, 1.0), lambda x: layer(x, 1.0), 1),
    "layer_norm without bias": (lambda o, x: o.layer_norm(x, "w", 1e-3), lambda x: centred(x) * WIDE["w.weight"], 1),
    "layer_norm without weights": (lambda o, x: o.layer_norm(x, "none", 1e-3), centred, 1),
    "add_layer_norm without weights": (
        lambda o, x, y: o.add_layer_norm(x, y, "none", 1e-3, 1.0), lambda x, y: (centred(x + y), x + y), 2,
    ),
    "add_rms_norm": (lambda o, x, y: o.add_rms_norm(x, y, "n", 1e-3), lambda x, y: (rms(x + y), x + y), 2),
    "add_layer_norm offset": (
        lambda o, x, y: o.add_layer_norm(x, y, "n", 1e-3, 1.0), lambda x, y: (layer(x + y, 1.0), x + y), 2,
    ),
    "add_layer_norm": (lambda o, x, y: o.add_layer_norm(x, y, "n", 1e-3), lambda x, y: (layer(x + y), x + y), 2),
    "column_linear": (lambda o, x: o.column_linear(x, "l"), lambda x: product(x) + WIDE["l.bias"], 1),
    "linear": (lambda o, x: o.linear(x, "l"), lambda x: product(x) + WIDE["l.bias"], 1),
    "row_linear": (lambda o, x: o.row_linear(x, "l"), lambda x: product(x) + WIDE["l.bias"], 1),
    "row_linear_partial": (lambda o, x: o.row_linear_partial(x, "l"), product, 1),
    "row_linear_pair": (
        lambda o, x, y: o.row_linear_pair(x, "l", y, "m"),
        lambda x, y: product(x) + product(y, "m") + WIDE["l.bias"] + WIDE["m.bias"], 2,
    ),
    "add_bias": (lambda o, x: o.add_bias(x, "b"), lambda x: x + WIDE["b.bias"], 1),
    "all_reduce": (lambda o, x: o.all_reduce(x), lambda x: x, 1),
    "scale": (lambda o, x: o.scale(x, -1.75), lambda x: -1.75 * x, 1),
    "clip": (lambda o, x: o.clip(x, 0.5), lambda x: np.clip(x, -0.5, 0.5), 1),
    "add": (lambda o, x, y: o.add(x, y), lambda x, y: x + y, 2),
    "linear of prime sizes": (
        lambda o, x: o.linear(x, "p"), lambda x: product(x, "p") + WIDE["p.bias"], 1,
    ),
    "layer_norm of a prime size": (lambda o, x: o.layer_norm(x, "q", 1e-3), lambda x: layer(x, name="q"), 1),
    "logits": (lambda o, x: o.logits(x, "l"), lambda x: product(x) + WIDE["l.bias"], 1),
    "logits capped": (
        lambda o, x: o.logits(x, "l", soft_cap=3.0), lambda x: 3 * np.tanh((product(x) + WIDE["l.bias"]) / 3), 1,
    ),
    **{
        f"experts {name}": (
            lambda o, x, renormalise=renormalise: o.experts(x, "x", ExpertsSpec(5, 3, "silu", renormalise)),
            lambda x, renormalise=renormalise: mixture(x, renormalise), 1,
        )
        for name, renormalise in (("renormalised", True), ("not renormalised", False))
    },
    "sigmoid_gate": (
        lambda o, x, y: o.sigmoid_gate(x, y, "x.gate"),
        lambda x, y: x / (1 + np.exp(-product(y, "x.gate"))), 2,
    ),
    **{
        f"activation {kind}": (lambda o, x, kind=kind: o.activation(x, kind), function, 1)
        for kind, function in ACTIVATIONS.items()
    },
    **{
        f"gated_activation {kind}": (
            lambda o, x, kind=kind: o.gated_activation(x, kind),
            lambda x, function=function: function(x[:, : WIDTH // 2]) * x[:, WIDTH // 2 :], 1,
        )
        for kind, function in ACTIVATIONS.items()
    },
}  # fmt: skip
NOTHING_TO_DO = {("tensorrt", "all_reduce")}
"""A network of one rank would have its input as output."""
REFUSED = {("tensorrt", name) for name in ("experts renormalised", "experts not renormalised")}
"""Models that use it are refused (tests/executors/test_capabilities.py)."""


@pytest.fixture
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Executor:
    return open_executor(request.param, monkeypatch, request.config.cache.mkdir("emulated-kernels"))


def of_engine(engine: str, *values: Any) -> Any:
    """A test's parameters, marked where they need a library that need not be installed."""
    return pytest.param(engine, *values, marks=[pytest.mark.tensorrt] if engine == "tensorrt" else [])


CASES = [
    of_engine(engine, name, rows)
    for engine in EXECUTORS
    for name in OPERATIONS
    for rows in ((ROWS,) if "embedding" in name else (1, ROWS))
    if (engine, name) not in NOTHING_TO_DO | REFUSED
]


@pytest.mark.parametrize("poisons", [False, True], ids=["kept", "poisoned"])
@pytest.mark.parametrize(("executor", "name", "rows"), CASES, indirect=["executor"])
def test_operation_equals_float64(executor: Executor, name: str, rows: int, poisons: bool) -> None:
    compute, formula, num_tensors = OPERATIONS[name]
    columns = slice(23 if "prime" in name else None)
    tensors = [tensor[:rows, columns] for tensor in (X, Y)[:num_tensors]]
    results = executor.run(compute, WEIGHTS, tensors, poisons, POSITIONS if "embedding" in name else ())
    expected = formula(*(tensor.astype(np.float64) for tensor in tensors))
    for result, wanted in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
        np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-5 * max(1.0, np.abs(wanted).max()))


READERS = ("rms_norm", "layer_norm", "column_linear", "linear", "row_linear_partial", "experts renormalised", "logits")


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("executor", ["numpy", "cuda"], indirect=True)  # tensors of a network cannot be overwritten
def test_products_and_norms_only_read(executor: Executor, name: str) -> None:
    compute, _, _ = OPERATIONS[name]
    _, unchanged = executor.run(lambda ops, x: (compute(ops, x), x), WEIGHTS, [X])
    np.testing.assert_array_equal(unchanged, X)


@pytest.mark.parametrize("executor", ["numpy", "cuda"], indirect=True)
@pytest.mark.parametrize(
    ("chances", "renormalise", "expected"),
    [
        ((4, 3, 2, 1), True, 4 / 7 * 1 + 3 / 7 * 2),
        ((4, 3, 2, 1), False, 0.4 * 1 + 0.3 * 2),
        ((1, 2, 3, 4), False, 0.4 * 4 + 0.3 * 3),
        ((1, 1, 1, 1), True, (1 + 2) / 2),
        ((1, 2, 2, 2), True, (2 + 3) / 2),
    ],
)
def test_experts_count_by_their_probabilities_once(
    executor: Executor, chances: tuple[int, ...], renormalise: bool, expected: float
) -> None:
    """Expert e answers e + 1; of equals the first counts.

    TRT-LLM#2752, sglang-jax#1282, vllm#45037, torchtitan#1448, flashinfer#2889, sglang#35160: chosen before the softmax, renormalised
    or scaled twice, or not at all.
    """
    width, first = 8, np.eye(1, 8, dtype=np.float32)
    router = np.log(np.array(chances, np.float32))[:, None] * first
    gate_up = np.tile(np.vstack([first] * 16), (4, 1))  # gate and up are 1 in all eight columns
    down = np.vstack([np.full((width, 8), (index + 1) / 8, np.float32) for index in range(4)])
    weights = {"x.router.weight": router, "x.gate_up.weight": gate_up, "x.down.weight": down}
    spec = ExpertsSpec(4, 2, "relu", renormalise)
    (result,) = executor.run(lambda ops, x: ops.experts(x, "x", spec), weights, [np.repeat(first, 3, axis=0)])
    np.testing.assert_allclose(result, expected, rtol=1e-6)


SPEC = AttentionSpec(4, 2, 16, 0.25)
SPECS = {
    "plain": SPEC,
    "one key/value head": replace(SPEC, num_heads=5, num_kv_heads=1),
    "scale": replace(SPEC, scale=0.4),
    "rope": replace(SPEC, rope=RopeConfig(theta=100.0, rotary_dim=16)),
    "part of the head": replace(SPEC, rope=RopeConfig(theta=100.0, rotary_dim=8)),
    "interleaved": replace(SPEC, rope=RopeConfig(theta=100.0, rotary_dim=8, interleaved=True)),
    "window": replace(SPEC, window=5),
    "soft cap": replace(SPEC, soft_cap=1.5),
    "alibi": replace(SPEC, num_heads=6, alibi_slopes=alibi_slopes(6)),
    "not causal": replace(SPEC, causal=False),
    "not cached": replace(SPEC, causal=False, cached=False),
    "head norm of own weights": replace(SPEC, head_norm=HeadNorm(1e-3, 0.0, "layer", own_weights=True)),
    "head norm with biases": replace(SPEC, head_norm=HeadNorm(1e-3, kind="layer", has_bias=True)),
    "head norm": replace(SPEC, head_norm=HeadNorm(1e-3, 0.5), rope=RopeConfig(theta=100.0, rotary_dim=16)),
}
SHARED_NORMS = {"a.query_norm.weight": normal(16), "a.key_norm.weight": normal(16)}
BIASED_NORMS = {**SHARED_NORMS, "a.query_norm.bias": normal(16), "a.key_norm.bias": normal(16)}
OWN_NORMS = {"a.query_norm.weight": normal(4, 16), "a.key_norm.weight": normal(2, 16)}
REFUSED_SPECS: Mapping[str, set[str]] = {
    "numpy": set(), "cuda": {"not cached"},
    "tensorrt": {"soft cap", "alibi", "not causal", "not cached", "head norm", "head norm with biases",
                 "head norm of own weights"},
}  # fmt: skip
"""Models that use these are refused (tests/executors/test_capabilities.py)."""
LENGTHS = (1, 17, 23, 32)
"""One token, one more than a block, a prime number, two full blocks."""


def norms_of(spec: AttentionSpec) -> dict[str, Array]:
    if spec.head_norm is not None and spec.head_norm.has_bias:
        return BIASED_NORMS
    return OWN_NORMS if spec.head_norm is not None and spec.head_norm.own_weights else SHARED_NORMS


def expected_attention(spec: AttentionSpec, qkv: Array, prefix: int = 0) -> Array:
    heads, kv_heads, length = spec.num_heads, spec.num_kv_heads, len(qkv)
    packed = qkv.astype(np.float64).reshape(length, heads + 2 * kv_heads, spec.head_dim)
    q, k, v = np.split(packed, [heads, heads + kv_heads], axis=1)
    if spec.head_norm is not None:
        if spec.head_norm.kind == "layer":
            q, k = (x - x.mean(-1, keepdims=True) for x in (q, k))
        q, k = (
            x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.head_norm.eps)
            * (norms_of(spec)[f"a.{side}_norm.weight"] + spec.head_norm.weight_offset)
            + norms_of(spec).get(f"a.{side}_norm.bias", 0.0)
            for x, side in ((q, "query"), (k, "key"))
        )  # fmt: skip
    if spec.rope is not None:
        q, k = (rotated(x, spec.rope, prefix) for x in (q, k))
    k, v = (np.repeat(x, heads // kv_heads, axis=1) for x in (k, v))
    scores = np.einsum("qhc,khc->hqk", q, k) * spec.scale
    if spec.soft_cap:
        scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
    distance = np.arange(length)[:, None] - np.arange(length)
    if spec.alibi_slopes:
        scores -= np.array(spec.alibi_slopes)[:, None, None] * distance
    if spec.causal:
        later = (distance < 0) & (np.arange(length) >= prefix)
        scores = np.where(later | ((distance >= spec.window) & (spec.window > 0)), -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khc->qhc", weights / weights.sum(-1, keepdims=True), v).reshape(length, -1)


def rotated(x: Array, rope: RopeConfig, prefix: int = 0) -> Array:
    """As complex numbers: pair i turns by position x theta^(-2 i / rotary_dim)."""
    half, positions, out = rope.rotary_dim // 2, [np.arange(len(x))], x.copy()
    if rope.two_dimensional:
        last = max(prefix - 1, 0)
        positions = [np.minimum(positions[0], last), np.maximum(positions[0] - last, 0)]
    for part, where in enumerate(positions):
        turns = np.outer(where, rope.theta ** (-np.arange(half) * 2 / rope.rotary_dim))
        start = part * rope.rotary_dim
        first, second = (
            (slice(start, start + 2 * half, 2), slice(start + 1, start + 2 * half, 2))
            if rope.interleaved
            else (slice(start, start + half), slice(start + half, start + 2 * half))
        )
        pairs = (x[..., first] + 1j * x[..., second]) * np.exp(1j * turns)[:, None]
        out[..., first], out[..., second] = pairs.real, pairs.imag
    return out


@pytest.mark.parametrize(
    ("executor", "name"),
    [of_engine(engine, name) for engine in EXECUTORS for name in SPECS if name not in REFUSED_SPECS[engine]],
    indirect=["executor"],
)
def test_attention_equals_float64(executor: Executor, name: str) -> None:
    spec = SPECS[name]
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    qkv = [normal(length, width) for length in LENGTHS]
    whole = [[(0, 1), (1, 17), (2, 23)], [(3, 32)]]
    chunked = [[(0, 1), (1, 9), (2, 20), (3, 16)], [(1, 7)], [(1, 1), (2, 3), (3, 15)], [(3, 1)]]
    steps = chunked if spec.causal else whole
    for result, rows in zip(attend(executor, spec, norms_of(spec), qkv, steps), qkv, strict=True):
        np.testing.assert_allclose(result, expected_attention(spec, rows), rtol=0, atol=2e-5)


@pytest.mark.parametrize("executor", ["numpy", "cuda"], indirect=True)
def test_a_prefix_sees_all_of_itself_and_turns_by_two_positions(executor: Executor) -> None:
    """Prefixes of one token, of part of a prompt, and of all of it; what follows comes in chunks and token by token."""
    rope = RopeConfig(theta=100.0, rotary_dim=8, two_dimensional=True)
    spec, prefixes = replace(SPEC, prefix_end=(5, 6), rope=rope), (1, 9, 20, 13)
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    qkv = [normal(length, width) for length in LENGTHS]
    steps = [[(0, 1), (1, 12), (2, 20), (3, 13)], [(1, 1), (2, 3), (3, 16)], [(1, 1), (3, 1)], [(1, 3), (3, 2)]]
    results = attend(executor, spec, {}, qkv, steps, prefixes)
    for result, rows, prefix in zip(results, qkv, prefixes, strict=True):
        np.testing.assert_allclose(result, expected_attention(spec, rows, prefix), rtol=0, atol=2e-5)
