"""Files whose pages are mapped, brought in by threads and let go again: what offload.py needs of the system."""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import mmap
import os
import resource
import sys
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

# From Linux' headers; Python's mmap module does not know them all.
_MADV_RANDOM, _MADV_DONTNEED, _MADV_HUGEPAGE, _MADV_NOHUGEPAGE, _MADV_POPULATE_READ = 1, 4, 14, 15, 22
_READERS = 2  # more gain nothing on a disk that was asked in pieces of 4 MiB, and take processor time from the model
_LINGER_SECONDS = 1.0  # an idle model has no threads


class WeightsChangedError(RuntimeError):
    """The files that a running model reads its weights from were cut short or written to."""


@functools.lru_cache(maxsize=1)
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return libc


def major_faults() -> int:
    """How often this process has waited for a page that was not in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


@functools.lru_cache(maxsize=1)
def is_supported() -> bool:
    """Whether this system can bring in mapped pages on request."""
    if sys.platform != "linux":
        return False
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        start = ctypes.c_char.from_buffer(page)
        supported = _libc().madvise(ctypes.addressof(start), mmap.PAGESIZE, _MADV_POPULATE_READ) == 0
        del start  # or the page cannot be closed
    return bool(supported)


def _dtypes() -> dict[str, Any]:
    import torch

    names = {
        "BF16": "bfloat16",
        "F16": "float16",
        "F32": "float32",
        "F64": "float64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "I8": "int8",
        "I16": "int16",
        "I32": "int32",
        "I64": "int64",
        "U8": "uint8",
        "BOOL": "bool",
    }
    return {short: getattr(torch, name) for short, name in names.items()}


class MappedFile:
    """A safetensors file, mapped as long as it is open or one of its tensors lives.

    The mapping is private: a tensor that is written to changes in memory alone.

    Attributes:
        path: Where it was found.
        size_bytes: Its size when it was opened.
        entries: Tensor name to dtype, shape, first byte and the byte after the last, counted from the file's start.
    """

    page_bytes = mmap.PAGESIZE
    huge_page_bytes = 2 * 2**20

    def __init__(self, path: str) -> None:
        import torch

        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(self._fd)
            self.size_bytes = status.st_size
            self._stamp = (status.st_size, status.st_mtime_ns)
            self.entries = self._read_header()
            self._storage: Any = torch.UntypedStorage.from_file(path, shared=False, nbytes=self.size_bytes)
        except BaseException:
            os.close(self._fd)
            raise
        self._address = self._storage.data_ptr()
        self._probe = bytearray(self.size_bytes // mmap.PAGESIZE + 2)
        self._probe_address = ctypes.addressof(ctypes.c_char.from_buffer(self._probe))

    def _read_header(self) -> dict[str, tuple[Any, tuple[int, ...], int, int]]:
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        try:
            header = json.loads(os.pread(self._fd, length, 8)) if length < self.size_bytes else {}
            dtypes, base = _dtypes(), 8 + length
            entries = {
                name: (dtypes[e["dtype"]], tuple(e["shape"]), *(base + at for at in e["data_offsets"]))
                for name, e in header.items()
                if name != "__metadata__" and e["dtype"] in dtypes
            }
        except (ValueError, KeyError, TypeError) as error:
            raise OSError(errno.EINVAL, f"{self.path} is no safetensors file ({error})") from None
        if any(end > self.size_bytes for *_, end in entries.values()):
            raise OSError(errno.EINVAL, f"{self.path} is cut short")
        return entries

    def tensor(self, key: str) -> Any:
        """A tensor of the file without a copy.

        Args:
            key: Its name in the file.

        Returns:
            The tensor, of the file's dtype and shape, at the same place within a page as in the file.
        """
        import torch

        dtype, shape, start, end = self.entries[key]
        whole = torch.empty(0, dtype=dtype).set_(self._storage[start:end], 0, ((end - start) // dtype.itemsize,), (1,))
        return whole.view(shape)

    def advise(self, *, huge: bool, sparse: Iterable[tuple[int, int]]) -> None:
        """Ask for huge pages, which are mapped 400 times faster, but not where only a little will be touched."""
        pages = self.size_bytes - self.size_bytes % mmap.PAGESIZE
        _libc().madvise(self._address, pages, _MADV_HUGEPAGE if huge else _MADV_NOHUGEPAGE)
        for start, end in sparse:
            low, high = _inwards(start, end)
            if low < high:
                _libc().madvise(self._address + low, high - low, _MADV_NOHUGEPAGE)
                _libc().madvise(self._address + low, high - low, _MADV_RANDOM)

    def check(self) -> None:
        """Make sure that the file is what it was; touching a page beyond its end would kill the process.

        Raises:
            WeightsChangedError: If it was cut short or written to. (One that was removed or replaced lives on.)
        """
        if self._fd < 0:
            return
        status = os.fstat(self._fd)
        if (status.st_size, status.st_mtime_ns) != self._stamp:
            raise WeightsChangedError(
                f"The weights file {self.path} was changed while the model that runs from it was loaded: unload the "
                "model, restore the file, and load it again."
            )

    def populate(self, start: int, end: int) -> bool:
        """Bring the pages of a range in. Holds no lock of Python's while it waits.

        Args:
            start: First byte.
            end: The byte after the last.

        Returns:
            Whether anything had to be read from disk.

        Raises:
            OSError: If they cannot be read.
        """
        low = start - start % mmap.PAGESIZE
        before = resource.getrusage(resource.RUSAGE_THREAD)
        while _libc().madvise(self._address + low, end - low, _MADV_POPULATE_READ) != 0:
            code = ctypes.get_errno()
            if code not in (errno.EINTR, errno.EAGAIN):
                raise OSError(code, f"{os.strerror(code)}: {self.path}")
        after = resource.getrusage(resource.RUSAGE_THREAD)
        return after.ru_inblock != before.ru_inblock or after.ru_majflt != before.ru_majflt

    def is_resident(self, start: int, end: int) -> bool:
        """Whether all pages of a range are in memory, mapped or not."""
        low = start - start % mmap.PAGESIZE
        pages = (end - low + mmap.PAGESIZE - 1) // mmap.PAGESIZE
        _libc().mincore(self._address + low, end - low, self._probe_address)
        return self._probe.find(0, 0, pages) < 0

    def release(self, start: int, end: int, *, drop: bool) -> None:
        """Let the whole pages within a range go; what was written to a tensor there is lost.

        Args:
            start: First byte.
            end: The byte after the last.
            drop: Whether the system shall drop them from its cache as well.
        """
        low, high = _inwards(start, min(end, self.size_bytes))  # beyond lies somebody else's memory
        if low < high and self._fd >= 0:
            _libc().madvise(self._address + low, high - low, _MADV_DONTNEED)
            if drop:
                os.posix_fadvise(self._fd, low, high - low, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file; the mapping goes with the last tensor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._storage = None


def _inwards(start: int, end: int) -> tuple[int, int]:
    return start + -start % mmap.PAGESIZE, end - end % mmap.PAGESIZE


# --- the threads ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """A piece of a file that one thread reads at once.

    Attributes:
        owner: Whose it is; one waits for all chunks of an owner. Its ``from_disk`` becomes true if the disk was read.
        file: The file.
        start: First byte.
        end: The byte after the last.
    """

    owner: Any
    file: MappedFile
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return self.end - self.start


class PageReaders:
    """Two threads that bring pages in; they exist while there is something to read."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[Chunk] = deque()
        self._pending: dict[Any, int] = {}  # owner to its chunks that are not read yet
        self._errors: dict[Any, OSError] = {}
        self._threads: list[threading.Thread] = []
        self._closed = False

    def put(self, chunks: list[Chunk], *, front: bool) -> None:
        """Queue chunks, in front of all others if somebody waits for them."""
        with self._changed:
            if self._closed:
                return
            for chunk in chunks:
                self._pending[chunk.owner] = self._pending.get(chunk.owner, 0) + 1
            if front:
                self._queue.extendleft(reversed(chunks))
            else:
                self._queue.extend(chunks)
            # One that waits reads along, and for little a thread is not worth its start.
            while len(self._threads) < min(_READERS, len(self._queue)):
                thread = threading.Thread(target=self._run, name="workbench-pages", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify_all()  # those who wait for other chunks are woken in vain, which is rare

    def wait(self, owner: Any) -> None:
        """Wait until all chunks of an owner are read, and read along.

        Raises:
            OSError: If one could not be read.
        """
        while True:
            with self._changed:
                if owner not in self._pending:
                    break
                mine = bool(self._queue) and self._queue[0].owner is owner
                if not mine:
                    self._changed.wait(_LINGER_SECONDS)
                    continue
                chunk = self._queue.popleft()
            self._read(chunk)
        error = self._errors.pop(owner, None)
        if error is not None:
            raise error

    def clear(self) -> list[Chunk]:
        """Take back and return what nobody has begun to read; what has been begun is finished."""
        with self._changed:
            taken = list(self._queue)
            self._queue.clear()
            for chunk in taken:
                self._done(chunk)
            while self._pending and not self._closed:
                self._changed.wait(_LINGER_SECONDS)
            return taken

    def close(self) -> None:
        """Take everything back and wait for the threads to end."""
        with self._changed:
            self._closed = True
            self.clear()
            self._changed.notify_all()
            threads = list(self._threads)
        if threading.current_thread() in threads:  # the garbage collector ran here: the others end by themselves
            return
        for thread in threads:
            thread.join()

    def _run(self) -> None:
        me = threading.current_thread()
        while True:
            with self._changed:
                if not self._queue and not self._closed:
                    self._changed.wait(_LINGER_SECONDS)
                if self._closed or not self._queue:
                    self._threads.remove(me)
                    return
                chunk = self._queue.popleft()
            self._read(chunk)

    def _read(self, chunk: Chunk) -> None:
        try:
            if chunk.file.populate(chunk.start, chunk.end):
                chunk.owner.from_disk = True
        except OSError as error:
            self._errors[chunk.owner] = error
        finally:
            with self._changed:
                self._done(chunk)

    def _done(self, chunk: Chunk) -> None:
        left = self._pending[chunk.owner] - 1
        if left:
            self._pending[chunk.owner] = left
        else:
            del self._pending[chunk.owner]
            self._changed.notify_all()
