"""Vectors of texts on disk: made once, kept for good, read where they lie.

A cache folder holds the vectors of any number of encoders, each in a folder named after the encoder's identity:

    identity.json   what made the vectors, for people to read
    vectors         float16[n, dim], little-endian, in the order in which they were added
    digests         uint64[n], BLAKE2b of the texts

Both files only grow. A block of vectors is on disk before its digests are, and only as many vectors are there as there are
whole digests. So whatever a killed writer left behind is not read, and the next writer writes over it. One writer at a time
appends, under a lock that ends with its process; readers need none.

A digest has 64 bits: of ten million texts two share one with a probability of 3e-6, and then one text gets the other's vector.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qaperso.data.features import normalise
from qaperso.errors import UserError

Embed = Callable[[Sequence[str]], np.ndarray]
DTYPE = np.dtype("<f2")
# Texts that are embedded, and made to last, at a time.
BLOCK = 4096


def digest(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Vectors:
    """The vectors of one encoder. Memory holds 16 bytes for each; the vectors themselves stay on disk."""

    def __init__(self, folder: str | Path, identity: str, dim: int):
        """Opens a cache, or begins one.

        Args:
          folder: of the cache, shared by encoders and runs; "" = a temporary one, which is gone with this object.
          identity: of the encoder: equal where equal texts get equal vectors.
          dim: of the vectors.

        Raises:
          UserError: the folder cannot be made.
        """
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="qaperso-vectors-")
        whole = f"{identity} {dim}"
        root = Path(folder or self._temporary.name)
        self.folder = root / hashlib.sha256(whole.encode()).hexdigest()[:16]
        self.dim = dim
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("vectors", "digests"):
                (self.folder / name).touch()
            (self.folder / "identity.json").write_text(json.dumps({"encoder": identity, "dim": dim}) + "\n")
        except OSError as error:
            raise UserError(
                f"config.vectors='{folder}' cannot be written to ({error.strerror}); give a folder of your own, or ''"
            ) from error
        self._read()

    def __len__(self) -> int:
        """How many vectors there are."""
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of all vectors."""
        return self._count * self.dim * DTYPE.itemsize

    @property
    def table(self) -> np.ndarray:
        """float16[n, dim], mapped: only rows that are looked at are read."""
        if len(self._table) != self._count:
            self._table = np.memmap(self.folder / "vectors", DTYPE, "r", shape=(self._count, self.dim))
        return self._table

    @property
    def digests(self) -> np.ndarray:
        """uint64[n], `digest` of each vector's text, mapped."""
        if len(self._named) != self._count:
            self._named = np.memmap(self.folder / "digests", "<u8", "r", shape=(self._count,))
        return self._named

    def find(self, texts: Sequence[str]) -> np.ndarray:
        """Rows of the table, int64[n]; -1 where a text has no vector."""
        return self._find(_digests(texts))

    def add(self, texts: Sequence[str], embed: Embed) -> np.ndarray:
        """Rows of the table for all texts, int64[n]; those that have no vector get one first.

        They are embedded `BLOCK` at a time, each block made to last before the next: a build that is killed goes on from there.

        Args:
          texts: in the order in which they are to lie on disk; what is read together should lie together.
          embed: n texts to float[n, dim].
        """
        digests = _digests(texts)
        rows = self._find(digests)
        missing = {int(digests[i]): texts[i] for i in np.flatnonzero(rows < 0)}
        if not missing:
            return rows
        for start in range(0, len(missing), BLOCK):
            with self._writing():
                block = np.fromiter(itertools.islice(missing, start, start + BLOCK), np.uint64)
                # Another process may have been here meanwhile.
                block = block[self._find(block) < 0]
                if len(block):
                    self._append(block, np.asarray(embed([missing[int(d)] for d in block])))
        return self._find(digests)

    def _find(self, digests: np.ndarray) -> np.ndarray:
        rows = np.full(len(digests), -1, np.int64)
        for known, order in (self._old, self._recent):
            if len(known):
                place = np.minimum(np.searchsorted(known, digests), len(known) - 1)
                rows = np.where(known[place] == digests, order[place], rows)
        return rows

    def _read(self) -> None:
        """Takes in what is on disk."""
        self._count = self._committed()
        digests = np.fromfile(self.folder / "digests", "<u8", self._count)
        self._old, self._recent = _sorted(digests, np.arange(self._count)), _NONE
        self._table, self._named = np.zeros((0, self.dim), DTYPE), np.zeros(0, np.uint64)

    def _committed(self) -> int:
        sizes = []
        for name in ("digests", "vectors"):
            # A shared disk may remember an old size of a file, but not of one that is opened.
            with (self.folder / name).open("rb") as file:
                sizes.append(os.fstat(file.fileno()).st_size)
        return min(sizes[0] // 8, sizes[1] // (self.dim * DTYPE.itemsize))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """This process is the one that appends, and knows what others have appended."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            more = self._committed() - self._count
            if more > 0:
                self._take(np.fromfile(self.folder / "digests", "<u8", more, offset=8 * self._count))
            elif more < 0:
                self._read()
            yield

    def _append(self, digests: np.ndarray, vectors: np.ndarray) -> None:
        if vectors.shape != (len(digests), self.dim):
            raise ValueError(f"vectors of shape {vectors.shape} for {len(digests)} texts of {self.dim} dimensions")
        row = self.dim * DTYPE.itemsize
        _write(self.folder / "vectors", self._count * row, np.ascontiguousarray(vectors, DTYPE).tobytes())
        _write(self.folder / "digests", self._count * 8, digests.astype("<u8").tobytes())
        self._take(digests)

    def _take(self, digests: np.ndarray) -> None:
        """Knows of vectors that are on disk behind the others."""
        self._recent = _joined(self._recent, (digests, np.arange(self._count, self._count + len(digests))))
        self._count += len(digests)
        # Few are sorted at each block, and all of them a few times in a build.
        if len(self._recent[0]) > len(self._old[0]) // 8 + 16 * BLOCK:
            self._old, self._recent = _joined(self._old, self._recent), _NONE


# Digests in order, and the row of each.
_Index = tuple[np.ndarray, np.ndarray]
_NONE: _Index = (np.zeros(0, np.uint64), np.zeros(0, np.int64))


def _sorted(digests: np.ndarray, rows: np.ndarray) -> _Index:
    # Stable: linear where long stretches are in order already.
    order = np.argsort(digests, kind="stable")
    return digests[order], rows[order]


def _joined(one: _Index, two: _Index) -> _Index:
    return _sorted(np.concatenate([one[0], two[0]]), np.concatenate([one[1], two[1]]))


def _digests(texts: Sequence[str]) -> np.ndarray:
    return np.fromiter(map(digest, texts), np.uint64, len(texts))


def _write(path: Path, start: int, content: bytes) -> None:
    """Puts the content behind the first `start` bytes of a file, and on disk."""
    with path.open("r+b") as file:
        file.truncate(start)
        file.seek(start)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Some vectors of a cache as an array float16[count, dim] that is read when it is needed; the rest of it is 0.

    Attributes:
      source: the cache.
      index: int64[n], n at most `count`.
      count: rows of the array.
    """

    source: Vectors
    index: np.ndarray
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of the array."""
        return self.count, self.source.dim

    @property
    def dtype(self) -> np.dtype:
        """Of the array."""
        return DTYPE

    def tobytes(self) -> bytes:
        """Equal for equal texts in equal order, in whichever cache of the encoder."""
        return self.source.digests[self.index].tobytes()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.zeros(self.shape, DTYPE)
        if len(self.index):
            whole[: len(self.index)] = self._vectors()
        return whole if dtype is None else whole.astype(dtype)

    def _vectors(self) -> np.ndarray:
        return self.source.table[self.index]


@dataclasses.dataclass(frozen=True, eq=False)
class Differences(Rows):
    """Of each vector what sets it apart: itself less the mean of some others, of unit length; 0 where nothing does.

    Attributes:
      others: int32[m], the others of all vectors, one vector's after another's; each has at least one.
      starts: int64[n], where the others of each begin.
    """

    others: np.ndarray
    starts: np.ndarray

    def tobytes(self) -> bytes:
        """See `Rows`."""
        named = self.source.digests
        return b"".join(x.tobytes() for x in (named[self.index], named[self.others], self.starts))

    def _vectors(self) -> np.ndarray:
        table = self.source.table
        sums = np.add.reduceat(table[self.others].astype(np.float32), self.starts)
        number = np.diff(self.starts, append=len(self.others))
        return normalise(table[self.index].astype(np.float32) - sums / number[:, None])
