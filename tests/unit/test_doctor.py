"""`prefkit doctor`: passes on sound models, fails where the engine is broken on purpose, and says what to use."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from prefkit import cli
from prefkit.domains.text import attention, cache, diagnosis, diagnosis_speed, head, reference, sampler
from prefkit.domains.text.diagnosis import Finding, Start, compared, load_policy
from prefkit.domains.text.diagnosis_speed import Cost, advise
from prefkit.records import Group

LAYOUTS = ("packed (sdpa)", "shared prefix (sdpa)", "chunks of 7 (sdpa)")
REST = (
    "cached = live reference",
    "first DPO loss = log 2",
    "first rewards = 0",
    "tokens read as the text",
    "sampler = engine log-probs",
)
CHECKS = [f"{layout}: {what}" for layout in LAYOUTS for what in ("log-probs", "gradients")] + [*REST]
FLEX = "packed (flex)"
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA finds")


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are not folded, and passes are timed as seldom as may be."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(diagnosis_speed, "SECONDS", 0.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", tiny.pairs(20))


def run(model: Path | str, *words: str) -> int:
    return cli.run(["doctor", str(model), "--dtype", "float32", *words])


def examined(tmp_path: Path, model: Path, data: Path, *words: str, code: int) -> dict[str, Any]:
    """What a run that ends with `code` writes as JSON."""
    file = tmp_path / "found.json"
    assert run(model, "--data", str(data), "--json", str(file), *words) == code
    return json.loads(file.read_text())


def failed(found: dict[str, Any]) -> set[str]:
    return {entry["check"] for entry in found["checks"] if entry["state"] == "FAIL"}


@needs_cpu
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_sound_model_passes(family: str, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.folder(tmp_path / "model", family)
    assert run(model, "--data", str(data)) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("│")]
    states = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in lines[: len(CHECKS) + 1]}
    assert states == dict.fromkeys(CHECKS, "pass") | {FLEX: "skipped"}
    assert "needs CUDA" in shown and "8 of 20 rows" in shown
    assert [line.split("│")[1].strip() for line in lines[len(CHECKS) + 1 :]] == ["padded", "sdpa", "flex"]
    last = shown.splitlines()[-1]
    assert last.startswith(("recommended: --scoring_backend sdpa", "recommended: --scoring_backend padded"))


@needs_cpu
def test_what_is_written(llama: Path, tmp_path: Path, data: Path) -> None:
    found = examined(tmp_path, llama, data, "--num_rows", "20", code=0)
    assert found["rows"] == f"20 of 20 rows of {data}" and found["dtype"] == "float32"
    compared = [entry for entry in found["checks"] if entry["state"] == "pass"]
    assert [entry["check"] for entry in compared] == CHECKS
    assert all(0 <= entry["deviation"] <= entry["tolerance"] for entry in compared)
    # gradients of different layouts are summed in another order: all zero would mean that nothing was compared
    assert any(entry["deviation"] > 0 for entry in compared if "gradients" in entry["check"])
    costs = {entry["backend"]: entry for entry in found["backends"]}
    policy = load_policy(Start(model_name_or_path=str(llama), dtype="float32"))
    groups = diagnosis.read_rows(str(data), policy, count=20, max_length=1024, seed=0).groups
    answers = [(len(group.prompt), len(answer)) for group in groups for answer in group.answers]
    assert costs["padded"]["tokens"] == len(answers) * (max(map(sum, answers)) - 1)
    assert costs["sdpa"]["tokens"] == sum(len(group.prompt) for group in groups) + sum(a - 1 for _, a in answers)
    assert 0 < costs["sdpa"]["memory"] < costs["padded"]["memory"]
    assert costs["flex"]["memory"] is None and "CUDA" in costs["flex"]["note"]
    assert found["recommended"]["flags"].startswith(f"--scoring_backend {found['recommended']['backend']}")


def test_an_adapter_and_built_in_rows(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(llama, "--use_peft") == 0
    shown = capsys.readouterr().out
    assert "LoRA" in shown and "built-in rows" in shown and "adapters off" in shown
    plain = tiny.folder(tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    assert run(plain, "--num_rows", "3") == 0
    assert "0 of 3 rows" in capsys.readouterr().out


def no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    own = attention.SdpaPlan._mask

    def mask(self: Any, *asked: Any) -> Any:
        return torch.zeros_like(own(self, *asked))

    monkeypatch.setattr(attention.SdpaPlan, "_mask", mask)


@needs_cpu
def test_a_backend_the_engine_refuses_for_its_numbers_fails(
    llama: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_mask(monkeypatch)
    found = examined(tmp_path, llama, data, code=1)
    assert failed(found) == {"packed (sdpa)"}
    entry = found["checks"][0]
    assert entry["deviation"] > entry["tolerance"] and "differ from padded ones" in entry["note"]
    assert found["recommended"]["backend"] == "padded"
    assert "FAIL" in capsys.readouterr().out


def blind_to_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask where a row is longer than any of those the engine tries at its start."""
    own = attention.SdpaPlan._mask

    def mask(self: Any, number: int, *asked: Any) -> Any:
        right = own(self, number, *asked)
        return torch.zeros_like(right) if self.blocks[number].reach > 20 else right

    monkeypatch.setattr(attention.SdpaPlan, "_mask", mask)


