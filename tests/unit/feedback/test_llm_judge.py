"""The LLM judge against a real server that misbehaves: nothing is paid twice, nothing is guessed, nothing leaks."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from judge_server import JudgeServer, Play, Response, completion, longer, preferring, serving
from prefkit.errors import InputError
from prefkit.feedback.client import Client
from prefkit.feedback.config import Judging
from prefkit.feedback.endpoint import Endpoint
from prefkit.feedback.llm import LlmJudge, llm_judge
from prefkit.feedback.replies import Replies
from prefkit.feedback.templates import Template
from prefkit.records import Question

KEY = "sk-secret-0123456789"


def well(body: dict[str, Any], count: int) -> Response:
    return Response(preferring(longer(body)))


def judge_at(
    server: JudgeServer, folder: Path, template: str = "chat", say: Callable[[str], None] | None = None, **options: Any
) -> LlmJudge:
    endpoint = Endpoint(
        **{"base_url": server.url, "model": "judge", "key": KEY, "backoff": 0.001, "timeout": 5.0, **options}
    )
    return LlmJudge(Client(endpoint, Replies(folder)), Template.load(template), price_in=1.0, price_out=10.0, say=say)


def questions(count: int, answers: int = 2) -> list[Question]:
    """Different questions, the first answer of each the longest."""
    return [
        Question(prompt=f"question {row}", answers=["x" * (9 - k) for k in range(answers)], row=row)
        for row in range(count)
    ]


def on_disk(folder: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.jsonl"))


def test_both_orders_are_asked_and_averaged(tmp_path: Path) -> None:
    with serving(well) as server:
        judge = judge_at(server, tmp_path)
        (verdict,) = judge.judge([Question(prompt="hi", answers=["long one", "short", "long two"])])
    assert judge.name == verdict.judge == "llm:judge@chat-1"
    assert [(c.first, c.second, c.prob_first, c.orders) for c in verdict.comparisons] == [
        (0, 1, 1.0, (1.0, 1.0)),
        (0, 2, 0.5, (0.5, 0.5)),
        (1, 2, 0.0, (0.0, 0.0)),
    ]
    assert (verdict.calls, verdict.cached, verdict.tokens) == (6, 0, 660)
    assert judge.tally.agreement == 1.0 and judge.tally.ties == 1 and judge.tally.calls == len(server.bodies) == 6
    assert judge.tally.replies == Counter(A=2, B=2, tie=2)
    assert judge.tally.cost(1.0, 10.0) == pytest.approx((600 * 1 + 60 * 10) / 1e6)
    body = server.bodies[0]
    assert body["path"] == "/v1/chat/completions" and body["model"] == "judge" and body["temperature"] == 0
    assert body["response_format"]["json_schema"]["schema"]["properties"]["preferred"]["enum"][:2] == ["A", "B"]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert "orders agree in 100.0%" in judge.summary() and "cost" in judge.summary()


def test_a_judge_of_places_is_corrected_and_seen(tmp_path: Path) -> None:
    with serving(lambda body, count: Response(preferring("A"))) as server:
        judge = judge_at(server, tmp_path)
        comparisons = [c for v in judge.judge(questions(3)) for c in v.comparisons]
    assert all(c.prob_first == 0.5 and c.orders == (1.0, 0.0) for c in comparisons)
    assert judge.tally.agreement == 0.0 and judge.tally.tie_rate == 1.0


def test_asked_pairs_only_and_in_their_order(tmp_path: Path) -> None:
    with serving(well) as server:
        question = Question(prompt="hi", answers=["aaa", "bb", "c"], pairs=[(2, 0), (1, 2)])
        (verdict,) = judge_at(server, tmp_path).judge([question])
    assert [(c.first, c.second, c.prob_first) for c in verdict.comparisons] == [(2, 0, 0.0), (1, 2, 1.0)]
    assert verdict.prob(0, 2) == 1.0 and len(server.bodies) == 4


def test_equal_answers_tie_without_being_asked_about(tmp_path: Path) -> None:
    with serving(well) as server:
        (verdict,) = judge_at(server, tmp_path).judge([Question(prompt="hi", answers=["same", "same"])])
    assert verdict.comparisons[0].prob_first == 0.5 and verdict.comparisons[0].orders is None
    assert not server.bodies and not list(tmp_path.iterdir())


def test_equal_questions_are_asked_once(tmp_path: Path) -> None:
    with serving(well) as server:
        judge = judge_at(server, tmp_path)
        # the mirrored question has the same two requests
        same = [Question(prompt="hi", answers=["aa", "b"]), Question(prompt="hi", answers=["b", "aa"])]
        first, second = judge.judge([same[0], same[1]])
    assert len(server.bodies) == 2
    assert (first.calls, first.cached, second.calls, second.cached) == (2, 0, 0, 2)
    assert first.prob(0, 1) == second.prob(1, 0) == 1.0


def test_replies_are_found_again_by_another_process(tmp_path: Path) -> None:
    with serving(well) as server:
        before = judge_at(server, tmp_path).judge(questions(5))
        judge = judge_at(server, tmp_path)
        again = judge.judge(questions(5))
        assert [v.comparisons for v in again] == [v.comparisons for v in before]
        assert len(server.bodies) == 10 and judge.tally.calls == 0 and judge.tally.cached == 10
        # another template, model or decoding is another judge
        judge_at(server, tmp_path, template="hh", retries=0).dry_run(questions(5))
        assert judge_at(server, tmp_path, template="hh").dry_run(questions(5)).cached == 0
        assert judge_at(server, tmp_path, model="other").dry_run(questions(5)).cached == 0
        assert judge_at(server, tmp_path).dry_run(questions(6)).cached == 10


def test_two_judges_share_a_folder_at_once(tmp_path: Path) -> None:
    with serving(well) as server:
        one, two = judge_at(server, tmp_path), judge_at(server, tmp_path)
        one.judge(questions(3))
        two.judge(questions(3))  # reads what the other has written since it was made
        assert two.tally.calls == 0 and len(server.bodies) == 6
        two.judge(questions(4))
        assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_requests_are_in_flight_together(tmp_path: Path) -> None:
    gate = threading.Barrier(4)

    def together(body: dict[str, Any], count: int) -> Response:
        gate.wait(timeout=5)  # passes only when four requests are here at once
        return well(body, count)

    with serving(together) as server:
        judge_at(server, tmp_path, concurrency=4, retries=0).judge(questions(4))
        assert server.most_busy == 4 and len(server.bodies) == 8


def test_inside_a_running_event_loop(tmp_path: Path) -> None:
    async def notebook(judge: LlmJudge) -> float | None:
        return judge.judge(questions(1))[0].prob(0, 1)

    with serving(well) as server:
        assert asyncio.run(notebook(judge_at(server, tmp_path))) == 1.0


def first_time(bad: Response) -> Play:
    """The first request gets `bad`, the others are served well."""
    return lambda body, count: bad if count == 0 else well(body, count)


BAD = {
    "429": Response({"error": {"message": "slow down"}}, 429, {"Retry-After": "0"}),
    "500": Response(b"oops", 500),
    "503": Response({"error": "overloaded"}, 503),
    "no JSON": Response(b"<html>gateway</html>"),
    "cut JSON": Response(b'{"choices": [{"mess'),
    "no choices": Response({"choices": [], "model": "judge"}),
    "an error with 200": Response({"error": {"message": "upstream"}}),
    "a list": Response(b"[1]"),
    "no number": Response(b'{"choices": [{"message": {}}], "usage": {"prompt_tokens": Infinity}}'),
    "reset": Response(reset=True),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_passes_is_tried_again(kind: str, tmp_path: Path) -> None:
    with serving(first_time(BAD[kind])) as server:
        judge = judge_at(server, tmp_path, concurrency=1)
        (verdict,) = judge.judge(questions(1))
    assert verdict.prob(0, 1) == 1.0 and len(server.bodies) == 3 and judge.tally.retries == 1
    charged = BAD[kind].status == 200  # served, or cut off while it was: may be on the bill
    assert judge.tally.calls == (3 if charged else 2) and Replies(tmp_path).paid_calls == judge.tally.calls


def test_500_twice_then_fine(tmp_path: Path) -> None:
    with serving(lambda body, count: Response(b"", 500) if count < 2 else well(body, count)) as server:
        judge = judge_at(server, tmp_path, concurrency=1)
        assert judge.judge(questions(1))[0].prob(0, 1) == 1.0
    assert judge.tally.retries == 2 and len(server.bodies) == 4


def test_slow_beyond_the_time_out(tmp_path: Path) -> None:
    done = threading.Event()

    def slow(body: dict[str, Any], count: int) -> Response:
        if count == 0:
            done.wait(5)
        return well(body, count)

    with serving(slow) as server:
        judge = judge_at(server, tmp_path, concurrency=1, timeout=0.1)
        assert judge.judge(questions(1))[0].prob(0, 1) == 1.0
        done.set()
    assert judge.tally.retries == 1 and judge.tally.calls == 3, "what timed out may have been charged"


def test_a_reply_that_drips_is_beyond_the_time_out_too(tmp_path: Path) -> None:
    with serving(first_time(Response(b" " * 100, drip=0.02))) as server:
        judge = judge_at(server, tmp_path, concurrency=1, timeout=0.15)
        assert judge.judge(questions(1))[0].prob(0, 1) == 1.0
    assert judge.tally.retries == 1
    assert '"why": "failed"' in on_disk(tmp_path), "given up in time, not read to its malformed end"


@pytest.mark.parametrize("dated", [False, True])
def test_retry_after_is_honoured_by_everybody(dated: bool, tmp_path: Path) -> None:
    times: list[float] = []

    def limited(body: dict[str, Any], count: int) -> Response:
        times.append(time.monotonic())
        # a date has whole seconds only, so one in the past by then is what can be tested fast
        when = format_datetime(datetime.now(UTC) - timedelta(seconds=5), usegmt=True) if dated else "0.08"
        return Response(b"", 429, {"Retry-After": when}) if count == 0 else well(body, count)

    with serving(limited) as server:
        judge_at(server, tmp_path, concurrency=2).judge(questions(2))
        assert len(server.bodies) == 5
    if not dated:
        assert all(later - times[0] > 0.07 for later in times[2:]), "new requests wait as well"


def test_a_long_pause_is_not_slept_through(tmp_path: Path) -> None:
    with serving(lambda body, count: Response(b"", 429, {"Retry-After": "86400"})) as server:
        with pytest.raises(InputError, match="86400 s"):
            judge_at(server, tmp_path).judge(questions(1))
        assert len(server.bodies) <= 2


STOPS = {
    "401": (Response({"error": {"message": f"bad key {KEY}"}}, 401), "PREFKIT_JUDGE_API_KEY or OPENAI_API_KEY"),
    "403": (Response(b"no", 403), "OPENAI_API_KEY"),
    "404": (Response({"error": {"message": "no such model"}}, 404), "no model 'judge'"),
    "redirect": (Response(b"", 301, {"Location": "https://elsewhere/v1"}), "https://elsewhere/v1"),
    "no quota": (Response({"error": {"message": "pay", "code": "insufficient_quota"}}, 429), "no quota left: pay"),
    "no schema": (Response({"error": {"message": "response_format is unknown"}}, 400), 'reply = "text"'),
    "wrong model": (Response(completion("{}", model="cheaper")), "'judge' was asked for and 'cheaper' answered"),
    "the key as model": (Response(completion("{}", model=KEY)), "'judge' was asked for and '[key]' answered"),
    "the key in an address": (Response(b"", 307, {"Location": f"http://x/?key={KEY}"}), "http://x/?key=[key]"),
}


@pytest.mark.parametrize("kind", STOPS)
def test_what_does_not_pass_stops_at_once(kind: str, tmp_path: Path) -> None:
    response, words = STOPS[kind]
    with serving(lambda body, count: response) as server:
        with pytest.raises(InputError, match=re.escape(words)) as caught:
            judge_at(server, tmp_path, concurrency=1).judge(questions(5))
        assert len(server.bodies) == 1, "never sent again, and nothing after it"
        assert "address" in kind or kind == "redirect" or server.url in caught.value.where
    assert KEY not in str(caught.value) and KEY not in on_disk(tmp_path)
    assert "0 of 10 replies" in caught.value.what


def test_a_rejected_question_is_counted_and_the_others_go_on(tmp_path: Path) -> None:
    def full(body: dict[str, Any], count: int) -> Response:
        if "question 2" in body["messages"][-1]["content"]:
            return Response({"error": {"message": "context length exceeded"}}, 400)
        return well(body, count)

    with serving(full) as server:
        judge = judge_at(server, tmp_path)
        verdicts = judge.judge(questions(4))
        assert [v.comparisons[0].prob_first for v in verdicts] == [1.0, 1.0, None, 1.0]
        assert verdicts[2].comparisons[0].reason == "failed" and judge.tally.replies["rejected"] == 2
        assert len(server.bodies) == 8, "a rejection is final"
        again = judge_at(server, tmp_path).judge(questions(4))  # only the rejected one is missing now
        assert [v.comparisons for v in again] == [v.comparisons for v in verdicts]
        assert len(server.bodies) == 10


def test_when_everything_is_rejected_the_request_is_blamed(tmp_path: Path) -> None:
    with serving(lambda body, count: Response({"error": {"message": "unknown field"}}, 422)) as server:
        with pytest.raises(InputError, match="no request gets a reply: HTTP 422 unknown field"):
            judge_at(server, tmp_path, concurrency=2).judge(questions(50))
        assert len(server.bodies) <= 10


def test_bodies_that_stay_malformed_are_counted_as_failed(tmp_path: Path) -> None:
    def broken(body: dict[str, Any], count: int) -> Response:
        return Response(b"{") if "question 1" in body["messages"][-1]["content"] else well(body, count)

    with serving(broken) as server:
        judge = judge_at(server, tmp_path, retries=2, concurrency=1)
        first, second = judge.judge(questions(2))
        assert first.prob(0, 1) == 1.0 and second.comparisons[0].reason == "failed"
        assert judge.tally.replies["malformed"] == 2 and len(server.bodies) == 2 + 2 * 3


def test_a_question_that_kills_the_endpoint_does_not_stop_the_others(tmp_path: Path) -> None:
    poisoned = threading.Event()

    def poison(body: dict[str, Any], count: int) -> Response:
        if "question 0" in body["messages"][-1]["content"]:
            poisoned.wait(5)  # the others are answered first
            return Response(b"", 500)
        if count >= 9:
            poisoned.set()
        return well(body, count)

    with serving(poison) as server:
        verdicts = judge_at(server, tmp_path, concurrency=3, retries=1).judge(questions(5))
    assert verdicts[0].comparisons[0].reason == "failed" and all(v.prob(0, 1) == 1.0 for v in verdicts[1:])


UNUSABLE = {
    "refused": (completion(None, refusal="I cannot do that."), "refused"),
    "filtered": (completion("", finish="content_filter"), "refused"),
    "truncated": (completion('{"comparison": "Both', finish="length"), "unparsable"),
    "empty": (completion(""), "unparsable"),
    "unparsable": (completion("I prefer A, clearly."), "unparsable"),
    "unsure": (preferring("unsure"), "unsure"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_replies_that_say_nothing_are_counted_and_never_guessed(kind: str, tmp_path: Path) -> None:
    body, reason = UNUSABLE[kind]
    with serving(lambda request, count: Response(body if count == 0 else preferring("B"))) as server:
        judge = judge_at(server, tmp_path, concurrency=1)
        (verdict,) = judge.judge(questions(1))
        assert verdict.comparisons[0].prob_first is None and verdict.comparisons[0].reason == reason
        assert verdict.comparisons[0].orders == (None, 1.0), "the usable order is kept for the record"
        assert judge.tally.replies == Counter({kind: 1, "B": 1}) and judge.tally.reasons == Counter({reason: 1})
        assert judge.tally.agreement is None
        judge_at(server, tmp_path).judge(questions(1))
        assert len(server.bodies) == 2, "paid for, so not asked again"


def test_a_judge_that_dies_half_way_costs_nothing(tmp_path: Path) -> None:
    dead = threading.Event()

    def mortal(body: dict[str, Any], count: int) -> Response:
        if count == 27:
            dead.set()
        return Response(b"", 503) if dead.is_set() else well(body, count)

    with serving(mortal) as server:
        whole = judge_at(server, tmp_path / "whole").judge(questions(10))  # 20 requests
        with pytest.raises(InputError, match="cannot be reached: HTTP 503") as caught:
            judge_at(server, tmp_path / "broken", retries=2).judge(questions(10))
        assert "7 of 20 replies asked for here are on disk" in caught.value.what
        assert "start the same command again" in str(caught.value)
        server.play = well
        server.bodies.clear()
        told: list[str] = []
        resumed = judge_at(server, tmp_path / "broken", say=told.append)
        verdicts = resumed.judge(questions(10))
        assert len(server.bodies) == 13 and resumed.tally.cached == 7
    assert [v.comparisons for v in verdicts] == [v.comparisons for v in whole]
    assert not told, "given up in good order, nothing was in flight"


CHILD = """
import sys
from pathlib import Path
from prefkit.feedback.client import Client
from prefkit.feedback.endpoint import Endpoint
from prefkit.feedback.llm import LlmJudge
from prefkit.feedback.replies import Replies
from prefkit.feedback.templates import Template
from prefkit.records import Question

