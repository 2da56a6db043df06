"""What a language model has said for a run: asked once, kept by content, counted.

A method that asks a language model (`methods/dpl.py`) puts its questions to the run's `Notes`. These know the answers that
`FILE` in the run's folder holds; the others come from a `Writer`, which a command gives them (see `qaperso.annotate`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qaperso.endpoint import Cache, Completion, Messages, digest
from qaperso.errors import UserError

FILE = "notes.jsonl"
# Answers to questions, in their order; what the cache lacks is asked, and kept answer by answer.
Writer = Callable[[Cache, Sequence[Messages]], list[Completion]]


class Notes:
    """The answers that a run rests on."""

    def __init__(self, folder: Path):
        """Reads and writes nothing yet; `folder` is the run's, and need not be there before the first question."""
        self.writer: Writer | None = None
        self._path = folder / FILE
        self._cache: Cache | None = None
        self._made = 0
        self._used: dict[str, Completion] = {}

    def complete(self, asked: Sequence[Messages]) -> list[str]:
        """The answers, in the order of the questions; equal questions are asked once, whenever that was.

        Raises:
          UserError: nobody is there to be asked, or the writer fails; what had been answered by then is kept.
        """
        if not asked:
            return []
        if self.writer is None:
            raise UserError(
                "this method asks a language model, and this command has none for it; use python -m qaperso.train, "
                "evaluate, chat or annotate"
            )
        if self._cache is None:
            self._cache = Cache(self._path)
        before = len(self._cache)
        try:
            found = self.writer(self._cache, asked)
        finally:
            self._made += len(self._cache) - before
        self._used |= {digest("", messages): answer for messages, answer in zip(asked, found, strict=True)}
        return [answer.text for answer in found]

    def usage(self) -> dict[str, int]:
        """Calls and tokens of the answers that were used so far, and how many of any this process had `made`."""
        answers = self._used.values()
        return {
            "calls": len(answers),
            "made": self._made,
            "prompt_tokens": sum(a.prompt_tokens for a in answers),
            "completion_tokens": sum(a.completion_tokens for a in answers),
        }

    def told(self, counts: Mapping[str, int]) -> str:
        """One line on what was found and what it took.

        Args:
          counts: of the method's `annotate`.
        """
        found = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        use = self.usage()
        return (
            f"{found}; {use['calls']:,} calls, {use['made']:,} of them made now: {use['prompt_tokens']:,} prompt and "
            f"{use['completion_tokens']:,} completion tokens"
        )

    def close(self) -> None:
        """Closes the file; the next question opens it again."""
        if self._cache is not None:
            self._cache.close()
            self._cache = None
