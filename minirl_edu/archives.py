"""Small text files of many runs, kept as one archive per folder.

    FOLDER/<group>/seed<k>.csv     while runs are made: a file for each run that has ended
    FOLDER.tar.bz2                 at rest: the same files, byte for byte, in about a quarter of the bytes

`pack` turns the first into the second, `files_in` reads both, `tar xf FOLDER.tar.bz2` unpacks by hand. The runs of the
experiments are text of 4 significant digits. Compressed, that takes less than float32 columns do (npz, parquet), and
nothing is rounded a second time.
"""

import io
import os
import re
import tarfile
from contextlib import suppress
from pathlib import Path

_NAME = re.compile(r"[^/]+/seed\d+\.csv")


def archive_of(folder: str | Path) -> Path:
    """Where the files of `folder` lie when they are packed: beside it."""
    folder = Path(folder)
    return folder.with_name(f"{folder.name}.tar.bz2")


def files_in(folder: str | Path) -> dict[str, bytes]:
    """The contents of every `<group>/seed<k>.csv`, by that name, ordered by group and seed; empty where there is none.

    A file in the folder is newer than one of the same name in the archive, and is taken instead of it. Raises OSError
    for an archive that cannot be read.
    """
    files = _packed(archive_of(folder))
    for path in Path(folder).glob("*/seed*.csv"):
        name = f"{path.parent.name}/{path.name}"
        if _NAME.fullmatch(name):
            files[name] = path.read_bytes()
    return dict(sorted(files.items(), key=_order))


def pack(folder: str | Path) -> None:
    """Move the files of `folder` into its archive, where they replace those of the same name. Other files stay.

    The archive appears whole or not at all, and only then are the files removed: whatever ends this process, nothing
    is lost. The same files always give the same bytes. Raises OSError as `files_in`.
    """
    folder, archive = Path(folder), archive_of(folder)
    loose = [path for path in folder.glob("*/seed*.csv") if _NAME.fullmatch(f"{path.parent.name}/{path.name}")]
    if not loose:
        return
    part = archive.with_name(f"{archive.name}.part")
    with part.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w:bz2") as tar:
            for name, content in files_in(folder).items():
                entry = tarfile.TarInfo(name)  # no owner, no time
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        file.flush()
        os.fsync(file.fileno())  # the files are removed next
    part.replace(archive)
    for path in loose:
        path.unlink()
    for path in [*{path.parent for path in loose}, folder]:
        with suppress(OSError):  # something else is in it
            path.rmdir()


def _packed(archive: Path) -> dict[str, bytes]:
    if not archive.exists():
        return {}
    try:
        with tarfile.open(archive, "r:bz2") as tar:
            members = {entry.name: tar.extractfile(entry) for entry in tar if _NAME.fullmatch(entry.name)}
            return {name: file.read() for name, file in members.items() if file is not None}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise OSError(f"{archive} cannot be read ({error}): restore it, or delete it to make its runs again") from error


def _order(item: tuple[str, bytes]) -> tuple[str, int]:
    group, _, file = item[0].partition("/")
    return group, int(file.removeprefix("seed").removesuffix(".csv"))
