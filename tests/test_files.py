"""Files appear whole or not at all."""

from __future__ import annotations

import json
import os

import pytest

from fastl2l import files


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_writes_what_it_is_given_and_leaves_nothing_else(tmp_path):
    assert files.write_bytes(tmp_path / "deep" / "a.bin", b"\x00\xff") == tmp_path / "deep" / "a.bin"
    files.write_text(tmp_path / "b.txt", "é\n")
    files.write_json(tmp_path / "c.json", {"x": [1, 2.5, None]})
    assert (tmp_path / "deep" / "a.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b.txt").read_bytes() == "é\n".encode()
    assert json.loads((tmp_path / "c.json").read_text()) == {"x": [1, 2.5, None]}
    assert names(tmp_path) == ["b.txt", "c.json", "deep"]
    assert names(tmp_path / "deep") == ["a.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch, step):
    path = files.write_text(tmp_path / "a.txt", "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_text(path, "new, and longer")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_the_data_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    files.write_text(tmp_path / "a.txt", "x")
    assert order[:2] == ["fsync", "replace"]


def test_links_are_followed_and_permissions_follow_the_umask(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    old = os.umask(0o027)
    try:
        files.write_text(tmp_path / "link", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "x"
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o640


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="data: expected bytes, got str"):
        files.write_bytes(tmp_path / "a", "text")
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a", {"loss": float("inf")})
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a", {"loss": object()})
    with pytest.raises(IsADirectoryError, match="expected a file name"):
        files.write_text(tmp_path, "x")
    assert names(tmp_path) == []
