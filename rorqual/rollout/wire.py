"""JSON over HTTP with bounded patience: what passes is asked again, what will not pass is said at once."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rorqual.errors import UserError

T = TypeVar("T")
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}


class EndpointError(UserError):
    """What an endpoint answered instead of what was asked for; asking again would not help. `status` is 0 for none."""

    def __init__(self, message: str, status: int = 0):
        self.status = status
        super().__init__(message)


class Away(UserError):
    """The endpoint was asked as often and as long as allowed, and gave no answer."""


class Retry(Exception):
    """An answer that may be better next time."""

    def __init__(self, text: str, pause_s: float = 0.0):
        self.pause_s = pause_s
        super().__init__(text)


@dataclass(frozen=True)
class Patience:
    """How often and how long to ask: tries go on until both are used up. Pauses double, with jitter."""

    max_tries: int = 4
    seconds: float = 0.0
    first_pause_s: float = 0.5
    max_pause_s: float = 30.0

    def is_over(self, tries: int, since: float) -> bool:
        return tries >= self.max_tries and time.monotonic() - since >= self.seconds

    def pause(self, tries: int) -> float:
        return min(self.first_pause_s * 2.0 ** min(tries - 1, 30), self.max_pause_s) * random.uniform(0.5, 1.0)


@dataclass
class Wire:
    """One HTTP client for one endpoint; belongs to the event loop that uses it. `counts` says what went wrong how often."""

    client: Any
    base: str
    patience: Patience
    max_body_bytes: int
    counts: Counter[str] = field(default_factory=Counter)

    async def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None, read: Callable[[dict[str, Any]], T] = lambda answer: answer
    ) -> T:
        """`read` of the answer. Raises EndpointError for what will not pass, Away when patience has run out."""
        began, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                return read(await self._once(method, path, body))
            except Retry as error:
                self.counts["retries"] += 1
                if self.patience.is_over(tries, began):
                    self.counts["given_up"] += 1
                    raise Away(f"{error} ({tries} tries in {time.monotonic() - began:.0f} s)") from None
                await asyncio.sleep(error.pause_s or self.patience.pause(tries))

    async def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        import httpx

        try:
            response = await self.client.request(method, self.base + path, json=body)
        except httpx.TimeoutException:
            raise Retry(f"{self.base}: no answer within {self.client.timeout.read} s") from None
        except httpx.HTTPError as error:
            raise Retry(f"{self.base}: {type(error).__name__}: {error}") from None
        if len(response.content) > self.max_body_bytes:
            raise EndpointError(f"{self.base}: answered with {len(response.content)} bytes")
        if response.status_code in RETRIED:
            raise Retry(f"{self.base}: status {response.status_code}", _retry_after(response.headers))
        if response.status_code >= 400:
            raise EndpointError(f"{self.base}{path}: status {response.status_code}: {response.text[:300]}", response.status_code)
        return _object(response, self.base)


def _object(response: Any, base: str) -> dict[str, Any]:
    """The answer as a JSON object; an empty body, which some engines send for a deed done, is an empty one."""
    if not response.content:
        return {}
    try:
        answer = response.json()
    except ValueError:
        raise Retry(f"{base}: the answer is no JSON: {response.text[:100]!r}") from None
    if not isinstance(answer, dict):
        raise Retry(f"{base}: the answer is no JSON object")
    return answer


def _retry_after(headers: Mapping[str, str]) -> float:
    try:
        return max(float(headers.get("retry-after", "0")), 0.0)
    except ValueError:
        return 0.0
