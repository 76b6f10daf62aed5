"""PPO and DR-PO from end to end: PPO where nothing is reset, resets, resumption, and what ends a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from method_runs import Inputs, assert_same_state, call, column, lines, metrics, read, run, state
from prefkit import cli
from prefkit.domains.text.sampler import TransformersSampler
from prefkit.engine import checkpoint
from prefkit.errors import InputError
from prefkit.loops.policy_optimization import PolicyOptimization

RATE: dict[str, Any] = {"learning_rate": 3e-3}
CUT = "rollout/cut_"


class Killed(BaseException):
    pass


def rollouts(directory: Path, step: int) -> list[dict[str, Any]]:
    """The batch of episodes that a checkpoint holds."""
    return lines(directory / f"checkpoint-{step}" / "rollouts.jsonl")[1:]


def die_at(step: int, monkeypatch: Any) -> None:
    """From now on a run is killed in the forward pass of this step."""
    original, batches = PolicyOptimization.compute, PolicyOptimization.batches
    now: list[int] = []

    def counted(self: Any, number: int, *rest: Any) -> Any:
        now.append(number)
        return batches(self, number, *rest)

    def dying(self: Any, batch: Any) -> Any:
        if now[-1] == step:
            raise Killed
        return original(self, batch)

    monkeypatch.setattr(PolicyOptimization, "batches", counted)
    monkeypatch.setattr(PolicyOptimization, "compute", dying)


@pytest.mark.parametrize("lora", [False, True])
def test_without_resets_it_is_ppo_bit_for_bit(inputs: Inputs, tmp_path: Path, lora: bool) -> None:
    options = {**RATE, "max_steps": 8, "num_mini_batches": 2, "save_steps": 4, "eval_steps": 4, "use_peft": lora}
    ppo = run(inputs, "ppo", tmp_path / "ppo", **options)
    drpo = run(inputs, "drpo", tmp_path / "drpo", reset_prob=0, **options)
    assert_same_state(ppo, drpo)
    assert {f"checkpoint-{step}/optimizer.safetensors" for step in (4, 8)} <= set(state(ppo))
    for name in ("rollouts.jsonl", "optimizer.json"):
        assert (ppo / "checkpoint-8" / name).read_bytes() == (drpo / "checkpoint-8" / name).read_bytes()
    assert len({row["objective/scores"] for row in metrics(ppo) if "objective/scores" in row}) == 2
    reset = run(inputs, "drpo", tmp_path / "reset", **options)
    assert column(reset, "loss") != column(ppo, "loss")


def test_resets_leave_all_other_random_numbers_alone(inputs: Inputs, tmp_path: Path) -> None:
    """Rollouts that the coin leaves plain are PPO's own rollouts, in the first batch of episodes."""
    options: dict[str, Any] = {"per_device_train_batch_size": 8, "max_steps": 1}
    plain = rollouts(run(inputs, "ppo", tmp_path / "ppo", **options), 1)
    mixed = rollouts(run(inputs, "drpo", tmp_path / "drpo", reset_prob=0.5, k_min=1, **options), 1)
    same = [one["tokens"] == other["tokens"] for one, other in zip(plain, mixed, strict=True) if not other["prefix"]]
    assert same and all(same) and len(same) < len(plain)
    for one, other in zip(plain, mixed, strict=True):
        assert one["prompt"] == other["prompt"] and len(other["tokens"]) <= 8


