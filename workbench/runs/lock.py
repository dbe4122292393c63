"""One writer at a time: an advisory `flock` on a file beside the run.

The kernel drops the lock when its holder dies, however it dies, so no lock has to be broken by hand. The file
names its holder (process, machine, start) for the message that the second writer gets. It is removed on
release; one that a kill left behind is empty talk and is taken over.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path

from workbench.errors import RunLocked

from .disk import writing
from .manifest import utc_now


class Lock:
    """An exclusive lock, held from construction until `release`."""

    def __init__(self, file: Path, run: Path) -> None:
        self._file = file
        with writing(run):
            self._descriptor = self._take(run)
            holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": utc_now()})
            try:
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, holder.encode(), 0)
            except BaseException:
                self.release()
                raise

    def _take(self, run: Path) -> int:
        while True:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its holder may have removed it after we opened it, and then our lock guards nothing.
                if self._is_current(descriptor):
                    return descriptor
            except BlockingIOError:
                holder = os.pread(descriptor, 4096, 0)
                os.close(descriptor)
                raise RunLocked(
                    f"{_describe(holder)} is writing the run {run}; wait for it, stop it, or choose another path"
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._file))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let the next writer in; a second call does nothing."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        try:
            self._file.unlink(missing_ok=True)
        finally:
            # Explicitly: a forked child may still hold a copy of the descriptor, and with it the lock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _describe(holder: bytes) -> str:
    try:
        known = json.loads(holder)
        return f"process {known['pid']} on {known['host']} (since {known['started']})"
    except (ValueError, KeyError, TypeError):
        return "another process"
