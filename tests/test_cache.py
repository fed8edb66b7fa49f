"""The artifact store: what goes in comes out or is a miss, whatever happens to the disk."""

import errno
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqcompile import cache, config
from lqcompile.cache import Cache


@pytest.fixture
def store(tmp_path):
    return Cache(tmp_path / "store")


def only_file(store, suffix=cache.SUFFIX):
    (path,) = (p for p in store.root.iterdir() if p.suffix == suffix)
    return path


@given(
    items=st.dictionaries(st.tuples(st.text(max_size=4), st.text()), st.binary(max_size=300), max_size=6),
    in_memory=st.booleans(),
)
def test_what_is_put_is_got(items, in_memory):
    with tempfile.TemporaryDirectory() as folder:
        store = Cache(None if in_memory else Path(folder) / "store")
        for (kind, key), data in items.items():
            store.put(kind, key, b"older")
            store.put(kind, key, data, size=len(data))
        other = store if in_memory else Cache(store.root)
        assert {(kind, key): other.get(kind, key) for kind, key in items} == items
        assert other.get("no", "such key") is None
        found = sorted((e.kind, e.facts["size"], e.ok) for e in other.entries())
        assert found == sorted((kind, len(data), True) for (kind, _), data in items.items())
        assert other.verify() == [] and store.clear() == len(items)
        assert not any(store.get(kind, key) for kind, key in items) and not list(store.entries())


def test_kind_and_key_do_not_run_into_each_other(store):
    store.put("ab", "c", b"1")
    assert store.get("a", "bc") is None and store.get("abc", "") is None


def test_no_text_of_a_key_reaches_the_file_system(store):
    store.put("../kind", "../../secret\0/\ud800", b"data")
    path = only_file(store)
    assert path.parent == store.root and len(path.stem) == 64 and set(path.stem) <= set("0123456789abcdef")
    assert store.get("../kind", "../../secret\0/\ud800") == b"data"
    assert path.stat().st_mode & 0o777 == 0o600 and store.root.stat().st_mode & 0o777 == 0o700


def flip_header(blob):
    at = blob.index(b'"kind"')
    return blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :]


def another_format(blob):
    body = json.dumps([1, 2]).encode() + b"\n" + b"data"
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


