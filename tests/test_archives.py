"""Runs at rest lie in one archive per folder: nothing is lost on the way there, whatever happens."""

import bz2
import os
import tarfile

import pytest

from minirl_edu import archives
from minirl_edu.archives import archive_of, files_in, pack


def write(folder, **files):
    """Files by `group_seed`: `r2_10="text"` is `r2/seed10.csv`."""
    for name, text in files.items():
        group, _, seed = name.rpartition("_")
        path = folder / group / f"seed{seed}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_packed_files_are_the_same_bytes_in_order_and_gone_from_the_folder(tmp_path):
    folder = tmp_path / "grid.2e-4"  # no ending is cut off
    write(folder, r2_10="ten", r2_9="nine", minirl_0="zero, \N{GREEK SMALL LETTER PI}\n")
    before = files_in(folder)
    assert list(before) == ["minirl/seed0.csv", "r2/seed9.csv", "r2/seed10.csv"] and before["r2/seed10.csv"] == b"ten"
    pack(folder)
    assert os.listdir(tmp_path) == ["grid.2e-4.tar.bz2"]
    assert files_in(folder) == before and list(files_in(folder)) == list(before)
    with tarfile.open(archive_of(folder)) as tar:  # any tar opens it
        assert tar.getnames() == list(before)


def test_a_file_in_the_folder_is_newer_than_one_in_the_archive(tmp_path):
    folder = tmp_path / "n2"
    write(folder, r2_0="old", r2_1="kept")
    pack(folder)
    write(folder, r2_0="new", r3_0="more")
    wanted = {"r2/seed0.csv": b"new", "r2/seed1.csv": b"kept", "r3/seed0.csv": b"more"}
    assert files_in(folder) == wanted
    pack(folder)
    assert files_in(folder) == wanted and not folder.exists()


def test_packing_again_changes_nothing_and_the_same_files_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, r2_0="x" * 100, r2_1="y")
        pack(tmp_path / name)
    first = archive_of(tmp_path / "a").read_bytes()
    assert first == archive_of(tmp_path / "b").read_bytes()
    stamp = archive_of(tmp_path / "a").stat().st_mtime_ns
    pack(tmp_path / "a")
    assert archive_of(tmp_path / "a").stat().st_mtime_ns == stamp


def test_other_files_stay_where_they_are(tmp_path):
    folder = tmp_path / "n2"
    write(folder, r2_0="run")
    for name in ("seed0.old.csv", "seed1.log"):
        (folder / "r2" / name).write_text(name)
    pack(folder)
    assert sorted(os.listdir(folder / "r2")) == ["seed0.old.csv", "seed1.log"]
    assert list(files_in(folder)) == ["r2/seed0.csv"]


@pytest.mark.parametrize("when", ["writing", "removing"])
def test_an_interruption_loses_nothing(tmp_path, monkeypatch, when):
    folder = tmp_path / "n2"
    write(folder, r2_0="one", r2_1="two")
    pack(folder)
    write(folder, r2_1="newer", r2_2="three")
    before = files_in(folder)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if when == "writing" else (archives.Path, "unlink")), interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(folder)
    assert files_in(folder) == before
    pack(folder)
    assert files_in(folder) == before and not folder.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", bz2.compress(b"no tar"), None])
def test_a_broken_archive_is_an_error_and_never_overwritten(tmp_path, content):
    folder = tmp_path / "n2"
    write(folder, r2_0="one" * 1000)
    pack(folder)
    archive = archive_of(folder)
    broken = archive.read_bytes()[:60] if content is None else content  # None: cut short
    archive.write_bytes(broken)
    write(folder, r2_1="two")
    for read in (files_in, pack):
        with pytest.raises(OSError, match=r"n2.tar.bz2 cannot be read .*: restore it, or delete it"):
            read(folder)
    assert archive.read_bytes() == broken and (folder / "r2" / "seed1.csv").exists()


def test_only_names_of_runs_are_read_from_an_archive(tmp_path):
    folder = tmp_path / "n2"
    with tarfile.open(archive_of(folder), "w:bz2") as tar:
        for name in ("../../r2/seed0.csv", "/r2/seed0.csv", "r2/seed0.csv", "seed0.csv", "r2/evil.py"):
            tar.addfile(tarfile.TarInfo(name))
    assert files_in(folder) == {"r2/seed0.csv": b""}
