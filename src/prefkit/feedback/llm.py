"""Judges that read two answers and say which they prefer: over an OpenAI-compatible endpoint, or in this process.

Both show every pair in both orders, as A and B and as B and A, and take the mean.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from prefkit.errors import InputError
from prefkit.feedback import answered
from prefkit.feedback.answered import Failed
from prefkit.feedback.client import Client, Request
from prefkit.feedback.config import Judging
from prefkit.feedback.endpoint import OPENAI, Endpoint, key_from
from prefkit.feedback.orders import comparisons, in_both_orders
from prefkit.feedback.parsing import REASONS, WORTH, Unusable, parse
from prefkit.feedback.replies import Replies, Reply, key_of
from prefkit.feedback.tally import Tally
from prefkit.feedback.templates import Template
from prefkit.records import Question, Verdict

REPLY_TOKENS = 60
"""tokens of a reply, about: one sentence and a letter; forecasts use it"""

Ask = Callable[[Sequence[list[dict[str, str]]]], Sequence[tuple[float, float]]]
"""conversations -> natural log-probabilities that the next tokens are A, and that they are B

The judge's turn has begun with `templates.PREFIX`: rendering that and reading the model is the caller's."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What judging would take. Tokens are estimated from characters; nothing is sent to find out."""

    calls: int
    cached: int
    """replies on disk, which cost nothing"""
    tokens_in: int
    tokens_out: int
    most_tokens_out: int
    """if every reply is as long as the request allows"""
    cost: float
    """at the prices given"""

    def __str__(self) -> str:
        return (
            f"{self.calls} calls, {self.cached} more on disk; about {self.tokens_in} tokens to read and "
            f"{self.tokens_out} to write (at most {self.most_tokens_out}), estimated at "
            f"{answered.CHARACTERS_PER_TOKEN} characters a token; cost about {self.cost:.4f}"
        )


@dataclass(frozen=True)
class _Shown(Generic[T]):
    """A pair of a question shown in one order: what was made of it, under its key."""

    key: str
    what: T


