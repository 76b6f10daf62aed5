"""Rollouts: where an answer ends, what is counted of it, and that two ways to see a prefix score it alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from prefkit.domains.text.episodes import EpisodeData
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.resets import ResetSampler
from prefkit.domains.text.reward import RewardModel
from prefkit.domains.text.rollout_maker import RolloutMaker, TokenReward, scoring
from prefkit.domains.text.rollout_metrics import penalised
from prefkit.domains.text.rollouts import Columns, Rollout, RolloutStore, group_of
from prefkit.domains.text.sampler import TransformersSampler
from prefkit.domains.text.value import SeparateValue, value_of
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.loops import stages
from prefkit.methods import drpo
from prefkit.records import Sample

END = 2


def config(**options: Any) -> drpo.Config:
    shared: dict[str, Any] = {
        "dtype": "float32",
        "max_new_tokens": 8,
        "per_device_train_batch_size": 4,
        "num_mini_batches": 2,
        "temperature": 0.7,
        "missing_eos": "replace",
    }
    return drpo.Config(**{**shared, **options})


def reward_model(family: str = "llama") -> RewardModel:
    return RewardModel.create(config(), World.start(), model=tiny.model(family, seed=5), tokenizer=tiny.tokenizer())


def made(family: str = "llama", *, accounting: Any = "continuation", score: Any = None, **options: Any) -> RolloutMaker:
    """A maker over a tiny model and tiny pairs; a value function whose head is not 0."""
    how, model = config(**options), tiny.model(family)
    data = EpisodeData.of(
        stages.prepare(how, model=model, tokenizer=tiny.tokenizer(), train=tiny.pairs(), evaluation=tiny.pairs(4, 9))
    )
    policy = TextPolicy.create(how, World.start(), model=model, tokenizer=data.data.tokenizer)
    value = value_of(how, policy, reward="", keeping="separate")
    assert isinstance(value, SeparateValue)
    torch.manual_seed(1)
    for name, weight in value.module.named_parameters():
        if "score" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return RolloutMaker(
        policy=policy,
        sampler=TransformersSampler(policy),
        data=data,
        score=score or (lambda rollouts: [float(len(r.text)) for r in rollouts]),
        resets=ResetSampler(prob=how.reset_prob, k_min=how.k_min, seed=how.seed),
        value=value,
        accounting=accounting,
        config=how,
    )


def rollout(tokens: Sequence[int], *, prefix: int = 0, finished: bool = False, **more: Any) -> Rollout:
    drawn = Sample(
        prompt=(5, 6),
        tokens=tokens,
        log_probs=(),
        finished=finished,
        text="drawn",
        row=0,
        index=0,
        prefix=prefix,
    )
    found = Rollout.of(drawn, place=0, row=0, prefix=prefix, ends=[END], decode=lambda ids: f"cut at {len(ids)}")
    return replace(found, **more)


@pytest.mark.parametrize(
    ("tokens", "prefix", "sampler_says", "end", "finished"),
    [
        ([7, 8, END], 0, True, 3, True),  # at the last position of the budget
        ([7, 8, 9], 0, False, 3, False),
        ([END, 8, 9], 0, False, 1, True),  # first
        ([7, END, END], 0, False, 2, True),  # twice: the first counts
        ([7, 8, END], 2, True, 3, True),
        ([7, END, 8], 2, False, 3, False),  # one in a forced prefix ends nothing
        ([7, 8], 0, True, 2, True),  # by a stop string
    ],
)
def test_the_end_of_an_answer(tokens: list[int], prefix: int, sampler_says: bool, end: int, finished: bool) -> None:
    found = rollout(tokens, prefix=prefix, finished=sampler_says)
    assert (found.end, found.finished) == (end, finished)
    assert found.counted("continuation") == tuple(tokens[prefix:end])
    assert found.counted("episode") == tuple(tokens)


def test_the_text_of_an_answer_stops_at_its_end() -> None:
    assert rollout([7, END, 8, 9]).text == "cut at 2"
    assert rollout([7, 8, 9]).text == rollout([7, 8, END]).text == "drawn"


def test_end_token_0_ends_an_answer() -> None:
    drawn = Sample(prompt=(5,), tokens=(7, 0, 8), log_probs=(), finished=False, text="", row=0, index=0)
    found = Rollout.of(drawn, place=0, row=0, prefix=0, ends=[0], decode=str)
    assert (found.end, found.finished) == (2, True)


def rows() -> list[Rollout]:
    """An answer that ended early, one at the last position, one without an end; budget 5."""
    return [
        rollout([7, 8, END, 9, 9], prefix=1, score=3.0),
        rollout([7, 8, 9, 10, END], prefix=2, score=4.0),
        rollout([7, 8, 9, 10, 11], score=5.0),
    ]


def test_columns_by_continuation() -> None:
    found = Columns.of(rows(), "continuation")
    assert found.counted.tolist() == found.actions.tolist()
    assert found.counted.tolist() == [
        [True, True, False, False, False],
        [True, True, True, False, False],
        [True] * 5,
    ]
    assert found.ends.tolist() == [1, 2, 4]
    assert found.lengths.tolist() == [3, 5, 5]
    assert found.finished.tolist() == [True, True, False]
    assert found.resets.tolist() == [1, 2, 0]


def test_columns_by_episode_count_what_the_released_code_counts() -> None:
    found = Columns.of(rows(), "episode")
    assert bool(found.counted.all())  # every position of the budget
    assert found.actions.tolist() == [[False, *[True] * 4], [False, False, *[True] * 3], [True] * 5]
    assert found.ends.tolist() == [2, 4, 4]
    # it looks for padding behind the end token, so that one at the very last position counts as missing
    assert found.finished.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("rule", "accounting", "scores"),
    [
        ("keep", "continuation", [3, 4, 5]),
        ("subtract", "continuation", [3, 4, 3]),
        ("replace", "continuation", [3, 4, -2]),
        ("replace", "episode", [3, -2, -2]),
    ],
)
def test_the_rules_for_a_missing_end(rule: Any, accounting: Any, scores: list[float]) -> None:
    how = config(missing_eos=rule, missing_eos_penalty=2.0)
    assert penalised(Columns.of(rows(), accounting), how).tolist() == scores


def test_scores_are_clipped_before_the_rule() -> None:
    how = config(missing_eos="subtract", missing_eos_penalty=2.0, reward_clip=3.5)
    assert penalised(Columns.of(rows(), "continuation"), how).tolist() == [3.0, 3.5, 1.5]


def test_a_store_gives_back_what_it_saved(tmp_path: Path) -> None:
    store = RolloutStore(is_main=lambda: True)
    numbers = tuple(torch.randn(3).tolist())
    store.about = {"batch": 3, "kl_coef": 0.05}
    store.rollouts = [replace(r, log_probs=numbers, text='line\u2028\n"break"') for r in rows()]
    store.save(tmp_path)
    again = RolloutStore(is_main=lambda: True)
    again.load(tmp_path)
    assert again.about == store.about and again.rollouts == store.rollouts
    RolloutStore(is_main=lambda: False).save(tmp_path / "nowhere")


def batch(maker: RolloutMaker, number: int = 1) -> list[Rollout]:
    return maker.make(number, progress=0.0)


def test_a_forced_prefix_is_the_beginning_of_the_offline_answer() -> None:
    maker, lengths = made(), set[int]()
    for number in (1, 2):
        found = batch(maker, number)
        assert [r.place for r in found] == list(range(8))
        assert [r.row for r in found] == maker.data.prompts(number)
        for r in found:
            row = maker.data.data.train[r.row]
            assert r.tokens[: r.prefix] == tuple(row.completion[: r.prefix])
            assert r.prompt == tuple(row.prompt)
            assert r.prefix < len(row.completion) and r.prefix < len(r.tokens) <= 8
            assert END not in r.tokens[: r.prefix]
            lengths.add(r.prefix)
    assert len(lengths) > 3


def test_visits_are_cut_anew() -> None:
    maker = made(per_device_train_batch_size=24)  # 48 places: every row twice
    by_row: dict[int, set[int]] = {}
    for r in batch(maker):
        by_row.setdefault(r.row, set()).add(r.prefix)
    assert sum(len(found) == 2 for found in by_row.values()) > 8


def test_without_resets_the_same_answers_are_drawn_whoever_is_asked() -> None:
    plain, never = made(reset_prob=0.0), made(reset_prob=0.0)
    assert batch(replace(plain, resets=None)) == batch(never)


def test_rows_that_are_not_reset_draw_what_they_draw_without_resets() -> None:
    some, none = batch(made(reset_prob=0.5, k_min=1)), batch(made(reset_prob=0.0))
    kept = [(one, other) for one, other in zip(some, none, strict=True) if not one.prefix]
    assert 0 < len(kept) < 8
    assert all(one.tokens == other.tokens for one, other in kept)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_masked_prefix_and_one_in_the_prompt_score_alike(family: str) -> None:
    maker = made(family)
    found = [r for r in batch(maker) if r.prefix]
    masked = [unit[0] for unit in replace(maker, accounting="episode")._scored([[r] for r in found])]
    for one, whole in zip(found, masked, strict=True):
        for name in ("log_probs", "ref_log_probs", "values"):
            other = getattr(whole, name)
            assert len(other) == len(whole.tokens)
            assert getattr(one, name) == pytest.approx(other[one.prefix : one.end], abs=2e-5)


def test_a_masked_prefix_and_one_in_the_prompt_have_the_same_gradient() -> None:
    """Of policy and value function, through a surrogate that counts what the policy chose."""
    maker = made()
    found = [r for r in batch(maker) if r.prefix]
    value = maker.value
    assert isinstance(value, SeparateValue)
    draws = torch.Generator().manual_seed(2)
    weights = [torch.randn(len(r.tokens), generator=draws) for r in found]

    def gradients(accounting: Any) -> list[torch.Tensor]:
        groups = [group_of([r], accounting) for r in found]
        columns = Columns.of(found if accounting == "continuation" else wide(found), accounting)
        factor = torch.zeros(columns.counted.shape)
        for line, (r, weight) in enumerate(zip(found, weights, strict=True)):
            start = r.start(accounting)
            factor[line, r.prefix - start : r.end - start] = weight[r.prefix : r.end]
        kept = [w for part in (maker.policy.module, value.module) for w in part.parameters()]
        for weight in kept:
            weight.grad = None
        scored = maker.policy.token_log_probs(groups, temperature=0.7) + value.values(groups)
        (scored * factor * columns.actions).sum().backward()
        return [w.grad.clone() for w in kept if w.grad is not None]

    def wide(rollouts: list[Rollout]) -> list[Rollout]:
        return [replace(r, log_probs=(), ref_log_probs=(), values=()) for r in rollouts]

    for one, other in zip(gradients("continuation"), gradients("episode"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("k_min", "trained"), [(0, True), (1, False)])
def test_the_first_token_is_an_action_with_k_min_0_alone(k_min: int, trained: bool) -> None:
    """With a forced token in every rollout nothing trains the first one: the released code's setting."""
    found = Columns.of(batch(made(k_min=k_min, accounting="episode")), "episode")
    assert bool(found.actions[:, 0].any()) is trained
    assert bool(found.actions.any(-1).all())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_old_and_reference_log_probs_are_the_models_at_the_temperature(family: str, temperature: float) -> None:
    found = batch(made(family, temperature=temperature))
    model = tiny.model(family)
    for r in found[:4]:
        ids = torch.tensor([[*r.prompt, *r.tokens]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(r.prompt) + r.prefix - 1 : -1]
        expected = (logits / temperature).log_softmax(-1)
        expected = expected.gather(-1, torch.tensor(r.counted("continuation"))[:, None])[:, 0].tolist()
        assert r.log_probs == pytest.approx(expected, abs=1e-4)
        assert r.ref_log_probs == r.log_probs  # the first update: the policy is its reference
        assert len(r.values) == len(r.log_probs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_neighbours_padding_and_packing_change_nothing(family: str) -> None:
    packed = made(family, tokens_per_batch=512)
    padded = made(family, per_device_train_batch_size=8, num_mini_batches=1, scoring_backend="padded")
    alone = made(family, per_device_train_batch_size=1, num_mini_batches=8)
    for one, other, third in zip(batch(packed), batch(padded), batch(alone), strict=True):
        assert one.tokens == other.tokens == third.tokens
        for name in ("log_probs", "ref_log_probs", "values"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=2e-5)
            assert getattr(one, name) == pytest.approx(getattr(third, name), abs=2e-5)


def test_by_episode_every_answer_fills_its_budget_and_is_read_to_its_end() -> None:
    read: list[str] = []

    def score(rollouts: Sequence[Rollout]) -> list[float]:
        read.extend(r.text for r in rollouts)
        return [1.0] * len(rollouts)

    maker = made(accounting="episode", score=score)
    head = maker.policy.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(320))
    with torch.no_grad():
        head.bias[END] = 12.0  # so that answers end
    found = batch(maker)
    assert all(len(r.tokens) == len(r.log_probs) == len(r.values) == 8 for r in found)
    assert any(r.end < 8 for r in found)
    decode = maker.policy.tokenizer.decode
    assert read == [decode(list(r.tokens[: r.end]), skip_special_tokens=True) for r in found]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_token_reward_reads_the_answer_to_its_end(family: str) -> None:
    model = reward_model(family)
    score = TokenReward(model=model, batch_size=2)
    ended, cut = rollout([7, 8, END, 9, 9]), rollout([7, 8, END])
    assert score([ended])[0] == pytest.approx(score([cut])[0], abs=1e-5)
    many = [rollout([7 + i, *range(20, 20 + i), END], prefix=i % 2) for i in range(5)]
    together = score(many)
    assert together == pytest.approx([score([r])[0] for r in many], abs=1e-4)


def test_an_answer_that_repeats_the_reference_scores_as_the_reference_whatever_the_cut() -> None:
    model, maker = reward_model(), made()
    score = TokenReward(model=model, batch_size=3)
    for row in maker.data.data.train[:3]:
        whole = tuple(row.completion)
        again = [replace(rollout(whole, prefix=k), prompt=tuple(row.prompt)) for k in range(len(whole))]
        expected = float(model.rewards([row.group])[0, 0].detach())
        assert score(again) == pytest.approx([expected] * len(whole), abs=1e-4)


def test_who_is_scored_by_tokens_and_who_by_text() -> None:
    maker, model = made(), reward_model()
    rows = maker.data.data.train
    assert isinstance(scoring(model, maker.policy, rows, batch_size=2), TokenReward)
    model.made_elsewhere = True
    assert not isinstance(scoring(model, maker.policy, rows, batch_size=2), TokenReward)
    by_text = scoring(lambda prompts, answers: [float(len(a)) for a in answers], maker.policy, rows, batch_size=2)
    assert by_text(batch(maker)[:1])[0] == len(batch(made())[0].text)


@pytest.mark.parametrize("lora", [False, True])
def test_the_mean_reward_of_references_of_any_prompt_length_is_0(lora: bool) -> None:
    """The released code reads its normalising pass at the first padding of a prompt padded on the left."""
    maker = made()
    rows = maker.data.data.train
    assert len({len(row.prompt) for row in rows}) > 3
    how = config(use_peft=lora)
    model = RewardModel.create(how, World.start(), model=tiny.model(seed=5), tokenizer=tiny.tokenizer())
    with torch.no_grad():
        model.centre(float(torch.cat([model.rewards([row.group])[0] for row in rows]).mean()))
    again = [replace(rollout(tuple(row.completion)), prompt=tuple(row.prompt)) for row in rows]
    assert sum(TokenReward(model=model, batch_size=24)(again)) / len(rows) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("score", [lambda rollouts: [1.0], lambda rollouts: [float("nan")] * len(rollouts)])
def test_a_reward_that_cannot_be_used_is_refused(score: Any) -> None:
    with pytest.raises(InputError, match=r"gave 1 scores|is nan"):
        batch(made(score=score))


def test_answers_to_a_prompt_share_their_prefix() -> None:
    maker = made(num_generations=3, k_min=1, per_device_train_batch_size=2, num_mini_batches=1)
    found = batch(maker)
    assert [(r.place, r.index) for r in found] == [(p, i) for p in range(2) for i in range(3)]
    for place in range(2):
        unit = [r for r in found if r.place == place]
        assert len({(r.prefix, r.tokens[: r.prefix]) for r in unit}) == 1
        group = group_of(unit, "continuation")
        assert list(group.prompt) == [*unit[0].prompt, *unit[0].tokens[: unit[0].prefix]]
        assert len({r.tokens for r in unit}) > 1


@pytest.mark.parametrize("lora", [False, True])
def test_the_start_models_own_samples_as_a_source(lora: bool) -> None:
    maker = made(per_device_train_batch_size=2, use_peft=lora)
    maker = replace(maker, resets=ResetSampler(source="policy", k_min=1))
    drawn = maker._start_samples(maker.data.prompts(1), 1)
    with torch.no_grad():  # the policy has moved since, its reference has not
        for weight in (w for w in maker.policy.module.parameters() if w.requires_grad):
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    again = maker._start_samples(maker.data.prompts(1), 1)
    assert [tuple(a.tokens) for a in drawn if a] == [tuple(a.tokens) for a in again if a]
    for r, answer in zip(batch(maker), again, strict=True):
        assert answer is not None
        assert r.tokens[: r.prefix] == tuple(answer.tokens[: r.prefix])
        assert 0 < r.prefix < len(answer.tokens)
