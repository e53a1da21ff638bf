"""Networks of quantised checkpoints, without a GPU: interpreted, they compute the definitions; built, they hold codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")

from launch import quantize
from phalanx.checkpoints.dtypes import NUMPY_DTYPES
from phalanx.checkpoints.formats import DENSE
from phalanx.checkpoints.quantization.encodings import PackedWords
from phalanx.checkpoints.quantization.group_codes import GroupCodes, Stored
from phalanx.checkpoints.quantization.held import QuantizeName
from phalanx.checkpoints.quantization.numbers import E4M3, quantize_rows
from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.parallel.communicator import Communicator, SelfCommunicator
from phalanx.parallel.thread_comm import run_ranks
from phalanx.parallel.topology import Layout, Topology
from phalanx.runtime.executors.tensorrt.builder import build_engine, load_shard
from phalanx.runtime.executors.tensorrt.graph import Graph
from phalanx.runtime.executors.tensorrt.installed import load_tensorrt
from phalanx.runtime.executors.tensorrt.layers import Constants, TrtLayers
from phalanx.runtime.executors.tensorrt.quantised import QuantisedProducts
from phalanx.runtime.executors.weights import Weight, Weights
from phalanx.runtime.step import StepPlan

from ..quantization import writers
from ..quantization.test_checkpoints import ALL, CASE, ODD, WEIGHT_ONLY, WITH_INPUTS
from ..support.checkpoints import CASES_BY_NAME, write_checkpoint
from .interpreter import NetworkInterpreter
from .networks import open_request
from .steps import NUM_DECODE_STEPS, PROMPT_LENGTHS, plans, reference_executor, run
from .test_numbers import SHAPE, TOLERANCE, difference, interpreted, reference

Array = np.ndarray[Any, Any]

FAMILIES = ("gpt2-plain", "gemma-one-kv-head", "qwen2-plain", "opt-narrow-norm-last", "falcon-two-norms", "phi3-window")
PRODUCTS = ("qkv", "output", "gate_up", "down")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quantised")
    for case in (CASE, ODD):
        write_checkpoint(case, root / case.name / "dense")
    return root


def written(root: Path, name: str, case: str = CASE.name) -> Path:
    path = root / case / name
    if not path.exists():
        module, section = ALL[name]
        writers.write(root / case / "dense", path, root / case / f"{name}-twin", module, section)
    return path


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_networks_of_weight_only_checkpoints_give_the_reference_logits(root: Path, name: str, tp: int) -> None:
    path = written(root, name)
    steps, expected, _ = reference(path, CASE.config["vocab_size"])
    assert difference(interpreted(path, Layout(tp=tp), steps)[0], expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["ct-w8-channel", "ct-w4-g16-asymmetric"])
def test_a_quantised_head_is_split_over_the_vocabulary(root: Path, name: str) -> None:
    """101 tokens on two ranks: the second pads its rows."""
    module, section = ALL[name]
    path = root / f"{name}-head"
    with_head = {**section, "ignore": []}
    writers.write(
        root / CASE.name / "dense", path, root / f"{name}-head-twin", module, with_head, also=("lm_head.weight",)
    )
    steps, expected, _ = reference(path, CASE.config["vocab_size"])
    assert difference(interpreted(path, Layout(tp=2), steps)[0], expected) <= TOLERANCE


@pytest.mark.parametrize("scheme", [("w8a16",), ("w4a16", "--group-size", "4")], ids=lambda scheme: scheme[0])
@pytest.mark.parametrize("family", FAMILIES)
def test_networks_of_quantised_families_give_the_reference_logits(
    family: str, scheme: tuple[str, ...], tmp_path: Path
) -> None:  # fmt: skip
    """Biases, matrices stored ``[in, out]``, one projection for all of q, k and v, gates."""
    case = CASES_BY_NAME[family]
    path = tmp_path / "quantised"
    arguments = ["--model", str(write_checkpoint(case, tmp_path / "dense")), "--output", str(path), "--scheme", *scheme]
    assert quantize.main(arguments) == 0
    steps, expected, _ = reference(path, case.config["vocab_size"])
    assert difference(interpreted(path, Layout(tp=2), steps)[0], expected) <= TOLERANCE


def fixed_steps(vocab_size: int) -> list[StepPlan]:
    """Random tokens, so that no engine has to find them first."""
    random = np.random.default_rng(11)
    return list(
        plans([random.integers(0, vocab_size, length + NUM_DECODE_STEPS + 2).tolist() for length in PROMPT_LENGTHS])
    )


def numpy_logits(path: Path, steps: list[StepPlan], tp: int) -> list[Array]:
    def body(comm: Communicator) -> list[Array]:
        executor = reference_executor(path, SHAPE, comm=comm)
        run(executor, steps, comm.rank == 0)
        return executor.recorded

    return run_ranks(tp, body)[0] if tp > 1 else body(SelfCommunicator())


def divergence(found: list[Array], expected: list[Array]) -> float:
    """Mean KL divergence of ``found`` from ``expected``, rows of logits, in nats."""
    logs = []
    for rows in (found, expected):
        logits = np.concatenate(rows).astype(np.float64)
        logs.append(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    return float((np.exp(logs[1]) * (logs[1] - logs[0])).sum(axis=1).mean())


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", WITH_INPUTS)
def test_networks_that_quantise_inputs_compute_what_the_numpy_engine_does(root: Path, name: str, tp: int) -> None:
    """A last bit may move an input to the neighbouring code, and that all later ones; what codes of inputs cost is more."""
    path = written(root, name)
    steps = fixed_steps(CASE.config["vocab_size"])
    expected, plain = (numpy_logits(one, steps, tp) for one in (path, path.with_name(f"{name}-twin")))
    found = interpreted(path, Layout(tp=tp), steps)[0]
    assert divergence(found, expected) <= divergence(plain, expected) / 2


def interpreted_product(weight: Weight[Array], x: Array, dtype: Any) -> Array:
    """``x`` times ``weight``, float32 or of the compute type ``dtype``."""
    library = load_tensorrt()
    builder = library.module.Builder(library.logger(lambda severity, message: None))
    graph = Graph(library, library.create_network(builder))
    product = QuantisedProducts(graph, np.dtype(dtype)).product(
        graph.input("x", np.dtype(dtype), (-1, x.shape[1])), weight
    )
    graph.output("y", product)
    interpreter = NetworkInterpreter(library.module, graph.network, SelfCommunicator(), (graph, builder))
    return interpreter.run({"x": x})["y"]


def reference_product(weight: Weight[Array], x: Array) -> Array:
    return weight.format.product(x, weight.format.operand(weight.components), lambda x, weight: x @ weight.T)


def inputs(columns: int) -> Array:
    """Tokens of several sizes, zeros and outliers among them."""
    x = np.random.default_rng(5).normal(size=(6, columns)) * np.array([[1], [30], [0], [1e-3], [4], [1]])
    x[4, ::7] *= 50
    return x.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("case", [CASE.name, ODD.name])
@pytest.mark.parametrize("name", ALL)
def test_products_are_those_of_the_definition(root: Path, name: str, case: str) -> None:
    _, request, source = open_request(written(root, name, case), SHAPE)
    for rank in range(2):
        weights = load_shard(request, source, Topology(Layout(tp=2), rank))
        for product in PRODUCTS:
            weight = weights.linear(f"layers.1.{product}")
            if weight.format == DENSE:
                continue  # the one that some formats leave as it is
            x = inputs(weight.components["codes"].shape[1])
            expected = reference_product(weight, x)
            found = interpreted_product(weight, x, np.float32)
            if isinstance(weight.format, RowCodes) and weight.format.kind == "int8" and weight.format.input != "plain":
                np.testing.assert_array_equal(found, expected, err_msg=product)
            else:
                np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max(), err_msg=product)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_quantize_makes_codes_of_values_of_the_compute_type(root: Path, kind: QuantizeName) -> None:
    _, request, source = open_request(root / CASE.name / "dense", replace(SHAPE, dtype="bfloat16"))
    place = Topology(Layout(tp=2), 1)
    plain, codes = (load_shard(one, source, place) for one in (request, replace(request, quantize=kind)))
    for weight in codes.values():
        values = plain.linear(weight.name).components["weight"].astype(np.float32)
        if weight.name.endswith(PRODUCTS):
            expected = quantize_rows(values, kind)
            np.testing.assert_array_equal(weight.components["codes"].view(np.int8), expected.codes.view(np.int8))
            np.testing.assert_array_equal(weight.components["scale"], expected.scale[:, 0])
            assert weight.format == RowCodes(kind)
        else:
            assert weight.components["weight"].dtype == NUMPY_DTYPES["BF16"]


@pytest.mark.parametrize("name", ["int8 weight-only", "int4 in groups"])
def test_scales_that_are_not_positive_are_no_dequantisation_layers(name: str) -> None:
    """The layer asks for positive ones; the rows that pad a vocabulary have scales of zero."""
    chosen, _ = HELD[name]
    components = components_of_random_codes(chosen, 256)
    components["scale"][7], components["scale"][9] = 0, -1
    weight = Weight("lm_head", chosen, components)
    found, expected = interpreted_product(weight, inputs(256), np.float16), reference_product(weight, inputs(256))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    assert not expected[:, 7].any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_scales_by_powers_of_two_are_exact_at_and_next_to_powers(dtype: Any) -> None:
    """Also the smallest, of zeros, and those of the compute type's largest value and of infinity."""
    powers = (448 * 2.0 ** np.arange(-10, 7)).astype(dtype)
    beyond = [0, 1e-7, np.finfo(dtype).max, np.inf]
    values = np.concatenate((powers, np.nextafter(powers, dtype(0)), np.nextafter(powers, dtype(60000)), beyond))
    x = np.stack((values, values * 0.03), axis=1).astype(np.float32)
    stored = Stored("w", "s", dtype="F8_E4M3")
    chosen = GroupCodes("fp8 blocks", stored, 2, 2, input="fp8 groups by powers of two")
    components = {"codes": np.array([[1, 0], [0, 1]], E4M3), "scale": np.ones((2, 1), np.float32)}
    weight = Weight("layers.0.down", chosen, components)
    with np.errstate(
        invalid="ignore", over="ignore"
    ):  # infinity times the inverse of its scale, and the largest rounded up
        found, expected = interpreted_product(weight, x, dtype), reference_product(weight, x)
    assert np.isnan(expected[-1]).all()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "chosen", [RowCodes("int8"), RowCodes("fp8", input="static"), RowCodes("int8", input="plain")], ids=str
)
def test_a_bias_is_added_before_the_sum_is_rounded(chosen: RowCodes) -> None:
    random = np.random.default_rng(4)
    components = chosen.quantize(random.normal(size=(12, 40)).astype(np.float32))
    components["input_scale"] = np.array([0.5, 0.125], np.float32)
    weight = Weight("layers.0.up", chosen, components, random.normal(size=12).astype(np.float16))
    library = load_tensorrt()
    builder = library.module.Builder(library.logger(lambda severity, message: None))
    graph, half = Graph(library, library.create_network(builder)), np.dtype(np.float16)
    x = graph.input("x", half, (-1, 40))
    layers = TrtLayers(
        graph, Constants(graph, Weights({weight.name: weight}), half), half, graph.extent(graph.shape(x), 0)
    )
    graph.output("y", layers.column_linear(x, weight.name))
    interpreter = NetworkInterpreter(library.module, graph.network, SelfCommunicator(), (graph, builder, weight))
    expected = reference_product(weight, inputs(40)) + weight.bias
    np.testing.assert_allclose(interpreter.run({"x": inputs(40)})["y"], expected, atol=3e-6 * np.abs(expected).max())
    rounds = [layer.get_output(0).dtype.name for layer in interpreter.layers()][-2:]
    assert rounds == (["HALF", "HALF"] if chosen.input == "plain" else ["FLOAT", "HALF"])


