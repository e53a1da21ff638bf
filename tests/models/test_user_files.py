"""Model files: a family that Phalanx does not have runs in every layout, and a wrong file is one sentence."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phalanx.models
from phalanx.checkpoints.files import ModelDirectory
from phalanx.checkpoints.manifest import read_manifest
from phalanx.launch import check, plan, quantize, split
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.thread_comm import run_ranks
from phalanx.runtime.llm import LLM
from phalanx.runtime.models import find_model
from phalanx.runtime.models.user_file import model_from_file
from phalanx.runtime.request import RequestOutput, SamplingParams
from tests.models.test_against_transformers import log_softmax
from tests.support.checkpoints import ARCEE, CASES_BY_NAME, OLMO, CheckpointCase, write_checkpoint
from tests.support.fake_cupy import install_fake_device
from tests.support.reference import load_reference, prompt_token_ids, transformers_reference
from tests.support.thread_ranks import generate_on_threads, tokens_of

FILE = ARCEE.model_file
assert FILE is not None
SURFACE = Path(__file__).with_name("surface.json")
"""``phalanx.models`` as version 1 has it. Additions with defaults may be recorded; for anything else raise API_VERSION."""


def generate(directory: Path, tp: int, pp: int, case: CheckpointCase = ARCEE, **options: Any) -> RequestOutput:
    reference = load_reference(case)

    def rank(comm: Communicator) -> RequestOutput:
        sizes = {"block_size": 16, "max_num_seqs": 2, "max_num_batched_tokens": 12, "num_kv_blocks": 20}
        files = {"model_file": case.model_file if comm.rank == 0 else Path("/nowhere/another.py")}
        with LLM(
            directory, tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=comm, **{**sizes, **files, **options}
        ) as llm:
            params = SamplingParams(
                max_tokens=len(reference.greedy), temperature=0.0, ignore_eos=True, prompt_logprobs=0
            )
            return llm.generate([prompt_token_ids(case)], params)[0]

    return run_ranks(tp * pp, rank)[0]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(ARCEE, tmp_path_factory.mktemp("arcee"))


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (3, 1), (2, 2), (4, 1), (1, 3)])
@pytest.mark.parametrize("case", [ARCEE, OLMO], ids=lambda case: case.name)
def test_a_users_family_equals_transformers_and_ranks_run_the_text_of_rank_0(
    case: CheckpointCase, tp: int, pp: int, tmp_path: Path
) -> None:
    reference, prompt = load_reference(case), prompt_token_ids(case)
    output = generate(write_checkpoint(case, tmp_path), tp, pp, case, engine="numpy")
    assert output.token_ids == reference.greedy
    assert output.prompt_logprobs is not None
    expected = log_softmax(reference.logits)[np.arange(len(prompt) - 1), prompt[1:]]
    values = [entry.logprob for entry in output.prompt_logprobs if entry is not None]
    np.testing.assert_allclose(values, expected, rtol=0, atol=2e-4 * float(np.ptp(reference.logits)))


@pytest.mark.parametrize("case", [ARCEE, OLMO], ids=lambda case: case.name)
def test_a_users_family_runs_on_the_cuda_engine(
    case: CheckpointCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))
    output = generate(write_checkpoint(case, tmp_path), 2, 1, case, engine="cuda")
    assert output.token_ids == load_reference(case).greedy


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [ARCEE, OLMO], ids=lambda case: case.name)
def test_the_record_is_that_of_transformers(
    case: CheckpointCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = transformers_reference(case, tmp_path)
    np.testing.assert_allclose(load_reference(case).logits, live.logits, rtol=0, atol=1e-5 * float(np.ptp(live.logits)))
    assert check.main(["--model", str(tmp_path), "--model-file", str(case.model_file), "--against-transformers"]) == 0
    assert "transformers: equal; log-probabilities of 23 tokens differ by at most" in capsys.readouterr().out


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_another_computation_than_transformers_is_noticed(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.py"
    assert FILE is not None
    wrong.write_text(
        FILE.read_text().replace(
            "return blocks.mlp(ops, name, x, config.activation)", 'return blocks.mlp(ops, name, x, "relu")'
        )
    )
    assert check.main(["--model", str(directory), "--model-file", str(wrong), "--against-transformers"]) == 1
    assert "transformers: NOT equal" in capsys.readouterr().out


def test_the_documented_file_is_the_example() -> None:
    page = (Path(__file__).parents[2] / "docs" / "howto" / "own-model.md").read_text()
    assert FILE is not None
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert block.strip() == FILE.read_text().strip()


def test_check_says_what_the_model_is_and_what_each_engine_lacks(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main(["--model", str(directory), "--model-file", str(FILE)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"ArceeForCausalLM, sha256 [0-9a-f]{64}: 3 layers, 21 weights, all of them used", lines[0])
    assert lines[1].startswith("operations: embedding, rms_norm, column_linear, attention")
    assert lines[2:4] == ["numpy: runs it", "cuda: runs it"]
    assert lines[4].startswith("tensorrt: ")
    mixtral = write_checkpoint(CASES_BY_NAME["mixtral-plain"], directory.parent / "mixtral")
    assert check.main(["--model", str(mixtral)]) == 0
    assert "\ntensorrt: experts is not supported; experts.num_experts=5 is not supported; " in capsys.readouterr().out


HEADER = "from dataclasses import replace\nfrom phalanx.models import built_in\nPHALANX_API = 1\nLLAMA = built_in('LlamaForCausalLM')\n"
MINE = HEADER + "MODEL = replace(LLAMA, architecture='ArceeForCausalLM', "
FILES = {
    "exit": ("raise SystemExit(3)\n", r"mine\.py line 1: SystemExit: 3"),
    "no pass": (MINE + "passes={})\n", r"mine\.py, MODEL: passes holds \{\}, but it is a mapping to Pass, with one called 'decode'"),
    "one text": (MINE + "other_names='A')\n", r"mine\.py, MODEL: other_names='A' is not a tuple of strings"),
    "no expression": (MINE + "ignored_tensors=('(',))\n", r"mine\.py, MODEL: '\(' in ignored_tensors is no regular expression"),
    "everything ignored": (MINE + "ignored_tensors=('.*',))\n", r"'\.\*' in ignored_tensors matches every tensor"),
    "no config": (MINE + "read_fields=lambda reader: {})\n", r"mine\.py, read_fields returns dict, not a ModelConfig"),
    "no such method": (MINE + "read_fields=lambda reader: reader.act())\n", r"mine\.py, read_fields: AttributeError: .*'act'"),
    "chance": (
        "import random\n" + MINE + "passes={'decode': replace(LLAMA.decode, head=lambda ops, config, x, residual: LLAMA.decode.head("
        "ops, config, ops.scale(x, random.random()), residual))})\n",
        r"a second run of its functions differs from the first; they must depend on their arguments alone",
    ),
    "syntax": ("def block(:\n", r"mine\.py line 1: invalid syntax"),
    "exception": ("x = 1\ny = x / 0\n", r"mine\.py line 2: ZeroDivisionError: division by zero"),
    "missing import": ("import nowhere_to_be_found\n", r"mine\.py line 1: ModuleNotFoundError"),
    "no version": ("MODEL = 1\n", r"mine\.py does not say for which version of phalanx\.models it is; add PHALANX_API = 1"),
    "other version": ("PHALANX_API = 2\n", r"mine\.py is for version 2 of phalanx\.models, but this Phalanx has 1"),
    "no model": ("PHALANX_API = 1\n", r"mine\.py defines no MODEL"),
    "unknown base": ("from phalanx.models import built_in\nbuilt_in('T5')\n", r"line 2: ConfigError: there is no built-in family T5"),
    "other architecture": (
        HEADER + "MODEL = replace(LLAMA, architecture='MyForCausalLM', other_names=())\n",
        r"--model-file defines MyForCausalLM, but config\.json has architectures=\['ArceeForCausalLM'\]",
    ),
    "a mistake in the model": (
        HEADER + "MODEL = replace(LLAMA, architecture='ArceeForCausalLM', passes={'decode': replace(LLAMA.decode, "
        "block=lambda ops, config, layer, x, residual: (ops.all_reduce(x), residual))})\n",
        r"ArceeForCausalLM, block of layer 0: all_reduce sums a tensor that is whole on every rank",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_one_sentence_on_every_rank(name: str, directory: Path, tmp_path: Path) -> None:
    text, sentence = FILES[name]
    (path := tmp_path / "mine.py").write_text(text)

    def rank(comm: Communicator) -> str:
        with pytest.raises(ConfigError, match=sentence) as caught:
            LLM(directory, tensor_parallel_size=2, comm=comm, engine="numpy", model_file=path)
        return str(caught.value)

    assert len(set(run_ranks(2, rank))) == 1
    with pytest.raises(ConfigError, match=sentence):
        check.main(["--model", str(directory), "--model-file", str(path)])


@pytest.mark.parametrize(("command", "flags"), [(split, ("--tp", "2")), (quantize, ("--scheme", "int8"))])
def test_a_mistake_in_the_model_is_found_before_anything_is_written(
    command: Any, flags: tuple[str, ...], directory: Path, tmp_path: Path
) -> None:
    text, sentence = FILES["a mistake in the model"]
    (path := tmp_path / "mine.py").write_text(text)
    words = ["--model", str(directory), "--model-file", str(path), "--output", str(tmp_path / "out"), *flags]
    with pytest.raises(ConfigError, match=sentence):
        command.main(words)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.py"]


def test_a_file_that_does_something_else_on_another_rank_is_refused(directory: Path, tmp_path: Path) -> None:
    (path := tmp_path / "mine.py").write_text(
        "import random\n" + HEADER + "FACTOR = random.random()\n\n\ndef head(ops, config, x, residual):\n"
        "    return LLAMA.decode.head(ops, config, ops.scale(x, FACTOR), residual)\n\n\n"
        "MODEL = replace(LLAMA, architecture='ArceeForCausalLM', passes={'decode': replace(LLAMA.decode, head=head)})\n"
    )  # fmt: skip

    def rank(comm: Communicator) -> str:
        with pytest.raises(
            ConfigError, match=r"rank 1 on \S+ and rank 0 on \S+ differ in what the model file does"
        ) as caught:
            LLM(directory, tensor_parallel_size=2, comm=comm, engine="numpy", model_file=path)
        return str(caught.value)

    assert len(set(run_ranks(2, rank))) == 1


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_layers_may_have_numbers_of_heads_of_their_own(cache: str, directory: Path, tmp_path: Path) -> None:
    (path := tmp_path / "mine.py").write_text(
        HEADER
        + """