@pytest.mark.parametrize("k_min", [0, 1])
def test_the_first_token_starves_where_it_is_always_forced(
    inputs: Inputs, tmp_path: Path, k_min: int, monkeypatch, capsys
) -> None:
    """A last hidden state acts on one next-token distribution: its gradient is that of the position."""
    found: list[tuple[int, float, float]] = []
    compute = PolicyOptimization.compute

    def watched(self: Any, batch: Any) -> Any:
        kept: list[Any] = []
        handle = self.policy.model.model.norm.register_forward_hook(lambda *args: kept.append(args[2]))
        losses, values = compute(self, batch)
        handle.remove()
        (gradient,) = torch.autograd.grad(losses.sum(), kept[0], retain_graph=True)
        for line, place in enumerate(batch):
            (rollout,) = self._units[place]
            first = len(rollout.prompt) - 1
            later = first + rollout.prefix
            before, at, behind = (gradient[line, part].abs() for part in (slice(first), first, slice(later, None)))
            assert float(before.sum()) == 0, "no gradient on the prompt"
            found.append((rollout.prefix, float(at.max()), float(behind.max())))
        return losses, values

    monkeypatch.setattr(PolicyOptimization, "compute", watched)
    options = {"k_min": k_min, "num_ppo_epochs": 1, "per_device_train_batch_size": 8, "max_steps": 2}
    run(inputs, "drpo", tmp_path / "run", scoring_backend="padded", **options)
    assert any(behind > 0 for *_, behind in found)
    for prefix, at, _ in found:
        assert (at > 0) == (prefix == 0), "forced tokens have no gradient, the first one that is chosen has"
    assert all(prefix for prefix, *_ in found) == bool(k_min)
    assert ("the first token of an answer gets no gradient" in capsys.readouterr().err) == bool(k_min)


CLOSE = ("loss", "grad_norm", "objective/scores", "objective/kl", "loss/value", "policy/ratio", "objective/entropy")


@pytest.mark.parametrize("options", [{}, {"kl_in": "loss"}, {"use_peft": True, "num_generations": 2}])
def test_micro_batches_equal_one_batch(inputs: Inputs, tmp_path: Path, options: Any) -> None:
    options = {
        **RATE,
        "learning_rate": 1e-3,
        "reset_prob": 0.7,
        "max_new_tokens": 6,
        "kl_coef": 0.2,
        "max_steps": 2,
        **options,
    }
    big = run(inputs, "drpo", tmp_path / "big", per_device_train_batch_size=6, **options)
    assert len({row["prefix"] for row in rollouts(big, 2)}) > 1, "unequal cuts"
    for name, more in {
        "small": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6},
        "packed": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "tokens_per_batch": 90},
    }.items():
        other = run(inputs, "drpo", tmp_path / name, **options, **more)
        assert [r["tokens"] for r in rollouts(other, 2)] == [r["tokens"] for r in rollouts(big, 2)]
        for key in CLOSE:
            one, many = torch.tensor(column(big, key)), torch.tensor(column(other, key))
            torch.testing.assert_close(many, one, rtol=2e-4, atol=1e-5, msg=f"{name} {key}")


@pytest.fixture(scope="module")
def reward(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory):
    """A reward model's run, with LoRA or all weights, made once."""
    made: dict[bool, Path] = {}

    def get(lora: bool) -> Path:
        if lora not in made:
            folder = tmp_path_factory.mktemp("reward") / "run"
            made[lora] = run(inputs, "reward", folder, use_peft=lora, learning_rate=1e-2, max_steps=6)
        return made[lora]

    return get


BATCHES: dict[str, Any] = {
    "learning_rate": 3e-3,
    "max_steps": 9,
    "num_eval_prompts": 1,
    "num_mini_batches": 2,
    "save_steps": 1,
    "reset_prob": 0.5,
    "kl_coef": 0.1,
    "kl_target": 0.5,
    "kl_horizon": 20,
}


@pytest.mark.parametrize(("step", "lora"), [(3, False), (8, True)])
def test_stopped_within_a_batch_of_episodes_it_goes_on_to_the_same_bits(
    inputs: Inputs, tmp_path: Path, reward: Any, step: int, lora: bool, monkeypatch
) -> None:
    options = {**BATCHES, "use_peft": lora, "reward": f"reward:{reward(lora)}"}
    whole = run(inputs, "drpo", tmp_path / "whole", **options)
    coefficients = column(whole, "objective/kl_coef")
    assert len(coefficients) == len(set(coefficients)) == 3, "the coefficient adapts"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(step, patch)
        run(inputs, "drpo", tmp_path / "run", **options)
    assert not (tmp_path / "run" / f"checkpoint-{step}").exists()
    run(inputs, "drpo", tmp_path / "run", **options)
    assert_same_state(whole, tmp_path / "run")


