"""prefkit bench: what it writes, that its counts are exact, and that both sides of it train on the same thing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from prefkit import cli
from prefkit.bench import arms, counts, workloads
from prefkit.bench.blocks import SPLIT, Block, agreement, ratios, seconds_per_step
from prefkit.bench.memory import CLEAR, STATUS
from prefkit.bench.workloads import EOS, Workload
from prefkit.domains.text.layout import lay_out

MICRO = ["bench", "dpo", "--model", "llama-micro", "--batch", "2", "--steps", "3"]
SMALL = Workload(model="llama-micro", shape="9/4", batch=2, steps=3)
RAGGED = [(5, 3, 9), (12, 1, 2), (3, 7, 7), (8, 2, 5), (20, 4, 1), (6, 6, 3)]


def written(tmp_path: Path, *argv: str) -> Any:
    file = tmp_path / "bench.json"
    assert cli.run([*MICRO, *argv, "--json", str(file)]) == 0
    return json.loads(file.read_text(encoding="utf-8"))


def test_times_of_our_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = written(tmp_path, "--shape", "9/4", "--repeats", "2", "--against", "none")
    assert found["mode"] == "time" and list(found["arms"]) == list(arms.OURS)
    assert found["workload"]["lengths"] == [[9, 4, 4]] * 6
    assert found["environment"]["cpu"] and found["environment"]["threads"] == torch.get_num_threads()
    assert {"torch", "transformers", "trl"} <= set(found["environment"]["versions"])
    for arm in found["arms"].values():
        assert [len(block["seconds"]) for block in arm["blocks"]] == [3, 3]
        assert all(seconds > 0 for block in arm["blocks"] for seconds in block["seconds"])
        assert [block["losses"][0] for block in arm["blocks"]] == pytest.approx([math.log(2)] * 2, abs=1e-6)
        assert arm["blocks"][0]["losses"] == arm["blocks"][1]["losses"]  # every block starts anew
        assert arm["pairs_per_second"] == pytest.approx(2 / arm["seconds_per_step"])
    assert set(found["ratios"]) == {name for name in SPLIT if "trl" not in name}
    for distance in found["agreement"].values():
        assert max(distance["losses"], distance["log_probs"]) < 1e-5 and distance["grad_norms"] < 1e-4
    assert "padded/engine" in capsys.readouterr().out


def test_counts_hold_exactly(tmp_path: Path) -> None:
    found = written(tmp_path, "--shape", "40/10", "--counts")
    assert found["head_rows_exact"] and found["arms"]["engine"]["head_rows"] == found["answer_tokens"] == 6 * 20
    assert found["arms"]["naive"]["head_rows"] == 6 * 2 * 49
    # A layer of this model: k and v 32x16; q and o 32x32, gate, up and down 32x48. It has two of them, and in the last
    # only k and v are made of every token, the rest where an answer token is predicted: both first ones from one place.
    keys, rest = 2 * 2 * 32 * 16, 2 * (2 * 32 * 32 + 3 * 32 * 48)
    engine = (40 + 2 * 9) * (2 * keys + rest) + 19 * rest
    padded = 2 * 49 * (2 * keys + rest) + 20 * rest
    assert found["arms"]["engine"]["linear_flops"] == 6 * engine
    assert found["arms"]["padded"]["linear_flops"] == found["arms"]["packed"]["linear_flops"] == 6 * padded
    assert found["token_bound"] == pytest.approx(10 / 6)
    assert found["linear_padded/engine"] == pytest.approx(padded / engine)
    # One layer of two has less to share: below the bound here, and within its tolerance with the bench's six.
    assert found["bound_deviation"] == pytest.approx(padded / engine / (10 / 6) - 1) and not found["bound_held"]
    six = (2 * 49 * (6 * keys + 5 * rest) + 20 * rest) / ((40 + 2 * 9) * (6 * keys + 5 * rest) + 19 * rest)
    assert abs(six / (10 / 6) - 1) < counts.TOLERANCE
    causal = 49 * 50 // 2
    assert found["arms"]["padded"]["attention_pairs_needed"] == 6 * 2 * causal
    assert found["arms"]["engine"]["attention_pairs_needed"] == 6 * (causal + 9 * 40 + 9 * 10 // 2)


def test_counts_of_ragged_rows() -> None:
    setup = arms.prepare(SMALL, RAGGED)
    found = counts.counts(setup, arms.OURS)
    assert [found["arms"][arm]["head_rows"] for arm in ("padded", "packed", "engine")] == [50] * 3
    tokens = {
        arm: sum(
            lay_out(arms.unshared(groups) if arm == "packed" else groups, 0, backend="sdpa").num_tokens
            for groups in counts.batches(setup)
        )
        for arm in ("packed", "engine")
    }
    assert tokens == {"packed": 2 * 54 + 50 - 12, "engine": 54 + 50 - 12}
    keys, rest = 2 * 2 * 32 * 16, 2 * (2 * 32 * 32 + 3 * 32 * 48)
    first = sum(1 for groups in counts.batches(setup) for _ in groups)
    rows = {"packed": 50, "engine": 50 - first}  # the answers of a pair have their first tokens from one place
    flops = {arm: tokens[arm] * (2 * keys + rest) + rows[arm] * rest for arm in tokens}
    assert {arm: found["arms"][arm]["linear_flops"] for arm in tokens} == flops
    assert found["linear_packed/engine"] == pytest.approx(flops["packed"] / flops["engine"])


@pytest.mark.parametrize("use_peft", [False, True])
def test_arms_score_alike(use_peft: bool) -> None:
    setup = arms.prepare(Workload(model="llama-micro", batch=2, steps=3, use_peft=use_peft), RAGGED)
    found = {arm: [arms.block(setup, arm)] for arm in arms.OURS}
    for distance in agreement(found).values():
        assert max(distance["losses"], distance["log_probs"]) < 1e-5 and distance["grad_norms"] < 1e-4
    before = {name: weight.clone() for name, weight in setup.start.items()}
    moved = [name for name, weight in arms.trained(setup.policy.model) if not torch.equal(weight, before[name])]
    assert moved  # the blocks really train
    assert setup.policy.module.backend == "sdpa"


@pytest.mark.parametrize("use_peft", [False, True])
def test_trl_trains_on_the_same(use_peft: bool) -> None:
    pytest.importorskip("trl")
    from prefkit.bench.peer import Peer

    setup = arms.prepare(Workload(model="llama-micro", batch=2, steps=3, use_peft=use_peft), RAGGED)
    peer = Peer(setup)
    rows = peer.trainer.train_dataset
    assert [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in rows] == [
        (pair.prompt, pair.chosen, pair.rejected) for pair in setup.pairs
    ]
    found = {"trl": [peer.block(), peer.block()], "engine": [arms.block(setup, "engine"), arms.block(setup, "engine")]}
    assert found["trl"][0].losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert found["engine"][0].losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert found["trl"][1].losses == found["trl"][0].losses  # the second block starts from the same weights
    distance = agreement(found)["engine"]
    assert max(distance["losses"], distance["log_probs"]) < 1e-4 and distance["grad_norms"] < 1e-3
    assert [len(block.seconds) for block in found["trl"]] == [3, 3]


on_linux = pytest.mark.skipif(not (STATUS.is_file() and CLEAR.exists()), reason="reads Linux's /proc")


@on_linux
def test_memory_of_one_arm(tmp_path: Path) -> None:
    file = tmp_path / "arm.json"
    options = ["--shape", "40/10", "--vocabulary", "100000", "--memory", "--arms", "engine", "--alone", str(file)]
    assert cli.run([*MICRO, *options]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["bytes_above_floor"] == found["peak"] - found["floor"]
    # The gradient of 40 answer tokens needs their 16 MB of probabilities.
    assert found["bytes_above_floor"] > 40 * 100_000 * 4
    assert found["gradient_bytes"] == found["weight_bytes"] > 32 * 100_000 * 4
    assert found["how"] == "VmHWM, reset before the step"


@pytest.mark.slow
@on_linux
def test_memory_of_each_arm_in_its_own_process(tmp_path: Path) -> None:
    options = ["--shape", "200/20", "--vocabulary", "50000", "--memory", "--arms", "naive,engine"]
    found = written(tmp_path, *options)
    assert set(found["arms"]) == {"naive", "engine"}
    naive, engine = (found["arms"][arm]["bytes_above_floor"] for arm in ("naive", "engine"))
    # 2 x 2 rows of 220 places: their logits alone take 176 MB; those of 80 answer tokens 16 MB.
    assert naive > 4 * 219 * 50_000 * 4
    assert 0 < engine < naive / 2
    assert found["engine/naive"] == pytest.approx(engine / naive)


def test_stored_lengths_are_what_their_recipe_draws() -> None:
    for name, stored in workloads.distributions().items():
        assert workloads.drawn(**stored["drawn"]) == stored["rows"], name
        assert len(stored["rows"]) == workloads.ROWS and stored["about"]
    prompt, chosen, rejected = (sum(column) for column in zip(*workloads.shape_lengths("hh"), strict=True))
    assert prompt / ((chosen + rejected) / 2) == pytest.approx(6, rel=0.1)
    prompt, chosen, rejected = (sum(column) for column in zip(*workloads.shape_lengths("ultrafeedback"), strict=True))
    assert prompt / ((chosen + rejected) / 2) == pytest.approx(0.4, rel=0.1)


def test_sorted_batches_hold_the_same_rows() -> None:
    plain, ordered = (Workload(shape="hh", sort=sort).lengths() for sort in (False, True))
    assert plain != ordered and sorted(plain) == sorted(ordered)

    def padding(rows: list[workloads.Lengths]) -> int:
        batches = [rows[i : i + 8] for i in range(0, len(rows), 8)]
        longest = [max(p + max(c, r) for p, c, r in batch) for batch in batches]
        return sum(longest)

    assert padding(ordered) < padding(plain)


def test_the_tokenizer_gives_the_ids_back() -> None:
    pair = workloads.token_pairs([(5, 4, 1)], 320, 0)[0]
    assert (len(pair.prompt), len(pair.chosen), pair.rejected) == (5, 4, [EOS])
    text = " ".join(map(workloads.word, pair.chosen))
    assert workloads.word_tokenizer(320)(text)["input_ids"] == list(pair.chosen)


def test_ratios_pair_blocks_of_one_round() -> None:
    def block(*seconds: float) -> Block:
        return Block(seconds=[100.0, *seconds])

    found = {"padded": [block(2, 4), block(8, 4)], "engine": [block(1, 1), block(2, 2)]}
    assert ratios(found)["padded/engine"]["each"] == [3.0, 3.0]
    assert ratios(found)["padded/engine"]["median"] == 3.0
    assert list(ratios(found)) == ["padded/engine"]
    assert seconds_per_step(found["padded"]) == pytest.approx((5 + 4) / 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--shape", "none"], "ultrafeedback"),
        (["--shape", "0/4"], "--shape"),
        (["--steps", "1"], "--steps"),
        (["--arms", "trl"], "--against trl"),
        (["--arms", "engin"], "did you mean engine"),
    ],
)
def test_what_cannot_be_measured(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*MICRO, *options]) == 2
    assert says in capsys.readouterr().err


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    assert cli.run([*MICRO, "--against", "trl"]) == 2
    assert 'pip install "prefkit[bench]"' in capsys.readouterr().err
