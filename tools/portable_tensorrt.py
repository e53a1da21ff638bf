"""A folder with everything that ``--engine tensorrt`` needs on a machine without a network: Python 3.11, wheels, TensorRT 8.6.

    python3.11 tools/portable_tensorrt.py --output DIR [--cuda toolkit|wheels] [--pieces MB]
    DIR/run python -m launch.doctor                       # there; ``run`` sets the library paths and starts the rest

TensorRT 8.6.0's libraries come from the wheel ``tensorrt==8.6.0``, whose bindings are for Python 3.10 and older; those of
``tensorrt_bindings==8.6.1`` for Python 3.11 load the same ``libnvinfer.so.8``. Of its libraries only libnvinfer and the builder's
kernels are kept: the bindings also name the plugins and parsers, which Phalanx never calls and which would need cuBLAS 12 and
cuDNN 8, so functions that do nothing stand in for them (this needs a C compiler here).

``--cuda toolkit`` leaves NVRTC, cuBLASLt and NCCL to the machine, which needs CUDA 13 (its toolkit, or NVIDIA's wheels in its own
Python); ``wheels`` brings them along, about 1 GB. ``--pieces`` also writes the folder as archives of at most that size below
``DIR.pieces``, each a part of one zstd stream: ``cat DIR.pieces/* | zstd -d --long=27 | tar x``.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TENSORRT, BINDINGS = "tensorrt==8.6.0", "tensorrt_bindings==8.6.1"
KEPT = ("libnvinfer.so.8", "libnvinfer_builder_resource.so.8.6.0")
STAND_INS = ("nvinfer_plugin", "nvonnxparser", "nvparsers")
FUNCTIONS = (
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion", "initLibNvInferPlugins",
    "_ZN14nvcaffeparser117createCaffeParserEv", "_ZN14nvcaffeparser123shutdownProtobufLibraryEv",
    "_ZN11nvuffparser15createUffParserEv", "_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi",
)  # fmt: skip
LEFT_OUT = shutil.ignore_patterns(
    "site-packages",
    "test",
    "tests",
    "__pycache__",
    "idlelib",
    "tkinter",
    "turtledemo",
    "ensurepip",
    "lib2to3",
    "config-3*",
)
WITHOUT_LIBRARIES = ("cupy-cuda13x>=13.6", "nvmath-python>=0.6", "cuda-bindings>=13", "cuda-core", "cuda-pathfinder")
CUDA_WHEELS = ("nvidia-nccl-cu13", "nvidia-cublas", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime")

RUN = """#!/bin/sh
# Start a command with this folder's Python, TensorRT and MPI: DIR/run python -m launch.generate ...
here=$(cd "$(dirname "$0")" && pwd)
for folder in "$here"/python/lib/python3.11/site-packages/nvidia/*/lib $(python3 -c '
import glob, importlib.util
found = importlib.util.find_spec("nvidia")
for path in found.submodule_search_locations if found else ():
    print(*glob.glob(path + "/cu13/lib"), *glob.glob(path + "/nccl/lib"))' 2>/dev/null); do
    [ -d "$folder" ] && LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
done
export LD_LIBRARY_PATH="$here/lib:$here/python/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PATH="$here/python/bin:$PATH" CUDA_MODULE_LOADING=${CUDA_MODULE_LOADING:-LAZY}
exec "$@"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Make the folder; exit status 2 if this is no Python 3.11."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cuda", choices=("toolkit", "wheels"), default="wheels")
    parser.add_argument("--pieces", type=int, metavar="MB", help="also write archives of at most this size")
    args = parser.parse_args(argv)
    if sys.version_info[:2] != (3, 11):
        parser.error(f"this is Python {sys.version_info[0]}.{sys.version_info[1]}; TensorRT 8.6's bindings need 3.11")
    folder: Path = args.output
    if folder.exists():
        parser.error(f"{folder} exists; use another --output")
    copy_interpreter(folder / "python")
    install_packages(folder / "python", args.cuda)
    unpack_tensorrt(folder / "lib")
    write_launcher(folder)
    if args.pieces:
        write_pieces(folder, args.pieces)
    print(folder)
    return 0


def copy_interpreter(target: Path) -> None:
    """Copy the interpreter that runs this, with its standard library; an environment's is its base's."""
    base, library = Path(sys.base_prefix), target / "lib"
    shutil.copytree(base / "lib" / "python3.11", library / "python3.11", ignore=LEFT_OUT)
    (target / "bin").mkdir()
    shutil.copy(Path(sys.base_prefix) / "bin" / "python3.11", target / "bin" / "python3.11")
    for name in ("python3", "python"):
        (target / "bin" / name).symlink_to("python3.11")
    for shared in (base / "lib").glob("libpython3.11.so*"):
        shutil.copy(shared, library, follow_symlinks=False)


def install_packages(target: Path, cuda: str) -> None:
    """Install what Phalanx needs to run, Triton's clients, and pytest for its checks; the checkout itself is not part of the folder."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    install = ("install", "--prefix", str(target), "--ignore-installed", "--no-warn-script-location")
    _pip(
        *install,
        *project["dependencies"],
        *project["optional-dependencies"]["cpu"],
        *project["optional-dependencies"]["grpc"],
        "tritonclient[http]",
        *project["optional-dependencies"]["grpc"],
        "tritonclient[http]",
        "pytest",
        "pytest-timeout",
        "hypothesis",
    )
    _pip(*install, "--no-deps", *WITHOUT_LIBRARIES, BINDINGS)
    if cuda == "wheels":
        _pip(*install, *CUDA_WHEELS)


def unpack_tensorrt(target: Path) -> None:
    """Fill ``target`` with TensorRT's own libraries and stand-ins for those that its bindings only name."""
    target.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        _pip("download", "--no-deps", "--only-binary=:all:", "--python-version", "3.10", "--dest", scratch, TENSORRT)
        (wheel,) = Path(scratch).glob("tensorrt-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in KEPT:
                with archive.open(f"tensorrt/{name}") as source, (target / name).open("wb") as file:
                    shutil.copyfileobj(source, file)
        source_file = Path(scratch) / "stand_in.c"
        source_file.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
        compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
        for library in STAND_INS:
            name = f"lib{library}.so.8"
            options = ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(target / name)]
            subprocess.run([compiler, *options, str(source_file)], check=True)


def write_launcher(folder: Path) -> None:
    """Write ``run``, which starts a command inside the folder."""
    launcher = folder / "run"
    launcher.write_text(RUN)
    launcher.chmod(0o755)


def write_pieces(folder: Path, megabytes: int) -> None:
    """Compress the folder into numbered pieces for links that limit a transfer."""
    pieces = folder.with_name(folder.name + ".pieces")
    pieces.mkdir()
    command = f"tar c -C '{folder.parent}' '{folder.name}' | zstd -q -T0 -15 --long=27 | split -b {megabytes}M -d -a 3 - '{pieces}/piece.'"
    subprocess.run(["bash", "-o", "pipefail", "-c", command], check=True)


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], check=True)


if __name__ == "__main__":
    raise SystemExit(main())
