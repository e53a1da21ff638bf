# SPDX-License-Identifier: Apache-2.0
"""Results of ``launch.generate``: each is written as soon as all earlier ones are, and what is finished is kept."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.whole_file import write_whole

if TYPE_CHECKING:
    from phalanx.runtime.request import Logprob, RequestOutput

__all__ = ["InOrder", "ResultFile", "check_same_prompts", "to_json"]

LOCK_SECONDS = 10.0
"""How long an earlier run, of which the launcher is gone, may take to end."""
LOCK_POLL_SECONDS = 0.1
_DEVICES = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))
"""What is there stands for something else, such as the shell's file behind ``/dev/stdout``, which takes lines but is not continued."""


class InOrder:
    """Hands results on in input order, each as soon as all earlier ones are there.

    Args:
        write: takes one result.
        indices: which results will come.
    """

    def __init__(self, write: Callable[[RequestOutput], None], indices: Iterable[int]) -> None:
        self._write = write
        self._expected = sorted(indices, reverse=True)
        self._waiting: dict[int, RequestOutput] = {}

    def take(self, output: RequestOutput) -> None:
        """One result; its place is its index."""
        self._waiting[output.index] = output
        while self._expected and (following := self._waiting.pop(self._expected[-1], None)) is not None:
            self._expected.pop()
            self._write(following)

    def release(self) -> None:
        """Write what is finished, although earlier ones are missing: no more will come."""
        for index in sorted(self._waiting):
            self._write(self._waiting.pop(index))


class ResultFile:
    """JSON lines on disk, which an interrupted run leaves and a later one continues. A pipe or a device only takes lines.

    Raises:
        ConfigError: the file is there and is not to be continued, it cannot be written, or it holds something else.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self._path = path
        self._lines: dict[int, Mapping[str, Any]] = {}
        self._is_kept = (path.is_file() or not path.exists()) and path.parent not in _DEVICES
        if path.is_file() and self._is_kept and not resume:
            raise self._exists()
        if resume and not self._is_kept:
            raise ConfigError(f"--output {path} is not a file that --resume could continue; leave --resume out")
        try:
            self._file: BinaryIO = self._open_locked() if self._is_kept else path.open("ab")
        except OSError as error:
            raise ConfigError(f"--output {path} cannot be written: {error.strerror}; choose another place") from None
        try:
            if self._is_kept:
                if not resume and os.fstat(self._file.fileno()).st_size:  # written while this run waited for the lock
                    raise self._exists()
                self._read()
        except ConfigError:
            self._file.close()
            raise

    @property
    def done(self) -> dict[int, Mapping[str, Any]]:
        """The lines so far, by index of the prompt."""
        return self._lines

    def write(self, output: RequestOutput) -> None:
        """Append a line, which is then safe from whatever happens to this process.

        Raises:
            OSError: the file, which it names, cannot be written.
        """
        with self._named():
            self._file.write(to_json(output).encode() + b"\n")
            self._file.flush()

    def close(self, complete: bool) -> None:
        """Close it; a complete file gets its lines in input order, where an interruption had left them in another.

        Raises:
            OSError: as `write`.
        """
        with self._named(), self._file:
            if complete and self._is_kept:
                self._put_in_order()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """An error of the disk says which file."""
        try:
            yield
        except OSError as error:
            error.filename = str(self._path)
            raise

    def _put_in_order(self) -> None:
        lines = self._path.read_bytes().splitlines(keepends=True)
        ordered = sorted(lines, key=lambda line: int(json.loads(line)["index"]))
        if ordered == lines:
            return
        write_whole(self._path, b"".join(ordered))

    def _exists(self) -> ConfigError:
        return ConfigError(f"--output {self._path} exists; give --resume to continue it, or another name")

    def _open_locked(self) -> BinaryIO:
        """Open the file and keep a second run away, which would write the same lines.

        The run that held the lock may have replaced the file meanwhile, to put its lines in order: then it is opened again.

        Raises:
            ConfigError: another run holds the file, and is not just ending.
            OSError: it cannot be opened.
        """
        while True:
            file = self._path.open("a+b")
            try:
                self._lock(file)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                        return file
            except (ConfigError, OSError):
                file.close()
                raise
            file.close()

    def _lock(self, file: BinaryIO) -> None:
        give_up = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > give_up:
                    reason = "is being written by another run; wait for its end, or choose another name"
                    raise ConfigError(f"--output {self._path} {reason}") from None
                time.sleep(LOCK_POLL_SECONDS)
            except OSError:  # a file system without locks
                return
            else:
                return

    def _read(self) -> None:
        self._file.seek(0)
        kept = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):  # cut off while it was written
                break
            try:
                entry = json.loads(line)
                self._lines[int(entry["index"])] = entry
            except (ValueError, TypeError, KeyError):
                raise ConfigError(
                    f"--output {self._path} line {number} is not a result of phalanx generate; choose another name"
                ) from None
            kept += len(line)
        self._file.truncate(kept)
        self._file.seek(0, os.SEEK_END)


def check_same_prompts(
    path: Path, done: Mapping[int, Mapping[str, Any]], count: int, token_ids_of: Callable[[int], Collection[int]]
) -> None:
    """Raise unless the lines of ``path`` belong to the prompts of this run.

    Raises:
        ConfigError: a line is of a prompt that this run does not have.
    """
    for index, entry in done.items():
        refused = entry.get("finish_reason") == "error"
        if not 0 <= index < count or not (refused or list(entry["prompt_token_ids"]) == list(token_ids_of(index))):
            raise ConfigError(
                f"--output {path} continues other prompts: result {index} is not of this input; choose another name"
            )


def to_json(output: RequestOutput) -> str:
    """Return a result as one line of JSON; log-probabilities are natural logarithms."""
    import msgspec

    def entry(item: Logprob | None) -> dict[str, Any] | None:
        return None if item is None else {"token_id": item.token_id, "logprob": item.logprob, "top": item.top}

    fields: dict[str, Any] = {
        "index": output.index,
        "prompt_token_ids": output.prompt_token_ids,
        "token_ids": output.token_ids,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "logprobs": None if output.logprobs is None else [entry(item) for item in output.logprobs],
        "prompt_logprobs": None if output.prompt_logprobs is None else [entry(item) for item in output.prompt_logprobs],
    }
    if output.hypotheses:
        fields["hypotheses"] = [
            {"token_ids": one.token_ids, "score": one.score, "total": one.total, "finish_reason": one.finish_reason}
            for one in output.hypotheses
        ]
    if output.error is not None:
        fields["error"] = output.error
    return msgspec.json.encode(fields).decode()
