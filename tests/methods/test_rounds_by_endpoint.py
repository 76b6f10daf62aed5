"""Rounds whose judge is behind an endpoint that dies in the middle of one: nothing is paid twice, nothing is lost."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from judge_server import JudgeServer, Response, longer, preferring, serving
from method_runs import Inputs, column, lines, read, run, weights
from prefkit import cli

pytest.importorskip("httpx2")


def well(body: dict[str, Any], count: int) -> Response:
    return Response(preferring(longer(body)) | {"model": body["model"]})


def options(server: JudgeServer) -> dict[str, Any]:
    judge = {"judge": "llm:judge", "judge_base_url": server.url, "judge_concurrency": 3, "judge_retries": 0}
    return {**judge, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "save_steps": 0}


@pytest.mark.parametrize("method", ["selm", "online_dpo"])
def test_an_endpoint_that_dies_in_a_round_costs_nothing(
    inputs: Inputs, tmp_path: Path, monkeypatch, method: str
) -> None:
    monkeypatch.setenv("PREFKIT_JUDGE_API_KEY", "secret")
    answered: list[str] = []
    lock = threading.Lock()

    def dying(body: dict[str, Any], count: int) -> Response:
        with lock:
            if server.play is dying and len(answered) >= 5:
                return Response(reset=True)
            answered.append(body["messages"][-1]["content"])
        return well(body, count)

    with serving(well) as server:
        whole = run(inputs, method, tmp_path / "whole", **options(server))
        paid = len(server.bodies)
        server.play, server.bodies = dying, []
        assert cli.run(inputs.arguments(method, tmp_path / "run", **options(server))) == 2
        assert len(answered) == 5
        server.play = lambda body, count: dying(body, count)
        run(inputs, method, tmp_path / "run", **options(server))
    assert len(answered) == paid == len(set(answered)), "every question is answered once"
    assert column(whole, "loss") == column(tmp_path / "run", "loss")
    assert column(whole, "rounds/comparisons") == column(tmp_path / "run", "rounds/comparisons")
    one, two = weights(whole), weights(tmp_path / "run")
    assert all(torch.equal(one[name], two[name]) for name in one)
    for path in sorted((whole / "rounds").glob("?????.jsonl")):
        for first, second in zip(lines(path), lines(tmp_path / "run" / "rounds" / path.name), strict=True):
            for name in ("answers", "order", "matches", "dropped"):
                assert first[name] == second[name]
    counts = [read(path / "rounds" / "00001.json") for path in (whole, tmp_path / "run")]
    replies = [count["judge_calls"] + count["judge_cached"] for count in counts]
    assert replies[0] == replies[1] and counts[1]["judge_cached"] >= counts[0]["judge_cached"]
