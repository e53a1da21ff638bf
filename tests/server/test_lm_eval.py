"""lm-eval itself, from an environment of its own, against a whole job: ``make test-lm-eval`` installs it and runs this."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from tokenizers import Tokenizer

from tests.support.float64_llama import Float64Llama

from .jobs import serve
from .test_clients import DEMO, MODEL

PAIRS = [
    ("def add(a, b):\n    return", " a + b"),
    ("import", " os"),
    ("class Error(", "Exception): pass"),
    ("x =", " qqqq"),
]
PROGRAM = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
url, name, pairs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = LocalCompletionsAPI(base_url=url + "/v1/completions", model=name, tokenizer_backend="remote", batch_size=2)
made = [Instance("loglikelihood", {}, tuple(pair), index) for index, pair in enumerate(pairs)]
until = Instance("generate_until", {}, ("def main(", {"until": [":"], "max_gen_toks": 20}), 0)
print(json.dumps([model.loglikelihood(made), model.generate_until([until])]))
"""


@pytest.mark.slow
def test_log_likelihoods_of_lm_eval_equal_the_reference() -> None:
    python = os.environ.get("PHALANX_LM_EVAL_PYTHON")
    if python is None:
        pytest.skip("slow; run by make test-lm-eval")
    with serve(2, "--dtype", "float32") as job:
        done = subprocess.run(
            [python, "-c", PROGRAM, job.server.url, MODEL, json.dumps(PAIRS)],
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr
    found, (generated,) = json.loads(done.stdout.splitlines()[-1])
    reference, tokenizer = Float64Llama(DEMO), Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    for (context, continuation), (log_likelihood, is_greedy) in zip(PAIRS, found, strict=True):
        # Log-likelihoods are of texts without a begin token, unless add_bos_token is given.
        start = tokenizer.encode(context, add_special_tokens=False).ids
        tokens = tokenizer.encode(context + continuation, add_special_tokens=False).ids
        rows = reference.log_probabilities(tokens)[len(start) - 1 : -1]
        expected = sum(row[token] for row, token in zip(rows, tokens[len(start) :], strict=True))
        assert log_likelihood == pytest.approx(expected, abs=1e-4)
        assert is_greedy == (rows.argmax(axis=-1).tolist() == tokens[len(start) :])
    assert generated
    assert ":" not in generated
