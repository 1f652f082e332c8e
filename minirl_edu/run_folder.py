"""The lock of a folder that one process writes at a time, such as that of a run.

The operating system holds it (`flock`) and takes it back when the process ends, however it ends: a folder whose process
was killed is free at once. Where there is no such lock (Windows, some network file systems) nothing is locked.
"""

import json
import os
import socket
import weakref
from contextlib import suppress
from datetime import datetime
from pathlib import Path

LOCK_FILE = ".lock"
"""What is locked: a file in the folder, which says by whom."""


class FolderInUse(FileExistsError):
    """Another process is at work in the folder; the message names it."""


class FolderLock:
    """A locked folder, until `close()`, the end of a `with` block, or the end of the process."""

    def __init__(self, file: Path, descriptor: int | None, made: bool) -> None:
        self.close = weakref.finalize(self, _release, file, descriptor, made, os.getpid())

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_held: "weakref.WeakValueDictionary[Path, FolderLock]" = weakref.WeakValueDictionary()


def lock_folder(folder: str | Path) -> FolderLock:
    """Lock `folder`, which is made if it does not exist; if nothing was put into it, `close()` removes it again.

    No child process keeps the lock, whether it was forked or started. Within one process the latest caller has it: a
    trainer that is built anew in a notebook takes over from the one before.

    Raises FolderInUse naming process, host and time, OSError for a folder that cannot be made or written.
    """
    folder = Path(folder).resolve()
    file, made = folder / LOCK_FILE, not folder.exists()
    if (before := _held.pop(file, None)) is not None:
        before.close()
    lock = FolderLock(file, _locked(file), made)
    _held[file] = lock
    return lock


def _locked(file: Path) -> int | None:
    """A descriptor of the file, with the lock, which no program that we start gets; None where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        file.parent.mkdir(parents=True, exist_ok=True)
        return None
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # A link could lead to a file of someone else's, which would be overwritten.
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except (FileNotFoundError, FileExistsError):
            if file.parent.exists() and not file.parent.is_dir():
                raise
            continue  # the folder was just removed, by the process that had made it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                break
        except FileNotFoundError:
            pass
        except BlockingIOError:
            holder = _holder(os.pread(descriptor, 1000, 0))
            os.close(descriptor)
            raise FolderInUse(
                f"{file.parent}: in use by {holder}; wait until it has ended, or choose another folder"
            ) from None
        except OSError:  # a network file system without locks
            os.close(descriptor)
            file.unlink(missing_ok=True)
            return None
        os.close(descriptor)  # of a file that its last holder has removed meanwhile
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since})
    with suppress(OSError):  # a full disk; only the message needs it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode() + b"\n", 0)
    return descriptor


def _holder(text: bytes) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, TypeError, KeyError):  # it has only just begun
        return "another process"


def _release(file: Path, descriptor: int | None, made: bool, pid: int) -> None:
    """Free the folder; a forked child only lets go of its copy of the descriptor."""
    with suppress(OSError):
        if os.getpid() == pid and descriptor is not None:
            file.unlink()
        if os.getpid() == pid and made:
            file.parent.rmdir()
    if descriptor is not None:
        os.close(descriptor)


def _let_go() -> None:
    for lock in list(_held.values()):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
