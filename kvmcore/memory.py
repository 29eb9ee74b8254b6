"""Guest RAM: one sealed memfd, and the one gate from a guest-physical range to host bytes.

Spec: memfd_create(2), fcntl(2) F_ADD_SEALS.  The seals keep any holder of the descriptor from truncating
the file, which would kill the others with SIGBUS.  Left out: read-only regions and memory hot-plug.
"""

from __future__ import annotations

import _thread  # not threading, which has much to do in each process that is forked
import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterable
from typing import NamedTuple, Self

from kvmcore.errors import MemoryFault

MAP_NORESERVE = 0x4000  # <asm-generic/mman-common.h>; the mmap module has it from 3.13 on
_IOV_MAX_BYTES = 1 << 30  # one preadv moves less than 2 GiB


class Region(NamedTuple):
    """[gpa, gpa + size) of the guest is [offset, offset + size) of the memfd."""

    gpa: int
    size: int
    offset: int


class GuestMemory:
    """RAM as a mapping of the memfd, addressed by guest-physical address.

    Every access is checked whole against one region before a byte moves: a range that reaches into a hole
    or across the 32-bit gap is a MemoryFault, never a short transfer.
    """

    fd = -1

    def __init__(self, fd: int, regions: Iterable[Region]) -> None:
        """Map `fd` and, unless that fails, take it over; see `create` and `attach`."""
        self.regions = tuple(sorted(regions))
        self.size = sum(r.size for r in self.regions)
        self._map = mmap.mmap(fd, self.size, mmap.MAP_SHARED | MAP_NORESERVE)
        with contextlib.suppress(OSError):  # a kernel without; if there are any is the host's to say
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._map)
        self._lock = _thread.allocate_lock()
        self.fd = fd

    @classmethod
    def create(cls, ranges: Iterable[tuple[int, int]]) -> Self:
        """New RAM, sparse and zero, for the (gpa, size) of `ranges`; `close` closes its memfd too.

        Raises:
            OSError: the kernel refuses (out of memory or address space).
        """
        regions = []
        offset = 0
        for gpa, size in ranges:
            regions.append(Region(gpa, size, offset))
            offset += size
        fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, offset)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, regions)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, regions: Iterable[Region]) -> Self:
        """The same RAM in a device process that was handed the memfd; takes over `fd`.

        Raises:
            ValueError: the regions do not fill the file exactly.
        """
        regions = tuple(regions)
        end = 0
        for region in sorted(regions, key=lambda r: r.offset):
            if region.offset != end:
                raise ValueError(f"guest memory: region at file offset {region.offset:#x}, expected {end:#x}")
            end += region.size
        if end != os.fstat(fd).st_size:
            raise ValueError(f"guest memory: file of {os.fstat(fd).st_size:#x} bytes, expected {end:#x}")
        return cls(fd, regions)

    def _offset(self, gpa: int, size: int) -> int:
        """The file offset of [gpa, gpa + size), all of it checked."""
        if size >= 0:
            for start, length, offset in self.regions:
                if 0 <= gpa - start <= length - size:
                    return gpa - start + offset
        raise MemoryFault(gpa, size)

    def holds(self, gpa: int, size: int) -> bool:
        """Whether [gpa, gpa + size) is wholly RAM."""
        if size >= 0:
            for start, length, _ in self.regions:
                if 0 <= gpa - start <= length - size:
                    return True
        return False

    def views(self, spans: Iterable[tuple[int, int]]) -> list[memoryview]:
        """Each (gpa, size) as writable host bytes, for preadv and its like; `close` needs them gone.

        Raises:
            MemoryFault: one is not wholly RAM.
        """
        view = self._view
        return [view[at : at + size] for at, size in [(self._offset(*span), span[1]) for span in spans]]

    def copy_out(self, spans: Iterable[tuple[int, int]], limit: int) -> bytes:
        """The first `limit` bytes of what `spans` are one after the other; fewer where they end.

        Raises:
            MemoryFault: not all of that is RAM.
        """
        parts = []
        for gpa, size in spans:
            if limit <= 0:
                break
            parts.append(self.read(gpa, min(size, limit)))
            limit -= size
        return b"".join(parts)

    def copy_in(self, spans: Iterable[tuple[int, int]], data: bytes | bytearray | memoryview) -> int:
        """Spread `data` over `spans`; how many bytes there was room for.

        Raises:
            MemoryFault: not all of that is RAM; the spans before the one that is not have been written.
        """
        source = memoryview(data).cast("B")
        done = 0
        for gpa, size in spans:
            if done == source.nbytes:
                break
            self.write(gpa, source[done : done + size])
            done += min(size, source.nbytes - done)
        return done

    def fence(self) -> None:
        """No load after this is done before the stores ahead of it: the one reordering of x86.

        Python has no barrier, but taking a lock is a locked instruction, and "Loads and Stores Are Not
        Reordered with Locked Instructions" (Intel SDM, volume 3, Memory Ordering).
        """
        with self._lock:
            pass

    def read(self, gpa: int, size: int) -> bytes:
        """`size` bytes from `gpa`.

        Raises:
            MemoryFault: not wholly RAM.
        """
        at = self._offset(gpa, size)
        return self._map[at : at + size]

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` (bytes, whatever its item size) at `gpa`.

        Raises:
            MemoryFault: not wholly RAM; nothing was written.
        """
        source = data if type(data) is bytes else memoryview(data).cast("B")
        at = self._offset(gpa, len(source))
        self._view[at : at + len(source)] = source

    def pread_from(self, fd: int, file_offset: int, gpa: int, size: int) -> int:
        """Read up to `size` bytes of a file straight to `gpa`; less than `size` only at its end.

        Raises:
            MemoryFault: the destination is not wholly RAM; nothing was read.
            OSError: the file cannot be read.
        """
        at = self._offset(gpa, size)
        done = 0
        while done < size:
            window = self._view[at + done : at + min(size, done + _IOV_MAX_BYTES)]
            count = os.preadv(fd, [window], file_offset + done)
            if not count:
                break
            done += count
        return done

    def discard(self, gpa: int, size: int) -> None:
        """Give whole pages back to the host, for everyone who has the memfd; they read as zeros afterwards.

        MADV_REMOVE punches a hole in the file, as fallocate(2) does, where MADV_DONTNEED would only unmap.

        Raises:
            MemoryFault: not wholly RAM; nothing was given back.
            OSError: [gpa, gpa + size) is not whole pages.
        """
        self._map.madvise(mmap.MADV_REMOVE, self._offset(gpa, size), size)

    def host_address(self, gpa: int, size: int) -> int:
        """Where [gpa, gpa + size) is mapped in this process, for KVM_SET_USER_MEMORY_REGION.

        Raises:
            MemoryFault: not wholly RAM.
        """
        import ctypes  # noqa: PLC0415  only the supervisor asks; device processes stay without it

        at = self._offset(gpa, size)
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + at

    def close(self) -> None:
        """Unmap and close the memfd; nothing may be using either (a VM, a device)."""
        if self.fd >= 0:
            self._view.release()
            self._map.close()
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        if self.fd >= 0:  # the mapping goes by itself
            os.close(self.fd)
