"""Machine code as text: what a kernel reads or writes before it waits for the kernel ahead of it."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from phalanx.kernels.compiler import KernelSource

PARAMETER_BASE = {"sm_90a": 0x210, "sm_100a": 0x380, "sm_120": 0x380}
"""Where the constant bank of a launch holds its parameters."""
WEIGHTS = {
    "gemv": frozenset({"weight", "bias"}),
    "gemv8": frozenset({"weight", "weight_scale", "bias"}),
    "gemv_packed": frozenset({"codes", "scale", "zero", "bias"}),
}
"""By source the parameters that no kernel writes, which may be read before the wait."""
WAIT = "ACQBULK"
"""What ``griddepcontrol.wait`` becomes."""

_COMMENT = re.compile(r"/\*.*?\*/")
# CCTL.IVALL, which a barrier of clusters has, makes the first-level cache forget and reads nothing.
_ACCESS = re.compile(
    r"^(@!?U?P\d+ )?(LD|LDG|LDGSTS|ST|STG|ATOM|ATOMG|RED|REDG|UBLKPF|UBLKCP|UBLKRED|UTMALDG|UTMASTG|CCTL(?!\.IVALL))\b"
)
_INSTRUCTION = re.compile(r"^(?P<guard>@!?U?P\d+ )?(?P<operation>[A-Z0-9_.]+)\s*(?P<operands>.*?)\s*;$")
_REGISTER = re.compile(r"\b(U?R)(\d+)\b")
_CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]")
_MOVE_TO_UNIFORM = re.compile(r"^U?P\d+, (?=UR\d+, )")  # R2UR, which may write a predicate, too
_ADDRESS = re.compile(r"(?:desc\[UR\d+\])?\[([^\]]*)\]")


@dataclass(frozen=True, slots=True)
class EarlyAccess:
    """An access to global memory before the wait, and the pointers among the parameters that its address is made of."""

    instruction: str
    pointers: frozenset[str]


def assert_weights_alone_are_read_early(cubin: bytes, source: KernelSource, architecture: str) -> None:
    """A kernel that may start while the one before it runs touches nothing but weights until that one has ended.

    Compilers move loads ahead of the wait where they hold the memory for constant, which no result of a single kernel shows.
    """
    if not source.overlaps_previous or architecture not in PARAMETER_BASE or not can_disassemble():
        return
    allowed = WEIGHTS.get(source.name, frozenset())
    for kernel, accesses in early_accesses(cubin, source.text, architecture).items():
        for access in accesses:
            assert access.pointers, f"{kernel}: where {access.instruction!r} reads is not known"
            assert access.pointers <= allowed, (
                f"{kernel} reads {sorted(access.pointers)} too early: {access.instruction!r}"
            )


def early_accesses(cubin: bytes, source: str, architecture: str) -> dict[str, list[EarlyAccess]]:
    """By kernel, all of which wait for the one before them, in the order in which the code lies; ``source``: what was compiled.

    Raises:
        ValueError: a kernel does not wait.
    """
    found = {}
    for name, code in _kernels(disassemble(cubin)):
        if WAIT not in code:
            raise ValueError(f"{name} does not wait for the kernel before it")
        pointers = {PARAMETER_BASE[architecture] + offset: pointer for offset, pointer in _pointers(source, name)}
        found[name] = list(_accesses(code[: code.index(WAIT)].splitlines(), pointers))
    return found


def disassemble(cubin: bytes) -> str:
    """All code sections, by NVIDIA's disassembler."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_disassembler()), "--print-code", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def can_disassemble() -> bool:
    """Whether NVIDIA's disassembler is installed."""
    return _disassembler() is not None


def _disassembler() -> Path | None:
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "nvdisasm"), None)


def _kernels(text: str) -> Iterator[tuple[str, str]]:
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        yield section.split(",")[0].strip(), _COMMENT.sub("", section)


def _pointers(source: str, kernel: str) -> Iterator[tuple[int, str]]:
    """Offset and name of each parameter that is a pointer."""
    signature = re.search(rf"\b{kernel}\(([^)]*)\)", source)
    assert signature is not None, f"the source does not declare {kernel}"
    offset = 0
    for parameter in signature[1].split(","):
        size = 8 if re.search(r"\*|long long|int64", parameter) else 4
        offset = -(-offset // size) * size
        if "*" in parameter:
            yield offset, parameter.split()[-1].lstrip("*")
        offset += size


def _accesses(lines: list[str], pointers: dict[int, str]) -> Iterator[EarlyAccess]:
    """Follows parameters from the constant bank through registers, as if the code ran from its first line to its last."""
    behind: dict[str, frozenset[str]] = {}
    nothing: frozenset[str] = frozenset()
    for line in map(str.strip, lines):
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            continue
        operands = instruction["operands"]
        if _ACCESS.match(line):
            registers = _named(" ".join(_ADDRESS.findall(operands)), pairs=True)
            yield EarlyAccess(line, nothing.union(*(behind.get(register, nothing) for register in registers)))
        operation = instruction["operation"]
        target, _, sources = _MOVE_TO_UNIFORM.sub("", operands).partition(",")
        taint = nothing.union(*(behind.get(register, nothing) for register in _read(operation, sources)))
        taint |= {name for constant in _CONSTANT.findall(sources) if (name := pointers.get(int(constant, 16) & ~7))}
        for register in _written(operation, target):
            behind[register] = taint | (behind.get(register, nothing) if instruction["guard"] else nothing)


def _read(operation: str, sources: str) -> set[str]:
    """Of a wide multiplication the last operand, which is added, is a pair of registers; of a 64-bit operation all are."""
    if ".64" in operation:
        return _named(sources, pairs=True)
    if ".WIDE" in operation:
        *factors, addend = sources.split(",")
        return _named(",".join(factors), pairs=False) | _named(addend, pairs=True)
    return _named(sources, pairs=False)


def _named(text: str, *, pairs: bool) -> set[str]:
    return {f"{kind}{int(number) + i}" for kind, number in _REGISTER.findall(text) for i in range(1 + pairs)}


def _written(operation: str, target: str) -> list[str]:
    named = _REGISTER.search(target)
    if named is None:
        return []
    count = 4 if ".128" in operation else 2 if re.search(r"\.64|\.WIDE", operation) else 1
    return [f"{named[1]}{int(named[2]) + i}" for i in range(count)]
