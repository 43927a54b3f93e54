"""Files appear whole or not at all, and what is damaged is noticed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch

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


# Bounded


def test_what_is_read_is_bounded_and_a_file(tmp_path):
    path = files.write_bytes(tmp_path / "a", b"12345")
    assert files.read_bytes(path, 5) == b"12345"
    with pytest.raises(files.FileError, match="a: expected at most 4 bytes, got more"):
        files.read_bytes(path, 4)
    os.truncate(path, 2**40)  # takes no place on the disk, and would take all memory
    with pytest.raises(files.FileError, match="a: expected at most 5 bytes, got more"):
        files.read_bytes(path, 5)
    os.mkfifo(tmp_path / "pipe")  # which opening would wait at
    for name in ("pipe", "."):
        with pytest.raises(files.FileError, match="expected a file, got a folder or a device"):
            files.read_bytes(tmp_path / name, 5)
    with pytest.raises(FileNotFoundError):
        files.read_bytes(tmp_path / "nowhere", 5)


def test_json_is_bounded_in_depth():
    deep = "[" * files.DEEPEST + "]" * files.DEEPEST
    assert files.parse_json(deep, "a") == json.loads(deep)
    for text in (f"[{deep}]", '{"a":' * 100_000 + "1" + "}" * 100_000, "[" * 5_000_000):
        with pytest.raises(files.FileError, match="a: expected JSON"):
            files.parse_json(text, "a")
    for text in ("", "{", b"\xff\xfe\x00", "1" * 5000):
        with pytest.raises(files.FileError, match="a: expected JSON, got "):
            files.parse_json(text, "a")


def test_messages_do_not_grow_with_what_they_show():
    nested = []
    for _ in range(100):
        nested = [nested] * 100
    for value in ("x" * 10**6, list(range(10**6)), {str(n): n for n in range(10**5)}, nested):
        assert len(files.shown(value)) <= 403
    assert files.shown({"b": [1, 2], "a": "x"}) == "{'a': 'x', 'b': [1, 2]}"


# Records


RECORD = {"format": 1, "rate": 0.1, "kinds": {"sgd": "baseline"}, "sizes": (1, 2)}


def test_records_come_back_and_no_wrong_bit_does(tmp_path):
    path = files.write_record(tmp_path / "a.json", RECORD)
    assert files.read_record(path, 1) == RECORD | {"sizes": [1, 2]}
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with contextlib.suppress(files.FileError):
                assert files.read_record(path, 1) == RECORD | {"sizes": [1, 2]}  # white space may be another
    path.write_bytes(whole[:-30])
    with pytest.raises(files.FileError, match="expected JSON"):
        files.read_record(path, 1)


def test_the_version_is_looked_at_first_and_a_digest_is_wanted(tmp_path):
    path = tmp_path / "a.json"
    for text, message in (
        ('{"format": 2, "digest": 3}', "expected format 1, got 2"),
        ("[1]", "expected a record with a format"),
        ("{}", "expected a record with a format"),
        ('{"format": 1, "rate": 1}', "is damaged or of an older version: it has no checksum"),
        ('{"format": 1, "rate": 1, "digest": "0"}', "is damaged: its content does not match"),
    ):
        path.write_text(text)
        with pytest.raises(files.FileError, match=message):
            files.read_record(path, 1)
    path.write_text('{"format": 1, "rate": 1}')
    assert files.read_record(path, 1, unsealed={"format", "rate"}) == {"format": 1, "rate": 1}
    with pytest.raises(files.FileError, match="is damaged or of an older version: it has no checksum"):
        files.read_record(path, 1, unsealed={"format", "rate", "more"})


# Tensors


TENSORS = {"b": torch.arange(3.0), "a": torch.eye(2, dtype=torch.float64), "c": torch.ones((), dtype=torch.bool)}


def read_tensors(path, **options):
    with files.open_tensors(path) as stored:
        return stored, stored.load(**options)


def test_tensors_come_back_by_this_and_by_the_library(tmp_path):
    path = files.write_tensors(tmp_path / "a", TENSORS, {"x": "é", "b": "2"})
    stored, found = read_tensors(path)
    assert stored.shapes == {"a": (2, 2), "b": (3,), "c": ()}
    assert stored.dtypes == {"F64", "F32", "BOOL"}
    for by_library in (found, safetensors.torch.load(path.read_bytes()), safetensors.torch.load_file(path)):
        assert by_library.keys() == TENSORS.keys()
        assert all(torch.equal(by_library[name], TENSORS[name]) for name in TENSORS)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == stored.metadata
    assert {"x": "é", "b": "2"}.items() < stored.metadata.items()
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # numbers begin at a multiple of their size


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*checkpoint") as caught:
        files.write_bytes(tmp_path / "checkpoint", b"content")
    assert caught.value.filename == str(tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


WRITE = """
import sys, torch
from fastl2l import LSTMRule, save_rule
save_rule(LSTMRule(seed=3), sys.argv[1], recipe={"seed": 3, "about": "it", "scores": {"b": 1, "a": 2}})
"""


def test_processes_write_the_same_bytes(tmp_path):
    written = set()
    for number in range(4):
        path = tmp_path / str(number)
        subprocess.run([sys.executable, "-c", WRITE, path], check=True, env=os.environ | {"FASTL2L_NATIVE": "0"})
        written.add(path.read_bytes())
    assert len(written) == 1


def test_no_wrong_bit_of_a_tensor_comes_back(tmp_path):
    path = files.write_tensors(tmp_path / "a", {"a": torch.arange(3.0)}, {"x": "1"})
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with contextlib.suppress(files.FileError):
                stored, found = read_tensors(path)
                assert torch.equal(found["a"], torch.arange(3.0))
                assert stored.metadata["x"] == "1"
    for damaged in (whole[:-1], whole + b"x", whole[:20], b""):
        path.write_bytes(damaged)
        with pytest.raises(files.FileError, match="a: expected a safetensors file, and it is damaged"):
            read_tensors(path)


def test_tensors_without_checksum_are_read_only_if_asked_for(tmp_path):
    path = files.write_bytes(tmp_path / "a", safetensors.torch.save(TENSORS))
    assert read_tensors(path, sealed=False)[1].keys() == TENSORS.keys()
    with pytest.raises(files.FileError, match="is damaged or of an older version: it has no checksum"):
        read_tensors(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"3",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": {}, "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [99999999999999999999999], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"checksum": 3}}',
        b'{"__metadata__": []}',
    ],
)
def test_headers_that_say_anything_else_are_refused(tmp_path, header):
    path = files.write_bytes(tmp_path / "a", len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(files.FileError, match="a: expected a safetensors file, and it is damaged"):
        read_tensors(path, sealed=False)


def test_a_header_is_bounded(tmp_path):
    path = files.write_bytes(tmp_path / "a", (2**40).to_bytes(8, "little"))
    os.truncate(path, 2**41)
    with pytest.raises(files.FileError, match="a header of more than"):
        read_tensors(path)
    with pytest.raises(ValueError, match="metadata: expected at most 4194304 bytes, got "):
        files.write_tensors(tmp_path / "b", TENSORS, {"x": "y" * files.LARGEST_TEXT})
    assert names(tmp_path) == ["a"]


# The cache


def read_number(path):
    return files.read_record(path, 1)["number"]


def write_number(path, number):
    files.write_record(path, {"format": 1, "number": number})


def test_the_cache_keeps_answers_and_makes_damaged_ones_anew_and_says_so_once(tmp_path, recwarn):
    path, made = tmp_path / "deep" / "a", []

    def ask():
        return files.cached(path, read_number, lambda: made.append(1) or 7, write_number)

    assert [ask(), ask()] == [7, 7]
    assert len(made) == 1
    path.write_text(path.read_text().replace("7", "6"))
    with pytest.warns(RuntimeWarning, match="a: is damaged: .*; it is computed anew"):
        assert ask() == 7
    assert ask() == 7
    assert len(made) == 2
    assert not recwarn.list


@pytest.mark.parametrize("obstacle", ["a folder in its place", "a file in its folder's place", "a full disk"])
def test_the_cache_stops_nobody(tmp_path, obstacle, monkeypatch):
    path = tmp_path / "deep" / "a"
    if obstacle == "a folder in its place":
        path.mkdir(parents=True)
    elif obstacle == "a file in its folder's place":
        path.parent.write_text("")
    else:

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
    with pytest.warns(RuntimeWarning) as caught:
        assert files.cached(path, read_number, lambda: 7, write_number) == 7
    assert "deep: what was computed cannot be kept there: " in str(caught[-1].message)


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"path: expected a file, new or to be replaced, got .*pipe"):
        files.write_bytes(tmp_path / "pipe", b"x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipe"]