def test_nibbles_in_another_order_are_noticed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(root, "ct-w4-g64")
    steps, expected, _ = reference(path, CASE.config["vocab_size"])
    packed_codes = Graph.packed_codes

    def swapped(graph: Graph, name: str, array: Array) -> Any:
        pairs = array.reshape(len(array), -1, 2)[:, :, ::-1]
        return packed_codes(graph, name, np.ascontiguousarray(pairs.reshape(array.shape)))

    monkeypatch.setattr(Graph, "packed_codes", swapped)
    assert difference(interpreted(path, Layout(), steps)[0], expected) > 20 * TOLERANCE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["ct-w4-g64", "ct-w8-channel", "awq"])
def test_16_bit_networks_hold_the_same_codes_and_scales(root: Path, name: str, dtype: str) -> None:
    """Scales that the compute type holds exactly are of that type, others float32: neither is rounded."""
    path = written(root, name)
    steps, expected, _ = reference(path, CASE.config["vocab_size"], {"float16": "F16", "bfloat16": "BF16"}[dtype])
    shape = replace(SHAPE, dtype=dtype)
    assert difference(interpreted(path, Layout(tp=2), steps, shape)[0], expected) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ALL)
def test_engines_of_every_scheme_build_without_a_gpu(root: Path, name: str, dtype: str, tmp_path: Path) -> None:
    library, request, source = open_request(written(root, name, ODD.name), replace(SHAPE, dtype=dtype))
    place = Topology(Layout(tp=2), 1)
    report = build_engine(library, request, source, place, tmp_path / "engine", tmp_path / "cache")
    assert report.engine_bytes == (tmp_path / "engine").stat().st_size > 100_000


