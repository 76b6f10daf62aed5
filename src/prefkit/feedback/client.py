"""Requests to an OpenAI-compatible chat endpoint: many at once, repeated when they fail, paid for once.

`ask` is an ordinary function; the event loop lives inside it. Every reply is in `Replies`, on disk, before it is
returned, whatever happens to the other requests.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from prefkit.errors import InputError
from prefkit.feedback import answered
from prefkit.feedback.answered import Failed
from prefkit.feedback.budget import Budget
from prefkit.feedback.endpoint import Endpoint
from prefkit.feedback.replies import Replies, Reply

LONGEST_BACKOFF = 30.0
CONNECT = 10.0
"""seconds to wait for a connection, if --judge_timeout is not shorter"""
USELESS = 8
"""requests that may be rejected (400, 413, 422) or get no chat completion, until something is blamed that all of them
share; one reply is enough to prove it right"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to send, and the most it can cost."""

    key: str
    fields: Mapping[str, Any]
    """the body but for the model"""
    tokens_in: int
    """estimate"""
    tokens_out: int
    """the most that the reply may have"""


class Client:
    """One endpoint and the folder its replies go to."""

    def __init__(self, endpoint: Endpoint, replies: Replies, *, about: Mapping[str, Any] | None = None) -> None:
        """about: what the rows on disk say besides the reply, who judged and by which template."""
        self.endpoint, self.replies = endpoint, replies
        self.about = about or {}
        self.retries = 0
        """requests that were sent again"""
        self.calls = self.tokens_in = self.tokens_out = 0
        """what was spent by this client; attempts that were charged and brought nothing count"""
        self.proven = 0
        """requests whose reply came, now or earlier: what is sent then is right in itself"""

    def ask(self, requests: Sequence[Request]) -> list[Reply | Failed]:
        """Replies in order, or why there is none. Keys differ; requests whose reply is on disk are not sent.

        Raises InputError when the endpoint is gone, refuses the key or the request itself, answers as another model, or
        the budget is spent: requests in flight are waited for, and every reply until then is on disk.
        """
        missing = [request for request in requests if self.replies.get(request.key) is None]
        self.proven += len(requests) - len(missing)
        failed = _run(_Batch(self, _httpx(), missing)) if missing else {}
        return [self.replies.get(request.key) or failed[request.key] for request in requests]


