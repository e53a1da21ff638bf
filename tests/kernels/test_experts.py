import ml_dtypes
import numpy as np
import pytest

from phalanx.kernels.experts import ExpertRows, Routing, combine, grouped_product, max_tiles, route, rows_per_tile
from phalanx.kernels.packed import PackedWeight
from phalanx.parallel.errors import ExecutorError

from .devices import DTYPES
from .test_activation import reference
from .tolerance import RTOL

BFLOAT16, FLOAT32 = DTYPES["bfloat16"], DTYPES["float32"]


def softmax(x):
    wide = np.exp(x - x.max(axis=1, keepdims=True))
    return wide / wide.sum(axis=1, keepdims=True)


def chosen(logits, routing):
    """Ids and shares in float64; of equal logits the lower number first."""
    ids = np.argsort(-logits, axis=1, kind="stable")[:, : routing.top_k]
    shares = np.take_along_axis(softmax(logits), ids, axis=1)
    return ids, shares / (shares.sum(axis=1, keepdims=True) if routing.renormalise else 1)


def routed(device, x, router, routing, marks=None):
    rows = ExpertRows.allocate(device.poisoned, len(x), routing, x.dtype.itemsize)
    marks = np.zeros(len(x), np.int32) if marks is None else marks
    route(device.library, device.put(x), device.put(router), device.put(marks), routing, rows)
    return rows


def mixture(device, x, router, gate_up, down, routing, marks=None):
    gate_up, down = (one if isinstance(one, PackedWeight) else device.put(one) for one in (gate_up, down))
    rows = routed(device, x, router, routing, marks)
    features = down.shape[1]
    hidden = device.poisoned((len(x) * routing.top_k, features), x.dtype)
    products = device.poisoned((len(x) * routing.top_k, x.shape[1]), x.dtype)
    out = device.poisoned(x.shape, x.dtype)
    grouped_product(device.library, device.put(x), gate_up, hidden, routing, rows, gathers=True, activation="silu")
    grouped_product(device.library, hidden, down, products, routing, rows)
    combine(device.library, products, rows, out)
    return device.get(out)


def expected_mixture(x, router, gate_up, down, routing):
    x, router, gate_up, down = (array.astype(np.float64) for array in (x, router, gate_up, down))
    ids, shares = chosen(x @ router.T, routing)
    gates = np.split(gate_up, len(routing.experts))
    downs = np.split(down, len(routing.experts))
    out = np.zeros_like(x)
    for token, (experts, weights) in enumerate(zip(ids, shares, strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            if expert not in routing.experts:
                continue
            number = expert - routing.experts.start
            gate, up = np.split(gates[number] @ x[token], 2)
            out[token] += weight * (downs[number] @ (reference("silu", gate) * up))
    return out


def case(random_normal, dtype, tokens, features, inner, num_local, num_experts=None):
    """x, router, gate_up and down, of which every logit is well apart from the others."""
    return (
        random_normal(dtype, tokens, features), random_normal(dtype, num_experts or num_local, features),
        random_normal(dtype, num_local * 2 * inner, features, scale=features**-0.5),
        random_normal(dtype, num_local * features, inner, scale=inner**-0.5),
    )  # fmt: skip


def assert_mixture(result, expected, dtype):
    """Three roundings on the way: of gates and ups, of the activation, of the products."""
    limit = 4 * RTOL[dtype.name] * np.abs(expected).max()
    np.testing.assert_allclose(result.astype(np.float64), expected, rtol=0, atol=max(limit, 1e-5))


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 2), (8, 8), (70, 6)])
def test_routing_equals_float64(device, random_normal, num_experts, top_k, renormalise):
    routing = Routing(num_experts, top_k, renormalise, range(num_experts))
    x, router = random_normal(BFLOAT16, 11, 40), random_normal(BFLOAT16, num_experts, 40)
    rows = routed(device, x, router, routing)
    ids, shares = chosen(x.astype(np.float64) @ router.astype(np.float64).T, routing)
    np.testing.assert_array_equal(device.get(rows.ids), ids)
    np.testing.assert_allclose(device.get(rows.shares), shares, rtol=1e-4, atol=1e-7)


