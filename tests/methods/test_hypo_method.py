"""HyPO as a command: DPO where the KL weighs nothing, own samples where it does, and refusals that give the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from method_runs import Inputs, call, column, metrics, run, timeless, weights
from prefkit.domains.text import sampler
from prefkit.domains.text.scoring import LanguageModel
from prefkit.errors import InputError
from prefkit.loops.pairs import PairTask

RATE = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 4}


def same_weights(first: Path, second: Path) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("options", [{}, {"use_peft": True}, {"loss_type": "ipo"}, {"sft_weight": 0.5}])
def test_a_kl_weight_of_0_is_dpo_bit_for_bit(inputs: Inputs, tmp_path: Path, options: Any) -> None:
    options = {**RATE, "eval_steps": 2, **options}
    hypo = run(inputs, "hypo", tmp_path / "hypo", kl_weight=0, **options)
    dpo = run(inputs, "dpo", tmp_path / "dpo", **options)
    assert metrics(hypo) == metrics(dpo)
    assert same_weights(hypo, dpo)
    for file in ("pairs.jsonl", "samples.jsonl", "start.json"):
        assert (hypo / "evaluation" / file).read_bytes() == (dpo / "evaluation" / file).read_bytes()


def test_a_kl_weight_of_0_samples_nothing_in_training(inputs: Inputs, tmp_path: Path, monkeypatch) -> None:
    paths: list[Any] = []
    original = sampler.TransformersSampler.sample

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        paths.append(tuple(kwargs["path"]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(sampler.TransformersSampler, "sample", watched)
    call(inputs, "hypo", tmp_path / "none", kl_weight=0.0, num_generations=1)
    assert paths and set(paths) == {("evaluation",)}
    call(inputs, "hypo", tmp_path / "some", kl_weight=0.1)
    assert {path for path in paths if path[0] == "own"} == {("own", step) for step in (1, 2, 3, 4)}


@pytest.mark.parametrize("estimator", ["rloo", "reinforce", "rtg", "rb"])
def test_every_estimator_pulls_the_policy_to_its_reference(inputs: Inputs, tmp_path: Path, estimator: str) -> None:
    """From the same drifted start a heavy KL ends nearer to the reference than none."""
    options = {**RATE, "max_steps": 8, "per_device_train_batch_size": 8, "num_eval_prompts": 8, "num_generations": 4}
    free = call(inputs, "hypo", tmp_path / "free", kl_weight=0.0, **options)
    held = call(inputs, "hypo", tmp_path / "held", kl_weight=5.0, estimator=estimator, **options)
    assert held.metrics["eval_objective/kl"] < 0.7 * free.metrics["eval_objective/kl"]
    rows = metrics(tmp_path / "held")[1:]
    assert all({"objective/kl", "completions/mean_length", "val/contain_eos_token"} <= set(row) for row in rows)
    assert rows[0]["objective/kl"] == 0.0, "policy == reference: every log-ratio is exactly 0"
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert rows[-1]["objective/kl"] != 0.0


@pytest.mark.parametrize("estimator", ["rloo", "rtg", "rb"])
@pytest.mark.parametrize("lora", [False, True])
def test_micro_batches_equal_one_batch(inputs: Inputs, tmp_path: Path, estimator: str, lora: bool) -> None:
    options = {
        **RATE,
        "kl_weight": 0.5,
        "estimator": estimator,
        "use_peft": lora,
        "max_steps": 3,
        "learning_rate": 1e-3,
    }
    big = run(inputs, "hypo", tmp_path / "big", per_device_train_batch_size=6, **options)
    small = run(
        inputs, "hypo", tmp_path / "small", per_device_train_batch_size=2, gradient_accumulation_steps=3, **options
    )
    for name in ("loss", "grad_norm", "objective/kl", "completions/mean_length"):
        one, many = torch.tensor(column(big, name)), torch.tensor(column(small, name))
        # The loss is small because sums of tens of nats cancel in it: what float32 leaves of them is 1e-5.
        torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-5 if name == "loss" else 2e-6, msg=name)


@pytest.mark.parametrize(("estimator", "cached"), [("rloo", False), ("rtg", True)])
def test_fresh_answers_share_the_pass_of_their_pair(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str, cached: bool
) -> None:
    options = {**RATE, "kl_weight": 0.5, "estimator": estimator, "precompute_ref_log_probs": cached, "max_steps": 2}
    tokens: list[int] = []
    original = LanguageModel.forward

    def watched(self: LanguageModel, layout: Any, **how: Any) -> Any:
        if torch.is_grad_enabled():
            tokens.append(layout.num_tokens)
        return original(self, layout, **how)

    monkeypatch.setattr(LanguageModel, "forward", watched)
    together = run(inputs, "hypo", tmp_path / "together", **options)
    of_one_pass, tokens[:] = sum(tokens), []
    monkeypatch.setattr(PairTask, "_share_prompts", lambda *_: False)
    apart = run(inputs, "hypo", tmp_path / "apart", **options)
    assert of_one_pass < 0.75 * sum(tokens), "the prompt is computed once"
    for name in ("loss", "grad_norm", "objective/kl"):
        one, two = torch.tensor(column(together, name)), torch.tensor(column(apart, name))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=name)


def test_the_kl_weight_acts(inputs: Inputs, tmp_path: Path) -> None:
    light = run(inputs, "hypo", tmp_path / "light", kl_weight=0.01, **RATE)
    heavy = run(inputs, "hypo", tmp_path / "heavy", kl_weight=10, **RATE)
    assert column(light, "loss")[0] == column(heavy, "loss")[0]
    assert column(light, "grad_norm")[0] == pytest.approx(column(heavy, "grad_norm")[0], rel=1e-5)
    assert column(light, "grad_norm")[1] != pytest.approx(column(heavy, "grad_norm")[1], rel=1e-2)


def test_online_prompts_come_from_a_prompt_file(inputs: Inputs, tmp_path: Path, monkeypatch) -> None:
    texts = ["red red red", "blue", "moon moon"]
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    file = tiny.jsonl(tmp_path / "prompts.jsonl", rows)
    tokenizer = tiny.tokenizer()
    expected = {
        tuple(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False))
        for row in rows
    }
    seen: set[tuple[int, ...]] = set()
    original = sampler.TransformersSampler.sample

    def watched(self: Any, prompts: Any, **kwargs: Any) -> Any:
        if kwargs["path"][0] == "own":
            seen.update(tuple(prompt) for prompt in prompts)
        return original(self, prompts, **kwargs)

    monkeypatch.setattr(sampler.TransformersSampler, "sample", watched)
    directory = run(inputs, "hypo", tmp_path / "run", prompt_dataset=file, kl_weight=0.1)
    assert seen == expected
    same = run(inputs, "hypo", tmp_path / "pairs", kl_weight=0.1)
    assert column(directory, "rewards/chosen")[0] == column(same, "rewards/chosen")[0] == 0.0
    assert column(directory, "completions/mean_length") != [] and metrics(directory)[-1] != metrics(same)[-1]


def test_a_bad_prompt_file_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    file = tiny.jsonl(tmp_path / "prompts.jsonl", [{"prompt": [{"role": "user", "content": "red " * 3000}]}])
    with pytest.raises(InputError, match="tokens"):
        call(inputs, "hypo", tmp_path / "run", prompt_dataset=str(file))
    with pytest.raises(InputError, match="nowhere"):
        call(inputs, "hypo", tmp_path / "run", prompt_dataset=str(tmp_path / "nowhere.jsonl"))
    assert not (tmp_path / "run").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"temperature": 0.7}, "biased"),
    "top_p": ({"top_p": 0.9}, "biased"),
    "one answer": ({"num_generations": 1}, "at least two"),
    "negative": ({"kl_weight": -0.1}, "kl_weight is -0.1"),
    "unknown": ({"estimator": "rlooo"}, "not known"),
    "smoothed hinge": ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_another_gradient_is_refused(inputs: Inputs, tmp_path: Path, case: str) -> None:
    options, reason = REFUSED[case]
    with pytest.raises(InputError, match=reason):
        call(inputs, "hypo", tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("estimator", ["k1", "k3", "token_local", "group_mean", "clipped", "length_normalised"])
def test_biased_estimators_are_refused_with_the_reason(inputs: Inputs, tmp_path: Path, estimator: str) -> None:
    with pytest.raises(InputError, match=r"is biased: .*relative bias"):
        call(inputs, "hypo", tmp_path / "run", estimator=estimator)


def test_one_answer_is_enough_for_the_others(inputs: Inputs, tmp_path: Path) -> None:
    for estimator in ("reinforce", "rtg", "rb"):
        call(inputs, "hypo", tmp_path / estimator, estimator=estimator, num_generations=1, max_steps=1)


def test_a_cached_reference_changes_only_rounding(inputs: Inputs, tmp_path: Path) -> None:
    live = run(inputs, "hypo", tmp_path / "live", **RATE)
    cached = run(inputs, "hypo", tmp_path / "cached", precompute_ref_log_probs=True, **RATE)
    assert (cached / "reference.safetensors").is_file()
    for name in ("loss", "rewards/margins"):
        one, other = torch.tensor(column(live, name)), torch.tensor(column(cached, name))
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["dpo", "hypo"])
@pytest.mark.parametrize(
    "option",
    [
        {"sft_weight": 0.7},
        {"offline_kl_weight": 0.7},
        {"loss_type": "ipo"},
        {"loss_type": "hinge"},
        {"label_smoothing": 0.2},
    ],
)
def test_options_for_fair_comparison_act(inputs: Inputs, tmp_path: Path, method: str, option: Any) -> None:
    plain = run(inputs, method, tmp_path / "plain", **RATE)
    other = run(inputs, method, tmp_path / "other", **RATE, **option)
    before, after = metrics(plain)[1], metrics(other)[1]
    expected = {
        "ipo": (1 / (2 * 0.1)) ** 2,
        "hinge": 1.0,
    }.get(str(option.get("loss_type")), 0.693147)
    if "sft_weight" in option:
        assert after["loss"] > before["loss"] + 0.7
    else:
        assert after["loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics(plain)[2]["grad_norm"] != pytest.approx(metrics(other)[2]["grad_norm"], rel=1e-4)
    assert timeless(json.loads((other / "config.json").read_text())["config"]).items() >= {**option}.items()


def test_offline_kl_holds_the_policy_on_stored_answers(inputs: Inputs, tmp_path: Path) -> None:
    options = {**RATE, "max_steps": 8, "per_device_train_batch_size": 8}
    free = metrics(run(inputs, "dpo", tmp_path / "free", **options))[-1]
    held = metrics(run(inputs, "dpo", tmp_path / "held", offline_kl_weight=5, **options))[-1]
    assert abs(held["rewards/chosen"]) + abs(held["rewards/rejected"]) < 0.5 * (
        abs(free["rewards/chosen"]) + abs(free["rewards/rejected"])
    )


def test_an_sft_term_raises_the_chosen_answers(inputs: Inputs, tmp_path: Path) -> None:
    options = {**RATE, "max_steps": 8, "per_device_train_batch_size": 8}
    free = metrics(run(inputs, "dpo", tmp_path / "free", **options))[-1]
    held = metrics(run(inputs, "dpo", tmp_path / "held", sft_weight=2, **options))[-1]
    assert held["logps/chosen"] > free["logps/chosen"] + 1
