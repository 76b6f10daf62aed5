"""Held-out metrics: the right numbers for the right rows, unmoved by batches, order and repetition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from prefkit.domains.text import metrics
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.sampler import Decoding, TransformersSampler
from prefkit.domains.text.tokenize import tokenize_pairs
from prefkit.engine.world import World
from prefkit.methods import dpo
from prefkit.records import Pair, Preference


def policy(moved: bool = True) -> TextPolicy:
    config = dpo.Config(dtype="float32", use_peft=True)
    made = TextPolicy.create(config, World.start(), model=tiny.model(), tokenizer=tiny.tokenizer())
    if moved:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in made.module.named_parameters():
                if "lora_B" in name:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return made


def pairs(count: int = 7) -> list[Pair]:
    rows = [
        Preference(prompt=r["prompt"], chosen=r["chosen"], rejected=r["rejected"], row=i, extra={"group": r["group"]})
        for i, r in enumerate(tiny.pairs(count))
    ]
    return tokenize_pairs(tiny.tokenizer(), rows, max_length=200)


def test_pair_metrics_by_hand() -> None:
    log_probs = torch.tensor([[-3.0, -4.0], [-5.0, -2.0], [-1.0, -1.0]], requires_grad=True)
    reference = torch.tensor([[-4.0, -4.0], [-5.0, -4.0], [-2.0, -2.0]])
    found = metrics.pair_metrics(log_probs, reference, 0.5)
    assert found["rewards/chosen"].tolist() == [0.5, 0.0, 0.5]
    assert found["rewards/rejected"].tolist() == [0.0, 1.0, 0.5]
    assert found["rewards/margins"].tolist() == [0.5, -1.0, 0.0]
    assert found["rewards/accuracies"].tolist() == [1.0, 0.0, 0.5]
    assert found["logps/chosen"].tolist() == [-3.0, -5.0, -1.0]
    assert found["logps/rejected"].tolist() == [-4.0, -2.0, -1.0]
    assert not any(value.requires_grad for value in found.values())


def test_the_start_policy_has_margin_0_and_accuracy_one_half() -> None:
    rows = metrics.PairEvaluation(policy(moved=False), pairs(), beta=0.1, batch_size=3)()
    assert all(row["margin"] == 0.0 and row["accuracy"] == 0.5 for row in rows)
    assert metrics.summarize_pairs(rows)["eval_rewards/accuracies"] == 0.5


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_pair_rows_do_not_depend_on_the_batch_size(size: int) -> None:
    made, data = policy(), pairs()
    rows = metrics.PairEvaluation(made, data, beta=0.3, batch_size=size)()
    assert [row["index"] for row in rows] == [row["row"] for row in rows] == list(range(7))
    assert [row["group"] for row in rows] == ["g0", "g0", "g1", "g1", "g2", "g2", "g3"]
    for row, pair in zip(rows, data, strict=True):
        log_probs = made.log_probs([pair.group]).detach()
        alone = 0.3 * (log_probs - made.reference_log_probs([pair.group]))[0]
        assert row["reward_chosen"] == pytest.approx(float(alone[0]), abs=1e-4)
        assert row["margin"] == pytest.approx(float(alone[0] - alone[1]), abs=1e-4)
        assert row["accuracy"] == float(row["margin"] > 0)
    means = metrics.summarize_pairs(rows)
    assert means["eval_rewards/margins"] == pytest.approx(sum(row["margin"] for row in rows) / 7)
    assert len({row["margin"] for row in rows}) == 7


def test_the_reference_is_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = policy()
    evaluation = metrics.PairEvaluation(made, pairs(), beta=0.1, batch_size=3)
    first = evaluation()

    def never(*_: Any) -> Any:
        raise AssertionError("scored again")

    monkeypatch.setattr(made, "reference_log_probs", never)
    assert evaluation() == first


def evaluation(made: TextPolicy, data: list[Pair], size: int = 3, **judges: Any) -> metrics.SampleEvaluation:
    return metrics.SampleEvaluation(
        made,
        TransformersSampler(made),
        data,
        decoding=Decoding(max_new_tokens=6),
        seed=1,
        judges=judges,
        batch_size=size,
    )


def test_sample_rows_are_the_policys_own_and_repeat() -> None:
    made, data = policy(), pairs()
    rows = evaluation(made, data)()
    assert rows == evaluation(made, data)()
    assert [row["answer"] for row in rows] == [row["answer"] for row in evaluation(made, data, size=1)()]
    assert [row["index"] for row in rows] == list(range(7))
    assert all(1 <= row["length"] <= 6 for row in rows)
    assert any(row["log_ratio"] != 0 for row in rows)
    still = evaluation(policy(moved=False), data)()
    assert all(row["log_ratio"] == 0 for row in still)
    assert [row["answer"] for row in still] != [row["answer"] for row in rows]


def test_judges_see_prompts_and_answers_side_by_side() -> None:
    seen: list[Any] = []

    def judge(prompts: Any, completions: Any) -> list[float]:
        seen.append((list(prompts), list(completions)))
        return [float(len(answer)) for answer in completions]

    data = pairs()
    rows = evaluation(policy(), data, gold=judge)()
    assert seen[0][0] == [pair.source.prompt for pair in data]
    assert seen[0][1] == [row["answer"] for row in rows]
    assert [row["gold"] for row in rows] == [len(row["answer"]) for row in rows]
    means = metrics.summarize_samples(rows, ("gold",))
    assert sum(row["gold"] for row in rows) / 7 in [pytest.approx(value) for value in means.values()]
    assert means["eval_objective/kl"] == pytest.approx(sum(row["log_ratio"] for row in rows) / 7)
    assert means["eval_completions/mean_length"] == pytest.approx(sum(row["length"] for row in rows) / 7)


def test_no_prompts_give_no_rows() -> None:
    assert evaluation(policy(), [])() == []
    assert metrics.summarize_samples([]) == {} == metrics.summarize_pairs([])


def test_a_prompt_past_the_context_is_left_out_and_the_others_are_answered() -> None:
    made, data = policy(), pairs()
    long = Pair(prompt=[5] * 251, chosen=[6], rejected=[7], source=Preference(prompt="", chosen="", rejected=""))
    assert evaluation(made, [long])() == []
    assert evaluation(made, [long, *data])() == evaluation(made, data)()


@pytest.mark.parametrize(("size", "num"), [(1, 5), (2, 5), (3, 7), (4, 2), (2, 0)])
def test_processes_share_rows_in_equal_counts(size: int, num: int) -> None:
    worlds = [World(rank=rank, size=size, device=torch.device("cpu")) for rank in range(size)]
    shares = [metrics.spread(world, num) for world in worlds]
    assert len({len(share) for share in shares}) == 1, "sharded models must make the same number of calls"
    assert {index for share in shares for index in share} == set(range(num))


def test_repeated_rows_are_taken_once_in_order() -> None:
    rows = [{"index": 2, "x": 1}, {"index": 0, "x": 2}, {"index": 2, "x": 1}]
    world = World(rank=0, size=1, device=torch.device("cpu"))
    assert [row["index"] for row in metrics.in_order(world, rows)] == [0, 2]