def test_sorted_rows_hold_each_pair_once_and_tiles_cover_them(device, random_normal):
    routing = Routing(7, 3, True, range(7))
    x, router = random_normal(BFLOAT16, 50, 32), random_normal(BFLOAT16, 7, 32)
    rows = routed(device, x, router, routing)
    order, positions, ids = (device.get(array) for array in (rows.order, rows.positions, rows.ids))
    np.testing.assert_array_equal(order[positions.ravel()], np.arange(150))
    tiles = [tile for tile in device.get(rows.tiles).tolist() if tile[0] >= 0]
    covered = [position for _, first, stop, _ in tiles for position in range(first, stop)]
    assert covered == list(range(150))
    for expert, first, stop, _ in tiles:
        assert 0 < stop - first <= rows_per_tile(50, routing, 2)
        assert {ids.ravel()[pair] for pair in order[first:stop]} == {expert}


def test_of_equal_logits_the_lower_expert_is_chosen(device):
    routing = Routing(6, 3, True, range(6))
    x, router = np.ones((2, 8), BFLOAT16), np.zeros((6, 8), BFLOAT16)
    router[4] = 1
    rows = routed(device, x, router, routing)
    np.testing.assert_array_equal(device.get(rows.ids), [[4, 0, 1]] * 2)


def test_logits_that_are_no_numbers_choose_experts_that_exist(device):
    routing = Routing(5, 2, True, range(5))
    x = np.full((2, 8), np.nan, BFLOAT16)
    rows = routed(device, x, np.ones((5, 8), BFLOAT16), routing)
    np.testing.assert_array_equal(device.get(rows.ids), [[0, 1]] * 2)
    assert np.isnan(device.get(rows.shares)).all()


@pytest.mark.parametrize(
    ("dtype", "tokens", "features", "inner", "experts", "top_k"),
    [
        *((FLOAT32, tokens, 20, 12, 5, 2) for tokens in (1, 7)),  # no tensor cores
        (BFLOAT16, 9, 20, 12, 5, 2),  # rows of no whole number of 16 bytes
        *((BFLOAT16, tokens, 48, 40, 5, 2) for tokens in (1, 13)),
        (DTYPES["float16"], 30, 264, 88, 8, 3),
        (BFLOAT16, 60, 104, 72, 3, 1),  # tiles of 64 rows
        (BFLOAT16, 150, 72, 136, 2, 1),  # tiles of 128 rows
    ],
    ids=str,
)
def test_mixture_equals_float64(device, random_normal, dtype, tokens, features, inner, experts, top_k):
    routing = Routing(experts, top_k, True, range(experts))
    arrays = case(random_normal, dtype, tokens, features, inner, experts)
    assert_mixture(mixture(device, *arrays, routing), expected_mixture(*arrays, routing), dtype)


@pytest.mark.parametrize("tokens", [5, 140])
def test_one_expert_may_take_every_token(device, random_normal, tokens):
    routing = Routing(4, 1, True, range(4))
    x, router, gate_up, down = case(random_normal, BFLOAT16, tokens, 32, 24, 4)
    x, router = np.abs(x), np.zeros_like(router)
    router[2] = 1
    arrays = (x, router, gate_up, down)
    assert_mixture(mixture(device, *arrays, routing), expected_mixture(*arrays, routing), BFLOAT16)


@pytest.mark.parametrize("tokens", [6, 70])
def test_ranks_that_own_experts_add_up_to_one_that_has_all(device, random_normal, tokens):
    whole = Routing(5, 2, True, range(5))
    x, router, gate_up, down = case(random_normal, BFLOAT16, tokens, 40, 24, 5)
    total = np.zeros(x.shape)
    for experts in (range(2), range(2, 5)):
        share = Routing(5, 2, True, experts)
        part = slice(experts.start * 48, experts.stop * 48), slice(experts.start * 40, experts.stop * 40)
        arrays = (x, router, gate_up[part[0]], down[part[1]])
        result = mixture(device, *arrays, share)
        assert_mixture(result, expected_mixture(*arrays, share), BFLOAT16)
        total += result.astype(np.float64)
    assert_mixture(total, expected_mixture(x, router, gate_up, down, whole), BFLOAT16)


