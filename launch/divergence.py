"""How far one model's distribution of the next token is from a reference's: Kullback-Leibler divergence and flips.

Engines report the `NUM_ALTERNATIVES` most probable tokens of each place, not the whole vocabulary. Tokens that both models report
(and the text's own token) are compared one by one, all others as one. Merging outcomes never increases a divergence (data processing
inequality; Cover and Thomas, Elements of Information Theory, 2.8), so the figure is a lower bound of the exact one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from phalanx.runtime.request import Logprob

__all__ = ["NUM_ALTERNATIVES", "Divergence", "Predictions", "compare", "gather"]

NUM_ALTERNATIVES = 20
"""As many as a request may ask for."""

_LEAST_REST = 1e-7
"""Rounding of float32 log-probabilities: a smaller rest is not known to be there."""

_TOKENS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Predictions:
    """What one model reports of T places of a text: the text's token, then the most probable ones.

    Attributes:
        token_ids: ``[T, 1 + k]`` int32; -1 where a token is there already.
        logprobs: ``[T, 1 + k]`` float32.
        best: ``[T]`` int32, the most probable token.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    best: NDArray[np.int32]

    @property
    def total_loss(self) -> float:
        """Summed negative log-likelihood of the text's tokens in nats."""
        return -math.fsum(self.logprobs[:, 0].tolist())


@dataclass(frozen=True, slots=True)
class Divergence:
    """Of a model from a reference, for T places.

    Attributes:
        kl: ``[T]`` lower bounds of KL(reference || model) in nats.
        flips: ``[T]`` whether the most probable token is another.
        rest: ``[T]`` the reference's probability of the tokens that were compared as one.
    """

    kl: NDArray[np.float64]
    flips: NDArray[np.bool_]
    rest: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Mean nats a token."""
        return float(self.kl.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, as if tokens were independent."""
        return float(self.kl.std()) / math.sqrt(len(self.kl))

    @property
    def figures(self) -> dict[str, float]:
        """For machines."""
        return {
            "kl_lower_bound": self.mean,
            "kl_standard_error": self.standard_error,
            "kl_largest": float(self.kl.max()),
            "num_alternatives": NUM_ALTERNATIVES,
            "rest": float(self.rest.mean()),
            "num_flips": int(self.flips.sum()),
            "flips": float(self.flips.mean()),
        }

    @property
    def description(self) -> str:
        """For people: the figures, and what they leave out."""
        return (
            f"KL(reference || model)  at least {self.mean:.5f} nats a token (standard error {self.standard_error:.5f}; "
            f"largest {self.kl.max():.4f})\n"
            f"changed best tokens     {self.flips.sum():,} of {len(self.flips):,} ({100 * self.flips.mean():.2f} %)\n"
            f"compared as one         {100 * self.rest.mean():.2f} % of the probability: tokens that are not among the "
            f"{NUM_ALTERNATIVES} best of both models"
        )


def gather(windows: Iterable[Sequence[Logprob]]) -> Predictions:
    """Arrays of what `scored_tokens` yields."""
    parts = [_predictions(window) for window in windows]
    return Predictions(
        np.concatenate([part.token_ids for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.best for part in parts]),
    )


def compare(reference: Predictions, model: Predictions) -> Divergence:
    """The divergence of ``model`` from ``reference`` on the same text."""
    assert len(reference.best) == len(model.best)
    parts = [
        _compare_rows(reference, model, slice(first, first + _TOKENS_AT_ONCE))
        for first in range(0, len(model.best), _TOKENS_AT_ONCE)
    ]
    kl, rest = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Divergence(kl, reference.best != model.best, rest)


def _predictions(window: Sequence[Logprob]) -> Predictions:
    own_ids = np.array([[item.token_id] for item in window], np.int32)
    own_logprobs = np.array([[item.logprob] for item in window], np.float32)
    top_ids = np.array([[token for token, _ in item.top] for item in window], np.int32)
    top_logprobs = np.array([[logprob for _, logprob in item.top] for item in window], np.float32)
    best = top_ids[:, 0].copy()
    top_ids[top_ids == own_ids] = -1
    return Predictions(np.hstack((own_ids, top_ids)), np.hstack((own_logprobs, top_logprobs)), best)


def _compare_rows(
    reference: Predictions, model: Predictions, rows: slice
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Divergence and the reference's rest of some places."""
    ids, other_ids = reference.token_ids[rows], model.token_ids[rows]
    same = (ids[:, :, None] == other_ids[:, None, :]) & (ids >= 0)[:, :, None]
    is_shared, place = same.any(axis=2), same.argmax(axis=2)
    log_p = reference.logprobs[rows].astype(np.float64)
    log_q = np.take_along_axis(model.logprobs[rows].astype(np.float64), place, axis=1)
    p, q = np.where(is_shared, np.exp(log_p), 0.0), np.where(is_shared, np.exp(log_q), 0.0)
    terms = np.where(is_shared, p * (log_p - log_q), 0.0).sum(axis=1)
    rest_p, rest_q = (np.maximum(1.0 - one.sum(axis=1), _LEAST_REST) for one in (p, q))
    return terms + rest_p * np.log(rest_p / rest_q), rest_p
