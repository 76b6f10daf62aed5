"""Rewards are read at the answer's last token, fit by margins, centred, and the same in the folder that is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import tiny
from prefkit.domains.text.reward import MEAN, RewardModel
from prefkit.domains.text.tokenize import tokenize_pairs
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.loops.reward_fit import RewardTask
from prefkit.methods import reward
from prefkit.records import Group, Pair, Preference

GROUPS = [Group([5, 6, 7], [[8, 2], [9, 10, 11, 2]]), Group([12], [[13], [14, 2, 15, 2]])]


def create(model: Any = None, **options: Any) -> RewardModel:
    config = reward.Config(**{"dtype": "float32", **options})
    if not config.model_name_or_path:
        model = model or tiny.model()
    return RewardModel.create(config, World.start(), model=model, tokenizer=tiny.tokenizer())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("base") / "model")


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "mistral", "qwen2"])
def test_the_reward_is_read_at_the_last_token(family: str, lora: bool) -> None:
    made = create(tiny.model(family), use_peft=lora)
    rewards = made.rewards(GROUPS)
    assert rewards.shape == (2, 2) and rewards.dtype == torch.float32
    inner = made.model.get_base_model() if lora else made.model
    head = inner.score.modules_to_save["default"] if lora else inner.score
    for i, group in enumerate(GROUPS):
        for j, answer in enumerate(group.answers):
            hidden = inner.base_model(input_ids=torch.tensor([[*group.prompt, *answer]])).last_hidden_state[0, -1]
            torch.testing.assert_close(rewards[i, j], head(hidden)[0], rtol=1e-5, atol=1e-5)


def test_neighbours_and_padding_change_nothing() -> None:
    made = create()
    together = made.rewards(GROUPS)
    torch.testing.assert_close(torch.cat([made.rewards([group]) for group in GROUPS]), together)
    made.tokenizer.pad_token = "<|endoftext|>"
    assert torch.equal(made.rewards(GROUPS), together)


def test_a_fresh_head_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = create().rewards(GROUPS)
    torch.manual_seed(2)
    assert torch.equal(create().rewards(GROUPS), first)
    assert not torch.equal(create(seed=1).rewards(GROUPS), first)


def test_a_model_in_memory_is_left_as_it_was() -> None:
    model = tiny.model()
    made = create(model)
    with torch.no_grad():
        for weight in made.module.parameters():
            weight.add_(1.0)
    for name, weight in tiny.model().state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_a_loaded_model_and_one_in_memory_are_the_same(base: Path) -> None:
    named = create(model_name_or_path=str(base)).rewards(GROUPS)
    torch.testing.assert_close(create(AutoModelForCausalLM.from_pretrained(base)).rewards(GROUPS), named)


def pair(margin: float | None, number: int = 0) -> Pair:
    source = Preference(prompt="", chosen="", rejected="", margin=margin, row=number)
    return Pair(prompt=[5, 6 + number], chosen=[7, 8 + number, 2], rejected=[9, 2], source=source)


def task(made: RewardModel, rows: list[Pair]) -> RewardTask:
    return RewardTask(
        reward=made, pairs=rows, test=rows, selection=(), config=reward.Config(per_device_train_batch_size=2)
    )


def test_the_margin_column_acts() -> None:
    made = create()
    with torch.no_grad():
        rewards = made.rewards([pair(None).group])[0]
        losses, metrics = task(made, []).compute([pair(None), pair(2.0)])
        mixed, _ = task(made, []).compute([pair(None)])
    gap = rewards[0] - rewards[1]
    torch.testing.assert_close(losses, -torch.nn.functional.logsigmoid(torch.stack([gap, gap - 2.0])))
    torch.testing.assert_close(mixed, losses[:1])
    torch.testing.assert_close(metrics["rewards/margins"], torch.stack([gap, gap]))


def test_chosen_training_answers_have_mean_0_after_finishing() -> None:
    made, rows = create(), [pair(None, i) for i in range(5)]
    work = task(made, rows)
    assert abs(float(made.rewards([row.group for row in rows])[:, 0].mean())) > 1e-3
    for _ in range(2):  # a run that is continued finishes again
        work.finish()
        torch.testing.assert_close(
            made.rewards([row.group for row in rows])[:, 0].mean(), torch.tensor(0.0), atol=1e-6, rtol=0
        )
    report = work.evaluate()
    assert report.metrics["eval_rewards/chosen"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_the_saved_folder_gives_the_same_scores(base: Path, tmp_path: Path, lora: bool, memory: bool) -> None:
    made = create(
        AutoModelForCausalLM.from_pretrained(base) if memory else None,
        use_peft=lora,
        **({} if memory else {"model_name_or_path": str(base)}),
    )
    with torch.no_grad():
        for name, weight in made.module.named_parameters():
            if "lora_B" in name or "score" in name:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    made.centre(0.25)
    ours = made.rewards(GROUPS).detach()
    assert made.save_final(tmp_path)["model"] == "model"
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert stock.config.num_labels == 1
    assert getattr(stock.config, MEAN) == 0.25
    for i, group in enumerate(GROUPS):
        for j, answer in enumerate(group.answers):
            logit = stock(input_ids=torch.tensor([[*group.prompt, *answer]])).logits[0, 0]
            torch.testing.assert_close(logit - 0.25, ours[i, j], rtol=1e-4, atol=1e-4, msg=f"{group} {answer}")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = [[*group.prompt, *answer] for group in GROUPS for answer in group.answers]
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side="right")
    torch.testing.assert_close(stock(**batch).logits[:, 0] - 0.25, ours.flatten(), rtol=1e-4, atol=1e-4)
    again = RewardModel.load(str(tmp_path / "model"), dtype="float32")
    torch.testing.assert_close(again.rewards(GROUPS), ours, rtol=1e-4, atol=1e-4)
    assert not any(weight.requires_grad for weight in again.module.parameters())


def test_a_judge_reads_text_as_training_read_it(base: Path, tmp_path: Path) -> None:
    made = create(model_name_or_path=str(base))
    made.centre(0.5)
    made.save_final(tmp_path)
    judge = RewardModel.load(str(tmp_path / "model"), dtype="float32")
    rows = [Preference(**{k: v for k, v in row.items() if k != "group"}) for row in tiny.pairs(5)]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    expected = made.rewards([p.group for p in tokenize_pairs(tokenizer, rows, max_length=256)])[:, 0].tolist()
    scores = judge.judge([row.prompt for row in rows], [row.chosen[0]["content"] for row in rows], batch_size=2)
    assert scores == pytest.approx(expected, abs=1e-4)


def test_an_answer_may_be_empty(base: Path, tmp_path: Path) -> None:
    create(model_name_or_path=str(base)).save_final(tmp_path)
    judge = RewardModel.load(str(tmp_path / "model"), dtype="float32")
    prompt = [{"role": "user", "content": "red"}]
    scores = judge.judge([prompt, prompt], ["", "blue"])
    assert len(scores) == 2 and scores[0] != scores[1]


def test_what_is_no_reward_model_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reward"):
        RewardModel.load(str(base))