url, folder = sys.argv[1:]
endpoint = Endpoint(base_url=url, model="judge", concurrency=3)
judge = LlmJudge(Client(endpoint, Replies(Path(folder))), Template.load("chat"))
judge.judge([Question(prompt=f"question {row}", answers=["xxxxxxxxx", "xxxxxxxx"], row=row) for row in range(10)])
"""


def test_kill_minus_nine_loses_what_was_in_flight_and_says_so(tmp_path: Path) -> None:
    stuck, held = threading.Event(), threading.Barrier(4)

    def sticking(body: dict[str, Any], count: int) -> Response:
        if count >= 8 and not stuck.is_set():
            held.wait(timeout=60)  # three requests are in flight now, and the test knows
            stuck.wait(timeout=60)
        return well(body, count)

    with serving(sticking) as server:
        child = subprocess.Popen([sys.executable, "-c", CHILD, server.url, str(tmp_path)])
        try:
            held.wait(timeout=60)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        stuck.set()
        answered = len(Replies(tmp_path))
        assert answered == 8 and len(server.bodies) == 11
        with next(tmp_path.glob("*.jsonl")).open("ab") as file:
            file.write(b'{"reply": "cut in the midd')  # as a power cut would leave it
        told: list[str] = []
        judge = judge_at(server, tmp_path, say=told.append)
        verdicts = judge.judge(questions(10))
        assert told == ["3 requests were in flight when the judge was stopped; they are asked again"]
        assert len(server.bodies) == 11 + 12 and judge.tally.cached == 8
        assert all(v.prob(0, 1) == 1.0 for v in verdicts)
        asked = Counter(json.dumps(body["messages"]) for body in server.bodies)
        assert sorted(asked.values()) == [1] * 17 + [2] * 3, "only what was in flight is asked twice"
        told.clear()
        judge_at(server, tmp_path, say=told.append).judge(questions(10))
        assert len(server.bodies) == 23 and not told


def test_live_requests_of_another_process_are_not_called_lost(tmp_path: Path) -> None:
    one, two = Replies(tmp_path), Replies(tmp_path)
    one.asked("k", 7)
    two.refresh()
    assert two.lost(["k"]) == 0 and two.elsewhere() == {"k": 7} and one.elsewhere() == {}
    one.close()
    assert two.lost(["k"]) == 1 and two.lost(["other"]) == 0 and two.elsewhere() == {}


def test_the_budget_in_calls_holds_to_the_call(tmp_path: Path) -> None:
    with serving(well) as server:
        with pytest.raises(InputError, match="budget of 7 calls is spent") as caught:
            judge_at(server, tmp_path, max_calls=7, concurrency=4).judge(questions(10))
        assert len(server.bodies) == 7 and "7 of 20 replies" in caught.value.what
        assert "--judge_max_calls" in caught.value.where and "not asked again" in caught.value.mend
        with pytest.raises(InputError, match="budget of 7 calls"):
            judge_at(server, tmp_path, max_calls=7).judge(questions(10))
        assert len(server.bodies) == 7, "a restart does not open the purse again"
        judge_at(server, tmp_path, max_calls=20).judge(questions(10))
        assert len(server.bodies) == 20


def test_the_budget_in_tokens_counts_what_is_in_flight_at_its_most(tmp_path: Path) -> None:
    with serving(well) as server:
        judge = judge_at(server, tmp_path, max_tokens=2000, concurrency=8)
        most = next(iter(judge._requests(questions(1)[0]))).what
        with pytest.raises(InputError, match="budget of 2,000 tokens is spent"):
            judge.judge(questions(20))
        # every reply took 110; one that could have gone over the cap was not sent
        need = most.tokens_in + most.tokens_out
        assert server.most_busy <= 2000 // need
        paid = Replies(tmp_path).paid_tokens
        assert paid == 110 * len(server.bodies) <= 2000 < paid + need
        with pytest.raises(InputError, match="may take"):
            judge_at(server, tmp_path / "other", max_tokens=10).judge(questions(1))


def test_charged_attempts_without_a_reply_count_for_the_budget(tmp_path: Path) -> None:
    with serving(lambda body, count: Response(b"{")) as server:
        with pytest.raises(InputError, match="budget of 3 calls"):
            judge_at(server, tmp_path, max_calls=3, retries=10).judge(questions(1))
        assert len(server.bodies) == 3


def test_a_dry_run_sends_and_writes_nothing(tmp_path: Path) -> None:
    with serving(well) as server:
        judge = judge_at(server, tmp_path / "replies")
        forecast = judge.dry_run([*questions(10), *questions(4)])
        assert not server.bodies and not (tmp_path / "replies").exists()
        assert (forecast.calls, forecast.cached, forecast.tokens_out) == (20, 0, 1200)
        assert forecast.most_tokens_out == 20 * 512
        asked = {r.key: r.what for one in questions(10) for r in judge._requests(one)}
        characters = sum(len(turn["content"]) for request in asked.values() for turn in request.fields["messages"])
        assert forecast.tokens_in == pytest.approx(characters / 4, rel=0.1)
        assert forecast.cost == pytest.approx((forecast.tokens_in + 10 * 1200) / 1e6)
        assert "estimated at 4 characters a token" in str(forecast)
        judge.judge(questions(4))
        assert judge.dry_run(questions(10)).cached == 8


def test_the_key_is_neither_on_disk_nor_in_messages(tmp_path: Path) -> None:
    def echoing(body: dict[str, Any], count: int) -> Response:
        said = json.dumps({"comparison": f"your key is {KEY}", "preferred": "A"})
        return Response(completion(said)) if count else Response({"error": {"message": KEY}}, 500)

    with serving(echoing) as server:
        judge = judge_at(server, tmp_path, concurrency=1)
        assert judge.judge(questions(1))[0].comparisons[0].orders == (1.0, 0.0)
        assert KEY in server.headers[0]["Authorization"]
        server.play = lambda body, count: Response({"error": {"message": f"{KEY} {KEY}"}}, 503)
        with pytest.raises(InputError) as caught:
            judge_at(server, tmp_path / "other", retries=0).judge(questions(1))
    assert "[key]" in on_disk(tmp_path)
    for text in (on_disk(tmp_path), on_disk(tmp_path / "other"), str(caught.value), repr(judge.client.endpoint)):
        assert KEY not in text


def test_no_key_sends_no_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFKIT_JUDGE_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "  ")
    with serving(well) as server:
        config = Judging(judge_base_url=server.url + "/", judge_price_in=2.0)
        llm_judge("judge", config, tmp_path).judge(questions(1))
        assert "Authorization" not in server.headers[0] and server.bodies[0]["path"] == "/v1/chat/completions"
        monkeypatch.setenv("OPENAI_API_KEY", "second-key\n")
        monkeypatch.setenv("PREFKIT_JUDGE_API_KEY", "first-key")
        llm_judge("judge", config, tmp_path).judge(questions(2))
        assert server.headers[-1]["Authorization"] == "Bearer first-key"


def test_texts_that_no_encoder_likes_survive(tmp_path: Path) -> None:
    odd = "half \ud800 of a pair, \x00, \u2028 and {answer_b}"
    body = completion(json.dumps({"comparison": odd, "preferred": "B"}))
    with serving(lambda request, count: Response(body)) as server:
        question = Question(prompt=odd, answers=[odd, "plain"])
        before = judge_at(server, tmp_path).judge([question])
        again = judge_at(server, tmp_path).judge([question])
        assert before[0].comparisons == again[0].comparisons and len(server.bodies) == 2
        assert odd in server.bodies[0]["messages"][-1]["content"]


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "replies-x.jsonl").write_text('{"asked": "k"}\nrubbish\n')
    with pytest.raises(InputError, match=r"replies-x.jsonl line 2"):
        Replies(tmp_path)


def test_a_full_disk_is_told_and_leaves_no_half_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    real = os.write

    def full(descriptor: int, content: bytes) -> int:
        if b'"reply"' in content:
            real(descriptor, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, content)

    with serving(well) as server:
        judge = judge_at(server, tmp_path, concurrency=1)
        monkeypatch.setattr("prefkit.feedback.replies.os.write", full)
        with pytest.raises(InputError, match="no space left on disk"):
            judge.judge(questions(1))
        monkeypatch.undo()
        assert judge.judge(questions(1))[0].prob(0, 1) == 1.0
    assert all(json.loads(line) for line in on_disk(tmp_path).splitlines())


def test_without_httpx_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with serving(well) as server, pytest.raises(InputError, match=r"pip install prefkit\[judges\]"):
        judge_at(server, tmp_path).judge(questions(1))
