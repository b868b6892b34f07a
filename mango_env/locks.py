"""Locks between processes that the kernel lets go of when their holder ends, however that happens (flock)."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mango_env.layout import explained


def _flock(file: IO[str], wait: bool) -> bool:
    """Take the lock of an open file. False: somebody else has it. OSError where the file system knows no locks."""
    import fcntl  # here, because there is none on Windows, where stores can be read all the same

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, waiting for it where need be."""
    try:
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise explained(error, f"cannot write below {path.parent}", "choose a folder that can be written") from error
    with file:
        with suppress(OSError):                              # no locks here: the replacements are atomic all the same
            _flock(file, wait=True)
        yield


def try_lock(path: Path) -> bool:
    """Whether nobody holds the lock file `path` (or the file system knows no locks)."""
    with path.open("a", encoding="utf-8") as file:
        try:
            return _flock(file, wait=False)
        except OSError:
            return True


class WriterLock:
    """Says for as long as it is held that a writer of this name is at work.

    The file says which process on which machine, and whether the lock could be taken at all. It gets its name when all of
    that is true: nobody sees a lock that is not held yet, which would look like a dead writer's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        aside = path.with_name(f"{path.name}.new")
        try:
            self._file = aside.open("x", encoding="utf-8")
        except OSError as error:
            raise explained(error, f"cannot write below {path.parent}", "choose a folder that can be written") from error
        try:
            taken = _flock(self._file, wait=False)
        except OSError:
            taken = False
        try:
            self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "locked": taken}))
            self._file.flush()
            aside.rename(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            self.release()
            raise explained(error, f"cannot write below {path.parent}", "make room or choose another folder") from error

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        self._file.close()