def product_engine_bytes(weight: Weight[Array], dtype: str = "float16") -> int:
    """Size of an engine of one product for compute capability 8.9."""
    library = load_tensorrt()
    builder = library.module.Builder(library.logger(lambda severity, message: None))
    graph = Graph(library, library.create_network(builder))
    columns = next(iter(weight.components.values())).shape[1]
    compute = NUMPY_DTYPES[{"float16": "F16", "bfloat16": "BF16"}[dtype]]
    x = graph.input("x", compute, (-1, columns))
    graph.output("y", Constants(graph, Weights({weight.name: weight}), compute).product(x, weight.name))
    config = builder.create_builder_config()
    library.set_targets(config, ("8.9",))
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, columns), (8, columns), (64, columns))
    config.add_optimization_profile(profile)
    return int(builder.build_serialized_network(graph.network, config).nbytes)


INT4 = Stored("packed", "scale", codes_encoding=PackedWords(4, 1))
HELD = {
    "plain": (DENSE, 2.0),
    "fp8": (RowCodes("fp8"), 1.0),
    "fp8 static": (RowCodes("fp8", input="static"), 1.0),
    "int8": (RowCodes("int8"), 1.0),
    "int8 weight-only": (RowCodes("int8", input="plain"), 1.0),
    "int4 in groups": (GroupCodes("int4", INT4, 128, 128), 0.5),
    "int4 in groups with zeros": (GroupCodes("int4", replace(INT4, zero="zero"), 128, 128), 0.5),
    "int8 in groups": (GroupCodes("int8", replace(INT4, codes_encoding=None), 128, 128), 1.0),
    "int4 in order of activations": (GroupCodes("int4", replace(INT4, zero="zero", group_index="g_idx"), 128), 0.5),
    "fp8 blocks": (GroupCodes("fp8 blocks", Stored("w", "s", dtype="F8_E4M3"), 128, 128, input="fp8 groups"), 1.0),
}


