"""The artifact store: bytes under (kind, key), in a private folder, checked on every read. Nothing is unpickled.

One file an entry: sha256 of the rest, a line of JSON (kind, key's hash, bytes, facts), the bytes. Disk trouble never
raises: an entry that cannot be written is kept in memory, one that is damaged is set aside and reported as missing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import config

SUFFIX, DAMAGED, UNFINISHED = ".lq", ".damaged", ".tmp"
# A temporary file this old (seconds) was left by a process that died: no write takes that long.
ABANDONED = 3600


@dataclass(frozen=True)
class Entry:
    """What one entry holds. `key` is the hash of (kind, key); a damaged one has no kind, no facts and ok False."""

    kind: str
    key: str
    bytes: int
    facts: Mapping[str, Any]
    ok: bool


class Cache:
    """A store in the folder `root`, or in memory alone where root is None. Safe between threads and processes."""

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self._memory: dict[str, bytes] = {}
        self._warned = False

    def get(self, kind: str, key: str) -> bytes | None:
        """The bytes last put under (kind, key), or None: never put, damaged, or not readable."""
        name = _hash(kind, key)
        blob = self._memory.get(name)
        if blob is None:
            if self.problem() is not None:
                return None
            path = self._path(name)
            blob = _read(path)
            if blob is None:
                return None
            # A whole entry under another entry's name is damage too.
            if _entry(name, blob, kind) is None:
                _set_aside(path)
                return None
        return _split(blob)[1]

    def put(self, kind: str, key: str, data: bytes, **facts: str | int | float | bool | None) -> None:
        """Stores `data`, over what was there. `facts` are for whoever lists the entries."""
        name = _hash(kind, key)
        header = json.dumps({"kind": kind, "key": name, "bytes": len(data), "facts": facts}, sort_keys=True)
        body = header.encode() + b"\n" + data
        blob = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
        problem = self.problem(create=True)
        if problem is None:
            problem = self._write(name, blob)
        if problem is None:
            self._memory.pop(name, None)
            return
        self._memory[name] = blob
        if self.root is not None and not self._warned:
            self._warned = True
            warnings.warn(f"lqcompile keeps what it compiles in memory only: {problem}", stacklevel=2)

    def entries(self) -> Iterator[Entry]:
        """Every entry, checked, those in memory too. Reads them all; changes nothing."""
        blobs = dict(self._memory)
        for path in self._files(SUFFIX):
            blob = _read(path)
            if blob is not None:
                blobs.setdefault(path.stem, blob)
        for name, blob in sorted(blobs.items()):
            yield _entry(name, blob) or Entry("", name, len(blob), {}, False)

    def verify(self) -> list[Entry]:
        """Checks every entry and sets the damaged ones aside. Returns the damaged ones."""
        damaged = [entry for entry in self.entries() if not entry.ok]
        for entry in damaged:
            _set_aside(self._path(entry.key))
        return damaged

    def clear(self) -> int:
        """Removes every entry, those set aside and what dead processes left. Returns how many entries that were."""
        gone = set(self._memory)
        self._memory.clear()
        for path in (*self._files(SUFFIX), *self._files(DAMAGED)):
            if _remove(path):
                gone.add(path.name)
        for path in self._files(UNFINISHED):
            if _age(path) > ABANDONED:
                _remove(path)
        return len(gone)

    def problem(self, create: bool = False) -> str | None:
        """Why the folder is not used, as a sentence; None where it is. With `create` it is made where missing.

        Asked before every use: a folder may be removed or replaced while we run.
        """
        if self.root is None:
            return "there is no home directory for a cache"
        try:
            if create and not os.path.lexists(self.root):
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = os.stat(self.root, follow_symlinks=False)
        except FileNotFoundError:
            return f"{self.root} was removed" if create else None
        except OSError as error:
            return f"{self.root}: {error.strerror}"
        if stat.S_ISLNK(found.st_mode):
            return f"{self.root} is a symbolic link"
        if not stat.S_ISDIR(found.st_mode):
            return f"{self.root} is not a folder"
        if os.name == "posix" and found.st_uid != os.getuid():
            return f"{self.root} belongs to another user"
        if os.name == "posix" and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"{self.root} can be written by other users"
        return None

    def _path(self, name: str) -> Path:
        assert self.root is not None
        return self.root / (name + SUFFIX)

    def _files(self, suffix: str) -> list[Path]:
        if self.root is None or self.problem() is not None:
            return []
        try:
            return sorted(path for path in self.root.iterdir() if path.suffix == suffix)
        except OSError:
            return []

    def _write(self, name: str, blob: bytes) -> str | None:
        """Whole or not at all. Returns why it failed. No fsync: what a power cut tears is found damaged on reading."""
        unfinished = None
        try:
            handle, unfinished = tempfile.mkstemp(UNFINISHED, dir=self.root)
            with os.fdopen(handle, "wb") as file:
                file.write(blob)
            os.replace(unfinished, self._path(name))
        except OSError as error:
            if unfinished is not None:
                _remove(Path(unfinished))
            return f"{self.root}: {error.strerror or error}"
        return None


@functools.cache
def default() -> Cache:
    """The user's own cache: $LQ_CACHE_DIR, else $XDG_CACHE_HOME/lqcompile, else ~/.cache/lqcompile."""
    return Cache(config.cache_folder())


def _hash(kind: str, key: str) -> str:
    """Names an entry. Text of the key never reaches the file system."""
    return hashlib.sha256(f"{len(kind)}:{kind}{key}".encode(errors="surrogatepass")).hexdigest()


def _split(blob: bytes) -> tuple[bytes, bytes]:
    """The JSON line and the data of a whole entry."""
    _, header, data = blob.split(b"\n", 2)
    return header, data


def _entry(name: str, blob: bytes, kind: str | None = None) -> Entry | None:
    """What `blob` holds, if it is whole and the entry `name` (of `kind`, where given)."""
    digest, _, body = blob.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    # Beyond the digest: whoever may write here is the user, but a file may be of another version of ours.
    try:
        header, data = _split(blob)
        read = json.loads(header)
        entry = Entry(read["kind"], read["key"], read["bytes"], read["facts"], True)
    except (ValueError, KeyError, TypeError):
        return None
    if entry.key != name or entry.bytes != len(data) or kind not in (None, entry.kind):
        return None
    return entry


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _set_aside(path: Path) -> None:
    """Renames a damaged entry, for whoever wants to know why; where that fails it stays and stays a miss."""
    try:
        os.replace(path, path.with_suffix(DAMAGED))
    except OSError as error:
        warnings.warn(f"{path.name} of lqcompile's cache is damaged and stays: {error.strerror}", stacklevel=3)


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True


def _age(path: Path) -> float:
    """Seconds since the last write; 0 where the file is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
