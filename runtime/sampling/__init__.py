"""Choosing tokens: the NumPy reference that every executor's sampler must agree with."""

from __future__ import annotations

from phalanx.runtime.sampling.reference import gumbel_noise, log_softmax, philox, sample, top_logprobs

__all__ = ["gumbel_noise", "log_softmax", "philox", "sample", "top_logprobs"]