DAMAGES = {
    "a bit of the data": lambda blob: blob[:-1] + bytes([blob[-1] ^ 16]),
    "a bit of the header": flip_header,
    "a bit of the digest": lambda blob: bytes([blob[0] ^ 1]) + blob[1:],
    "truncated": lambda blob: blob[:-3],
    "half": lambda blob: blob[: len(blob) // 2],
    "one line": lambda blob: blob.split(b"\n")[0],
    "emptied": lambda blob: b"",
    "longer": lambda blob: blob + b"\0",
    "noise": lambda blob: bytes(range(256)),
    "another format, whole": another_format,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_a_miss_and_set_aside(store, damage):
    store.put("cubin", "key", b"some data", arch="sm_90a")
    path = only_file(store)
    path.write_bytes(damage(path.read_bytes()))
    assert [entry.ok for entry in store.entries()] == [False]
    assert store.get("cubin", "key") is None
    assert only_file(store, cache.DAMAGED) and not path.exists() and not list(store.entries())
    store.put("cubin", "key", b"again")
    assert store.get("cubin", "key") == b"again" and [entry.ok for entry in store.entries()] == [True]


def test_a_whole_entry_under_another_name_is_a_miss(store):
    store.put("cubin", "a", b"of a")
    a = only_file(store)
    store.put("cubin", "b", b"of b")
    (b,) = set(store.root.iterdir()) - {a}
    b.write_bytes(a.read_bytes())
    assert store.get("cubin", "b") is None and store.get("cubin", "a") == b"of a"


def test_verify_sets_aside_what_is_damaged_and_clear_removes_all(store):
    for key in "abc":
        store.put("cubin", key, key.encode(), note=key)
    victim = sorted(store.root.iterdir())[1]
    victim.write_bytes(b"")
    (damaged,) = store.verify()
    assert damaged.key == victim.stem and not damaged.ok
    assert store.verify() == [] and len({entry.facts["note"] for entry in store.entries()}) == 2
    (store.root / ("old" + cache.UNFINISHED)).touch()
    os.utime(store.root / ("old" + cache.UNFINISHED), (0, time.time() - 2 * cache.ABANDONED))
    (store.root / ("new" + cache.UNFINISHED)).touch()
    (store.root / "not ours").touch()
    assert store.clear() == 3
    assert {p.name for p in store.root.iterdir()} == {"new" + cache.UNFINISHED, "not ours"}


def linked(root, patch):
    (root.parent / "elsewhere").mkdir()
    root.symlink_to(root.parent / "elsewhere")


def dangling(root, patch):
    root.symlink_to(root.parent / "nowhere")


def open_to(mode):
    def spoil(root, patch):
        root.mkdir()
        root.chmod(mode)

    return spoil


def foreign(root, patch):
    root.mkdir(mode=0o700)
    real = os.stat

    def stat(path, **kw):
        found = real(path, **kw)
        if Path(path) != root:
            return found
        return os.stat_result((*found[:4], found.st_uid + 1, *found[5:]))

    patch.setattr(cache.os, "stat", stat)


def a_file(root, patch):
    root.touch()


def below_a_file(root, patch):
    root.parent.rmdir()
    root.parent.touch()


def unreadable_parent(root, patch):
    def stat(path, **kw):
        raise PermissionError(errno.EACCES, "Permission denied")

    patch.setattr(cache.os, "stat", stat)


REFUSED = {
    "a symbolic link": (linked, "symbolic link"),
    "a dangling link": (dangling, "symbolic link"),
    "group-writable": (open_to(0o770), "other users"),
    "world-writable": (open_to(0o1777), "other users"),
    "foreign-owned": (foreign, "another user"),
    "a file": (a_file, "not a folder"),
    "below a file": (below_a_file, "Not a directory"),
    "out of reach": (unreadable_parent, "Permission denied"),
}


def kept_in_memory(store, sentence):
    """Two entries work, with one warning, which says why."""
    before = len(list(store.entries()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store.put("cubin", "a", b"1")
        store.put("cubin", "b", b"2")
        assert (store.get("cubin", "a"), store.get("cubin", "b"), store.get("cubin", "c")) == (b"1", b"2", None)
    assert len(caught) == 1 and sentence in str(caught[0].message) and "memory" in str(caught[0].message)
    assert len(list(store.entries())) == before + 2


@pytest.mark.parametrize(("spoil", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_folder_that_is_not_private_is_refused(tmp_path, monkeypatch, spoil, sentence):
    root = tmp_path / "parent" / "store"
    root.parent.mkdir()
    with monkeypatch.context() as patch:
        spoil(root, patch)
        store = Cache(root)
        assert sentence in store.problem()
        kept_in_memory(store, sentence)
        assert store.clear() == 2
    assert not root.is_dir() or not list(root.iterdir())


def test_a_refused_folder_is_not_read_either(tmp_path):
    Cache(tmp_path / "real").put("cubin", "key", b"planted")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert Cache(tmp_path / "link").get("cubin", "key") is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("where", ["mkstemp", "write", "replace"])
def test_a_failed_write_is_kept_in_memory_and_leaves_nothing(store, monkeypatch, where, code):
    error = OSError(code, os.strerror(code))

    def fail(*args, **kw):
        raise error

    class Full:
        def __init__(self, handle):
            self.handle = handle

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            os.close(self.handle)

        write = fail

    with monkeypatch.context() as patch:
        if where == "mkstemp":
            patch.setattr(cache.tempfile, "mkstemp", fail)
        elif where == "write":
            patch.setattr(cache.os, "fdopen", lambda handle, mode: Full(handle))
        else:
            patch.setattr(cache.os, "replace", fail)
        kept_in_memory(store, os.strerror(code))
    assert not list(store.root.iterdir())
    # The disk has room again: the new bytes are stored, and not shadowed by the old ones.
    store.put("cubin", "a", b"3")
    assert Cache(store.root).get("cubin", "a") == store.get("cubin", "a") == b"3"


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_read_and_not_written(store):
    store.put("cubin", "old", b"0")
    store.root.chmod(0o500)
    kept_in_memory(Cache(store.root), "Permission denied")
    assert Cache(store.root).get("cubin", "old") == b"0"


def test_a_damaged_entry_that_cannot_be_renamed_stays_a_miss(store, monkeypatch):
    store.put("cubin", "key", b"data")
    only_file(store).write_bytes(b"")

    def fail(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache.os, "replace", fail)
    for _ in range(2):
        with pytest.warns(UserWarning, match="Read-only"):
            assert store.get("cubin", "key") is None


def test_a_folder_that_disappears_is_made_again(store):
    store.put("cubin", "key", b"1")
    store.clear()
    store.root.rmdir()
    assert store.get("cubin", "key") is None and not store.root.exists()
    store.put("cubin", "key", b"2")
    assert Cache(store.root).get("cubin", "key") == b"2"


def write_many(root, mark, failures):
    store = Cache(root)
    for i in range(100):
        store.put("cubin", "shared", mark * (20_000 + i))
        got = store.get("cubin", "shared")
        # Some process's bytes, whole: one letter, in a length that a writer chose.
        if got is None or len(set(got)) != 1 or not 20_000 <= len(got) < 20_100:
            failures.put(f"{mark!r} {i}: {got and len(got)}")


def test_processes_that_write_one_key_never_see_half_of_it(tmp_path):
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    writers = [context.Process(target=write_many, args=(tmp_path / "new", bytes([mark]), failures)) for mark in b"abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [w.exitcode for w in writers] == [0] * 4 and failures.empty()
    assert [p.suffix for p in (tmp_path / "new").iterdir()] == [cache.SUFFIX]


def test_where_the_default_is(monkeypatch, tmp_path):
    for name in ("LQ_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.cache_folder() == tmp_path / ".cache" / "lqcompile"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert config.cache_folder() == tmp_path / ".cache" / "lqcompile"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert config.cache_folder() == tmp_path / "xdg" / "lqcompile"
    monkeypatch.setenv("LQ_CACHE_DIR", str(tmp_path / "own"))
    assert config.cache_folder() == tmp_path / "own"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("LQ_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(config.Path, "home", homeless)
    assert config.cache_folder() is None