def test_evaluation_never_begins_an_answer_and_training_tells_kinds_apart(
    inputs: Inputs, tmp_path: Path, monkeypatch
) -> None:
    begun: dict[str, int] = {}
    original = TransformersSampler.sample

    def watched(self: Any, prompts: Any, **kwargs: Any) -> Any:
        kind = str(kwargs["path"][0])
        begun[kind] = begun.get(kind, 0) + sum(map(bool, kwargs.get("prefixes") or ()))
        return original(self, prompts, **kwargs)

    monkeypatch.setattr(TransformersSampler, "sample", watched)
    options: dict[str, Any] = {"per_device_train_batch_size": 8, "num_ppo_epochs": 1, "reset_prob": 0.5}
    directory = run(inputs, "drpo", tmp_path / "run", **options)
    assert begun == {"evaluation": 0, "rollout": begun["rollout"]} and begun["rollout"] > 4
    for row in metrics(directory)[1:]:
        share = row["rollout/reset_share"]
        assert row["rollout/plain/scores"] != row["rollout/reset/scores"]
        mean = share * row["rollout/reset/scores"] + (1 - share) * row["rollout/plain/scores"]
        assert row["objective/scores"] == pytest.approx(mean, rel=1e-5)
        assert {"rollout/plain/kl", "rollout/reset/length", "rollout/sampled_tokens"} <= set(row)
        assert any(name.startswith(CUT) for name in row)

    def starts_them(self: Any, prompts: Any, **kwargs: Any) -> Any:
        return original(self, prompts, **{**kwargs, "prefixes": [[5]] * len(prompts)})

    monkeypatch.setattr(TransformersSampler, "sample", starts_them)
    with pytest.raises(ValueError, match="cannot be evaluated"):
        call(inputs, "drpo", tmp_path / "begun", **options)


@pytest.mark.parametrize("logging_steps", [3, 4])
def test_every_batch_of_episodes_is_logged_whatever_the_cadence(
    inputs: Inputs, tmp_path: Path, logging_steps: int
) -> None:
    options: dict[str, Any] = {"max_steps": 8, "num_ppo_epochs": 4}
    often = run(inputs, "drpo", tmp_path / "often", **options)
    seldom = run(inputs, "drpo", tmp_path / "seldom", logging_steps=logging_steps, **options)
    assert column(seldom, "objective/scores") == column(often, "objective/scores")
    assert min(column(seldom, "objective/entropy")) > 0.1


SOURCES: dict[str, dict[str, Any]] = {
    "chosen": {},
    "rejected": {"reset_source": "rejected"},
    "both": {"reset_source": "both"},
    "policy": {"reset_source": "policy"},
    "fixed": {"reset_law": "fixed", "reset_cut": 2},
    "curriculum": {"reset_law": "curriculum"},
    "finished": {"reset_filter": "finished"},
}


@pytest.mark.parametrize("case", SOURCES)
def test_sources_laws_and_filter(inputs: Inputs, tmp_path: Path, case: str) -> None:
    options = {"per_device_train_batch_size": 8, "num_ppo_epochs": 1, "max_steps": 2, "k_min": 1, "save_steps": 1}
    directory = run(inputs, "drpo", tmp_path / "run", **options, **SOURCES[case])
    tokenizer = tiny.tokenizer()
    rows = lines(inputs.train)
    ends: set[str] = set()
    for rollout in [*rollouts(directory, 1), *rollouts(directory, 2)]:
        stored = {
            side: tokenizer(rows[rollout["row"]][side][0]["content"])["input_ids"] for side in ("chosen", "rejected")
        }
        forced = rollout["tokens"][: rollout["prefix"]]
        ends |= {side for side, ids in stored.items() if forced and ids[: len(forced)] == forced}
        if case == "fixed":
            assert len(forced) == 2
    assert column(directory, "rollout/reset_share")[0] > 0.8
    if case in ("chosen", "rejected"):
        assert case in ends
    elif case == "both":
        assert ends == {"chosen", "rejected"}
    elif case == "curriculum":
        early, late = (sum(r["prefix"] for r in rollouts(directory, step)) for step in (1, 2))
        assert early > late, "late cuts first"


