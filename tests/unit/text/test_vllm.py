"""The vLLM engine against a fake of vLLM's public interface, and against vLLM itself where it and a GPU are there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fake_vllm
import tiny
from prefkit.domains.text.generators import sampler_for
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.sampler import Decoding, Sampler
from prefkit.engine.seeds import number
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.methods import dpo
from prefkit.records import Group, Sample

PROMPTS = [[5, 9, 30], [7, 8], [11, 12, 13, 14, 15]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def made(folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> TextPolicy:
    """A policy on the fake: LoRA, or all weights where the test asks for it."""
    fake_vllm.install(monkeypatch)
    lora = getattr(request, "param", "lora") == "lora"
    return policy(folder, use_peft=lora)


def policy(folder: Path, **options: Any) -> TextPolicy:
    config = dpo.Config(**{"model_name_or_path": str(folder), "dtype": "float32", "lora_r": 4, **options})
    return TextPolicy.create(config, World.start())


def engine(made: TextPolicy) -> Sampler:
    return sampler_for(made, dpo.Config(generator="vllm"))


def sample(engine: Sampler, num: int = 2, **how: Any) -> list[list[Sample]]:
    decoding = Decoding(**{"max_new_tokens": 6, **how})
    return engine.sample(PROMPTS, num=num, decoding=decoding, seed=3, path=("own", 1), rows=[4, 5, 6])


def change(made: TextPolicy, seed: int) -> None:
    """An update of what trains, large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.module.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))


def assert_scored(made: TextPolicy, drawn: list[list[Sample]], temperature: float = 1.0) -> None:
    for one in (s for answers in drawn for s in answers):
        with torch.no_grad():
            scores = made.token_log_probs([Group(one.prompt, [one.tokens])], temperature=temperature)[0]
        assert one.log_probs == pytest.approx(scores.tolist(), abs=2e-4)


@pytest.mark.parametrize("made", ["lora", "all weights"], indirect=True)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_update_reaches_the_engine(made: TextPolicy, temperature: float) -> None:
    """Log-probs the engine returns equal those the policy scores, after each of several updates."""
    own = engine(made)
    seen = []
    for update in range(3):
        change(made, update)
        own.refresh()
        drawn = sample(own, temperature=temperature)
        assert_scored(made, drawn, temperature)
        seen.append([s.tokens for answers in drawn for s in answers])
    assert seen[0] != seen[1] != seen[2]
    assert len(fake_vllm.LLM.made) == 1


def test_each_push_of_an_adapter_has_its_own_number(made: TextPolicy) -> None:
    own = engine(made)
    for _ in range(3):
        own.refresh()
        sample(own)
        sample(own)
    sent = [request for _, _, request in fake_vllm.LLM.made[0].calls]
    assert [request.lora_int_id for request in sent] == [1, 1, 2, 2, 3, 3]
    assert len({request.lora_path for request in sent}) == 3
    assert not Path(sent[0].lora_path).exists() and Path(sent[-1].lora_path).exists()
    options = fake_vllm.LLM.made[0].options
    assert (options["enable_lora"], options["max_loras"], options["max_lora_rank"]) == (True, 1, 8)
    assert (options["generation_config"], options["dtype"]) == ("vllm", "float32")


@pytest.mark.parametrize("made", ["all weights"], indirect=True)
def test_whole_models_are_read_anew_and_nothing_cached_stays(made: TextPolicy) -> None:
    own = engine(made)
    own.refresh()
    sample(own)
    fake = fake_vllm.LLM.made[0]
    assert len(fake.reloads) == fake.caches_reset == 1
    assert not Path(fake.reloads[0]).exists(), "a pushed model is deleted once it was read"
    assert "enable_lora" not in fake.options and fake.calls[0][2] is None


def test_rows_have_their_own_seeds_in_the_order_asked_for(made: TextPolicy) -> None:
    drawn = sample(engine(made))
    prompts, settings, _ = fake_vllm.LLM.made[0].calls[0]
    assert [p["prompt_token_ids"] for p in prompts] == [p for p in PROMPTS for _ in range(2)]
    assert [s.seed for s in settings] == [number(3, "own", 1, row, j) for row in (4, 5, 6) for j in range(2)]
    assert [[(s.row, s.index) for s in answers] for answers in drawn] == [[(r, 0), (r, 1)] for r in (4, 5, 6)]
    assert [list(answers[0].prompt) for answers in drawn] == PROMPTS


