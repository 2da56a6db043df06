"""Vectors on disk: every text once, nothing half-written, whoever else writes and whenever a writer is killed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaperso.data import vectors
from qaperso.data.vectors import Differences, Rows, Vectors
from qaperso.errors import UserError

DIM = 3


def vector(text: str) -> np.ndarray:
    """Some float16 vector of a text's own."""
    return np.random.default_rng(vectors.digest(text)).normal(size=DIM).astype(np.float16)


def embed(texts: Sequence[str]) -> np.ndarray:
    return np.array([vector(text) for text in texts], np.float32)


def never(texts: Sequence[str]) -> np.ndarray:
    raise AssertionError(f"embedded again: {texts}")


def opened(folder: Path) -> Vectors:
    return Vectors(folder, "some encoder", DIM)


def check(cache: Vectors, texts: Sequence[str]) -> None:
    """All texts are there, with their own vectors."""
    rows = cache.find(texts)
    assert (rows >= 0).all()
    np.testing.assert_array_equal(cache.table[rows], np.array([vector(t) for t in texts]).reshape(-1, DIM))


def test_what_was_added_is_found_again(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    assert len(cache) == 0 and cache.table.shape == (0, DIM) and cache.find(["a"]).tolist() == [-1]
    assert cache.add(["b", "a", "b", ""], embed).tolist() == [0, 1, 0, 2]
    assert cache.add(["c", "a"], lambda texts: embed(texts) if texts == ["c"] else never(texts)).tolist() == [3, 1]
    check(cache, ["a", "b", "c", "", "\ud800"][:4])
    assert cache.find(["z", "c"]).tolist() == [-1, 3] and cache.nbytes == 4 * DIM * 2
    assert cache.add([], never).shape == (0,)
    again = opened(tmp_path)
    assert again.add(["c", "", "a", "b"], never).tolist() == [3, 2, 1, 0] and len(again) == 4
    check(again, ["a", "b", "c", ""])
    # Texts that are no Unicode are texts, too.
    check_lone = again.add(["\ud800"], lambda texts: np.zeros((1, DIM)))
    assert check_lone.tolist() == [4] and opened(tmp_path).find(["\ud800"]).tolist() == [4]


def test_encoders_do_not_meet(tmp_path: Path) -> None:
    opened(tmp_path).add(["a"], embed)
    for other in (Vectors(tmp_path, "another encoder", DIM), Vectors(tmp_path, "some encoder", DIM + 1)):
        assert len(other) == 0 and other.find(["a"]).tolist() == [-1]
    assert len(opened(tmp_path)) == 1


def test_without_a_folder_nothing_is_left() -> None:
    cache = Vectors("", "some encoder", DIM)
    cache.add(["a"], embed)
    check(cache, ["a"])
    where = cache.folder
    assert where.exists()
    del cache
    assert not where.exists()


@settings(max_examples=60, deadline=None)
@given(
    first=st.lists(st.text(max_size=3), unique=True, min_size=1, max_size=6),
    second=st.lists(st.text(max_size=3), unique=True, min_size=1, max_size=6),
    keep=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    garbage=st.binary(max_size=30),
)
def test_a_writer_killed_at_any_byte_leaves_whole_vectors(
    tmp_path_factory: pytest.TempPathFactory,
    first: list[str],
    second: list[str],
    keep: tuple[float, float],
    garbage: bytes,
) -> None:
    """Of its two writes the first may have got anywhere, and the second anywhere once the first is done."""
    folder = tmp_path_factory.mktemp("cache")
    cache = opened(folder)
    cache.add(first, embed)
    files = [cache.folder / name for name in ("vectors", "digests")]
    before = [f.stat().st_size for f in files]
    cache.add(second, embed)
    content = [f.read_bytes() for f in files]
    done = keep[0] > 0.5
    ends = (
        len(content[0]) if done else before[0] + int(2 * keep[0] * (len(content[0]) - before[0])),
        before[1] + int(keep[1] * (len(content[1]) - before[1])) if done else before[1],
    )
    for file, whole, end in zip(files, content, ends, strict=True):
        file.write_bytes(whole[:end])
    if not done:
        # What a file system may have put behind vectors that never got their digests.
        with files[0].open("ab") as file:
            file.write(garbage)
    after = opened(folder)
    check(after, first)
    assert (ends[1] - before[1]) // 8 == len(after) - len(first)
    after.add([*first, *second], embed)
    check(after, [*first, *second])
    check(opened(folder), [*first, *second])


def test_blocks_are_kept_where_embedding_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "BLOCK", 2)
    cache, seen = opened(tmp_path), []

    def failing(texts: Sequence[str]) -> np.ndarray:
        if seen:
            raise RuntimeError("the device is gone")
        seen.extend(texts)
        return embed(texts)

    with pytest.raises(RuntimeError, match="gone"):
        cache.add(list("abcde"), failing)
    again = opened(tmp_path)
    check(again, ["a", "b"])
    again.add(list("abcde"), lambda texts: never(texts) if set(texts) & {"a", "b"} else embed(texts))
    check(again, list("abcde"))