class LlmJudge:
    """A judge behind an endpoint. Equal questions are asked once; a reply is on disk before it is used."""

    def __init__(
        self,
        client: Client,
        template: Template,
        *,
        price_in: float = 0.0,
        price_out: float = 0.0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Prices are per million tokens. say: told, once a batch, what a reader of a log wants to know."""
        self.client, self.template = client, template
        self.price_in, self.price_out = price_in, price_out
        self.tally = Tally()
        self.name = f"llm:{client.endpoint.model}@{template.full_name}"
        client.about = {"judge": self.name}
        self._say = say

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        """Verdicts in order; a request is counted in the verdict that made it, in others it is cached.

        Raises InputError when the endpoint cannot go on or the budget is spent. Everything answered is kept: the same
        questions asked again cost only what is missing.
        """
        started, replies = time.monotonic(), self.client.replies
        replies.refresh()
        shown = [list(self._requests(question)) for question in questions]
        wanted = {one.key: one.what for each in shown for one in each}
        missing = {key for key in wanted if replies.get(key) is None}
        if (lost := replies.lost(missing)) and self._say is not None:
            self._say(f"{lost} requests were in flight when the judge was stopped; they are asked again")
        try:
            found = dict(zip(wanted, self.client.ask(list(wanted.values())), strict=True))
        finally:
            self._count()
            self.tally.seconds += time.monotonic() - started
        verdicts = [self._verdict(one, each, found, missing) for one, each in zip(questions, shown, strict=True)]
        self.tally.add(verdicts)
        self.tally.cached += sum(verdict.cached for verdict in verdicts)
        return verdicts

    def dry_run(self, questions: Sequence[Question]) -> Forecast:
        """What `judge` would ask and cost. Sends nothing and writes nothing."""
        self.client.replies.refresh()
        wanted = {one.key: one.what for question in questions for one in self._requests(question)}
        todo = [request for key, request in wanted.items() if self.client.replies.get(key) is None]
        read, most = sum(request.tokens_in for request in todo), sum(request.tokens_out for request in todo)
        written = min(most, REPLY_TOKENS * len(todo))
        return Forecast(
            calls=len(todo),
            cached=len(wanted) - len(todo),
            tokens_in=read,
            tokens_out=written,
            most_tokens_out=most,
            cost=(read * self.price_in + written * self.price_out) / 1e6,
        )

    def summary(self) -> str:
        """One line on everything this judge has done."""
        return self.tally.text(self.price_in, self.price_out)

    def _requests(self, question: Question) -> Iterator[_Shown[Request]]:
        """Two requests a comparison: first shown as A, then as B."""
        for first, second in in_both_orders(question):
            messages = self.template.messages(question.prompt, first, second)
            fields = {"messages": messages, **self.template.request_fields()}
            key = key_of({"judge": self.client.endpoint.identity, "template": self.template.full_name, **fields})
            yield _Shown(
                key,
                Request(
                    key=key,
                    fields=fields,
                    tokens_in=answered.tokens_in(messages),
                    tokens_out=self.template.longest_reply,
                ),
            )

    def _count(self) -> None:
        """Take over what the client has counted since it was made, before an error too."""
        spent = self.client
        self.tally.calls, self.tally.retries = spent.calls, spent.retries
        self.tally.tokens_in, self.tally.tokens_out = spent.tokens_in, spent.tokens_out

    def _verdict(
        self,
        question: Question,
        shown: Sequence[_Shown[Request]],
        found: Mapping[str, Reply | Failed],
        fresh: set[str],
    ) -> Verdict:
        """Read the replies to one question; `fresh` loses the keys that are charged to it."""
        values = [self._value(found[one.key]) for one in shown]
        keys = {one.key for one in shown}
        own = keys & fresh
        fresh -= own
        answers = [reply for key in own if isinstance(reply := found[key], Reply)]
        return Verdict(
            judge=self.name,
            comparisons=comparisons(question, values),
            calls=len(own),
            cached=len(keys - own),
            tokens=sum(reply.tokens_in + reply.tokens_out for reply in answers),
        )

    def _value(self, found: Reply | Failed) -> float | str:
        """P(the answer shown as A is better), or the reason why there is none."""
        if isinstance(found, Failed):
            self.tally.replies[found.reason] += 1
            return "failed"
        choice = parse(found.content, self.template, finish=found.finish, refusal=found.refusal)
        if isinstance(choice, Unusable):
            self.tally.replies[choice.reason] += 1
            return REASONS[choice.reason]
        self.tally.replies[choice] += 1
        worth = WORTH[choice]
        return "unsure" if worth is None else worth


class TransformersJudge:
    """A judge in this process: the softmax over A and B of a language model's next token, both orders averaged."""

    def __init__(self, ask: Ask, template: Template, *, model: str) -> None:
        """model: its name, for records."""
        self._ask, self.template = ask, template
        self.tally = Tally()
        self.name = f"transformers:{model}@{template.full_name}"

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        """Verdicts in order; equal questions are asked once, whatever `ask` makes of its batch.

        Raises InputError for log-probabilities that are no numbers.
        """
        started = time.monotonic()
        shown = [list(self._conversations(question)) for question in questions]
        wanted = {one.key: one.what for each in shown for one in each}
        found = dict(zip(wanted, self._values(list(wanted.values())), strict=True)) if wanted else {}
        fresh = set(wanted)
        verdicts: list[Verdict] = []
        for question, each in zip(questions, shown, strict=True):
            keys = {one.key for one in each}
            own = keys & fresh
            fresh -= own
            verdicts.append(
                Verdict(
                    judge=self.name,
                    comparisons=comparisons(question, [found[one.key] for one in each]),
                    calls=len(own),
                    cached=len(keys - own),
                )
            )
        self.tally.add(verdicts)
        self.tally.calls += len(wanted)
        self.tally.seconds += time.monotonic() - started
        return verdicts

    def _conversations(self, question: Question) -> Iterator[_Shown[list[dict[str, str]]]]:
        for first, second in in_both_orders(question):
            messages = self.template.messages(question.prompt, first, second, reply="letter")
            yield _Shown(key_of({"messages": messages}), messages)

    def _values(self, conversations: Sequence[list[dict[str, str]]]) -> list[float | str]:
        """P(A) / (P(A) + P(B)) of each; unparsable where neither letter can come."""
        values: list[float | str] = []
        for a, b in self._ask(conversations):
            if math.isnan(a) or math.isnan(b) or max(a, b) == math.inf:
                raise InputError(
                    f"gives log-probabilities {a} and {b}",
                    where=self.name,
                    mend="check the model: its weights or its dtype may be broken",
                )
            self.tally.mass += math.exp(min(a, 0.0)) + math.exp(min(b, 0.0))
            if max(a, b) == -math.inf:
                self.tally.replies["unparsable"] += 1
                values.append("unparsable")
                continue
            self.tally.replies["A" if a > b else "B" if b > a else "tie"] += 1
            values.append(1 / (1 + math.exp(min(b - a, 700.0))))
        return values


def llm_judge(
    model: str, config: Judging, folder: Path, *, key: str | None = None, say: Callable[[str], None] | None = None
) -> LlmJudge:
    """The LLM judge that the options describe; its replies go to `folder`. Sends nothing.

    key: empty sends none; None takes that of the environment (`endpoint.KEYS`). Raises InputError for options, a
    template or a folder that cannot be used.
    """
    endpoint = Endpoint(
        base_url=config.judge_base_url or OPENAI,
        model=model,
        key=key_from() if key is None else key,
        concurrency=config.judge_concurrency,
        timeout=config.judge_timeout,
        retries=config.judge_retries,
        max_calls=config.judge_max_calls,
        max_tokens=config.judge_max_tokens,
    )
    for name in ("judge_price_in", "judge_price_out"):
        if not 0 <= getattr(config, name) < math.inf:
            raise InputError(f"is {getattr(config, name)}", where=f"--{name}", mend="0 or more")
    client = Client(endpoint, Replies(folder))
    template = Template.load(config.judge_template)
    return LlmJudge(client, template, price_in=config.judge_price_in, price_out=config.judge_price_out, say=say)
