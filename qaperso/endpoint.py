"""Any OpenAI-compatible endpoint: asked with patience, many questions at a time, none of them twice.

Who is asked stands in the environment: QAPERSO_API_BASE (such as http://localhost:8000/v1), QAPERSO_API_MODEL and
QAPERSO_API_KEY. The key goes into the request's header and nowhere else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from qaperso.errors import UserError

# {"role", "content"} of each message of one question.
Messages = Sequence[Mapping[str, str]]

BASE, MODEL, KEY = "QAPERSO_API_BASE", "QAPERSO_API_MODEL", "QAPERSO_API_KEY"
# Tries of one question, the first one included.
ATTEMPTS = 6
# Seconds that a try may last.
TIMEOUT = 120.0
# Seconds before the second try, doubled for each further one up to the longest.
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
# Seconds that an endpoint may ask to be left alone; it is better to come back later than to sit through more.
PATIENCE = 300.0
# What half a JSON text raises, or another text that claims to be one.
NO_JSON = (json.JSONDecodeError, UnicodeDecodeError)
# Shorter keys are placeholders for servers that ask for none, and may well be words of a reply.
SECRET_LENGTH = 8


@dataclasses.dataclass(frozen=True)
class Address:
    """Whom to ask: URL up to and including `/v1`, name of the model, key."""

    base: str
    model: str
    key: str = dataclasses.field(repr=False)

    @property
    def host(self) -> str:
        """Host and port, for messages: without the user and password that a URL may hold."""
        return urlsplit(self.base).netloc.rpartition("@")[2]


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer; token counts are the endpoint's, 0 where it gives none."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class _Unusable(Exception):
    """The endpoint says that all went well, and sends no answer."""


def from_environment(environment: Mapping[str, str] = os.environ) -> Address:
    """The endpoint that the environment names.

    Raises:
      UserError: a variable is missing, or cannot be what it should.
    """
    found = {name: environment.get(name, "").strip() for name in (BASE, MODEL, KEY)}
    for name, value in found.items():
        if not value:
            example = "(such as http://localhost:8000/v1)"
            raise UserError(f"{name} is not set; set {BASE} {example}, {MODEL} and {KEY} in the environment")
    try:
        parts = urlsplit(found[BASE])
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or half an IPv6 address
        good = False
    if not good:
        raise UserError(f"{BASE} is no http:// or https:// address; expected one such as http://localhost:8000/v1")
    if not found[KEY].isascii() or not found[KEY].isprintable() or " " in found[KEY]:
        raise UserError(
            f"{KEY} holds blanks or characters outside ASCII; give the key as the endpoint's owner issued it"
        )
    return Address(found[BASE], found[MODEL], found[KEY])


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait by a response's Retry-After (RFC 9110, section 10.2.3); None where it says nothing readable.

    Args:
      headers: of the response, with lower-case names or case-insensitive.
      now: seconds since the epoch.
    """
    text = headers.get("retry-after")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def backoff(failed: int, asked: float | None, draw: float) -> float:
    """Seconds before the next try (ours): what the endpoint asked for, else doubled from try to try.

    Jitter keeps questions that failed together from coming back together.

    Args:
      failed: tries that have failed, at least 1.
      asked: seconds by Retry-After; never undercut.
      draw: uniform in [0, 1).
    """
    if asked is not None:
        return asked + draw
    return min(FIRST_WAIT * 2 ** (failed - 1), LONGEST_WAIT) * (1 + draw) / 2