from phalanx.models import AttentionSpec, blocks


def sized(config, layer):
    return replace(config, num_heads=2 * (layer + 1), num_kv_heads=layer + 1, intermediate_size=48 * (layer + 1))


def attention(config, layer):
    return AttentionSpec.of(sized(config, layer))


def block(ops, config, layer, x, residual):
    return blocks.pre_norm(ops, config, layer, x, residual, attention(config, layer))


def block_weights(config, layer):
    return LLAMA.decode.block_weights(sized(config, layer), layer)


DECODE = replace(LLAMA.decode, block=block, block_weights=block_weights, attention=attention)
MODEL = replace(LLAMA, architecture="ArceeForCausalLM", passes={"decode": DECODE})
"""
    )
    fields = json.loads((directory / "config.json").read_text()) | {"hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    options = {"model_file": path, "load_format": "dummy", "kv_cache_dtype": cache}
    expected = tokens_of(generate_on_threads(tmp_path, [(5, 6, 7, 8, 9)], params, **options))
    for tp, pp in ((2, 1), (2, 3)):
        assert tokens_of(generate_on_threads(tmp_path, [(5, 6, 7, 8, 9)], params, tp, pp, **options)) == expected


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model-file .*nowhere\.py cannot be read: No such file"):
        model_from_file(tmp_path / "nowhere.py")
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"bytes\.py is not UTF-8 text"):
        model_from_file(tmp_path / "bytes.py")


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "modeling_my.py").write_text("raise SystemExit('ran')\n")
    raw = {"architectures": ["MyForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_my.MyForCausalLM"}}
    with pytest.raises(ConfigError, match=r"auto_map\) is never run, --model-file takes yours"):
        find_model(raw)


def test_a_split_says_by_which_file_and_loads_with_it(directory: Path, tmp_path: Path) -> None:
    output = tmp_path / "split"
    arguments = ["--model", str(directory), "--model-file", str(FILE), "--output", str(output), "--tp", "2"]
    assert split.main(arguments) == 0
    model = model_from_file(FILE)
    assert model is not None
    assert read_manifest(ModelDirectory.at(output)).model_code == model.code
    assert len(model.code) == 64
    assert generate(output, 1, 2, engine="numpy").token_ids == load_reference(ARCEE).greedy


def test_the_planner_takes_a_model_file(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--model", str(directory), "--model-file", str(FILE), "--json"]) == 0
    (rank,) = json.loads(capsys.readouterr().out)["ranks"]
    assert rank["weights"]["mlp"] == 3 * 2 * 48 * 80 * 4


Offer = Callable[..., None]


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Offer]:
    """Let an installed package offer ARCEE's file under any names."""
    assert FILE is not None
    (tmp_path / "offered_arcee.py").write_text(FILE.read_text())
    monkeypatch.syspath_prepend(str(tmp_path))

    def offered(*names: str) -> None:
        entries = [importlib.metadata.EntryPoint(name, "offered_arcee", "phalanx.models") for name in names]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)

    yield offered
    sys.modules.pop("offered_arcee", None)


