"""Models of real widths without real weights: a random model writes text, and its quantised twin is compared on it.

Of text that a model wrote itself, the mean loss estimates its entropy, and the loss that quantisation adds estimates the divergence of the two
models. The prediction comes from transformers in float32 on the same GPU, its products replaced by the scheme's definition in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from phalanx.runtime.llm import LLM
from phalanx.runtime.request import SamplingParams
from tests.support.gpus import skip_without_gpus

pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

VOCAB_SIZE = 8192
CONFIG = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 512, "rope_theta": 500000.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""The widths of Llama-3-8B."""
LOGITS_STD = 4.2
"""Of logits, which gives an entropy of about 3 nats."""
NUM_TEXTS, LENGTH = 96, 256
MOST_APART = 0.2
"""Of the predicted divergence: bfloat16 between products adds noise, and moves codes that lie next to a rounding boundary."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with which every product keeps its input's size."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    skip_without_gpus(1)
    directory = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(3)
    with torch.device("cuda"), torch.no_grad():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).to(torch.bfloat16)
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                std = {"lm_head.weight": LOGITS_STD / math.sqrt(weight.shape[1]), "model.embed_tokens.weight": 1.0}
                weight.normal_(0.0, std.get(name, 1.0 / math.sqrt(weight.shape[1])))
    model.save_pretrained(directory)
    del model
    torch.cuda.empty_cache()
    return directory


def run(directory: Path, quantize: str, params: list[SamplingParams], texts: list[list[int]], kept: Any = None) -> Any:
    """Generate; ``kept[number, position]`` of the texts are kept if asked for."""

    def keep(seeds: Any, positions: Any, first_token: int, logits: Any) -> None:
        kept[seeds.astype(int), positions, first_token : first_token + logits.shape[1]] = logits

    sizes: dict[str, Any] = {
        "max_num_seqs": NUM_TEXTS,
        "num_kv_blocks": NUM_TEXTS * LENGTH // 16 + 64,
        "max_num_batched_tokens": 2048,
    }
    with LLM(directory, engine="cuda", dtype="bfloat16", quantize=quantize, **sizes) as llm:
        if kept is None:
            return llm.generate(texts, params)
        with llm.reading_logits(keep):
            return llm.generate(texts, params)


def kept_logits(directory: Path, quantize: str, texts: list[list[int]]) -> NDArray[np.float32]:
    """``[texts, positions, vocabulary]``: what follows each token but the last."""
    logits = np.zeros((NUM_TEXTS, LENGTH - 1, VOCAB_SIZE), np.float32)
    params = [SamplingParams(max_tokens=0, prompt_logprobs=0, seed=number) for number in range(NUM_TEXTS)]
    run(directory, quantize, params, texts, logits)
    return logits


@pytest.fixture(scope="module")
def texts(teacher: Path) -> list[list[int]]:
    """Sampled from the model's whole distribution."""
    params = [
        SamplingParams(max_tokens=LENGTH - 1, temperature=1.0, ignore_eos=True, seed=seed) for seed in range(NUM_TEXTS)
    ]
    starts = [[3 + number] for number in range(NUM_TEXTS)]
    outputs = run(teacher, "none", params, starts)
    return [start + list(output.token_ids) for start, output in zip(starts, outputs, strict=True)]


@pytest.fixture(scope="module")
def teachers_logits(teacher: Path, texts: list[list[int]]) -> NDArray[np.float32]:
    return kept_logits(teacher, "none", texts)


def log_probabilities(logits: NDArray[np.float32]) -> Any:
    """``[positions, vocabulary]`` in float64 on the GPU."""
    import torch

    return torch.log_softmax(torch.from_numpy(logits).cuda().double(), dim=-1)


def divergences(teachers: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(teacher || other) in nats at each place of each text."""
    found = []
    for one, other in zip(teachers, others, strict=True):
        p, q = log_probabilities(one), log_probabilities(other)
        found.append((p.exp() * (p - q)).sum(-1).cpu().numpy())
    return np.array(found)


def losses(logits: NDArray[np.float32], texts: list[list[int]]) -> NDArray[np.float64]:
    """Of each token but the first."""
    rows = np.arange(LENGTH - 1)
    return np.array(
        [log_probabilities(one).cpu().numpy()[rows, text[1:]] * -1 for one, text in zip(logits, texts, strict=True)]
    )


def test_a_models_own_text_has_the_loss_of_its_entropy(
    teachers_logits: NDArray[np.float32], texts: list[list[int]]
) -> None:
    entropies = np.array([-(p.exp() * p).sum(-1).cpu().numpy() for p in map(log_probabilities, teachers_logits)])
    surplus = losses(teachers_logits, texts) - entropies
    assert 2.0 < entropies.mean() < 4.0
    assert abs(surplus.mean()) < 4 * surplus.std() / math.sqrt(surplus.size)


def rounded_fp8(values: Any) -> Any:
    """Per row of the last axis, with the scale amax / 448."""
    import torch

    scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
    return (values / scale).to(torch.float8_e4m3fn).to(values.dtype) * scale


def rounded_int8(values: Any) -> Any:
    """Per row of the last axis, with the scale amax / 127."""
    scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (values / scale).round() * scale


def reference_logits(
    directory: Path, texts: list[list[int]], rounded: Callable[[Any], Any] | None
) -> Iterator[NDArray[np.float32]]:
    """transformers in float32, text by text; with ``rounded``, of both operands of every product but the head's."""
    import torch
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).cuda().eval()
    with torch.no_grad():
        if rounded is not None:
            for name, layer in model.named_modules():
                if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                    layer.weight.copy_(rounded(layer.weight))
                    layer.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
        for text in texts:
            yield model(torch.tensor([text[:-1]]).cuda()).logits[0].cpu().numpy()


@pytest.mark.parametrize(("quantize", "rounded"), [("fp8", rounded_fp8), ("int8", rounded_int8)])
def test_quantisation_costs_what_its_definition_predicts(
    teacher: Path, texts: list[list[int]], teachers_logits: NDArray[np.float32], quantize: str, rounded: Callable[[Any], Any]
) -> None:  # fmt: skip
    some = texts[:32]
    predicted = divergences(
        np.array(list(reference_logits(teacher, some, None))), np.array(list(reference_logits(teacher, some, rounded)))
    )
    logits = kept_logits(teacher, quantize, texts)
    measured = divergences(teachers_logits, logits)
    added = losses(logits, texts) - losses(teachers_logits, texts)
    print(f"{quantize}: KL {measured.mean():.5f}, predicted {predicted.mean():.5f}, loss +{added.mean():.5f}")
    assert measured[:32].mean() == pytest.approx(predicted.mean(), rel=MOST_APART)
    assert abs((added - measured).mean()) < 4 * (added - measured).std() / math.sqrt(added.size)
