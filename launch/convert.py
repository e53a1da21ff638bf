# SPDX-License-Identifier: Apache-2.0
"""``python -m launch.convert``: a checkpoint of another program as a directory that every command loads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from phalanx.launch.arguments import CommandParser, job_arguments, run_command
from phalanx.launch.sharing import require_one_rank

__all__ = ["main"]

_LOG = logging.getLogger("phalanx.convert")


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="launch.convert",
        description="Join the pieces of a GPT of Megatron-LM (mp_rank_*/model_optim_rng.pt, or a distributed checkpoint: torch_dist, zarr) or "
        "NeMo (a .nemo file or its directory, or NeMo 2's directory), or a binary directory of FasterTransformer (GPT, GPT-J, GPT-NeoX, Llama), into one directory. The first "
        "two hold pickles: PyTorch, which must be installed, reads weights and plain values from them in this process alone and runs nothing; "
        "archives are not unpacked.",
    )
    parser.add_argument("--from", dest="source", choices=("megatron", "nemo", "fastertransformer"), required=True,
                        help="program that wrote the checkpoint")  # fmt: skip
    parser.add_argument("--input", type=Path, required=True, metavar="PATH",
                        help="megatron: directory of the ranks' directories, or that of latest_checkpointed_iteration.txt; nemo: file or "
                        "directory; fastertransformer: directory of config.ini")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to make; must not exist")
    parser.add_argument("--vocab-size", type=int, default=0, metavar="N",
                        help="tokens of the tokenizer; further rows are padding and left out (default: as the checkpoint says, else all)")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args, comm = job_arguments(build_parser(), argv)

    from phalanx.checkpoints import conversion
    from phalanx.checkpoints.partial_directory import PartialDirectory

    require_one_rank(comm, "phalanx convert")
    readers = {
        "megatron": conversion.read_megatron,
        "nemo": conversion.read_nemo,
        "fastertransformer": conversion.read_faster_transformer,
    }
    with PartialDirectory(args.output, lambda name: name in conversion.WRITTEN_FILES).written() as partial:
        model = readers[args.source](args.input, args.vocab_size)
        conversion.write_directory(model, partial)
    _LOG.info("%s: %s, %d tensors", args.output, model.config["architectures"][0], len(model.tensors))
    comm.close()
    return 0


if __name__ == "__main__":
    run_command(main)