def test_two_writers_take_turns(tmp_path: Path) -> None:
    one, two = opened(tmp_path), opened(tmp_path)
    one.add(["a", "b"], embed)
    # What the other has written meanwhile is neither lost nor made twice.
    two.add(["c", "b", "a"], lambda texts: embed(texts) if texts == ["c"] else never(texts))
    one.add(["d", "c"], lambda texts: embed(texts) if texts == ["d"] else never(texts))
    for cache in (one, opened(tmp_path)):
        check(cache, list("abcd"))
        assert len(cache) == 4


def test_many_are_found_as_few_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the size at which they are sorted anew."""
    monkeypatch.setattr(vectors, "BLOCK", 8)
    cache, texts = opened(tmp_path), [f"text {i}" for i in range(700)]
    rows = np.concatenate([cache.add(texts[i : i + 50], embed) for i in range(0, 700, 50)])
    assert rows.tolist() == list(range(700)) and 0 < len(cache._recent[0]) < 400
    check(cache, texts[::-1])
    assert cache.find([*texts, "other"])[-1] == -1


def test_rows_are_read_when_they_are_needed(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    rows = Rows(cache, cache.add(["b", "a"], embed)[::-1], 4)
    none = Rows(cache, np.zeros(0, np.int64), 4)
    cache.add(["c"], embed)
    assert rows.shape == none.shape == (4, DIM) and rows.dtype == np.float16
    expected = np.zeros((4, DIM), np.float16)
    np.testing.assert_array_equal(np.asarray(none), expected)
    expected[:2] = vector("a"), vector("b")
    np.testing.assert_array_equal(np.asarray(rows), expected)
    into = np.ones((2, 4, DIM), np.float32)
    into[1] = rows
    np.testing.assert_array_equal(into[1], expected)
    assert rows.tobytes() != none.tobytes() == b"" and rows.tobytes() == Rows(cache, np.array([1, 0]), 4).tobytes()
    other = Vectors("", "some encoder", DIM)
    assert rows.tobytes() == Rows(other, other.add(["a", "z", "b"], embed)[[0, 2]], 4).tobytes()


def test_bad_folders_and_vectors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="config.vectors='.*file' cannot be written to"):
        Vectors(tmp_path / "file", "some encoder", DIM)
    with pytest.raises(ValueError, match="for 1 texts of 3 dimensions"):
        opened(tmp_path).add(["a"], lambda texts: np.zeros((1, 4)))
    assert len(opened(tmp_path)) == 0


def test_differences_by_hand() -> None:
    """Itself less the mean of its others, of unit length; 0 where the others say the same."""
    table = {"a": [1, 0, 0], "b": [0, 1, 0], "c": [0, 0, 1], "d": [1, 0, 0]}
    cache = Vectors("", "by hand", DIM)
    rows = cache.add(list(table), lambda texts: np.array([table[t] for t in texts], np.float32))
    others, starts = np.array([rows[1], rows[2], rows[3], rows[0]], np.int32), np.array([0, 2, 3])
    found = Differences(cache, rows[:3][[0, 0, 2]], 4, others, starts)
    expected = np.array([[1, -0.5, -0.5], [0, 0, 0], [-1, 0, 1], [0, 0, 0]]) / np.sqrt([[1.5], [1], [2], [1]])
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=1e-3)
    assert np.asarray(found).dtype == found.dtype and found.shape == (4, DIM)
    same = Differences(cache, found.index.copy(), 4, others.copy(), starts)
    assert found.tobytes() == same.tobytes() != Differences(cache, found.index, 4, others[::-1], starts).tobytes()
    nothing = Differences(cache, rows[:0], 2, others[:0], starts[:0])
    assert not np.asarray(nothing).any() and np.asarray(nothing).shape == (2, DIM)
