"""Requests to a Hub: which failures there are, when to ask again, and ranges that are what was asked for."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from huggingface_hub import get_token
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.utils import get_session, hf_raise_for_status

# The HTTP library's own base error comes with HfHubHTTPError: which library that is depends on huggingface_hub.
_HTTP_ERRORS = cast(
    tuple[type[Exception], ...], tuple(base for base in HfHubHTTPError.__bases__ if base is not OSError)
)
HUB_FAILURES: tuple[type[Exception], ...] = (*_HTTP_ERRORS, EntryNotFoundError, OSError)
# What comes of reading an answer that is not the Hub's own: a proxy's page, an empty body, fields that are not there.
GARBLED_ANSWERS: tuple[type[Exception], ...] = (ValueError, KeyError, TypeError, AttributeError)

# User access tokens of the Hub.
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
# Shorter ones are no tokens that a Hub gives out, and would be found in words.
_SHORTEST_TOKEN = 16

BUSY = (408, 429, 500, 502, 503, 504)
_ATTEMPTS = 6
# An error whose body is no text has a status that huggingface_hub does not say: it may be one of those, or final.
_ATTEMPTS_OF_NO_TEXT = 3
_LONGEST_WAIT = 8
# A server that asks for more patience than these seconds is not waited for.
_LONGEST_PATIENCE = 300

Result = TypeVar("Result")


class UnfitAnswer(ValueError):
    """A server answered, and not with the bytes that were asked for."""


def redact(text: str, token: str | None = None) -> str:
    """A text in which no Hub token stands: servers, proxies and libraries may repeat what they were sent.

    Args:
        text: a message.
        token: the token in use, beside the saved login and HF_TOKEN, whatever its form.
    """
    for secret in (token, get_token()):
        if secret and len(secret) >= _SHORTEST_TOKEN:
            text = text.replace(secret, "<token>")
    return HUB_TOKEN.sub("<token>", text)


def patiently(work: Callable[[], Result], *, also_unreachable: bool = True) -> Result:
    """The result of `work`, tried again while the Hub is busy or the connection breaks.

    Waits as long as the answer's `Retry-After` (or the Hub's `RateLimit`) says, up to five minutes, else 1, 2, 4, 8, 8
    seconds.

    Args:
        work: requests that may be repeated.
        also_unreachable: try again without a connection, too.

    Raises:
        Exception: what `work` raises, at once or in the last attempt.
    """
    with _warnings_said_once():
        return _repeated(work, also_unreachable)


@contextmanager
def _warnings_said_once() -> Iterator[None]:
    """huggingface_hub asks a busy Hub again, too, and warns of each answer: here each warning is shown once."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message in seen:
            return False
        seen.add(message)
        return True

    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def _repeated(work: Callable[[], Result], also_unreachable: bool) -> Result:
    for attempt in range(_ATTEMPTS - 1):
        try:
            return work()
        except HUB_FAILURES as error:
            response = _response_of(error)
            if response is not None and response.status_code not in BUSY:
                raise
            if response is None and not (also_unreachable and isinstance(error, _HTTP_ERRORS)):
                raise
            if (seconds := _seconds_to_wait(response, attempt)) > _LONGEST_PATIENCE:
                raise
            time.sleep(seconds)
        except UnicodeDecodeError:
            if attempt + 1 >= _ATTEMPTS_OF_NO_TEXT:
                raise
            time.sleep(_seconds_to_wait(None, attempt))
    return work()


def _response_of(error: BaseException) -> Any:
    """The answer that an error is about; huggingface_hub wraps some errors in others."""
    found = getattr(error, "response", None)
    return found if found is not None else getattr(error.__cause__, "response", None)


def _seconds_to_wait(response: Any, attempt: int) -> float:
    headers = {} if response is None else response.headers
    told = re.fullmatch(r"\d+", headers.get("Retry-After", "")) or re.search(
        r"(?<=\bt=)\d+", headers.get("RateLimit", "")
    )
    return float(told[0]) if told else float(min(2**attempt, _LONGEST_WAIT))


def read_bytes(url: str, begin: int, end: int, size: int, headers: dict[str, str]) -> bytes:
    """Bytes `begin` to `end` of a file of `size` bytes, no more of which is ever taken from the server.

    Args:
        url: where the file is served.
        begin: first byte.
        end: first byte behind.
        size: the whole file's bytes.
        headers: sent along.

    Raises:
        UnfitAnswer: the server ignores the range, or sends another one, or fewer or more bytes.
    """
    asked = {**headers, "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}

    def fetch() -> bytes:
        with get_session().stream("GET", url, headers=asked, timeout=60) as response:
            raise_for_status(response)
            _check_range(response, begin, end, size)
            return b"".join(_at_most(response.iter_bytes(), end - begin))

    found = patiently(fetch)
    if len(found) != end - begin:
        raise UnfitAnswer(f"{len(found)} bytes came where {end - begin} were asked for")
    return found


def raise_for_status(response: Any) -> None:
    """`hf_raise_for_status`, for an error whose body is no text, too: what stands before a Hub may send anything.

    Raises:
        HfHubHTTPError: the answer is an error.
    """
    try:
        hf_raise_for_status(response)
    except UnicodeDecodeError as error:
        raise HfHubHTTPError(
            f"status {response.status_code} for {response.url}, and its body is no text", response=response
        ) from error


def _check_range(response: Any, begin: int, end: int, size: int) -> None:
    status, told = response.status_code, response.headers.get("Content-Range", "")
    if status == 206 and told in (f"bytes {begin}-{end - 1}/{size}", f"bytes {begin}-{end - 1}/*"):
        return
    if status == 200 and (begin, end) == (0, size):
        return
    if status == 200:
        raise UnfitAnswer("the server does not serve parts of a file (status 200 to a range): a mirror or proxy?")
    raise UnfitAnswer(f"status {status} with Content-Range {told!r} came for bytes {begin}-{end - 1} of {size}")


def _at_most(blocks: Iterator[bytes], limit: int) -> Iterator[bytes]:
    for block in blocks:
        limit -= len(block)
        if limit < 0:
            raise UnfitAnswer("more bytes came than were asked for")
        yield block
