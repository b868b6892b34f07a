"""A file for HDF5 to write to that stops at its first failing write, so that what lies on the disk stays readable.

Left to itself, HDF5 goes on after a write that failed: it overwrites what describes the file while what is described
is missing, cannot close the file any more, and complains when the program ends.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py


class StoppingFile:
    """The file that HDF5 writes to. The first failing write is kept in `error`, and the file is left as it is then.

    HDF5 cannot close a file whose writes fail; so it is told that they succeed, and the shard's writer asks for `error`.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._at = self._size = 0
        self.error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        found = os.pread(self._fd, size, self._at).ljust(size, b"\0")
        self._at += size
        return found

    def readinto(self, buffer: memoryview) -> int:
        buffer[:] = self.read(len(buffer))
        return len(buffer)

    def write(self, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer) and self.error is None:
            try:
                done += os.pwrite(self._fd, buffer[done:], self._at + done)
            except OSError as error:
                self.error = error
        self._at += len(buffer)
        self._size = max(self._size, self._at)
        return len(buffer)

    def truncate(self, size: int | None = None) -> int:
        self._size = self._at if size is None else size
        if self.error is None:
            try:
                os.ftruncate(self._fd, self._size)
            except OSError as error:
                self.error = error
        return self._size

    def flush(self) -> None:
        """Writes are not buffered here."""

    def close(self) -> None:
        """Let go of the file; raises nothing, see `error`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextmanager
def new_file(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file to fill in one go; OSError, and no file, where that is impossible."""
    file = StoppingFile(path)
    try:
        with h5py.File(file, "w") as opened:
            yield opened
        if file.error is not None:
            raise file.error
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        file.close()