@pytest.mark.parametrize("tokens", [8, 80])
def test_a_tokens_result_does_not_depend_on_the_others(device, random_normal, tokens):
    routing = Routing(5, 2, True, range(5))
    x, *weights = case(random_normal, BFLOAT16, tokens, 40, 24, 5)
    alone = mixture(device, x, *weights, routing)
    others = random_normal(BFLOAT16, *x.shape)
    others[3] = x[3]
    np.testing.assert_array_equal(mixture(device, others, *weights, routing)[3], alone[3])
    order = np.random.default_rng(1).permutation(tokens)
    np.testing.assert_array_equal(mixture(device, x[order], *weights, routing), alone[order])


def test_padding_rows_take_no_expert_and_become_zeros(device, random_normal):
    routing = Routing(5, 2, True, range(5))
    arrays = case(random_normal, BFLOAT16, 6, 32, 24, 5)
    arrays[0][4:] = np.nan
    marks = np.array([0, 3, 1, 7, -1, -1], np.int32)
    rows = routed(device, arrays[0], arrays[1], routing, marks)
    tiles = device.get(rows.tiles)
    assert sum(stop - first for expert, first, stop, _ in tiles if expert >= 0) == 8
    result = mixture(device, *arrays, routing, marks)
    kept = (arrays[0][:4], *arrays[1:])
    assert_mixture(result[:4], expected_mixture(*kept, routing), BFLOAT16)
    np.testing.assert_array_equal(result[4:], np.zeros((2, 32), BFLOAT16))


def test_rows_of_more_tokens_than_other_extents_of_a_grid_have_blocks_are_combined(device, random_normal):
    x, order = random_normal(FLOAT32, 65_537, 4), np.arange(65_537, dtype=np.int32)[::-1, None].copy()
    positions, shares = device.put(order), device.put(np.ones(order.shape, np.float32))
    out = device.poisoned(x.shape, FLOAT32)
    rows = ExpertRows(shares, positions, shares, positions, positions, positions)
    combine(device.library, device.put(x), rows, out)
    np.testing.assert_array_equal(device.get(out), x[::-1])


def test_tiles_suffice_for_any_distribution():
    for tokens, experts, top_k in ((1, 8, 2), (16, 8, 2), (64, 128, 8), (700, 8, 2), (2048, 128, 8)):
        routing = Routing(experts, top_k, True, range(experts))
        height, pairs = rows_per_tile(tokens, routing, 2), tokens * top_k
        most = 0
        for full in range(min(experts, pairs)):  # the worst: as many experts as possible with one row too many
            counts = [1] * full
            rest = pairs - full
            most = max(most, sum(-(-count // height) for count in counts) + -(-rest // height))
        assert most <= max_tiles(tokens, routing, 2)


def test_more_experts_than_are_sorted_are_refused(device):
    routing = Routing(1025, 2, True, range(1025))
    x = np.zeros((1, 8), ml_dtypes.bfloat16)
    with pytest.raises(ExecutorError, match="1025 experts on a rank"):
        routed(device, x, np.zeros((1025, 8), ml_dtypes.bfloat16), routing)


@pytest.mark.parametrize(
    ("architecture", "blocks"), [("sm_80", 1), ("sm_86", 1), ("sm_89", 1), ("sm_90a", 2), ("sm_120", 1)]
)
def test_registers_are_bounded_for_as_many_blocks_as_shared_memory_holds(device, random_normal, architecture, blocks):
    """128 rows and plain values: a bound for two blocks where one fits would spill registers for nothing."""
    compiled = {}

    class Recorder:
        def __init__(self):
            self.architecture = architecture

        def function(self, source, name, shared_bytes=0, **defines):
            compiled[source] = defines
            return lambda *_, **__: None

    routing, x = Routing(2, 1, True, range(2)), random_normal(BFLOAT16, 150, 64)
    rows = ExpertRows.allocate(device.poisoned, len(x), routing, x.dtype.itemsize)
    out = device.poisoned(x.shape, BFLOAT16)
    grouped_product(Recorder(), x, random_normal(BFLOAT16, 128, 64), out, routing, rows)
    assert compiled["experts_tiles"]["MIN_BLOCKS"] == blocks
