"""A cap on what a judge may cost: checked before a request is sent, with what is in flight counted at its most.

Processes that share a folder of replies share the cap, and never have the same request in flight.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress

from prefkit.errors import InputError
from prefkit.feedback.replies import Replies, Reply

POLL = 0.05
"""seconds until another look at what other processes have in flight"""


class Budget:
    """Calls and tokens that may still be spent. What the folder of replies has paid for counts, whoever paid it."""

    def __init__(
        self, replies: Replies, *, max_calls: int, max_tokens: int, check: Callable[[], None] = lambda: None
    ) -> None:
        """A limit of 0 is none. check: raises where there is no point in waiting any longer."""
        self._replies, self._check = replies, check
        self._max_calls, self._max_tokens = max_calls, max_tokens
        self._calls = self._tokens = 0  # in flight
        self._change = asyncio.Condition()

    async def reserve(self, key: str, tokens: int) -> Reply | None:
        """Set aside one call and at most `tokens` tokens for a request, and note that it is asked; or its reply, where
        another process has got it by now: then nothing is set aside.

        Waits for requests in flight to settle if need be, here and elsewhere. Raises InputError when it does not fit
        although nothing is in flight, and what `check` raises.
        """
        async with self._change:  # held while looking, so that no release passes unseen before the wait begins
            while True:
                self._check()
                with self._replies.alone():
                    self._replies.refresh()
                    if (known := self._replies.get(key)) is not None:
                        return known
                    others = self._replies.elsewhere()
                    over = self._over(tokens, others)
                    if not over and key not in others:
                        self._replies.asked(key, tokens)
                        self._calls += 1
                        self._tokens += tokens
                        return None
                if over and not self._calls and not others:
                    raise self._spent(over, tokens)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._change.wait(), POLL if others else None)

    async def release(self, tokens: int) -> None:
        """The request has ended; what it cost is in the folder of replies by now."""
        async with self._change:
            self._calls -= 1
            self._tokens -= tokens
            self._change.notify_all()

    def _over(self, tokens: int, others: Mapping[str, int]) -> str:
        """The limit that one more request would break; empty if none. others: what is in flight elsewhere."""
        calls = self._replies.paid_calls + self._calls + len(others)
        if self._max_calls and calls + 1 > self._max_calls:
            return "max_calls"
        used = self._replies.paid_tokens + self._tokens + sum(others.values())
        if self._max_tokens and used + tokens > self._max_tokens:
            return "max_tokens"
        return ""

    def _spent(self, name: str, tokens: int) -> InputError:
        limit = self._max_calls if name == "max_calls" else self._max_tokens
        what = f"{limit:,} calls" if name == "max_calls" else f"{limit:,} tokens"
        need = "" if name == "max_calls" else f", and the next request may take {tokens:,} more"
        return InputError(
            f"the budget of {what} is spent: {self._replies.paid_calls:,} calls and {self._replies.paid_tokens:,} "
            f"tokens are paid for in {self._replies.folder}{need}",
            where=f"--judge_{name}",
            mend=f"raise --judge_{name} (0 has no limit) and start the same command again; what is paid for is not "
            "asked again",
        )
