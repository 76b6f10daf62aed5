"""prefkit bench rloo and its like: what it writes, answers of a forced length, and that both sides compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefkit import cli
from prefkit.bench import rl_result, rollouts
from prefkit.bench.rl_workloads import Episodes, even
from prefkit.bench.rollouts import RolloutBlock
from prefkit.bench.workloads import Workload
from prefkit.domains.text.sampler import end_tokens
from prefkit.errors import InputError

OPTIONS = ["--model", "llama-micro", "--shape", "3-9/5", "--batch", "2", "--steps", "2", "--repeats", "2"]


def small(method: str, **settings: Any) -> Episodes:
    work = Workload(model="llama-micro", shape="3-9/5", batch=2, steps=2)
    return Episodes(method=method, workload=work, num_generations=3, **settings)


def written(tmp_path: Path, method: str, *argv: str) -> Any:
    file = tmp_path / "bench.json"
    assert cli.run(["bench", method, *OPTIONS, *argv, "--json", str(file)]) == 0
    return json.loads(file.read_text(encoding="utf-8"))


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = written(tmp_path, "rloo", "--num_generations", "3", "--epochs", "2")
    assert found["bench"] == "rloo" and list(found["arms"]) == ["engine"] and found["ratios"] == {}
    work = found["workload"]
    assert (work["num_generations"], work["epochs"], work["answer"], len(work["prompts"])) == (3, 2, 5, 4)
    assert all(3 <= length <= 9 for length in work["prompts"])
    engine = found["arms"]["engine"]
    for block in engine["blocks"]:
        assert block["tokens"] == [2 * 3 * 5] * 2  # prompts x answers x tokens
        assert [len(block[name]) for name in ("seconds", "processor", "sampling", "scoring", "scores")] == [2] * 5
        assert len(block["losses"]) == len(block["grad_norms"]) == 4  # an optimizer step for each pass
        assert all(norm > 0 for norm in block["grad_norms"])
        assert block["losses"] == engine["blocks"][0]["losses"]  # every block starts anew
        for whole, sampling, scoring in zip(block["seconds"], block["sampling"], block["scoring"], strict=True):
            assert min(sampling, scoring) > 0 and sampling + scoring < whole
    assert engine["episodes_per_second"] == pytest.approx(6 / engine["seconds_per_batch"])
    assert engine["tokens_per_second"] == pytest.approx(30 / engine["seconds_per_batch"])
    assert sum(engine["shares"].values()) == pytest.approx(1)
    assert "RLOO on llama-micro" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["ppo", "drpo"])
def test_methods_without_a_peer(method: str, tmp_path: Path) -> None:
    found = written(tmp_path, method, "--repeats", "1")
    counts = found["arms"]["engine"]["blocks"][0]["tokens"]
    whole = 2 * 4 * 5
    assert counts == [whole] * 2 if method == "ppo" else all(0 < count < whole for count in counts)


def test_nothing_ends_an_answer() -> None:
    setup = rollouts.prepare(small("rloo"))
    assert end_tokens(setup.policy) == []
    drawn: list[list[list[int]]] = []
    rollouts.block(setup, drawn.append)
    assert [len(answer) for batch in drawn for answer in batch] == [5] * 12


def test_the_reward_counts_even_words() -> None:
    assert even(["1 2", ""], ["12 7 <unk> 300", ""]) == [2.0, 0.0]


def test_a_side_that_draws_less_is_said() -> None:
    block = RolloutBlock(
        seconds=[1.0], processor=[1.0], sampling=[1.0], scoring=[0.0], tokens=[29], scores=[], losses=[], grad_norms=[]
    )
    with pytest.raises(InputError, match="29"):
        rl_result.check_lengths(small("rloo"), {"trl": [block]})


def test_ratios_pair_blocks_of_one_round() -> None:
    def block(*seconds: float) -> RolloutBlock:
        times = [100.0, *seconds]
        half = [second / 2 for second in times]
        quarter = [second / 4 for second in times]
        return RolloutBlock(
            seconds=times,
            processor=times,
            sampling=half,
            scoring=quarter,
            tokens=[],
            scores=[],
            losses=[],
            grad_norms=[],
        )

    found = rl_result.ratios({"trl": [block(2, 4), block(8, 4)], "engine": [block(1, 1), block(2, 2)]})
    assert found["seconds"]["each"] == [3.0, 3.0] and found["seconds"]["median"] == 3.0
    assert found["updating"]["each"] == [3.0, 3.0]  # what is neither sampling nor scoring


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("rloo", ["--shape", "hh"], "--shape"),
        ("rloo", ["--shape", "9-3/5"], "--shape"),
        ("rloo", ["--num_generations", "1"], "--num_generations"),
        ("rloo", ["--epochs", "0"], "--epochs"),
        ("rloo", ["--memory"], "--memory"),
        ("grpo", ["--counts"], "--counts"),
        ("grpo", ["--use_peft"], "--use_peft"),
        ("grpo", ["--arms", "naive"], "unknown arm"),
        ("drpo", ["--against", "trl"], "TRL has no trainer"),
    ],
)
def test_what_cannot_be_measured(
    method: str, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", method, *OPTIONS, *options]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_trl_computes_the_same_on_the_same_answers(method: str, epochs: int) -> None:
    pytest.importorskip("trl")
    from prefkit.bench.rl_peer import RolloutPeer

    setup = rollouts.prepare(small(method, epochs=epochs))
    forward, settings = setup.policy.model.forward, setup.policy.model.generation_config.to_dict()
    peer = RolloutPeer(setup)
    found = rl_result.agreement(setup, peer)
    assert max(found.values()) < 1e-4
    assert setup.policy.model.forward == forward and setup.policy.model.generation_config.to_dict() == settings
    assert end_tokens(setup.policy) == []


def test_trl_draws_answers_of_the_forced_length() -> None:
    pytest.importorskip("trl")
    from prefkit.bench.rl_peer import RolloutPeer

    setup = rollouts.prepare(small("rloo"))
    peer = RolloutPeer(setup)
    one, two = peer.block(), peer.block()
    assert one.tokens == two.tokens == [2 * 3 * 5] * 2
    assert one.scores == two.scores and one.grad_norms == two.grad_norms  # every block starts anew
    assert len(one.seconds) == len(one.sampling) == len(one.scoring) == 2
    given = peer.block(lambda prompts: [[4] * 5] * len(prompts))
    assert given.scores == [5.0, 5.0] and max(given.grad_norms) < 1e-6  # all alike: nothing to learn


def test_both_sides_take_the_same_prompts_in_the_same_order() -> None:
    pytest.importorskip("trl")
    from prefkit.bench.rl_peer import RolloutPeer

    setup = rollouts.prepare(small("grpo"))
    seen: list[list[int]] = []

    def given(prompts: Any) -> list[list[int]]:
        seen.extend(list(prompt) for prompt in prompts)
        return [[4] * 5] * len(prompts)

    RolloutPeer(setup).block(given)
    rows = [row for batch in (1, 2) for row in setup.data.prompts(batch)]
    assert seen == [list(setup.data.data.train[row].prompt) for row in rows for _ in range(3)]
