"""Each model is tried at the start: packed rows where they are right, padded ones where not, and one line says why."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from prefkit.domains.text import attention, backends
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.reward import RewardModel
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.methods import dpo, reward
from prefkit.records import Group

IDS = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OWN = [(family, own) for family in ("llama", "mistral", "gpt2", "gpt_neox") for own in ("sdpa", "eager")]
OWN += [("gemma2", "eager")]  # transformers has no other for it
WIDE = {**SIZE, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 256}


def other(kind: str) -> Any:
    """A tiny random model that packed rows do not fit."""
    import transformers as t

    match kind:
        case "bloom":  # ALiBi, from the padding mask
            config: Any = t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **IDS)
        case "mpt":  # ALiBi, by places in the row
            config = t.MptConfig(d_model=32, n_layers=2, n_heads=4, max_seq_len=256, **IDS)
        case "gptj":  # attention of its own
            config = t.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=256, **IDS)
        case "bart":  # a decoder that counts its positions itself
            sizes = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 2}
            config = t.BartConfig(
                d_model=32, **sizes, max_position_embeddings=256, is_decoder=True, is_encoder_decoder=False, **IDS
            )
        case "gpt_oss":  # attention sinks
            config = t.GptOssConfig(
                **WIDE, **IDS, head_dim=8, sliding_window=8, num_local_experts=2, num_experts_per_tok=1
            )
            config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        case "lfm2":  # layers that convolve over the row
            config = t.Lfm2Config(**WIDE, **IDS, layer_types=["conv", "full_attention"])
        case _:
            raise ValueError(kind)
    torch.manual_seed(0)
    made = t.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "sinks" in name:
                weight.fill_(1.0)
    return made


def create(model: Any, **options: Any) -> TextPolicy:
    config = dpo.Config(**{"dtype": "float32", **options})
    return TextPolicy.create(config, World.start(), model=model, tokenizer=tiny.tokenizer())


def groups(count: int = 3) -> list[Group]:
    rng = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 300) for _ in range(rng.randint(low, high))]

    return [Group(ids(5, 20), [ids(1, 14), ids(1, 14)]) for _ in range(count)]


def plain(model: Any, group: Group, answer: int) -> Tensor:
    target = torch.tensor(group.answers[answer])
    ids = torch.tensor([[*group.prompt, *group.answers[answer]]])
    logits = model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def assert_scores_right(made: TextPolicy, model: Any) -> None:
    """Log-probs are those of `model`, one sequence at a time."""
    with torch.no_grad():
        ours = made.log_probs(groups())
        for i, group in enumerate(groups()):
            for j in range(2):
                torch.testing.assert_close(ours[i, j], plain(model, group, j).sum(), rtol=1e-5, atol=1e-4)


def own_name(model: Any) -> str:
    return model.config._attn_implementation


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_auto_takes_sdpa_on_a_cpu_and_says_so(family: str) -> None:
    made = create(tiny.model(family))
    assert made.module.backend == "sdpa"
    assert made.module.how == "scoring in packed rows, each prompt once (sdpa attention)"
    assert made.module.how in made.describe()
    assert_scores_right(made, tiny.model(family))


@pytest.mark.parametrize("backend", ["sdpa", "flex", "padded"])
def test_a_backend_asked_for_is_taken(backend: str) -> None:
    made = create(tiny.model(), scoring_backend=backend)
    assert made.module.backend == backend
    assert ("padded rows, as asked" if backend == "padded" else f"({backend} attention)") in made.module.how
    assert own_name(made.model).startswith(attention.PREFIX) == (backend != "padded")
    assert_scores_right(made, tiny.model())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["bloom", "mpt", "gptj", "bart", "gpt_oss", "lfm2"])
def test_a_model_that_packed_rows_do_not_fit_is_scored_in_padded_ones(kind: str, dtype: str) -> None:
    model = other(kind)
    before = own_name(model)
    made = create(model, dtype=dtype)
    assert made.module.backend == "padded"
    reason = made.module.how.removeprefix("scoring in padded rows: packed ones cannot be used, ")
    assert reason != made.module.how and len(reason) > 20 and "\n" not in reason
    assert own_name(model) == before
    if dtype == "float32":
        assert_scores_right(made, other(kind))


@pytest.mark.parametrize("kind", ["bloom", "gptj", "gpt_oss", "lfm2"])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_packed_rows_asked_for_where_they_would_be_wrong_are_refused(kind: str, backend: str) -> None:
    with pytest.raises(InputError, match=f"backend '{backend}' cannot score this model: ") as caught:
        create(other(kind), scoring_backend=backend)
    assert caught.value.where == "--scoring_backend" and "padded" in str(caught.value)


def test_reasons_name_what_is_in_the_way() -> None:
    assert "its attention takes no plan" in create(other("gptj")).module.how
    assert "layers of the kind conv" in create(other("lfm2")).module.how


def test_layers_of_an_unknown_kind_are_not_packed() -> None:
    model = tiny.model()
    model.config.layer_types = ["full_attention", "chunked_attention"]
    made = create(model)
    assert made.module.backend == "padded"
    assert made.module.how.endswith("it has layers of the kind chunked_attention")
    with pytest.raises(InputError, match="layers of the kind chunked_attention"):
        create(model, scoring_backend="sdpa")


@pytest.mark.parametrize(
    ("window", "reason"),
    [(8, "differ from padded ones by"), (10_000, "2 of its layers have a sliding window and 0 hand it over")],
)
def test_a_window_that_layers_do_not_hand_over_is_noticed(
    window: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.mistral.modeling_mistral import MistralAttention

    original = MistralAttention.forward

    def without_window(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's own, which masks by itself, but the attention function is told of no window."""
        kept, self.config = self.config, copy.copy(self.config)
        self.config.sliding_window = None
        try:
            return original(self, *args, **kwargs)
        finally:
            self.config = kept

    def model() -> Any:
        made = tiny.model("mistral")
        made.config.sliding_window = window
        return made

    assert create(model()).module.backend == "sdpa"
    monkeypatch.setattr(MistralAttention, "forward", without_window)
    made = create(model())
    assert made.module.backend == "padded"
    assert reason in made.module.how
    assert_scores_right(made, model())