def _run(work: _Batch) -> dict[str, Failed]:
    """Run a batch to its end, also where this thread has an event loop of its own (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work.all())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(work.all())).result()


class _Batch:
    """The requests of one call of `ask`."""

    def __init__(self, client: Client, httpx: ModuleType, requests: Sequence[Request]) -> None:
        self._client, self._httpx, self._requests = client, httpx, requests
        self._endpoint, self._replies = client.endpoint, client.replies
        self._queue = deque(requests)
        self._failed: dict[str, Failed] = {}
        self._stop: InputError | None = None
        self._answered = self._useless = 0
        self._pause_until = 0.0

    async def all(self) -> dict[str, Failed]:
        """Send everything; the requests that failed, by key. Raises the InputError that stopped it."""
        end = self._endpoint
        self._stopped = asyncio.Event()
        limits = {"max_calls": end.max_calls, "max_tokens": end.max_tokens}
        self._budget = Budget(self._replies, **limits, check=self._go_on)
        most = self._httpx.Limits(max_connections=end.concurrency)
        timeout = self._httpx.Timeout(end.timeout, connect=min(end.timeout, CONNECT))
        async with self._httpx.AsyncClient(limits=most, timeout=timeout, headers=end.headers()) as self._http:
            count = min(end.concurrency, len(self._requests))
            await asyncio.gather(*(self._worker() for _ in range(count)))
        if self._stop is None and not self._client.proven and self._useless == len(self._requests):
            self._halt(self._all_useless(next(iter(self._failed.values()))))
        if self._stop is not None:
            missing = sum(self._replies.get(request.key) is None for request in self._requests)
            done = f"{len(self._requests) - missing} of {len(self._requests)} replies asked for here are on disk"
            raise InputError(f"{self._stop.what}; {done}", where=self._stop.where, mend=self._stop.mend)
        return self._failed

    async def _worker(self) -> None:
        """Take requests until there are none, or the batch is stopped; a request in flight is waited for."""
        while self._queue and self._stop is None:
            request = self._queue.popleft()
            try:
                await self._one(request)
            except InputError as error:
                self._halt(error)
                with suppress(InputError):  # a full disk has been told already
                    self._replies.end(request.key, "stopped")

    def _go_on(self) -> None:
        """Raises what stopped the batch."""
        if self._stop is not None:
            raise self._stop

    def _halt(self, error: InputError) -> None:
        self._stop = self._stop or error
        self._stopped.set()

    async def _one(self, request: Request) -> None:
        """Send a request until it is answered, rejected or its repetitions are used up."""
        answered_before = self._answered
        outcome: Failed | None = None
        attempts = 0
        while outcome is None or (outcome.again and attempts <= self._endpoint.retries):
            await self._wait(request, attempts, outcome)
            found = await self._attempt(request)
            self._client.retries += attempts > 0
            attempts += 1
            if isinstance(found, Reply):
                self._answered += 1
                self._client.proven += 1
                return
            outcome = found
        if outcome.gone or (outcome.endpoint and self._answered == answered_before):
            # Nobody else was answered in the meantime: it is the endpoint, not the question.
            raise self._gone(outcome, attempts)
        if not outcome.endpoint:
            self._useless += 1
            if self._useless >= USELESS and not self._client.proven:
                raise self._all_useless(outcome)
        self._failed[request.key] = outcome

    async def _attempt(self, request: Request) -> Reply | Failed:
        """Send it once. A reply is on disk when this returns; an attempt that may have been charged is counted."""
        most = request.tokens_in + request.tokens_out
        if (known := await self._budget.reserve(request.key, most)) is not None:
            return known
        try:
            started = time.monotonic()
            found = await self._send(request)
            if isinstance(found, Reply):
                found = answered.measured(found, request.tokens_in, time.monotonic() - started)
                self._replies.keep(request.key, found, self._client.about)
                self._spend(found.tokens_in, found.tokens_out)
                return found
            if found.charged:
                self._waste(request, found.reason)
            self._replies.end(request.key, found.detail)
            return found
        finally:
            await self._budget.release(most)

    async def _send(self, request: Request) -> Reply | Failed:
        """One exchange; failures of the transport are values."""
        end, httpx = self._endpoint, self._httpx
        body = json.dumps({"model": end.model, **request.fields}).encode()
        try:
            async with asyncio.timeout(end.timeout):  # httpx2's own limit starts anew with every byte
                response: Any = await self._http.post(
                    end.url, content=body, headers={"Content-Type": "application/json"}
                )
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            return Failed("failed", f"cannot connect ({_told(error)})", again=True, endpoint=True, gone=True)
        except (TimeoutError, httpx.TimeoutException):
            return Failed("failed", f"no reply within {end.timeout:g} s", again=True, endpoint=True, charged=True)
        except httpx.RequestError as error:
            what = f"the connection broke ({end.blacked_out(_told(error))})"
            return Failed("failed", what, again=True, endpoint=True, charged=True)
        found = answered.read(end, int(response.status_code), response.headers, response.content)
        if isinstance(found, InputError):
            if response.status_code == 200:
                self._waste(request, "another model")
            raise found
        return found

    def _waste(self, request: Request, why: str) -> None:
        """Count an attempt that may have been charged. What it wrote is not known and counts nothing."""
        self._replies.waste(request.key, why, request.tokens_in)
        self._spend(request.tokens_in, 0)

    def _spend(self, tokens_in: int, tokens_out: int) -> None:
        self._client.calls += 1
        self._client.tokens_in += tokens_in
        self._client.tokens_out += tokens_out

    async def _wait(self, request: Request, attempts: int, outcome: Failed | None) -> None:
        """Pause before a repetition, longer each time; while the endpoint has asked for a pause, everybody waits.

        The jitter depends on the request, so that requests that failed together do not come back together. Raises what
        stopped the batch, without waiting to the end.
        """
        now = time.monotonic()
        pause = 0.0
        if outcome is not None:
            longest = min(LONGEST_BACKOFF, self._endpoint.backoff * 2 ** (attempts - 1))
            pause = longest * random.Random(f"{request.key} {attempts}").uniform(0.5, 1.0)
            self._pause_until = max(self._pause_until, now + outcome.wait)
        pause = max(pause, self._pause_until - now)
        if pause > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), pause)
        self._go_on()

    def _gone(self, outcome: Failed, attempts: int) -> InputError:
        return InputError(
            f"the judge cannot be reached: {outcome.detail}, attempt {attempts}",
            where=self._endpoint.url,
            mend="start the same command again when it can; what is paid for is not asked again (--judge_retries, "
            "--judge_timeout and --judge_concurrency change how long and how hard it tries)",
        )

    def _all_useless(self, outcome: Failed) -> InputError:
        return InputError(
            f"no request gets a reply: {outcome.detail}",
            where=self._endpoint.url,
            mend="check the base URL and the model's name; a template file with a [decoding] table sets what requests "
            "send (docs/judges.md)",
        )


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__


def _httpx() -> ModuleType:
    try:
        import httpx2
    except ImportError as error:
        raise InputError("httpx2 is not installed", where="--judge llm", mend="pip install prefkit[judges]") from error
    return httpx2
