"""A score that lives elsewhere: an HTTP endpoint that takes a list of texts and gives a number for each.

The request is a POST of JSON, `{"texts": [...], "prompts": [...], "completions": [...]}`, where a text is a prompt and
its completion; the answer is a JSON list of as many numbers, or `{"scores": [...]}`.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from typing import Any
from urllib.parse import urlsplit

from .config import check
from .scores import ScoreUnavailable, shorten

PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that may be gone at the next try."""
ABOUT_THE_TEXTS = 500
"""The one among them that some text may be the reason of: it is worth to ask about each text alone."""
LARGEST_ANSWER = 64 * 2**20
BLOCK = 2**16
SENT = ("completions", "prompts", "texts")


class RemoteError(ValueError):
    """An endpoint refused a request, or answered what is no list of scores."""


def _is_header(header: tuple[Any, Any]) -> bool:
    """Whether a name and a value can go into a request as they are."""
    return all(isinstance(each, str) and each.isascii() and each.isprintable() for each in header) and header[0] != ""


class RemoteScore:
    """Scores from an HTTP endpoint, callable in the convention of `Task.score`.

    Args:
        url: "http://..." or "https://...".
        timeout: seconds that an answer may take to be read, and each wait for it and for its headers.
        retries: so many more tries after one that got no answer, or an HTTP status that may pass (429, 500, 503, ...).
        backoff: seconds before the second try; twice as many before each one after it, each time a random half to
            all of them. An endpoint that says `Retry-After` is waited for so long.
        max_backoff: bound on these waits.
        chunk_size: texts in one request.
        concurrency: requests at once, whoever calls.
        columns: columns of the rows that are sent too, as lists under their names.
        headers: more HTTP headers, for an endpoint that wants a key.

    Raises:
        ValueError: for an address that is none, or a number out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        retries: int = 4,
        backoff: float = 0.5,
        max_backoff: float = 30.0,
        chunk_size: int = 64,
        concurrency: int = 4,
        columns: Sequence[str] = (),
        headers: dict[str, str] | None = None,
    ) -> None:
        shown = re.sub(r"//.*@", "//...@", url) if isinstance(url, str) else url
        check("url", shown, is_address(url), 'the address of a score, "http://..." or "https://...", no password in it')
        for name, value in (("timeout", timeout), ("max_backoff", max_backoff)):
            check(name, value, isinstance(value, (int, float)) and 0 < value < float("inf"), "a finite number above 0")
        check("backoff", backoff, isinstance(backoff, (int, float)) and 0 <= backoff < float("inf"), "at least 0")
        for name, count, least in (
            ("retries", retries, 0),
            ("chunk_size", chunk_size, 1),
            ("concurrency", concurrency, 1),
        ):
            check(name, count, isinstance(count, int) and count >= least, f"a whole number of at least {least}")
        named = not isinstance(columns, str) and isinstance(columns, Sequence)
        check("columns", columns, named and all(isinstance(each, str) for each in columns), "a list of names")
        check("columns", columns, not {*columns} & {*SENT}, f"other columns than {list(SENT)}, which are sent anyway")
        fine = headers is None or isinstance(headers, dict)
        check("headers", headers, fine and all(map(_is_header, (headers or {}).items())), "texts of one line of ASCII")
        self.url, self.timeout, self.retries = url, timeout, retries
        self.backoff, self.max_backoff = backoff, max_backoff
        self.chunk_size, self.concurrency = chunk_size, concurrency
        self.columns, self.headers = tuple(columns), dict(headers or {})
        self._running = threading.Semaphore(concurrency)
        self._random = random.Random()  # of its own: nobody's samples depend on how often an endpoint was down

    def __getstate__(self) -> dict[str, Any]:
        """All but the count of running requests, which is this object's own."""
        return {name: value for name, value in vars(self).items() if name != "_running"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Puts it back, with nothing running."""
        vars(self).update(state, _running=threading.Semaphore(state["concurrency"]))

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[Any]:
        """The scores of B responses, in order.

        Raises:
            ScoreUnavailable: where the endpoint gave no answer, however often it was asked.
            RemoteError: where it refused, or its answer is no list of scores.
        """
        if missing := [name for name in self.columns if name not in columns]:
            raise RemoteError(f"columns must be columns of the rows; {missing[0]!r} is none of {list(columns)}")
        parts = [
            slice(start, min(start + self.chunk_size, len(prompts)))
            for start in range(0, len(prompts), self.chunk_size)
        ]
        bodies = [
            {
                "texts": [p + c for p, c in zip(prompts[part], completions[part], strict=True)],
                "prompts": list(prompts[part]),
                "completions": list(completions[part]),
                **{name: columns[name][part] for name in self.columns},
            }
            for part in parts
        ]
        if len(bodies) <= 1:
            return [score for body in bodies for score in self._ask(body)]
        with ThreadPoolExecutor(min(self.concurrency, len(bodies)), "textrl remote score") as pool:
            return [score for answer in pool.map(self._ask, bodies) for score in answer]

    def _ask(self, body: dict[str, Any]) -> list[Any]:
        """The scores of one request, tried until there is an answer."""
        data = json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            try:
                with self._running:
                    answer = self._post(data)
                return self._scores(answer, len(body["texts"]))
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code not in PASSING or (attempt == self.retries and error.code == ABOUT_THE_TEXTS):
                    raise RemoteError(f"{self.url} answered {reason}") from None
                wait = _retry_after(error.headers)
            except (OSError, http.client.HTTPException) as error:  # refused, reset, cut short, too late
                reason, wait = str(getattr(error, "reason", None) or error) or type(error).__name__, None
            if attempt < self.retries:
                delay = self.backoff * 2**attempt * self._random.uniform(0.5, 1.0) if wait is None else wait
                time.sleep(min(delay, self.max_backoff))
        raise ScoreUnavailable(f"{self.url} gave no answer in {self.retries + 1} tries: {reason}")

    def _post(self, data: bytes) -> bytes:
        """One request.

        Raises:
            OSError: `HTTPError` and `TimeoutError` among them.
        """
        deadline = time.monotonic() + self.timeout
        headers = {"Content-Type": "application/json", "Accept": "application/json", **self.headers}
        request = urllib.request.Request(self.url, data, headers, method="POST")
        parts, size = [], 0
        with _OPENER.open(request, timeout=self.timeout) as answer:
            while block := answer.read1(BLOCK):
                parts.append(block)
                size += len(block)
                if size > LARGEST_ANSWER:
                    raise RemoteError(f"{self.url} answered more than {LARGEST_ANSWER} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the answer was not whole within {self.timeout:g} s")
            if answer.length:
                raise http.client.IncompleteRead(b"", answer.length)
        return b"".join(parts)

    def _scores(self, answer: bytes, count: int) -> list[Any]:
        try:
            said = json.loads(answer)
        except (ValueError, RecursionError):
            raise RemoteError(f"{self.url} must answer with JSON; got {shorten(answer)}") from None
        scores = said.get("scores") if isinstance(said, dict) else said
        if not isinstance(scores, list) or len(scores) != count:
            raise RemoteError(
                f'{self.url} must answer with a list of {count} numbers, or {{"scores": [...]}}; got {shorten(said)}'
            )
        return scores


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would be a GET without the texts."""

    def redirect_request(self, *args: Any) -> None:
        """None: the answer stays an error."""


_OPENER = urllib.request.build_opener(_NoRedirect)


def is_address(url: Any) -> bool:
    """Whether this is an HTTP address with a host."""
    if not isinstance(url, str) or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        plain = bool(parts.hostname) and "@" not in parts.netloc  # a password would stand in every message
        return parts.scheme in ("http", "https") and plain and (parts.port or 1) > 0
    except ValueError:
        return False


def _retry_after(headers: Message) -> float | None:
    """The seconds that an endpoint asks to wait, where it says a number."""
    try:
        return max(0.0, float(headers.get("Retry-After", "")))
    except ValueError:
        return None
