"""What of a process's libraries stays in its memory."""

from __future__ import annotations

import ctypes
from pathlib import Path

_MADV_DONTNEED = 4


def release_code(folder: Path) -> None:
    """Let go of the machine code of a folder's libraries; what is needed is mapped again.

    The start of PyTorch runs through 60 MB of it, most of which never runs again. Only code is
    touched, which is as in its file; where this cannot be done, nothing is.
    """
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    library = ctypes.CDLL(None)
    for line in maps:
        # Addresses, permissions, offset, device, inode, file.
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or fields[1] != "r-xp" or folder not in Path(fields[5]).parents:
            continue
        first, end = (int(address, 16) for address in fields[0].split("-"))
        library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_DONTNEED)
