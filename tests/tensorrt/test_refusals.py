"""What cannot work is refused with what, why and what to do."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from phalanx.checkpoints.checkpoint import Checkpoint, open_checkpoint
from phalanx.parallel.communicator import SelfCommunicator
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.topology import Layout, Topology
from phalanx.runtime.config import EngineConfig, ModelConfig
from phalanx.runtime.executors.rank_spec import RankSpec
from phalanx.runtime.executors.registry import choose_engine
from phalanx.runtime.executors.tensorrt import installed
from phalanx.runtime.executors.tensorrt import library as trt_adapter
from phalanx.runtime.executors.tensorrt.build import create_trt_executor
from phalanx.runtime.executors.tensorrt.builder import network_shape
from phalanx.runtime.executors.tensorrt.engine_directory import EngineDirectory, EngineIdentity, weights_checksum
from phalanx.runtime.executors.tensorrt.installed import load_tensorrt
from phalanx.runtime.executors.tensorrt.library import TensorRT
from phalanx.runtime.executors.tensorrt.loading import check_sizes, find_engine
from phalanx.runtime.executors.tensorrt.network import NetworkShape
from phalanx.runtime.models import find_model

from ..support.checkpoints import CASES_BY_NAME, write_checkpoint

SHAPE = NetworkShape("float32", 4, 64, 32)


def _config(case: str = "llama-plain") -> ModelConfig:
    return find_model(CASES_BY_NAME[case].config).read_config(CASES_BY_NAME[case].config)


def _identity(**changes: Any) -> EngineIdentity:
    fields = {"config": _config(), "shape": SHAPE, "layout": Layout(tp=2), "weights": "0" * 32,
              "library": "tensorrt 11.4.0.106", "targets": ("8.9",)}  # fmt: skip
    return EngineIdentity(**{**fields, **changes})


def test_another_model_file_makes_another_key() -> None:
    built_in, first, second = (_identity(model_code=code) for code in ("", "a" * 64, "b" * 64))
    assert built_in.key == _identity().key
    assert len({built_in.key, first.key, second.key}) == 3


def _alone(checkpoint: Checkpoint, options: EngineConfig) -> RankSpec:
    """The only rank."""
    model = find_model(checkpoint.config)
    config = model.read_config(checkpoint.config)
    return RankSpec(model, config, checkpoint, options, Topology(Layout()), SelfCommunicator())


@pytest.fixture
def directory(tmp_path: Path) -> EngineDirectory:
    """Engines of `_identity`."""
    directory = EngineDirectory.of(tmp_path / "engines", tmp_path / "llama-plain")
    assert directory.prepare(_identity()) == []
    for rank in range(2):
        directory.engine(_identity(), rank).write_bytes(b"plan")
    return directory


def _importing(monkeypatch: pytest.MonkeyPatch, modules: dict[str, ModuleType | Exception]) -> None:
    """Make imports of TensorRT give these modules or raise these errors, and the others be missing."""
    real = importlib.import_module

    def import_module(name: str) -> ModuleType:
        if not name.startswith("tensorrt"):
            return real(name)
        found = modules.get(name, ModuleNotFoundError(f"No module named {name!r}", name=name))
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(installed.importlib, "import_module", import_module)


def _module(version: str) -> Any:
    return SimpleNamespace(__version__=version)


def test_no_tensorrt_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    _importing(monkeypatch, {})
    with pytest.raises(ConfigError, match=r"none is installed; install one: pip install -e '\.\[tensorrt\]'"):
        load_tensorrt()


def test_bindings_without_their_libraries_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _importing(monkeypatch, {"tensorrt": ImportError("libnvinfer.so.11: cannot open shared object file")})
    with pytest.raises(ConfigError, match=r"found tensorrt, whose libraries do not load \(libnvinfer.so.11"):
        load_tensorrt()


@pytest.mark.parametrize(
    ("name", "version", "limit"),
    [("tensorrt", "10.15.1.29", "at least 10.16"), ("tensorrt", "12.0.0.1", "below 12.0"),
     ("tensorrt_rtx", "1.6.1.120", "at least 1.7")],
)  # fmt: skip
def test_unsupported_release_names_the_limits(
    name: str, version: str, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _importing(monkeypatch, {name: _module(version)})
    with pytest.raises(ConfigError, match=rf"{name} {version} is installed, but Phalanx needs .*{limit}.*pip install"):
        load_tensorrt()


@pytest.mark.parametrize(
    ("capability", "expected"), [(None, "tensorrt_rtx"), ("9.0", "tensorrt")], ids=["without-gpu", "with-gpu"]
)
def test_of_two_libraries_the_one_that_can_work_here_is_taken(
    capability: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _importing(monkeypatch, {"tensorrt": _module("11.4.0.106"), "tensorrt_rtx": _module("1.7.1.116")})
    monkeypatch.setattr(installed, "compute_capability", lambda: capability)
    assert load_tensorrt().flavour == expected


def _rtx() -> TensorRT:
    capabilities = SimpleNamespace(SM75=1, SM80=2, SM86=3, SM89=4, SM120=5, NONE=0, CURRENT=9)
    return TensorRT(SimpleNamespace(ComputeCapability=capabilities), "tensorrt_rtx", "1.7.1.116")  # type: ignore[arg-type]


def test_rtx_on_a_data_centre_gpu_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"9\.0 is not supported by tensorrt_rtx 1\.7.*8\.0, 8\.6, 8\.9, 12\.0.*--engine cuda"
    ):
        _rtx().check_target("9.0")


def test_gpu_older_than_the_attention_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"7\.5 is below 8\.0, which TensorRT's attention needs; use --engine"):
        TensorRT(ModuleType("tensorrt"), "tensorrt", "11.4.0.106").check_target("7.5")


def test_building_without_gpu_and_target_says_which_targets_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_adapter, "compute_capability", lambda: None)
    with pytest.raises(ConfigError, match=r"no GPU.*--target-compute-capability with one or more of 8\.0, 8\.6, 8\.9"):
        _rtx().default_targets()
    with pytest.raises(ConfigError, match=r"no GPU.*install tensorrt-rtx"):
        TensorRT(ModuleType("tensorrt"), "tensorrt", "11.4.0.106").default_targets()


def test_tensorrt_builds_for_its_own_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_adapter, "compute_capability", lambda: "9.0")
    library = TensorRT(ModuleType("tensorrt"), "tensorrt", "11.4.0.106")
    library.check_targets(("9.0",))
    with pytest.raises(ConfigError, match=r"8\.9 is not this machine's GPU \(9\.0\).*build on the target machine"):
        library.check_targets(("8.9",))


def test_engines_that_fit_are_found(directory: EngineDirectory) -> None:
    path = directory.check(_identity(targets=("8.6", "8.9")), 1, "8.9")
    assert path.name == "llama-plain_float32_tp2_pp1_rank1.engine"
    assert directory.read_shape() == SHAPE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "1" * 32}, r"stale: the checkpoint's weights changed.*phalanx build"),
        (
            {"library": "tensorrt 11.0.0.114"},
            r"built by tensorrt 11\.4\.0\.106, but tensorrt 11\.0\.0\.114 is installed",
        ),
        ({"layout": Layout(tp=4)}, r"built for tensor_parallel_size=2, but tensor_parallel_size=4 is asked for"),
        ({"config": _config("gpt2-plain")}, r"built for model_config\.architecture=LlamaForCausalLM, but"),
        ({"shape": NetworkShape("float16", 4, 64, 32)}, r"built for dtype=float32, but dtype=float16"),
    ],
    ids=["weights", "version", "layout", "model", "dtype"],
)
def test_stale_or_foreign_engines_say_what_differs(
    changes: dict[str, Any], message: str, directory: EngineDirectory
) -> None:
    with pytest.raises(ConfigError, match=message):
        directory.check(_identity(**changes), 0, "8.9")
    assert _identity(**changes).key != _identity().key


def test_engines_for_another_gpu_are_refused(directory: EngineDirectory) -> None:
    with pytest.raises(ConfigError, match=r"built for compute capability 8\.9, but this GPU has 8\.6; build them here"):
        directory.check(_identity(), 0, "8.6")


def test_missing_engine_damaged_and_absent_config_are_told_apart(directory: EngineDirectory, tmp_path: Path) -> None:
    directory.engine(_identity(), 1).unlink()
    with pytest.raises(ConfigError, match=r"rank1\.engine is missing from .*phalanx build --rank 1"):
        directory.check(_identity(), 1, "8.9")
    directory.config_path.write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        directory.read_config()
    directory.config_path.write_text("{}")
    with pytest.raises(ConfigError, match=r"was not written by phalanx build"):
        directory.read_config()
    directory.config_path.write_text('{"key": "0"}')
    with pytest.raises(ConfigError, match=r"lacks dtype, max_num_seqs, max_model_len, max_prefill_tokens"):
        directory.read_shape()
    with pytest.raises(ConfigError, match=r"holds no engines \(no config\.json\); make them with phalanx build"):
        EngineDirectory(tmp_path / "nothing", "x").read_config()


def test_engines_are_found_whatever_the_checkpoint_is_called_now(directory: EngineDirectory) -> None:
    assert EngineDirectory.existing(directory.path) == directory


def test_a_new_build_removes_what_it_makes_stale_and_nothing_else(directory: EngineDirectory) -> None:
    changed = _identity(weights="1" * 32)
    assert directory.prepare(_identity()) == []
    assert [path.name[-12:] for path in directory.prepare(changed)] == ["rank0.engine", "rank1.engine"]
    assert not list(directory.path.glob("*.engine"))
    directory.engine(changed, 0).write_bytes(b"plan")
    assert directory.prepare(changed) == []
    assert directory.check(changed, 0, "8.9").exists()
    with pytest.raises(
        ConfigError, match=r"holds other engines \(llama-plain_float32_tp2_pp1_rank0.engine\); use another"
    ):
        directory.prepare(_identity(layout=Layout(tp=4)))
    assert directory.engine(changed, 0).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EngineConfig(max_num_seqs=5), r"--max-num-seqs=5 exceeds the 4 .*use --max-num-seqs 4"),
        (EngineConfig(max_num_seqs=4, max_model_len=65), r"--max-model-len=65 exceeds the 64"),
        (EngineConfig(max_num_seqs=4, dtype="float16"), r"built for dtype=float32, but float16 was requested"),
    ],
)
def test_options_beyond_the_engines_are_refused(options: EngineConfig, message: str) -> None:
    check_sizes(EngineConfig(max_num_seqs=4, max_model_len=64), _config(), SHAPE)
    with pytest.raises(ConfigError, match=message):
        check_sizes(options, _config(), SHAPE)


def test_longer_sequences_than_the_model_has_positions_for_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--max-model-len=129 is beyond the 128 positions"):
        network_shape(_config(), "auto", 4, 129, 32)
    assert network_shape(_config(), "auto", 4, None, 2048) == NetworkShape("float32", 4, 128, 128)


def test_serving_without_a_gpu_points_to_building(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    if trt_adapter.compute_capability() is not None:
        pytest.skip("this machine has a GPU")
    with open_checkpoint(write_checkpoint(CASES_BY_NAME["llama-plain"], tmp_path / "model")) as checkpoint:
        spec = _alone(checkpoint, EngineConfig(engine="tensorrt"))
        with pytest.raises(ConfigError, match=r"found no GPU here; engines can be built here .*phalanx build"):
            create_trt_executor(spec)


@pytest.mark.parametrize(
    ("cache", "message"),
    [("fp8", r"held as fp8 .*the cache layer of tensorrt_rtx 1\.7.* use --kv-cache-dtype bfloat16, or --engine cuda"),
     ("float16", r"--kv-cache-dtype=float16 is neither fp8 nor the compute type bfloat16")],
)  # fmt: skip
def test_a_cache_that_the_network_cannot_hold_is_refused_first(cache: Any, message: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    with open_checkpoint(write_checkpoint(CASES_BY_NAME["llama-bfloat16"], tmp_path / "model")) as checkpoint:
        options = EngineConfig(engine="tensorrt", kv_cache_dtype=cache)
        with pytest.raises(ConfigError, match=message):
            create_trt_executor(_alone(checkpoint, options))


def test_auto_never_chooses_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    from phalanx.kernels import device

    for available in (False, True):
        monkeypatch.setattr(device, "gpu_is_available", lambda available=available: available)
        assert choose_engine("auto") == ("cuda" if available else "numpy")
    assert choose_engine("tensorrt") == "tensorrt"


def test_changed_weights_change_the_checksum_and_only_then_are_read_again(tmp_path: Path) -> None:
    path, memory = write_checkpoint(CASES_BY_NAME["llama-plain"], tmp_path / "model"), tmp_path / "memory"
    with open_checkpoint(path) as checkpoint:
        first = weights_checksum(checkpoint, memory)
        (remembered,) = memory.iterdir()
        remembered.write_text("f" * 32)
        assert weights_checksum(checkpoint, memory) == "f" * 32
    write_checkpoint(CASES_BY_NAME["llama-plain"], path, seed=1)
    with open_checkpoint(path) as checkpoint:
        assert weights_checksum(checkpoint, memory) not in (first, "f" * 32)


def test_first_use_builds_and_later_use_finds_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    monkeypatch.setenv("PHALANX_CACHE_DIR", str(tmp_path / "cache"))
    path = write_checkpoint(CASES_BY_NAME["gpt2-plain"], tmp_path / "model")
    options = EngineConfig(engine="tensorrt", dtype="float16", max_num_seqs=2, max_model_len=32)

    def find(options: EngineConfig) -> Path:
        with open_checkpoint(path) as checkpoint:
            engine, _ = find_engine(load_tensorrt(), _alone(checkpoint, options), "8.9")
        return engine

    engine = find(options)
    assert json.loads((engine.parent / "config.json").read_text())["key"] == engine.parent.name
    built = engine.stat().st_mtime_ns
    assert find(options) == engine
    assert engine.stat().st_mtime_ns == built
    given = EngineConfig(engine="tensorrt", dtype="float16", max_num_seqs=2, max_model_len=16, engine_dir=engine.parent)
    assert find(given) == engine
    write_checkpoint(CASES_BY_NAME["gpt2-plain"], path, seed=1)
    with pytest.raises(ConfigError, match="stale"):
        find(given)
    assert find(options) != engine


def test_engines_of_quantised_weights_serve_no_start_without_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    monkeypatch.setenv("PHALANX_CACHE_DIR", str(tmp_path / "cache"))
    path = write_checkpoint(CASES_BY_NAME["gpt2-plain"], tmp_path / "model")
    plain = EngineConfig(engine="tensorrt", dtype="float16", max_num_seqs=2, max_model_len=32)
    quantised = replace(plain, quantize="int8")

    def find(options: EngineConfig) -> Path:
        with open_checkpoint(path) as checkpoint:
            return find_engine(load_tensorrt(), _alone(checkpoint, options), "8.9")[0]

    engines = [find(options) for options in (quantised, plain)]
    assert engines[0].parent != engines[1].parent
    for engine, options in zip(engines, (plain, quantised), strict=True):
        with pytest.raises(ConfigError, match=r"stale: .*--quantize, changed since"):
            find(replace(options, engine_dir=engine.parent))


def test_shard_is_read_in_the_compute_type_once(tmp_path: Path) -> None:
    """Half of what float32 would take, and tied tables share one array."""
    from phalanx.runtime.executors.tensorrt.builder import BuildRequest, load_shard

    path = write_checkpoint(CASES_BY_NAME["llama-one-kv-head-tied"], tmp_path / "model")
    with open_checkpoint(path) as checkpoint:
        model = find_model(checkpoint.config)
        request = BuildRequest(model, _config("llama-one-kv-head-tied"), NetworkShape("bfloat16", 2, 32, 16), ("8.9",))
        weights = load_shard(request, checkpoint.source, Topology(Layout())).arrays()
    assert {array.dtype.name for array in weights.values()} == {"bfloat16"}
    assert np.shares_memory(weights["embed.weight"], weights["lm_head.weight"])