def test_installed_packages_offer_families_that_are_not_built_in(offer: Offer) -> None:
    offer("ArceeForCausalLM", "LlamaForCausalLM")
    own = model_from_file(FILE)
    assert own is not None
    assert find_model(ARCEE.config).code == own.code
    assert find_model(CASES_BY_NAME["llama-plain"].config).code == "", "a package does not replace a built-in family"
    offer("ArceeForCausalLM", "ArceeForCausalLM")
    with pytest.raises(ConfigError, match="ArceeForCausalLM is offered by several packages"):
        find_model(ARCEE.config)
    offer()
    with pytest.raises(ConfigError, match=r"architectures=\['ArceeForCausalLM'\] in config.json is not supported"):
        find_model(ARCEE.config)


def test_a_file_may_be_given_as_text(directory: Path) -> None:
    assert generate(directory, 1, 1, engine="numpy", model_file=str(FILE)).token_ids == load_reference(ARCEE).greedy


def test_an_installed_packages_family_runs_on_two_by_two_ranks_and_in_a_split(
    offer: Offer, directory: Path, tmp_path: Path
) -> None:
    offer("ArceeForCausalLM")
    assert generate(directory, 2, 2, engine="numpy", model_file=None).token_ids == load_reference(ARCEE).greedy
    output = tmp_path / "split"
    assert split.main(["--model", str(directory), "--output", str(output), "--tp", "2"]) == 0
    assert generate(output, 2, 1, engine="numpy", model_file=None).token_ids == load_reference(ARCEE).greedy


