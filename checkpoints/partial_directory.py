# SPDX-License-Identifier: Apache-2.0
"""A directory that appears whole or not at all.

Files are written into a sibling named ``<output>.partial``, which no loader accepts by its name; renaming it is the last step.
What an interrupted run leaves is found by the next one and replaced. Data is not flushed to the disk, which would take longer
than all the rest: a power cut may lose a directory just written, as it may lose any copy, and the checksums in the manifest
tell so at load.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from phalanx.checkpoints.files import PARTIAL_SUFFIX
from phalanx.parallel.errors import ConfigError

__all__ = ["PartialDirectory"]


class PartialDirectory:
    """The directory in the making. One process creates, commits or discards it; others may write files into ``path``.

    Args:
        output: what it is to become.
        is_ours: whether a file of this name can be a leftover of an interrupted run.
    """

    def __init__(self, output: Path, is_ours: Callable[[str], bool]) -> None:
        self._output = Path(os.path.abspath(output))
        self._is_ours = is_ours
        self._lock = -1
        self.path = self._output.parent / (self._output.name + PARTIAL_SUFFIX)

    def require_absent(self) -> None:
        """Refuse an output that is there. For every process, so that all of them end by themselves.

        Raises:
            ConfigError: the output exists.
        """
        if os.path.lexists(self._output):
            raise ConfigError(f"--output {str(self._output)!r} exists; remove it or choose another name")

    def create(self) -> bool:
        """Make it, empty and locked against a second writer; True if leftovers of an interrupted run were removed.

        Raises:
            ConfigError: the output exists, another process is writing it, or its parent cannot be written.
        """
        self.require_absent()
        try:
            self.path.mkdir(exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"cannot write {str(self.path)!r}: {error.strerror}; choose another --output") from None
        except KeyboardInterrupt:  # before `discard` knows that it is there
            with contextlib.suppress(OSError):
                self.path.rmdir()
            raise
        self._acquire()
        return self._clear()

    @contextlib.contextmanager
    def written(self) -> Iterator[Path]:
        """Create it, yield where files go, and commit it; after a failure it is removed.

        Raises:
            ConfigError: as `create`, or a file cannot be written.
        """
        with self.removed_after_failure():
            self.create()
            yield self.path
            self.commit()

    @contextlib.contextmanager
    def removed_after_failure(self) -> Iterator[None]:
        """Remove it if what is done meanwhile fails.

        Raises:
            ConfigError: a file cannot be written.
        """
        try:
            yield
        except OSError as error:
            self.discard()
            raise ConfigError(f"cannot write {str(self.path)!r}: {error.strerror}; nothing was left there") from error
        except BaseException:
            self.discard()
            raise

    def commit(self) -> None:
        """Give it its name: the last step."""
        os.rename(self.path, self._output)
        self._release()

    def discard(self) -> None:
        """Remove it, after a failure; does nothing if it was never created."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            self._release()

    def _acquire(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems cannot lock a directory; there a second writer goes unnoticed.
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self._release()
                raise ConfigError(f"another process is writing {str(self.path)!r}; wait for it or end it") from None
        if not os.path.samestat(os.fstat(self._lock), os.stat(self.path, follow_symlinks=False)):
            self._release()
            raise ConfigError(f"another process has just finished {str(self._output)!r}; choose another --output")

    def _clear(self) -> bool:
        names = os.listdir(self.path)
        if foreign := [name for name in names if not self._is_ours(name)]:
            self._release()
            raise ConfigError(
                f"{str(self.path)!r} holds {foreign[0]!r}, which an interrupted run did not leave; remove that directory"
            )
        for name in names:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        return bool(names)

    def _release(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._lock)
        self._lock = -1
