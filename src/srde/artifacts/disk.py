"""The few things that only the operating system can do: flush, exchange two names, tell a live process."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NOT_HERE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_TORCH_WRITER = ("inline_container.cc", "PytorchStreamWriter failed writing")


def flush(path: Path) -> None:
    """Returns when the file's content, or the folder's list of names, is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step (`renameat2` with `RENAME_EXCHANGE`).

    Returns:
        `False`, with nothing done, where the system, the C library or the file system has no such call.

    Raises:
        OSError: The swap itself failed.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_HERE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def is_alive(pid: int) -> bool:
    """Whether a process of this machine has the id; one that belongs to somebody else counts as alive."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def means_disk_full(error: BaseException) -> bool:
    """Whether a failed write was for want of space (or quota).

    Writers of other libraries do not all raise `OSError`: safetensors puts the system's text into an exception of
    its own, so the text counts too; PyTorch's says only that its file is shorter than what it wrote.
    """
    code = error.errno if isinstance(error, OSError) else None
    texts = (os.strerror(errno.ENOSPC), *_TORCH_WRITER)
    return code in _FULL or any(text in str(error) for text in texts)
