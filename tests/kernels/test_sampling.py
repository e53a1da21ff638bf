"""Sampling kernels against a sampler written here in float64 (sort, cumulative sums) and an own Philox."""

import numpy as np
import pytest

from phalanx.kernels.sampling import (
    PlanMasks,
    RowParameters,
    TokenCache,
    adjust_logits,
    local_argmax,
    log_probabilities,
    merge_argmax,
    num_splits,
    sample_rows,
)
from phalanx.parallel.errors import ExecutorError
from phalanx.runtime.sampling.adjust import adjust_logits as adjusted_on_host
from phalanx.runtime.sampling.fields import SAMPLING_STRUCT
from phalanx.runtime.sampling.masks import pack_mask
from phalanx.runtime.step import ADMISSION, TOKEN_BIAS

from .devices import DTYPES


def philox(key, counter):
    """Philox4x32-10 over arrays of counters [n, 4]; checked against the published vectors below."""
    multipliers, weyl = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
    mask = np.uint64(0xFFFFFFFF)
    c = [np.asarray(word, np.uint64) for word in np.moveaxis(np.asarray(counter, np.uint64), -1, 0)]
    k = [int(key) & 0xFFFFFFFF, int(key) >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(multipliers[0]), c[2] * np.uint64(multipliers[1])
        high_a, low_a, high_b, low_b = a >> np.uint64(32), a & mask, b >> np.uint64(32), b & mask
        c = [high_b ^ c[1] ^ np.uint64(k[0]), low_b, high_a ^ c[3] ^ np.uint64(k[1]), low_a]
        k = [(word + step) & 0xFFFFFFFF for word, step in zip(k, weyl, strict=True)]
    return np.stack(c, -1)


def test_the_reference_philox_gives_the_published_vectors():
    known = [
        (0, [0, 0, 0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (2**64 - 1, [0xFFFFFFFF] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ]
    for key, counter, words in known:
        assert philox(key, [counter])[0].tolist() == words


def gumbel(seed, position, vocab_size):
    tokens = np.arange(vocab_size)
    counter = np.stack([tokens >> 2, np.full_like(tokens, position), 0 * tokens, 0 * tokens], -1)
    words = philox(seed, counter)[tokens, tokens & 3]
    u = ((words >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23
    return -np.log(-np.log(u))


def allowed_tokens(logits, temperature, top_k, top_p, min_p):
    """The filtered set, and whether a decision was too close for float32 to be held to."""
    scores = (logits.astype(np.float32) / np.float32(temperature)).astype(np.float64)
    order = np.lexsort((np.arange(len(scores)), -scores))
    if top_k:
        order = order[:top_k]
    weights = np.exp(scores[order] - scores[order[0]])
    is_close = False
    if top_p < 1:
        cumulative = np.cumsum(weights / weights.sum())
        count = int(np.searchsorted(cumulative, np.float64(np.float32(top_p)))) + 1
        is_close |= bool(np.any(np.abs(cumulative - np.float32(top_p)) < 2e-6))
        order, weights = order[:count], weights[:count]
    is_close |= bool(np.any(np.abs(weights / np.float32(min_p) - 1) < 1e-5)) if min_p else False
    return order[weights >= np.float32(min_p)], is_close


def expected_token(logits, temperature, top_k, top_p, min_p, seed, position):
    """The token, or None when float32 may rightly answer otherwise."""
    if temperature == 0:
        return int(np.argmax(logits))
    kept, is_close = allowed_tokens(logits, temperature, top_k, top_p, min_p)
    scores = logits.astype(np.float32) / np.float32(temperature) + gumbel(seed, position, len(logits))
    best, *rest = np.sort(scores[kept])[::-1][:2]
    is_close |= bool(rest and best - rest[0] < 1e-4 * max(1.0, abs(best)))
    return None if is_close else int(kept[np.argmax(scores[kept])])


def parameters(device, rows):
    """Rows of (temperature, top_k, top_p, min_p, seed, position) as device arrays."""
    records = np.zeros(len(rows), ADMISSION)
    for name, values in zip(("temperature", "top_k", "top_p", "min_p", "seed"), zip(*rows, strict=True), strict=False):
        records[name] = values
    positions = np.array([row[-1] for row in rows], np.int32)
    words = records.view(np.int32).reshape(len(rows), -1)
    return RowParameters(device.put(words), device.put(positions), SAMPLING_STRUCT)


def no_masks(device, num_rows):
    return PlanMasks(device.put(np.full(num_rows, -1, np.int32)), device.put(np.zeros(1, np.int32)))


@pytest.mark.parametrize(("num_parts", "part_size"), [(1, 1003), (2, 8208), (3, 336)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_tokens_outside_a_rows_mask_are_banned(device, random_normal, dtype, num_parts, part_size):
    vocab_size = num_parts * part_size - 5 * (num_parts > 1)  # the last part is padded
    rng = np.random.default_rng(part_size)
    allowed = rng.integers(0, 2, (2, vocab_size)).astype(bool)
    allowed[:, [0, 31, 32, vocab_size - 1]] = [True, False, True, True]
    words = np.concatenate([np.full(7, -1, np.int32), *(pack_mask(np.flatnonzero(row), vocab_size) for row in allowed)])
    offsets = np.array([7 + len(words[7:]) // 2, -1, 7], np.int32)
    records, biases = np.zeros(3, ADMISSION), np.zeros((1, 2), TOKEN_BIAS)
    records["num_biases"], biases[0, 0] = [1, 0, 0], (31, 100.0, 99, 0)
    rows = RowParameters(
        device.put(records.view(np.int32).reshape(3, -1)), device.put(np.full(3, 4, np.int32)), SAMPLING_STRUCT
    )
    cache = TokenCache(device.put(np.zeros((1, 1), np.int32)), device.put(np.zeros((1, 16), np.int32)))
    masks = PlanMasks(device.put(offsets), device.put(words))
    for part in range(num_parts):
        logits = random_normal(dtype, 3, part_size)
        logits[2, 5] = np.nan
        out = device.poisoned(logits.shape, np.float32)
        adjust_logits(
            device.library, device.put(logits), rows, device.put(biases.view(np.int32).reshape(1, 2, 4)), cache, masks, out,
            vocab_start=part * part_size, vocab_size=vocab_size,
        )  # fmt: skip
        expected = logits.astype(np.float32)
        held = min(part_size, vocab_size - part * part_size)
        for row, mask in ((0, allowed[1]), (2, allowed[0])):
            banned = np.flatnonzero(~mask[part * part_size :][:held] & np.isfinite(expected[row, :held]))
            expected[row, banned] = -1e30
        np.testing.assert_array_equal(device.get(out), expected)


@pytest.mark.parametrize("part_size", [1003, 8208, 20000])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_biases_in_force_of_tokens_that_the_rank_holds_are_added(device, random_normal, dtype, part_size):
    logits, vocab_start = random_normal(dtype, 4, part_size), 500
    last = vocab_start + part_size - 1
    biases = np.zeros((3, 5), TOKEN_BIAS)
    biases[1] = [(499, 1, 99, 0), (500, 2.5, 99, 0), (last, -1e30, 8, 0), (last + 1, 1, 99, 0), (700, 4, 99, 0)]
    biases[2, :3] = [(600, -100, 7, 0), (600, -1e30, 8, 0), (600, 7, 6, 0)]
    records = np.zeros(4, ADMISSION)
    records["seq_index"], records["num_biases"], positions = (
        [1, 0, 2, 1],
        [4, 0, 3, 5],
        np.array([7, 7, 7, 8], np.int32),
    )
    expected = logits.astype(np.float32)
    expected[[0, 3], 0] += np.float32(2.5)
    expected[0, -1] += np.float32(-1e30)
    expected[2, 100] += np.float32(-1e30)
    expected[3, 200] += np.float32(4)
    rows = RowParameters(device.put(records.view(np.int32).reshape(4, -1)), device.put(positions), SAMPLING_STRUCT)
    out = device.poisoned(logits.shape, np.float32)
    words = device.put(biases.view(np.int32).reshape(3, 5, 4))
    cache = TokenCache(device.put(np.zeros((3, 1), np.int32)), device.put(np.full((1, 16), 600, np.int32)))
    adjust_logits(
        device.library,
        device.put(logits),
        rows,
        words,
        cache,
        no_masks(device, len(logits)),
        out,
        vocab_start=vocab_start,
        vocab_size=1 << 20,
    )
    np.testing.assert_array_equal(device.get(out), expected)


def test_a_bias_with_tokens_before_it_counts_where_the_output_ends_in_them(device, random_normal):
    """Not across the end of the prompt, and one ban after another is no less than a ban."""
    logits = random_normal(np.float32, 6, 1003)
    tables, cached = np.array([[2, 0]], np.int32), np.zeros((3, 16), np.int32)
    cached[[2, 0]] = np.arange(32).reshape(2, 16)  # the token at each position is its number
    entries = [
        (500, -1e30, 99, 2),
        (16, 0, 0, 0),
        (15, 0, 0, 0),
        (501, -1e30, 99, 0),
        (501, -1e30, 99, 1),
        (16, 0, 0, 0),
    ]
    biases, records = np.zeros((1, 8), TOKEN_BIAS), np.zeros(6, ADMISSION)
    biases[0, :6] = entries
    records["num_biases"], records["num_prompt"] = 6, [4, 15, 16, 17, 4, 4]
    positions = np.array([17, 17, 17, 17, 16, 18], np.int32)
    expected = logits.copy()
    expected[:, 501] = -1e30
    expected[:2, 500] += np.float32(-1e30)
    rows = RowParameters(device.put(records.view(np.int32).reshape(6, -1)), device.put(positions), SAMPLING_STRUCT)
    out, words = device.poisoned(logits.shape, np.float32), device.put(biases.view(np.int32).reshape(1, 8, 4))
    cache = TokenCache(device.put(tables), device.put(cached))
    adjust_logits(
        device.library, device.put(logits), rows, words, cache, no_masks(device, 6), out, vocab_start=0, vocab_size=1003
    )
    np.testing.assert_array_equal(device.get(out), expected)
    host = adjusted_on_host(logits, records, positions, biases, lambda _, length: np.arange(length, dtype=np.int32))
    np.testing.assert_array_equal(host, expected)


def penalised(row, vocab_start, prompt, output, repetition, presence, frequency):
    """In float64, token by token: repetition (CTRL, over prompt and output), then frequency, then presence (OpenAI, over the output)."""
    result = row.astype(np.float64)
    for column in range(len(row)):
        token = vocab_start + column
        if token in prompt or token in output:
            result[column] *= repetition if result[column] <= 0 else 1 / repetition
        result[column] -= frequency * output.count(token) + presence * (token in output)
    return result


@pytest.mark.parametrize("part_size", [1003, 8208, 20000])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_penalties_count_the_tokens_of_each_rows_sequence(device, random_normal, dtype, part_size):
    """Two sequences whose blocks lie anywhere; tokens that this rank does not hold, and blocks' tails, count for nothing."""
    logits, vocab_start, block_size = random_normal(dtype, 5, part_size), 500, 16
    rng = np.random.default_rng(part_size)
    tokens = rng.choice([3, 500, 501, 900, 1400, vocab_start + part_size - 1, vocab_start + part_size], (2, 64))
    tables = np.array([[5, 2, 7, 0], [1, 6, 3, 4]], np.int32)
    cached = np.full((8, block_size), 777, np.int32)
    cached[tables] = tokens.reshape(2, 4, block_size)
    rules = [(1.3, 0.0, 0.0), (1.0, 0.7, 0.0), (1.0, 0.0, -0.4), (0.6, 1.5, 0.25), (1.0, 0.0, 0.0)]
    records, biases = np.zeros(5, ADMISSION), np.zeros((2, 2), TOKEN_BIAS)
    records["seq_index"], positions, num_prompt = (
        [0, 1, 0, 1, 1],
        np.array([41, 64, 7, 33, 20], np.int32),
        [17, 1, 7, 20, 5],
    )
    records["num_prompt"] = num_prompt
    for name, values in zip(("repetition", "presence", "frequency"), zip(*rules, strict=True), strict=True):
        records[f"{name}_penalty"] = [0 if (name, value) == ("repetition", 1.0) else value for value in values]
    records["num_biases"][3], biases[1, 0] = 1, (500, 9.0, 99, 0)
    expected = logits.astype(np.float64)
    expected[3, 0] += 9  # before the penalties
    for row, sequence in enumerate(records["seq_index"]):
        known = tokens[sequence, : positions[row]].tolist()
        prompt, output = known[: num_prompt[row]], known[num_prompt[row] :]
        expected[row] = penalised(expected[row], vocab_start, prompt, output, *rules[row])
    rows = RowParameters(device.put(records.view(np.int32).reshape(5, -1)), device.put(positions), SAMPLING_STRUCT)
    out = device.poisoned(logits.shape, np.float32)
    cache = TokenCache(device.put(tables), device.put(cached))
    words = device.put(biases.view(np.int32).reshape(2, 2, 4))
    adjust_logits(
        device.library,
        device.put(logits),
        rows,
        words,
        cache,
        no_masks(device, len(logits)),
        out,
        vocab_start=vocab_start,
        vocab_size=1 << 20,
    )
    np.testing.assert_allclose(device.get(out), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(device.get(out)[4], logits[4].astype(np.float32))


def padded_parts(logits, num_parts, part_size):
    """[R, S, V_local] as a gather over ranks leaves it; the padding would win if it were looked at."""
    num_rows, vocab_size = logits.shape
    wide = np.full((num_rows, num_parts * part_size), 1e4).astype(logits.dtype)
    wide[:, :vocab_size] = logits
    return np.ascontiguousarray(wide.reshape(num_rows, num_parts, part_size).swapaxes(0, 1))


def run_local(device, logits, rows, num_parts, part_size):
    """Every rank's local_argmax, the gather, the merge."""
    vocab_size = logits.shape[1]
    splits = num_splits(len(logits), part_size)
    gathered = []
    for part, columns in enumerate(padded_parts(logits, num_parts, part_size)):
        keys = device.poisoned((splits, len(logits)), np.uint64)
        local_argmax(
            device.library, device.put(columns), parameters(device, rows), keys,
            vocab_start=part * part_size, vocab_size=vocab_size,
        )  # fmt: skip
        gathered.append(device.get(keys))
    token_ids = device.poisoned((len(logits),), np.int32)
    merge_argmax(device.library, device.put(np.concatenate(gathered)), token_ids)
    return device.get(token_ids)


def run_rows(device, logits, rows, num_parts, part_size):
    token_ids = device.poisoned((len(logits),), np.int32)
    parts = device.put(padded_parts(logits, num_parts, part_size))
    sample_rows(device.library, parts, parameters(device, rows), token_ids, vocab_size=logits.shape[1])
    return device.get(token_ids)


@pytest.mark.parametrize(
    ("num_rows", "part_size", "splits"), [(1, 128_256, 63), (16, 128_256, 33), (1024, 128_256, 1), (1, 8, 1)]
)
def test_ranks_on_different_gpus_gather_as_many_keys(num_rows, part_size, splits):
    """The number of slices followed from a device's multiprocessors, so that an all-gather of two kinds of GPUs never ended."""
    assert num_splits(num_rows, part_size) == splits


LAYOUTS = [(1, 1003), (1, 1008), (2, 504), (3, 336), (4, 253)]


@pytest.mark.parametrize("run", [run_local, run_rows])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_greedy_takes_the_lowest_of_equal_maxima_in_any_layout(device, random_normal, dtype, run):
    logits = random_normal(dtype, 4, 1003)
    logits[1, [1002, 400, 700]] = 9.0
    logits[2] = 0.0
    logits[3, [5, 3]] = [0.0, -0.0]
    logits[3, logits[3] > 0] *= -1
    expected = np.argmax(logits.astype(np.float32), axis=1)
    assert expected[1:].tolist() == [400, 0, 3]
    for num_parts, part_size in LAYOUTS:
        tokens = run(device, logits, [(0.0, 0, 1.0, 0.0, 1, 7)] * 4, num_parts, part_size)
        np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize("run", [run_local, run_rows])
def test_noise_depends_on_seed_position_and_token_alone(device, random_normal, run):
    logits = np.repeat(random_normal(np.float32, 1, 1003), 12, axis=0)
    rows = [(0.8, 0, 1.0, 0.0, seed, position) for seed in (0, 5, 2**63 + 11) for position in (0, 1, 2, 999)]
    expected = [expected_token(row, *rule) for row, rule in zip(logits, rows, strict=True)]
    assert None not in expected
    assert len(set(expected)) > 6
    for num_parts, part_size in LAYOUTS:
        np.testing.assert_array_equal(run(device, logits, rows, num_parts, part_size), expected)
    alone = [run(device, logits[:1], [rule], 1, 1003)[0] for rule in rows]
    np.testing.assert_array_equal(alone, expected)


def test_noise_draws_from_the_softmax(device):
    num_rows = 4000
    logits = np.tile(np.log(np.array([0.5, 0.25, 0.125, 0.125, 0.0 + 1e-9], np.float32)), (num_rows, 1))
    tokens = run_local(device, logits, [(1.0, 0, 1.0, 0.0, 12345, row) for row in range(num_rows)], 1, 5)
    frequency = np.bincount(tokens, minlength=5) / num_rows
    np.testing.assert_allclose(frequency, [0.5, 0.25, 0.125, 0.125, 0.0], atol=4 * np.sqrt(0.25 / num_rows))


FILTERS = [
    (0, 1.0, 0.0), (1, 1.0, 0.0), (7, 1.0, 0.0), (50, 1.0, 0.0), (1000, 1.0, 0.0), (5000, 1.0, 0.0), (0, 0.1, 0.0),
    (0, 0.9, 0.0), (0, 0.999, 0.0), (0, 1e-6, 0.0), (20, 0.5, 0.0), (20, 0.95, 0.0), (0, 1.0, 0.05), (0, 1.0, 1.0),
    (50, 0.9, 0.1),
]  # fmt: skip


@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("dtype", [DTYPES["float32"], DTYPES["bfloat16"]], ids=str)
def test_filters_keep_exactly_what_sorting_keeps(device, random_normal, dtype, scale):
    vocab_size = 1003
    rules = [(0.7, *rule, seed, 3) for rule in FILTERS for seed in range(2)]
    logits = random_normal(dtype, len(rules), vocab_size, scale=scale)
    expected = np.array([expected_token(row, *rule) for row, rule in zip(logits, rules, strict=True)], object)
    decided = np.array([token is not None for token in expected])
    assert decided.mean() > 0.8
    for num_parts, part_size in (LAYOUTS[0], LAYOUTS[3]):
        tokens = run_rows(device, logits, rules, num_parts, part_size)
        np.testing.assert_array_equal(tokens[decided], expected[decided].astype(np.int32))
        for row, rule, token in zip(logits, rules, tokens, strict=True):
            kept, is_close = allowed_tokens(row, *rule[:4])
            assert is_close or token in kept


@pytest.mark.parametrize("rows_at_once", [3, 15])
def test_rows_shared_by_a_cluster_of_blocks_sample_the_same_tokens(clustered_device, random_normal, rows_at_once):
    rules = [(0.7, *rule, 11, 5) for rule in FILTERS]
    logits = random_normal(DTYPES["bfloat16"], len(rules), 9000, scale=2.0)
    logits[3, :] = 0.5  # more ties than one bin's candidates
    expected = np.array([expected_token(row, *rule) for row, rule in zip(logits, rules, strict=True)], object)
    decided = np.array([token is not None for token in expected])
    assert decided.mean() > 0.8
    tokens = []
    for start in range(0, len(rules), rows_at_once):
        some = slice(start, start + rows_at_once)
        tokens += run_rows(clustered_device, logits[some], rules[some], 2, 4504).tolist()
    np.testing.assert_array_equal(np.array(tokens)[decided], expected[decided].astype(np.int32))


def test_log_probabilities_of_rows_shared_by_a_cluster(clustered_device, random_normal):
    logits = random_normal(np.float32, 3, 9000, scale=3.0)
    outputs = [clustered_device.poisoned(shape, dtype) for shape, dtype in
               (((3,), np.float32), ((3, 20), np.int32), ((3, 20), np.float32))]  # fmt: skip
    tokens = clustered_device.put(np.array([1, 2, 8999], np.int32))
    log_probabilities(clustered_device.library, clustered_device.put(logits[None]), tokens, *outputs, vocab_size=9000)
    wide = logits.astype(np.float64)
    expected = wide - wide.max(1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(1, keepdims=True))
    np.testing.assert_allclose(clustered_device.get(outputs[0]), expected[range(3), [1, 2, 8999]], rtol=1e-6, atol=2e-6)
    order = np.argsort(-wide, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(clustered_device.get(outputs[1]), order)
    np.testing.assert_allclose(
        clustered_device.get(outputs[2]), np.take_along_axis(expected, order, 1), rtol=1e-6, atol=2e-6
    )  # fmt: skip


def test_a_filter_set_is_exact_where_thousands_of_logits_are_equal(device):
    """More ties than one bin's candidates: the key is narrowed digit by digit down to the token."""
    vocab_size = 9000
    logits = np.zeros((6, vocab_size), np.float32)
    logits[:, 4321] = 1.0
    logits[5, :] = -40.0  # beyond the last bin
    logits[5, 4321] = 0.0
    rules = [
        (1.0, k, p, 0.0, 3, 1) for k, p in [(2, 1.0), (2500, 1.0), (8999, 1.0), (0, 0.5), (4000, 0.3), (3000, 1.0)]
    ]
    seen = [set() for _ in rules]
    for position in range(6):
        shifted = [(*rule[:5], position) for rule in rules]
        tokens = run_rows(device, logits, shifted, 1, vocab_size)
        for row, (kept, token) in enumerate(zip(seen, tokens, strict=True)):
            kept.add(int(token))
            expected = expected_token(logits[row], *shifted[row])
            assert expected is None or token == expected
            assert token in allowed_tokens(logits[row], *shifted[row][:4])[0]
    assert len(seen[2]) > 3


@pytest.mark.parametrize("run", [run_local, run_rows])
@pytest.mark.parametrize("rule", [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 5, 0.5, 0.0)], ids=str)
def test_a_row_that_is_not_finite_samples_minus_one_and_harms_no_other(device, random_normal, run, rule):
    logits = random_normal(np.float32, 5, 300)
    logits[1, 250], logits[2, 0], logits[3, 299] = np.nan, np.inf, -np.inf
    tokens = run(device, logits, [(*rule, 9, 9)] * 5, 1, 300)
    np.testing.assert_array_equal(tokens[1:4], -1)
    assert 0 <= tokens[0] < 300
    assert 0 <= tokens[4] < 300


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize(("num_parts", "part_size"), LAYOUTS)
def test_log_probabilities_equal_float64(device, random_normal, dtype, num_parts, part_size):
    logits = random_normal(dtype, 3, 1003, scale=5.0)
    logits[2, 100:130] = 20.0  # more ties at the top than are asked for
    token_ids = np.array([0, 1002, 500], np.int32)
    logprobs, top_ids = device.poisoned((3,), np.float32), device.poisoned((3, 20), np.int32)
    top_logprobs = device.poisoned((3, 20), np.float32)
    parts = device.put(padded_parts(logits, num_parts, part_size))
    log_probabilities(device.library, parts, device.put(token_ids), logprobs, top_ids, top_logprobs, vocab_size=1003)
    wide = logits.astype(np.float64)
    peak = wide.max(1, keepdims=True)
    expected = wide - peak - np.log(np.exp(wide - peak).sum(1, keepdims=True))
    np.testing.assert_allclose(device.get(logprobs), expected[np.arange(3), token_ids], rtol=1e-6, atol=2e-6)
    order = np.stack([np.lexsort((np.arange(1003), -row))[:20] for row in wide])
    np.testing.assert_array_equal(device.get(top_ids), order)
    np.testing.assert_allclose(device.get(top_logprobs), np.take_along_axis(expected, order, 1), rtol=1e-6, atol=2e-6)


def test_log_probabilities_without_alternatives_or_of_broken_rows(device, random_normal):
    logits = random_normal(np.float32, 2, 64)
    logits[1, 3] = np.nan
    outputs = device.poisoned((2,), np.float32), device.poisoned((2, 0), np.int32), device.poisoned((2, 0), np.float32)
    log_probabilities(
        device.library, device.put(logits[None]), device.put(np.array([5, 6], np.int32)), *outputs, vocab_size=64
    )  # fmt: skip
    wide = logits[0].astype(np.float64)
    result = device.get(outputs[0])
    np.testing.assert_allclose(result[0], wide[5] - np.log(np.exp(wide).sum()), rtol=1e-6)
    assert np.isnan(result[1])


def test_sizes_that_do_not_fit_are_refused(device):
    logits, tokens = device.put(np.zeros((1, 2, 8), np.float32)), device.put(np.zeros(2, np.int32))
    with pytest.raises(ExecutorError, match="vocab_size=9 is above the 1 x 8 columns"):
        sample_rows(device.library, logits, parameters(device, [(0.0, 0, 1.0, 0.0, 0, 0)] * 2), tokens, vocab_size=9)
    with pytest.raises(ExecutorError, match="9 alternatives a row are above 8"):
        log_probabilities(
            device.library, logits, tokens, device.poisoned((2,), np.float32), device.poisoned((2, 9), np.int32),
            device.poisoned((2, 9), np.float32), vocab_size=8,
        )  # fmt: skip
