"""Text of a reply on its way out: cut where a stop sequence begins."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Looks for stop sequences in a text that comes in pieces; what may yet become one is held back."""

    def __init__(self, stops: Sequence[str]):
        """Looks for any of these, the first to begin."""
        self._stops = tuple(stops)
        self._held = ""

    def add(self, piece: str, finished: bool) -> tuple[str, bool]:
        """What may be said now, and whether a stop sequence was met: all is said then.

        Args:
          piece: the next part of the text.
          finished: whether it is the last.
        """
        text = self._held + piece
        met = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if met:
            self._held = ""
            return text[: min(met)], True
        kept = 0 if finished else max((_overlap(text, stop) for stop in self._stops), default=0)
        said, self._held = text[: len(text) - kept], text[len(text) - kept :]
        return said, False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop sequence, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