def wrong_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    own: Callable[..., torch.Tensor] = head._logits

    def logits(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        return own(hidden, *rest) * (1.1 if len(hidden) == diagnosis.CHUNK else 1.0)

    monkeypatch.setattr(head, "_logits", logits)


def wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    own: Callable[..., Any] = head._slopes

    def slopes(logits: torch.Tensor, *rest: Any) -> Any:
        weighted, slope = own(logits, *rest)
        return weighted * (1.1 if len(logits) == diagnosis.CHUNK else 1.0), slope

    monkeypatch.setattr(head, "_slopes", slopes)


def stale_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    own = cache._read
    monkeypatch.setattr(cache, "_read", lambda path: (own(path)[0], own(path)[1].nextafter(torch.tensor(0.0))))


def forgotten_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_write", lambda *_: None)


def other_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    own = reference.FrozenCopy.__init__

    def init(self: Any, module: Any) -> None:
        own(self, module)
        for weight in self.module.parameters():
            weight.data = weight.data * 1.01

    monkeypatch.setattr(reference.FrozenCopy, "__init__", init)


def lost_token(monkeypatch: pytest.MonkeyPatch) -> None:
    own = diagnosis.check

    def check(*rows: Any, **settings: Any) -> Any:
        report = own(*rows, **settings)
        first: Any = report.examples[0]
        return dataclasses.replace(report, examples=[dataclasses.replace(first, rejected=first.rejected[1:])])

    monkeypatch.setattr(diagnosis, "check", check)


def no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    own = diagnosis.check
    monkeypatch.setattr(diagnosis, "check", lambda *rows, **settings: own(*rows, **settings, append_eos=False))


def tempered_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    own = sampler.sampling_log_probs
    monkeypatch.setattr(sampler, "sampling_log_probs", lambda logits, *how: own(logits / 1.2, *how))


Fault = Callable[[pytest.MonkeyPatch], None]
BROKEN: dict[Fault, set[str]] = {
    blind_to_long_rows: {"shared prefix (sdpa)", "chunks of 7 (sdpa)"},
    wrong_in_chunks: {"chunks of 7 (sdpa)"},
    wrong_gradient: {"chunks of 7 (sdpa): gradients"},
    stale_cache: {"cached = live reference"},
    forgotten_cache: {"cached = live reference"},
    other_reference: {"first DPO loss = log 2", "first rewards = 0"},
    lost_token: {"tokens read as the text"},
    no_end: {"tokens read as the text"},
    tempered_sampler: {"sampler = engine log-probs"},
}


@needs_cpu
@pytest.mark.parametrize("fault", BROKEN, ids=lambda fault: fault.__name__)
def test_what_is_broken_fails_its_own_check(
    fault: Fault,
    llama: Path,
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    found = examined(tmp_path, llama, data, code=1)
    expected = {name for name in CHECKS if name.startswith(tuple(BROKEN[fault]))}
    assert failed(found) == expected
    if fault is blind_to_long_rows:  # what fails is neither timed nor recommended
        assert found["auto"].startswith("scoring in packed rows")
        assert found["recommended"]["backend"] == "padded"
        assert [entry["pairs_per_second"] for entry in found["backends"][1:]] == [None, None]


def test_a_model_whose_attention_takes_no_plan_is_skipped(tmp_path: Path, data: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model = tmp_path / "bloom"
    shape = BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=320, bos_token_id=1, eos_token_id=2)
    BloomForCausalLM(shape).save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    found = examined(tmp_path, model, data, code=0)
    skipped = [entry["check"] for entry in found["checks"] if entry["state"] == "skipped"]
    assert skipped == ["packed (sdpa)", FLEX]
    assert found["recommended"]["flags"] == "--scoring_backend padded"


def test_unusable_input(llama: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*words: str) -> str:
        assert run(*words) == 2
        return capsys.readouterr().err

    assert "nowhere" in told(str(tmp_path / "nowhere"))
    assert "none.jsonl" in told(str(llama), "--data", str(tmp_path / "none.jsonl"))
    bad = tiny.jsonl(tmp_path / "bad.jsonl", [*tiny.pairs(2), {"prompt": "a", "chosen": "b"}])
    assert "bad.jsonl" in told(str(llama), "--data", str(bad))
    assert "max_length" in told(str(llama), "--data", str(data), "--max-length", "3")
    assert "--num_rows" in told(str(llama), "--num_rows", "0")


def test_a_deviation_that_is_no_number_fails() -> None:
    assert compared("x", float("nan"), 1.0, unit="").state == "FAIL"
    assert compared("x", 1.0, 1.0, unit="").state == "pass"


def test_the_recommendation(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(Start(model_name_or_path=str(llama), dtype="float32"))
    groups = [Group([1] * 60, [[2] * 20, [2] * 20])]  # 100 tokens

    def cost(backend: Any, speed: float, memory: int) -> Cost:
        return Cost(backend=backend, pairs_per_second=speed, memory=memory)

    def flags(*costs: Cost, max_length: int = 512) -> str:
        return advise(policy, groups, [*costs, Cost(backend="flex", note="not here")], max_length=max_length).flags

    # two copies of the weights, gradients and two moments; the other half of the memory is not counted on
    held = sum(weight.numel() for weight in policy.module.parameters()) * (4 + 4 + 4 + 8)
    monkeypatch.setattr(diagnosis_speed, "memory_bytes", lambda device: 2 * (held + 3000))
    assert flags(cost("padded", 1, 200), cost("sdpa", 2, 100)) == "--scoring_backend sdpa --tokens_per_batch 2048"
    assert flags(cost("padded", 2, 200), cost("sdpa", 1.99, 100)).startswith("--scoring_backend sdpa")
    assert flags(cost("padded", 2, 200), cost("sdpa", 1, 100)) == "--scoring_backend padded"
    assert flags(cost("padded", 1, 200), cost("sdpa", 2, 400)) == "--scoring_backend sdpa"
    most = flags(cost("padded", 1, 200), cost("sdpa", 2, 1))
    assert most == f"--scoring_backend sdpa --tokens_per_batch {diagnosis_speed.MOST_TOKENS}"
    # never fewer than the longest possible pair takes
    longest = flags(cost("padded", 1, 200), cost("sdpa", 2, 100), max_length=1400)
    assert longest == "--scoring_backend sdpa --tokens_per_batch 2800"


def test_failed_backends_are_not_measured(llama: Path) -> None:
    policy = load_policy(Start(model_name_or_path=str(llama), dtype="float32"))
    groups = [Group([1, 2, 3], [[4, 5], [6]])]
    finding = Finding(check="x", state="FAIL", backend="sdpa")
    costs = diagnosis_speed.measure(policy, groups, {"sdpa": "", "flex": "no"}, [finding])
    assert [(c.backend, c.note, c.pairs_per_second is None) for c in costs] == [
        ("padded", "", False),
        ("sdpa", "it fails its checks", True),
        ("flex", "no", True),
    ]


@needs_cpu
def test_saved_bytes_are_those_of_distinct_storages(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(Start(model_name_or_path=str(llama), dtype="float32"))
    weight = policy.model.get_output_embeddings().weight

    def one_pass(*_: Any) -> torch.Tensor:
        kept = torch.ones(10, len(weight), requires_grad=True)
        squared = kept * kept  # saves `kept` twice
        return (squared @ weight).exp().sum()  # saves `squared` and the exponentials; the weight does not count

    monkeypatch.setattr(diagnosis_speed, "_pass", one_pass)
    floats = 2 * 10 * len(weight) + 10 * weight.shape[1]
    assert diagnosis_speed._saved(policy, []) == 4 * floats