def components_of_random_codes(chosen: Any, size: int) -> dict[str, Array]:
    random = np.random.default_rng(3)
    if chosen is DENSE:
        return {"weight": random.normal(size=(size, size)).astype(np.float16)}
    codes = random.integers(-8, 8, (size, size)).astype(np.int8 if chosen.kind != "fp8" else E4M3)
    if isinstance(chosen, RowCodes):
        return {"codes": codes, "scale": np.full(size, 0.3, np.float32), "input_scale": np.ones(3, np.float32)}
    groups = np.full((size, size // 128), 0.25, np.float32)
    zero = {"zero": np.full(groups.shape, 3, np.int8)} if chosen.stored.zero else {}
    order = {"group_index": random.permutation(size)[None].astype(np.int32) // 128} if chosen.stored.group_index else {}
    return {"codes": codes, "scale": groups, **zero, **order}


@pytest.mark.parametrize("name", HELD)
def test_engines_hold_codes_and_not_the_values_that_they_stand_for(name: str) -> None:
    """Bytes a weight of 2048 x 2048, scales and kernels included."""
    chosen, expected = HELD[name]
    weight = Weight("layers.0.down", chosen, components_of_random_codes(chosen, 2048))
    assert expected < product_engine_bytes(weight) / 2048**2 < 1.5 * expected