Surface = dict[str, dict[str, list[str] | None]]


def test_the_surface_keeps_what_is_recorded() -> None:
    """Names and parameters with defaults may be added; for anything else raise `API_VERSION` and record again."""
    current, recorded = surface(), json.loads(SURFACE.read_text())
    for owner, names in recorded.items():
        assert names.keys() <= current[owner].keys(), owner
        for name, parameters in names.items():
            given = current[owner][name]
            if parameters is None or given is None:
                assert parameters == given, (owner, name)
                continue
            assert given[: len(parameters)] == parameters, (owner, name)
            assert all("=" in added for added in given[len(parameters) :]), (owner, name)


def surface() -> Surface:
    """By owner: names, and the parameters of what can be called."""
    models = phalanx.models
    found: Surface = {
        name: {each: _parameters(getattr(module, each)) for each in module.__all__}
        for name, module in {"": models, "blocks": models.blocks, "declarations": models.declarations}.items()
    }
    for kind in (models.Ops, models.ConfigReader, models.Family, models.Pass):
        found[kind.__name__] = {
            name: _parameters(getattr(kind, name)) for name in vars(kind) if not name.startswith("_")
        }
    return found


def _parameters(value: Any) -> list[str] | None:
    is_class = inspect.isclass(value) and value.__module__.startswith("phalanx") and not issubclass(value, Exception)
    if not inspect.isfunction(value) and not is_class:
        return None
    return [
        parameter.name if parameter.default is parameter.empty else f"{parameter.name}={_shown(parameter.default)}"
        for parameter in inspect.signature(value).parameters.values()
    ]


def _shown(default: Any) -> str:
    return default.__name__ if inspect.isfunction(default) else repr(default)