def test_references_of_prompt_and_completion_rows(inputs: Inputs, tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in tiny.pairs(16)]
    data = tiny.jsonl(tmp_path / "references.jsonl", rows)
    directory = run(inputs, "drpo", tmp_path / "run", dataset_name=data, reset_source="reference", max_steps=2)
    assert column(directory, "rollout/reset_share")[0] > 0
    with pytest.raises(InputError, match="chosen"):
        call(inputs, "drpo", tmp_path / "pairs", dataset_name=str(data), reset_source="rejected")


@pytest.mark.parametrize(
    "options",
    [
        {"profile": "paper"},
        {"profile": "paper", "whiten_rewards": True, "k_min": 1, "missing_eos": "replace", "use_peft": True},
        {"whiten_rewards": True, "scale_advantages": "scale", "dual_clip": 3.0, "reward_clip": 5.0},
        {"kl_in": "loss", "kl_estimator": "k2", "missing_eos": "subtract"},
        {"kl_coef": 0.0, "total_episodes": 8, "max_steps": -1},
        {"value_init": "policy", "num_generations": 2, "temperature": 0.7},
    ],
)
def test_options_run(inputs: Inputs, tmp_path: Path, reward: Any, options: Any) -> None:
    options = {"reward": f"reward:{reward(False)}", "per_device_train_batch_size": 4, "max_steps": 2, **options}
    directory = run(inputs, "drpo", tmp_path / "run", **options)
    rows = metrics(directory)[1:]
    assert all(abs(value) < 1e6 for row in rows for value in row.values())
    assert rows[0]["policy/ratio"] == pytest.approx(1, abs=1e-5), "fresh answers are the policy's own"
    assert ("objective/kl" in rows[0]) == (options.get("kl_coef") != 0.0)
    assert {"eval_objective/scores", "eval_objective/kl"} <= set(read(directory / "evaluation.json")["final"])


def test_a_value_function_begins_as_the_reward_model(inputs: Inputs, tmp_path: Path, reward: Any, capsys) -> None:
    """Where the reward is an adapter on the policy's base the base is shared, or not; both begin alike."""
    options = {"use_peft": True, "reward": f"reward:{reward(True)}", "num_ppo_epochs": 4, "learning_rate": 3e-4}
    shared = run(inputs, "drpo", tmp_path / "shared", **options)
    assert "a value adapter on the policy's own base" in capsys.readouterr().err
    assert (shared / "checkpoint-4" / "value.safetensors").is_file()
    separate = run(inputs, "drpo", tmp_path / "separate", value_model="separate", **options)
    assert "a separate value model with LoRA" in capsys.readouterr().err
    assert not (separate / "checkpoint-4" / "value.safetensors").exists()
    first = [metrics(path)[1]["loss/value"] for path in (shared, separate)]
    assert first[0] == pytest.approx(first[1], rel=1e-4)
    later = [metrics(path)[4]["loss/value"] for path in (shared, separate)]
    assert all(0 < value < 0.95 * first[0] for value in later), later
    assert all(metrics(path)[4]["policy/approx_kl"] > 1e-4 for path in (shared, separate)), "and so does the policy"
    assert not any("value" in path.name for path in (shared / "adapter").iterdir())


def test_where_the_base_cannot_be_shared_a_line_says_so(inputs: Inputs, tmp_path: Path, reward: Any, capsys) -> None:
    options = {"use_peft": True, "reward": f"reward:{reward(False)}", "max_steps": 1}
    run(inputs, "drpo", tmp_path / "run", **options)
    assert "a separate value model (the reward model is no adapter" in capsys.readouterr().err
    assert cli.run(inputs.arguments("drpo", tmp_path / "no", **options, value_model="shared")) == 2
    assert "cannot share the policy's base: the reward model is no adapter" in capsys.readouterr().err