def test_settings_and_ends_are_passed_on(made: TextPolicy) -> None:
    own = engine(made)
    free = sample(own, num=1)[0][0]
    stop = free.text[1:3]
    stopped = sample(own, num=1, stop_strings=(stop,), top_p=1.0)[0][0]
    how = fake_vllm.LLM.made[0].calls[1][1][0]
    assert (how.stop, how.stop_token_ids, how.include_stop_str_in_output) == ([stop], [2], True)
    assert (how.max_tokens, how.logprobs, how.skip_special_tokens) == (6, 0, False)
    assert stopped.finished and stop in stopped.text and not free.finished
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]


def test_greedy_answers_equal_the_other_engines(made: TextPolicy) -> None:
    plain = sampler_for(made, dpo.Config())
    ours, theirs = sample(engine(made), num=1, temperature=0.0), sample(plain, num=1, temperature=0.0)
    assert [a[0].tokens for a in ours] == [a[0].tokens for a in theirs]
    assert ours[0][0].log_probs == pytest.approx(theirs[0][0].log_probs, abs=2e-4)


def test_prefixes_are_sent_with_the_prompt_and_budgets_with_each_row(made: TextPolicy) -> None:
    own, prefixes = engine(made), [(40, 41), (), (50,)]
    how: dict[str, Any] = {"decoding": Decoding(max_new_tokens=6, ignore_end=True), "seed": 3, "path": (), "num": 2}
    drawn = own.sample(PROMPTS, rows=[4, 5, 6], prefixes=prefixes, budgets=[6, 2, 4], **how)
    sent, settings, _ = fake_vllm.LLM.made[0].calls[0]
    assert [p["prompt_token_ids"] for p in sent[::2]] == [[5, 9, 30, 40, 41], [7, 8], [11, 12, 13, 14, 15, 50]]
    assert [(s.max_tokens, s.ignore_eos, s.stop_token_ids) for s in settings[::2]] == [
        (4, True, []),
        (2, True, []),
        (3, True, []),
    ]
    for answers, prompt, prefix, budget in zip(drawn, PROMPTS, prefixes, [6, 2, 4], strict=True):
        for one in answers:
            k = len(prefix)
            assert (list(one.prompt), one.prefix, one.tokens[:k], len(one.tokens)) == (prompt, k, prefix, budget)
            with torch.no_grad():
                scores = made.token_log_probs([Group(one.prompt, [one.tokens])])[0].tolist()
            assert one.log_probs == pytest.approx([0.0] * k + scores[k:], abs=2e-4)


@pytest.mark.parametrize("lora", [True, False])
def test_a_model_in_memory_is_written_for_the_engine(monkeypatch: pytest.MonkeyPatch, lora: bool) -> None:
    fake_vllm.install(monkeypatch)
    config = dpo.Config(dtype="float32", use_peft=lora)
    made = TextPolicy.create(config, World.start(), model=tiny.model(seed=3), tokenizer=tiny.tokenizer())
    own = engine(made)
    change(made, 1)
    own.refresh()
    assert_scored(made, sample(own))


def test_folders_go_with_the_sampler(made: TextPolicy) -> None:
    own: Any = engine(made)
    sample(own)
    root = own._folder
    assert root.is_dir()
    del own
    assert not root.exists()


def test_prompts_are_checked_as_by_the_other_engine(made: TextPolicy) -> None:
    with pytest.raises(InputError, match="context of 256"):
        engine(made).sample([[5] * 255], num=1, decoding=Decoding(), seed=0, path=(), rows=[0])


def test_what_cannot_be_sampled_rightly_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = policy(folder, use_peft=True, lora_r=1024)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"(?s)not installed.*pip install 'prefkit\[vllm\]'"):
        engine(made)
    monkeypatch.undo()
    fake_vllm.install(monkeypatch)
    with pytest.raises(InputError, match="adapters up to rank 512, not 1024"):
        engine(made)
    made.world = World(rank=0, size=2, device=torch.device("cpu"))
    with pytest.raises(InputError, match="one process"):
        engine(made)


REAL = importlib.util.find_spec("vllm") is not None and torch.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.skipif(not REAL, reason="needs vllm (extra `vllm`) and a CUDA device")
@pytest.mark.parametrize("lora", [True, False])
def test_vllm_itself_returns_the_scored_log_probs(tmp_path: Path, lora: bool) -> None:
    """bfloat16 kernels of two libraries: log-probs agree within rounding, and follow an update."""
    model = tiny.model("llama", vocabulary=512)
    model.config.head_dim = 8
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    made = policy(tmp_path, use_peft=lora, lora_r=8, dtype="bfloat16")
    own = engine(made)
    for update in range(2):
        change(made, update)
        own.refresh()
        for one in (s for answers in sample(own, num=4) for s in answers):
            with torch.no_grad():
                scores = made.token_log_probs([Group(one.prompt, [one.tokens])])[0]
            assert one.log_probs == pytest.approx(scores.tolist(), abs=0.2)
