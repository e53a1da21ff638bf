"""The reference sampler: known answers, distributions, and independence of everything but the request itself."""

from __future__ import annotations

import numpy as np
import pytest

from phalanx.runtime.sampling.reference import gumbel_noise, log_softmax, philox, sample, top_logprobs

from ..support.records import admission

NUM_DRAWS = 4_000


def params(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 1
) -> np.ndarray:
    return admission(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)


def draw(logits: np.ndarray, **fields: float) -> np.ndarray:
    """Tokens at NUM_DRAWS positions of one request."""
    rows = np.broadcast_to(logits.astype(np.float32), (NUM_DRAWS, len(logits)))
    return sample(rows, np.repeat(params(**fields), NUM_DRAWS), np.arange(NUM_DRAWS, dtype=np.int32))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, int, int, int], key: tuple[int, int], words: str) -> None:
    # Known-answer vectors published with Random123 (kat_vectors, philox4x32-10).
    assert " ".join(f"{int(word):08x}" for word in philox(counter, key)) == words


def test_frequencies_follow_the_softmax() -> None:
    logits = np.array([2.0, 1.0, 0.0, -1.0, 0.5])
    probabilities = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    counts = np.bincount(draw(logits, temperature=0.7), minlength=5)
    deviation = np.sqrt(NUM_DRAWS * probabilities * (1 - probabilities))
    assert (np.abs(counts - NUM_DRAWS * probabilities) < 4.5 * deviation).all(), counts


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.6}, {0}),
        ({"top_p": 0.66}, {0, 1}),
        ({"top_k": 2, "top_p": 0.73}, {0}),  # 0.731 of what top-k leaves is the first token alone
        ({"top_k": 2, "top_p": 0.74}, {0, 1}),
        ({"min_p": 0.2}, {0, 1}),
        ({"top_p": 1e-9}, {0}),
    ],
)
def test_filters_keep_exactly(fields: dict[str, float], kept: set[int]) -> None:
    # Probabilities 0.644, 0.237, 0.087, 0.032.
    assert set(draw(np.array([3.0, 2.0, 1.0, 0.0]), **fields).tolist()) == kept


def test_equal_logits_rank_by_token_id() -> None:
    assert set(draw(np.array([1.0, 1.0, 1.0, 1.0]), top_k=2).tolist()) == {0, 1}
    assert sample(np.zeros((1, 4), np.float32), params(temperature=0.0), np.zeros(1, np.int32)).tolist() == [0]


def test_a_row_does_not_depend_on_its_batch() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(6, 50)).astype(np.float32)
    sampling = np.concatenate(
        [params(temperature=t, top_k=k, seed=s) for t, k, s in [(1, 0, 1), (0, 0, 2), (0.5, 5, 3)] * 2]
    )
    positions = np.arange(6, dtype=np.int32)
    together = sample(logits, sampling, positions)
    alone = [sample(logits[i : i + 1], sampling[i : i + 1], positions[i : i + 1])[0] for i in range(6)]
    assert together.tolist() == alone


def test_noise_depends_on_seed_position_and_token() -> None:
    noise = gumbel_noise(7, 3, 101)
    assert len(set(noise.tolist())) == 101
    np.testing.assert_array_equal(noise[:50], gumbel_noise(7, 3, 50))
    assert not np.array_equal(noise, gumbel_noise(8, 3, 101))
    assert not np.array_equal(noise, gumbel_noise(7, 4, 101))
    assert not np.array_equal(noise, gumbel_noise(7 + 2**32, 3, 101))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_marked(bad: float) -> None:
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2] = bad
    assert sample(logits, np.repeat(params(0.0), 3), np.zeros(3, np.int32)).tolist() == [0, -1, 0]


def test_log_probabilities_and_alternatives() -> None:
    logits = np.array([[1.0, 3.0, 2.0, 3.0]], np.float32)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    np.testing.assert_allclose(log_softmax(logits), exact, rtol=0, atol=1e-6)
    ids, values = top_logprobs(log_softmax(logits), 6)
    assert ids.tolist() == [[1, 3, 2, 0, -1, -1]]
    np.testing.assert_allclose(values[0, :4], exact[0, [1, 3, 2, 0]], rtol=0, atol=1e-6)
