"""What computes the expected values of a small checkpoint: transformers, put right or converted to where it has no such family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .checkpoint_case import CheckpointCase

__all__ = ["load_oracle"]

Model = Any
"""A causal language model of transformers in evaluation mode."""


def load_oracle(case: CheckpointCase, directory: Path) -> Model:
    """Load the model of ``directory``, a written checkpoint, in float32."""
    load = _OF_ARCHITECTURE.get(case.config["architectures"][0], _load)
    return load(case, directory).eval()


def _load(case: CheckpointCase, directory: Path) -> Model:
    import torch
    from transformers import AutoModelForCausalLM

    # Some releases leave the soft caps of Gemma 2 out of SDPA.
    attention = "eager" if case.config.get("attn_logit_softcapping") else None
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention)


def _mpt(case: CheckpointCase, directory: Path) -> Model:
    """transformers builds ALiBi with a bias of at most 8 whatever the file says; llm-foundry, which trains, does not."""
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    model = _load(case, directory)
    bias_max = case.config["attn_config"].get("alibi_bias_max", 8)
    model.transformer.build_mpt_alibi_tensor = partial(build_mpt_alibi_tensor, alibi_bias_max=bias_max)
    return model


_OF_ARCHITECTURE: Mapping[str, Callable[[CheckpointCase, Path], Model]] = {"MPTForCausalLM": _mpt}