def digest(model: str, messages: Messages) -> str:
    """What a question is known by: sha256 of model and messages."""
    plain = json.dumps([model, [dict(m) for m in messages]], sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


class Endpoint:
    """Asks one endpoint. May be shared by threads."""

    def __init__(
        self,
        address: Address,
        timeout: float = TIMEOUT,
        attempts: int = ATTEMPTS,
        sleep: Callable[[float], Any] | None = None,
    ):
        """Connects to nobody yet.

        Args:
          address: whom to ask.
          timeout: seconds that a try may last.
          attempts: tries of one question.
          sleep: waits so many seconds; the default can be cut short by `stop`.

        Raises:
          UserError: the `openai` package is not installed.
        """
        self.address = address
        self._openai = _library()
        self._attempts = attempts
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        # Tries are counted, spaced and reported here; two layers of retries would multiply.
        self._client = self._openai.OpenAI(base_url=address.base, api_key=address.key, timeout=timeout, max_retries=0)
        self._sampling: dict[str, Any] = {"temperature": 0}

    def stop(self) -> None:
        """Questions that wait for another try give up; those under way end as they may."""
        self._stopped.set()

    def complete(self, messages: Messages) -> Completion:
        """The model's answer; "" where it refuses to give one.

        Tried again after 429, 408, 409, 5xx, timeouts, broken connections and answers cut short or without a message.

        Raises:
          UserError: the endpoint refuses the question or the key, has failed `attempts` times, or asks for a long wait.
        """
        kept = "what was answered is kept, run again to go on"
        for failed in range(1, self._attempts + 1):
            if self._stopped.is_set():
                raise UserError(f"asking {self.address.host} was stopped; {kept}")
            try:
                return self._ask(messages)
            except (self._openai.APIError, _Unusable, *NO_JSON) as error:
                self._raise_if_final(error)
                problem, headers = self._describe(error), getattr(getattr(error, "response", None), "headers", {})
            asked = retry_after(headers, time.time())
            if asked is not None and asked > PATIENCE:
                raise UserError(f"{self.address.host} asks to be left alone for {asked:.0f} s ({problem}); {kept}")
            if failed < self._attempts:
                self._sleep(backoff(failed, asked, random.random()))
        raise UserError(f"{self.address.host} failed {self._attempts} times in a row, last with: {problem}; {kept}")

    def _ask(self, messages: Messages) -> Completion:
        question = {"model": self.address.model, "messages": [dict(m) for m in messages]}
        sampling = self._sampling
        try:
            found = self._client.chat.completions.create(**question, **sampling)
        except self._openai.BadRequestError as error:
            if error.code == "content_filter":
                return Completion("", 0, 0)
            if error.param != "temperature" or not sampling:
                raise
            # Some models draw at no temperature but their own.
            self._sampling = {}
            found = self._client.chat.completions.create(**question)
        try:
            content = found.choices[0].message.content
        except (AttributeError, IndexError, TypeError) as error:
            raise _Unusable("an answer without a message") from error
        usage = getattr(found, "usage", None)
        counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        text = self._hide(content) if isinstance(content, str) else ""
        return Completion(text, *(n if isinstance(n, int) else 0 for n in counts))

    def _raise_if_final(self, error: Exception) -> None:
        """Raises what another try would not mend."""
        status = getattr(error, "status_code", None)
        if status is None or status in (408, 409, 429) or status >= 500:
            return
        if status in (401, 403):  # such answers may quote part of the key
            raise UserError(f"{self.address.host} refused the key ({status}); check {KEY}") from None
        mend = f"; check {BASE} and {MODEL}" if status == 404 else ""
        raise UserError(f"{self.address.host} refused the question: {self._describe(error)}{mend}") from None

    def _describe(self, error: Exception) -> str:
        """One short line that shows no key."""
        if isinstance(error, NO_JSON):
            return "an answer that is no JSON"
        cause = f" ({error.__cause__})" if isinstance(error, self._openai.APIConnectionError) else ""
        return self._hide(" ".join(f"{error}{cause}".split()))[:200]

    def _hide(self, text: str) -> str:
        return text.replace(self.address.key, "***") if len(self.address.key) >= SECRET_LENGTH else text


def _library() -> ModuleType:
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise UserError("asking an endpoint needs the openai package; pip install 'qaperso[judge]'") from error


class Cache:
    """Answers by the digest of their question, in a file of JSON lines that only grows."""

    def __init__(self, path: Path):
        """Reads the file, or begins it. A last line that a kill cut in half is dropped with a warning.

        Raises:
          UserError: another line is broken, or the file cannot be read or written.
        """
        self._path, self._lock = path, threading.Lock()
        try:
            self._found = _read_lines(path) if path.exists() else {}
            # Unbuffered and in append mode: a line is one call of the system, there whole or not at all.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"{path} cannot be opened ({error.strerror}); check the folder") from error

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: str) -> Completion | None:
        """The answer to a question; None where there is none yet."""
        return self._found.get(key)

    def put(self, key: str, answer: Completion) -> None:
        """Keeps an answer.

        Raises:
          UserError: it cannot be written.
        """
        line = json.dumps({"key": key, **dataclasses.asdict(answer)}).encode() + b"\n"
        with self._lock:
            try:
                whole = self._file.write(line) == len(line)
            except OSError as error:
                raise UserError(
                    f"{self._path} cannot be written ({error.strerror}); make room and run again"
                ) from error
            if not whole:
                raise UserError(f"{self._path} took half a line; make room on the disk and run again")
            self._found[key] = answer

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _read_lines(path: Path) -> dict[str, Completion]:
    whole, end, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        print(f"warning: {path}: the last line is cut short, as by a kill; it is dropped", file=sys.stderr)
        os.truncate(path, len(whole + end))
    found = {}
    for number, line in enumerate(whole.split(b"\n") if end else [], 1):
        try:
            record = json.loads(line)
            answer = Completion(record["text"], record["prompt_tokens"], record["completion_tokens"])
            good = list(map(type, dataclasses.astuple(answer))) == [str, int, int]
            found[record["key"]] = answer
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise UserError(
                f"{path}:{number}: found no kept answer there; remove the line, or the file to ask all again"
            )
    return found


def complete_all(
    endpoint: Endpoint, cache: Cache, asked: Sequence[Messages], concurrency: int
) -> dict[str, Completion]:
    """Answers by `digest`; each different question that the cache does not know is asked once.

    Args:
      endpoint, cache: who is asked, and what was asked before; answers are kept as they come.
      asked: the questions.
      concurrency: questions under way at a time.

    Raises:
      UserError: as `Endpoint.complete` and `Cache.put`; what had been answered by then is kept.
    """
    questions = {digest(endpoint.address.model, messages): messages for messages in asked}
    missing = [key for key in questions if cache.get(key) is None]

    failures: list[Exception] = []

    def ask(key: str) -> None:
        try:
            cache.put(key, endpoint.complete(questions[key]))
        except Exception as error:
            failures.append(error)
            endpoint.stop()  # at once, or this thread would begin another question
            raise

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            waiting = [pool.submit(ask, key) for key in missing]
            for future in tqdm(
                as_completed(waiting), total=len(missing), unit="call", disable=None if missing else True
            ):
                future.result()
        except BaseException as error:  # the user's interruption too: what is under way is paid for, no more is begun
            endpoint.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            # Not that of a question which was stopped because of it.
            raise next(iter(failures), error) from None
    return {key: cache.get(key) for key in questions}