def test_a_plan_that_mixes_tokens_up_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = attention.SdpaPlan.attend

    def leaking(self: Any, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        return original(self, query, key, value + 0.05 * value.roll(1, 2), **settings)

    monkeypatch.setattr(attention.SdpaPlan, "attend", leaking)
    made = create(tiny.model())
    assert made.module.backend == "padded" and "differ from padded ones" in made.module.how


@pytest.mark.parametrize("window", [0, 8, 100, 100_000])
def test_the_probe_runs_over_small_windows_and_has_every_kind_of_group(window: int) -> None:
    found = backends.probe(320, window)
    prompts, answers = ([len(g.prompt) for g in found], [len(a) for g in found for a in g.answers])
    assert 1 in prompts and 1 in answers
    assert len({len(g.answers) for g in found}) > 1
    assert all(0 <= token < 320 for g in found for part in (g.prompt, *g.answers) for token in part)
    if 0 < window <= backends.LONGEST_PROBE:
        assert max(prompts) > window and max(answers) > window
    assert max(prompts) + max(answers) < 3 * backends.LONGEST_PROBE


@pytest.mark.parametrize(("family", "own"), OWN)
def test_without_a_plan_the_model_is_what_it_was(family: str, own: str) -> None:
    def model() -> Any:
        made = tiny.model(family)
        made.set_attn_implementation(own)
        return made

    fresh, made = model(), create(model())
    assert made.module.backend == "sdpa"
    assert own_name(made.model) == f"{attention.PREFIX}{own}"
    assert attention.own_attention(made.model.config) == own == attention.own_attention(fresh.config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (3, 24), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[2, :17] = 0
    with torch.no_grad():
        made.log_probs(groups())
        for options in ({}, {"attention_mask": mask}):
            expected, ours = (m(input_ids=ids, **options).logits for m in (fresh, made.model))
            assert torch.equal(ours, expected)
        assert not torch.equal(expected, fresh(input_ids=ids).logits), "the mask matters"
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(made.model.generate(ids, **settings), fresh.generate(ids, **settings))


@pytest.mark.parametrize(("family", "own"), OWN)
def test_packed_rows_equal_the_models_own_attention_whichever_it_is(family: str, own: str) -> None:
    model, fresh = tiny.model(family), tiny.model(family)
    for one in (model, fresh):
        one.set_attn_implementation(own)
    assert_scores_right(create(model), fresh)


def test_installing_twice_and_copying_do_no_harm() -> None:
    made = create(tiny.model())
    name = own_name(made.model)
    attention.install(made.model)
    assert own_name(made.model) == name == f"{attention.PREFIX}sdpa"
    assert_scores_right(made, tiny.model())
    again = create(copy.deepcopy(made.model))
    assert own_name(again.model) == name and again.module.backend == "sdpa"
    assert_scores_right(again, tiny.model())
    assert made.reference_log_probs(groups()).tolist() == made.log_probs(groups()).tolist()


def test_no_saved_file_names_prefkits_attention(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = create(tiny.model("mistral"))
    assert attention.PREFIX in own_name(made.model)
    made.save(tmp_path / "checkpoint")
    made.save_final(tmp_path / "run")
    made.model.save_pretrained(tmp_path / "plain")
    adapted = create(tiny.model(), use_peft=True)
    adapted.save(tmp_path / "adapter")
    adapted.save_final(tmp_path / "merged")
    config = reward.Config(dtype="float32")
    scorer = RewardModel.create(config, World.start(), model=tiny.model(), tokenizer=tiny.tokenizer())
    scorer.save_final(tmp_path / "reward")
    written = [path for path in tmp_path.rglob("*.json") if not path.name.startswith("tokenizer")]
    assert len({path.parent for path in written}) >= 6
    for path in written:
        text = path.read_text(encoding="utf-8").replace("prefkit_reward_mean", "")
        assert "prefkit_" not in text and "_attn_implementation" not in text, path
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    ids = torch.tensor([groups()[0].prompt])
    assert torch.equal(loaded(input_ids=ids).logits, tiny.model("mistral")(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["gptj", "bloom"])
def test_a_reward_model_falls_back_too(kind: str) -> None:
    config = reward.Config(dtype="float32")
    made = RewardModel.create(config, World.start(), model=other(kind), tokenizer=tiny.tokenizer())
    assert made.module.backend == "padded"
    assert "packed ones cannot be used" in made.module.how
    rewards = made.rewards(groups())
    for i, group in enumerate(groups()):
        for j, answer in enumerate(group.answers):
            ids = torch.tensor([[*group.prompt, *answer]])
            hidden = made.model.base_model(input_ids=ids).last_hidden_state[0, -1]
            torch.testing.assert_close(rewards[i, j], made.model.score(hidden)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="backend 'sdpa' cannot score this model"):
        RewardModel.create(
            reward.Config(dtype="float32", scoring_backend="sdpa"),
            World.start(),
            model=other(kind),
            tokenizer=tiny.tokenizer(),
        )
