"""Which names of TensorRT the executor uses, and what the bindings of a release say about them.

``python tests/tensorrt/api.py WHEEL ...`` records releases whose libraries are not installed: the bindings are imported over stand-ins
for the libraries, which are never called, and their own docstrings give every signature. Needs a C compiler.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

RECORDED = Path(__file__).resolve().parent / "recorded"

MEMBERS: dict[str, tuple[str, ...]] = {
    "ActivationType": ("GELU_ERF", "GELU_TANH", "RELU", "SIGMOID"),
    "AttentionNormalizationOp": ("SOFTMAX",),
    "Builder": (
        "__init__", "build_serialized_network_to_stream", "create_builder_config", "create_network", "create_optimization_profile",
    ),
    "BuilderFlag": ("REFIT_INDIVIDUAL", "STRIP_PLAN", "TF32"),
    "CausalMaskKind": ("NONE",),
    "CollectiveOperation": ("ALL_GATHER", "ALL_REDUCE"),
    "ComputeCapability": (),
    "DataType": ("BF16", "FLOAT", "FP8", "HALF", "INT32", "INT4", "INT64", "INT8"),
    "ElementWiseOperation": ("AND", "DIV", "GREATER", "LESS", "MAX", "MIN", "PROD", "SUB", "SUM"),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    "IAttention": ("decomposable", "get_output", "mask"),
    "IBuilderConfig": (
        "add_optimization_profile", "clear_flag", "create_timing_cache", "get_timing_cache", "num_compute_capabilities",
        "progress_monitor", "set_compute_capability", "set_flag", "set_preview_feature", "set_timing_cache",
    ),
    "IConcatenationLayer": ("axis",),
    "IDequantizeLayer": ("axis",),
    "DynamicShapesKernelSpecializationStrategy": ("EAGER",),
    "ICudaEngine": ("create_execution_context", "create_runtime_config", "device_memory_size_v2"),
    "IExecutionContext": (
        "execute_async_v3", "is_stream_capturable", "set_communicator", "set_device_memory", "set_input_shape",
        "set_optimization_profile_async", "set_tensor_address",
    ),
    "ILayer": ("get_output", "metadata", "name", "num_ranks", "set_input"),
    "ILogger": ("__init__", "log"),
    "INetworkDefinition": (
        "add_activation", "add_attention", "add_attention_v2", "add_cast", "add_concatenation", "add_constant",
        "add_dequantize", "add_dist_collective", "add_elementwise", "add_gather", "add_input", "add_kv_cache_update", "add_matrix_multiply",
        "add_normalization_v2", "add_quantize", "add_reduce", "add_rotary_embedding", "add_select", "add_shape", "add_shuffle", "add_slice", "add_topk",
        "add_unary", "mark_output", "mark_weights_refittable", "num_layers", "set_weights_name",
    ),
    "INormalizationLayer": ("epsilon",),
    "IOptimizationProfile": ("set_shape",),
    "IProgressMonitor": ("__init__", "phase_finish", "phase_start", "step_complete"),
    "IRuntimeCache": ("deserialize", "serialize"),
    "IRuntimeConfig": (
        "create_runtime_cache", "dynamic_shapes_kernel_specialization_strategy", "set_execution_context_allocation_strategy",
        "set_runtime_cache",
    ),
    "IShuffleLayer": ("first_transpose", "reshape_dims", "second_transpose"),
    "IStreamWriter": ("__init__", "write"),
    "ITensor": ("dtype", "name", "shape"),
    "ITimingCache": ("serialize",),
    "KVCacheMode": ("LINEAR",),
    "MatrixOperation": ("NONE", "TRANSPOSE"),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "Permutation": ("__init__",),
    "PreviewFeature": ("MULTIDEVICE_RUNTIME_10_16",),
    "ReduceOperation": ("AVG", "MAX", "NONE", "SUM"),
    "Refitter": ("__init__", "get_all_weights", "get_missing_weights", "refit_cuda_engine_async", "set_named_weights"),
    "Runtime": ("__init__", "deserialize_cuda_engine"),
    "TopKOperation": ("MAX",),
    "UnaryOperation": ("ABS", "NOT", "SQRT"),
    "Weights": ("__init__",),
}  # fmt: skip

SEGMENT_MEMBERS: dict[str, tuple[str, ...]] = {
    "ActivationType": ("RELU", "SIGMOID", "TANH"),
    "Builder": (
        "__init__", "build_serialized_network", "create_builder_config", "create_network", "create_optimization_profile",
    ),
    "BuilderFlag": ("FP16", "OBEY_PRECISION_CONSTRAINTS", "TF32"),
    "DataType": ("FLOAT", "HALF", "INT32"),
    "ElementWiseOperation": ("DIV", "MAX", "MIN", "PROD", "SUM"),
    "IBuilderConfig": (
        "add_optimization_profile", "builder_optimization_level", "clear_flag", "create_timing_cache", "get_timing_cache",
        "max_aux_streams", "set_flag", "set_tactic_sources", "set_timing_cache",
    ),
    "ICudaEngine": ("create_execution_context_without_device_memory", "device_memory_size"),
    "IExecutionContext": (
        "device_memory", "execute_async_v3", "set_input_shape", "set_optimization_profile_async", "set_tensor_address",
    ),
    "ILayer": ("get_output", "precision", "set_input", "set_output_type"),
    "ILogger": ("__init__", "log"),
    "INetworkDefinition": (
        "add_activation", "add_cast", "add_concatenation", "add_constant", "add_elementwise", "add_gather", "add_input",
        "add_matrix_multiply", "add_reduce", "add_shape", "add_slice", "add_unary", "mark_output", "num_layers",
    ),
    "IOptimizationProfile": ("set_shape",),
    "ITensor": ("dtype", "name", "shape"),
    "ITimingCache": ("serialize",),
    "MatrixOperation": ("NONE", "TRANSPOSE"),
    "NetworkDefinitionCreationFlag": ("EXPLICIT_BATCH",),
    "ReduceOperation": ("AVG",),
    "Runtime": ("__init__", "deserialize_cuda_engine"),
    "UnaryOperation": ("ERF", "SQRT"),
    "Weights": ("__init__",),
}  # fmt: skip
"""What segments use, all of which TensorRT 8.6 has."""

_ONLY_RTX = frozenset(
    {"ComputeCapability", "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability",
     "IExecutionContext.is_stream_capturable", "DynamicShapesKernelSpecializationStrategy",
     "DynamicShapesKernelSpecializationStrategy.EAGER", "IRuntimeCache", "IRuntimeCache.deserialize", "IRuntimeCache.serialize",
     "IRuntimeConfig.create_runtime_cache", "IRuntimeConfig.set_runtime_cache",
     "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy"}
)  # fmt: skip
_ONLY_10_16 = frozenset({"PreviewFeature.MULTIDEVICE_RUNTIME_10_16"})
_SINCE_11 = frozenset({"CausalMaskKind", "CausalMaskKind.NONE", "INetworkDefinition.add_attention_v2"})

ABSENT: dict[str, frozenset[str]] = {
    "tensorrt-10.16": _ONLY_RTX | _SINCE_11,
    "tensorrt-11.0": _ONLY_RTX | _ONLY_10_16,
    "tensorrt-11.4": _ONLY_RTX | _ONLY_10_16,
    "tensorrt_rtx-1.7": _ONLY_10_16,
}
"""Names that a release lacks, and that the adapter therefore asks for before it uses them."""

Signature = dict[str, list[str]]


def members_of(version: str) -> dict[str, tuple[str, ...]]:
    """The names that Phalanx uses of a release."""
    return SEGMENT_MEMBERS if version.startswith("8.") else MEMBERS


def record(module: ModuleType) -> dict[str, list[Signature] | None]:
    """``Class.member`` -> its signatures, or None for what is not a function; absent names are left out."""
    found: dict[str, list[Signature] | None] = {}
    for class_name, members in members_of(module.__version__).items():
        owner = getattr(module, class_name, None)
        if owner is None:
            continue
        found[class_name] = None
        for member in members:
            if hasattr(owner, member):
                found[f"{class_name}.{member}"] = _signatures(getattr(owner, member), member)
    return found


def _signatures(member: Any, name: str) -> list[Signature] | None:
    lines = re.findall(rf"(?m)^(?:\d+\. )?{name}\((self: .*)\) -> ", getattr(member, "__doc__", None) or "")
    return [_parameters(line) for line in lines] or None


def _parameters(text: str) -> Signature:
    """Names of all parameters after ``self`` and of those without a default."""
    parts = re.split(r", (?=\w+: )", text)[1:]
    return {
        "names": [part.split(":", 1)[0] for part in parts],
        "required": [part.split(":", 1)[0] for part in parts if " = " not in part],
    }


_STAND_IN = "".join(
    f"void *{name}(void) {{ return 0; }}\n"
    for name in (
        "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry", "getNvOnnxParserVersion",
        "getPluginRegistry", "initLibNvInferPlugins",
        # of 8.6 alone
        "_ZN14nvcaffeparser117createCaffeParserEv", "_ZN14nvcaffeparser123shutdownProtobufLibraryEv",
        "_ZN11nvuffparser15createUffParserEv", "_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi",
    )
)  # fmt: skip


def record_wheel(wheel: Path) -> dict[str, list[Signature] | None]:
    """Record the bindings in a ``tensorrt_cu13_bindings`` or ``tensorrt_bindings`` wheel, in a separate process."""
    major = wheel.name.split("-")[1].split(".")[0]
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        source = Path(folder) / "stand_in.c"
        source.write_text(_STAND_IN)
        for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser", "nvparsers"):
            name = f"lib{library}.so.{major}"
            command = [
                _compiler(),
                "-shared",
                "-fPIC",
                f"-Wl,-soname,{name}",
                "-o",
                str(Path(folder) / name),
                str(source),
            ]
            subprocess.run(command, check=True, timeout=60)
        environment = os.environ | {"LD_LIBRARY_PATH": folder, "PYTHONPATH": folder}
        command = [sys.executable, "-W", "ignore", __file__, "--module", "tensorrt_bindings"]
        result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60)
    recorded: dict[str, list[Signature] | None] = json.loads(result.stdout)
    return recorded


def _compiler() -> str:
    return (sysconfig.get_config_var("CC") or "cc").split()[0]


def release_of(wheel: Path) -> str:
    """``tensorrt-11.4`` for a wheel of 11.4.0.106."""
    return "tensorrt-" + ".".join(wheel.name.split("-")[1].split(".")[:2])


def load_recorded(release: str) -> dict[str, list[Signature] | None]:
    """What was recorded of a release."""
    recorded: dict[str, list[Signature] | None] = json.loads((RECORDED / f"{release}.json").read_text())
    return recorded


def _write(release: str, recorded: dict[str, list[Signature] | None]) -> None:
    lines = [f"{json.dumps(name)}: {json.dumps(signatures)}" for name, signatures in sorted(recorded.items())]
    (RECORDED / f"{release}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1] == "--module":
        print(json.dumps(record(importlib.import_module(sys.argv[2]))))
    else:
        for path in map(Path, sys.argv[1:]):
            _write(release_of(path), record_wheel(path))