REWARDS = """
calls = 0
def nan(prompts, completions):
    global calls
    calls += 1
    return [-float(len(c)) if calls < 3 else float("nan") for c in completions]
def short(prompts, completions):
    global calls
    calls += 1
    return [-float(len(c)) for c in completions][calls > 2:]
def constant(prompts, completions):
    return [1.5] * len(completions)
"""
GUARDS: dict[str, tuple[dict[str, Any], str, int]] = {
    "nan": ({"reward": "gold:NAME:nan"}, "returned nan for completion 1", 4),
    "count": ({"reward": "gold:NAME:short"}, "returned 1 numbers for 2 completions", 4),
    "constant": (
        {"reward": "gold:NAME:constant", "per_device_train_batch_size": 32, "num_ppo_epochs": 1},
        "answers scored 1.5",
        4,
    ),
    "ratio": ({"learning_rate": 3.0, "num_ppo_epochs": 8, "kl_coef": 0.0}, "has left the one that drew its answers", 1),
    "no end": (
        {"missing_eos": "replace", "per_device_train_batch_size": 32, "num_ppo_epochs": 1, "max_new_tokens": 2},
        "no answer ended",
        4,
    ),
}


@pytest.mark.parametrize("case", GUARDS)
def test_what_goes_wrong_in_training_ends_it_with_the_last_checkpoint_whole(
    inputs: Inputs, tmp_path: Path, case: str, monkeypatch, capsys
) -> None:
    options, message, last = GUARDS[case]
    name = f"rewards_{case.replace(' ', '_')}"
    (tmp_path / f"{name}.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    options = {"max_steps": 16, "save_steps": 1, "lr_scheduler_type": "constant", **options}
    options = {key: str(value).replace("NAME", name) for key, value in options.items()}
    assert cli.run(inputs.arguments("drpo", tmp_path / "run", **options)) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    step, damaged = checkpoint.newest_whole(tmp_path / "run")
    assert not damaged and step == last
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_reward_that_is_none_is_refused_before_any_training(inputs: Inputs, tmp_path: Path, capsys) -> None:
    for name in (f"reward:{inputs.model}", "reward:", "gold:nowhere:nothing", "llm:model"):
        assert cli.run(inputs.arguments("drpo", tmp_path / "run", reward=name, sft_steps=2)) == 2
        said = capsys.readouterr().err
        assert "--reward" in said and "Traceback" not in said, said
    assert not (tmp_path / "run" / "sft").exists()


def test_a_prompt_without_room_for_an_answer_is_refused_before_any_training(inputs: Inputs, tmp_path: Path) -> None:
    rows = tiny.pairs(16)
    rows[3]["prompt"][0]["content"] = "red " * 100
    data = tiny.jsonl(tmp_path / "long.jsonl", rows)
    with pytest.raises(InputError, match="leaves no room for 60 new ones") as error:
        call(inputs, "drpo", tmp_path / "run", dataset_name=str(data), max_new_tokens=60)
    assert "line 4" in error.value.where
    assert not (tmp_path / "run").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nucleus": ({"top_p": 0.9}, "not the policy's own"),
    "greedy": ({"temperature": 0.0}, "not the policy's own"),
    "share": ({"reset_prob": 1.5}, "reset_prob"),
    "clip": ({"cliprange": 0.0}, "cliprange"),
    "dual": ({"dual_clip": 0.5}, "dual_clip"),
    "coefficient": ({"kl_target": 6.0, "kl_coef": 0.0}, "cannot grow from 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_cannot_be_meant_are_refused(inputs: Inputs, tmp_path: Path, case: str) -> None:
    options, reason = REFUSED[case]
    with pytest.raises(InputError, match=reason):
        call(inputs, "drpo", tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
