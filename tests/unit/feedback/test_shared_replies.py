"""Judges that share a folder of replies: one budget, and nothing in flight twice."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from judge_server import JudgeServer, Response, longer, preferring, serving
from prefkit.errors import InputError
from prefkit.feedback.client import Client
from prefkit.feedback.endpoint import Endpoint
from prefkit.feedback.llm import LlmJudge
from prefkit.feedback.replies import Replies
from prefkit.feedback.templates import Template
from prefkit.records import Question, Verdict


def judge_at(server: JudgeServer, folder: Path, **options: Any) -> LlmJudge:
    endpoint = Endpoint(base_url=server.url, model="judge", backoff=0.001, timeout=5.0, **options)
    return LlmJudge(Client(endpoint, Replies(folder)), Template.load("chat"))


def questions(count: int) -> list[Question]:
    return [Question(prompt=f"question {row}", answers=["xx", "x"], row=row) for row in range(count)]


def at_once(*judges: LlmJudge, given: Sequence[Sequence[Question]]) -> list[list[Verdict] | InputError]:
    """What each judge makes of its questions, all on threads of their own, as processes that share a folder."""

    def work(judge: LlmJudge, asked: Sequence[Question]) -> list[Verdict] | InputError:
        try:
            return judge.judge(asked)
        except InputError as error:
            return error

    with ThreadPoolExecutor(len(judges)) as pool:
        return list(pool.map(work, judges, given))


def slowly(body: dict[str, Any], count: int) -> Response:
    time.sleep(0.01)
    return Response(preferring(longer(body)))


@pytest.mark.parametrize("limit", [{"max_calls": 7}, {"max_tokens": 3000}])
def test_processes_that_share_a_folder_share_its_budget(tmp_path: Path, limit: dict[str, int]) -> None:
    with serving(slowly) as server:
        judges = [judge_at(server, tmp_path, concurrency=4, **limit) for _ in range(3)]
        asked = questions(30)
        found = at_once(*judges, given=[asked[:10], asked[10:20], asked[20:]])
        assert all(isinstance(one, InputError) and "is spent" in one.what for one in found)
        calls, tokens = Replies(tmp_path).paid_calls, Replies(tmp_path).paid_tokens
        assert calls == len(server.bodies) and calls <= limit.get("max_calls", calls) and tokens <= 3000
        need = next(iter(judges[0]._requests(asked[0]))).what
        assert calls == 7 or tokens + need.tokens_in + need.tokens_out > 3000, "all that fits was spent"


def test_processes_that_ask_the_same_at_once_pay_once(tmp_path: Path) -> None:
    with serving(slowly) as server:
        judges = [judge_at(server, tmp_path, concurrency=3) for _ in range(3)]
        one, two, three = at_once(*judges, given=[questions(6), questions(6)[::-1], questions(6)])
        assert len(server.bodies) == 12
    assert isinstance(one, list) and isinstance(two, list) and isinstance(three, list)
    comparisons = [verdict.comparisons for verdict in one]
    assert comparisons == [v.comparisons for v in three] == [v.comparisons for v in two[::-1]]


def test_what_another_process_gave_up_is_asked_here(tmp_path: Path) -> None:
    """The first to be asked is rejected; whoever waited for it sends it anew."""
    with serving(lambda body, count: Response(b"too long", 400) if count == 0 else slowly(body, count)) as server:
        judges = [judge_at(server, tmp_path, concurrency=1) for _ in range(2)]
        found = at_once(*judges, given=[questions(2), questions(2)])
        assert len(server.bodies) == 5
    assert all(isinstance(one, list) for one in found)
    assert sum(v.prob(0, 1) is None for one in found if isinstance(one, list) for v in one) <= 1
