"""The run directory, cadence, selection, and the errors a user meets."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from prefkit.engine import files
from prefkit.engine.run import Run
from prefkit.errors import InputError

from . import toy
from .test_kill import exit_of, in_child


def config(directory: Path, **options: object) -> toy.Config:
    small = {"max_steps": 8, "save_steps": 3, "eval_steps": 4, **options}
    return dataclasses.replace(toy.Config(), output_dir=str(directory), **small)


def rows(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def checkpoints(directory: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in directory.glob("checkpoint-*"))


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    toy.train(config(tmp_path / "run"))
    return tmp_path / "run"


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_run_leaves_what_the_layout_says(ran: Path) -> None:
    assert [row["step"] for row in rows(ran)] == [0, *range(1, 9), 8]
    assert "eval_error" in rows(ran)[0] and "eval_error" in rows(ran)[4] and "eval_error" not in rows(ran)[5]
    assert rows(ran)[8]["epoch"] == 1.0
    assert checkpoints(ran) == [6, 8]
    saved = {path.name for path in (ran / "checkpoint-8").iterdir()}
    assert saved == {
        "model.safetensors",
        "optimizer.safetensors",
        "optimizer.json",
        "trainer_state.json",
        "manifest.json",
    }
    result = json.loads((ran / "result.json").read_text())
    assert (result["status"], result["steps"], result["selected_step"], result["rule"]) == (
        "complete",
        8,
        8,
        "last step",
    )
    about = json.loads((ran / "environment.json").read_text())
    assert about["processes"] == 1 and str(Path.home()) not in about["command"]


def test_a_finished_run_started_again_changes_nothing(ran: Path) -> None:
    before = (ran / "checkpoint-8" / "model.safetensors").read_bytes()
    toy.train(config(ran))
    assert (ran / "checkpoint-8" / "model.safetensors").read_bytes() == before
    assert [row["step"] for row in rows(ran)] == [0, *range(1, 9), 8]


def test_more_steps_continue_a_finished_run(ran: Path) -> None:
    toy.train(config(ran, max_steps=10))
    assert [row["step"] for row in rows(ran)] == [0, *range(1, 11), 10]
    assert json.loads((ran / "config.json").read_text())["config"]["max_steps"] == 10
    with pytest.raises(InputError, match="max_steps: 10 -> 9"):
        toy.train(config(ran, max_steps=9))


def test_other_options_are_refused_by_name(ran: Path) -> None:
    with pytest.raises(InputError) as caught:
        toy.train(config(ran, seed=1, learning_rate=0.5))
    assert "seed: 0 -> 1" in str(caught.value) and "learning_rate: 0.01 -> 0.5" in str(caught.value)
    assert "--overwrite" in caught.value.mend
    with pytest.raises(InputError, match="method: 'toy' -> 'other'"):
        Run(config(ran), method="other")


def test_overwrite_deletes_only_what_a_run_writes(ran: Path) -> None:
    (ran / "notes.txt").write_text("mine")
    (ran / "checkpoint-of-mine").mkdir()
    toy.train(config(ran, overwrite=True, max_steps=3))
    assert checkpoints_of_runs(ran) == [3]
    assert (ran / "notes.txt").read_text() == "mine" and (ran / "checkpoint-of-mine").is_dir()
    assert len(rows(ran)) == 5
    # the stored options can continue the run instead of deleting it again
    assert json.loads((ran / "config.json").read_text())["config"]["overwrite"] is False


def checkpoints_of_runs(directory: Path) -> list[int]:
    return sorted(int(n) for path in directory.glob("checkpoint-*") if (n := path.name.split("-")[1]).isdigit())


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="is no prefkit run"):
        toy.train(config(tmp_path, overwrite=overwrite))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model"]


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="is a file"):
        toy.train(config(tmp_path / "run"))


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (ran / "checkpoint-8" / "optimizer.safetensors").read_bytes()
    expected = rows(ran)
    damage(ran / "checkpoint-8" / "optimizer.safetensors")
    toy.train(config(ran))
    said = capsys.readouterr().err
    assert "checkpoint-8 is damaged (optimizer.safetensors is not what was written)" in said
    assert "continuing from checkpoint-6 instead" in said
    assert (ran / "checkpoint-8" / "optimizer.safetensors").read_bytes() == whole
    assert [{**row, "seconds": 0} for row in rows(ran)] == [{**row, "seconds": 0} for row in expected]


@pytest.mark.parametrize("name", ["manifest.json", "trainer_state.json", "model.safetensors"])
def test_no_whole_checkpoint_is_an_error_not_a_restart(ran: Path, name: str) -> None:
    (ran / "checkpoint-8" / name).unlink()
    damage(ran / "checkpoint-6" / "model.safetensors")
    before = (ran / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="no whole checkpoint to continue from"):
        toy.train(config(ran))
    assert (ran / "metrics.jsonl").read_bytes() == before and checkpoints(ran) == [6, 8]


def test_other_data_and_another_process_count_are_refused(ran: Path) -> None:
    with Run(config(ran), method="toy") as run:
        run.fingerprint(data="changed")
        with pytest.raises(InputError, match="the data is not what this run was started with"):
            run.track()
    with Run(config(ran), method="toy") as run:
        run.world = dataclasses.replace(run.world, rank=0, size=1)
        run.track()
        with pytest.raises(InputError, match="the data is not"):
            run.fingerprint(data="changed")
    state = json.loads((ran / "checkpoint-8" / "trainer_state.json").read_text())
    files.write_json(ran / "checkpoint-8" / "trainer_state.json", {**state, "processes": 4})
    listing = json.loads((ran / "checkpoint-8" / "manifest.json").read_text())
    path = ran / "checkpoint-8" / "trainer_state.json"
    listing["files"][path.name] = {"size": path.stat().st_size, "sha256": files.sha256(path)}
    files.write_json(ran / "checkpoint-8" / "manifest.json", listing)
    with pytest.raises(InputError, match=r"started with 4 process\(es\) and is continued with 1"):
        toy.train(config(ran))


def test_the_best_checkpoint_is_kept_selected_and_loaded(tmp_path: Path) -> None:
    values = {2: 0.1, 4: 0.9, 6: 0.5, 8: 0.4, 10: 0.3}
    with Run(config(tmp_path / "run", max_steps=10, keep_best="score", save_total_limit=1), method="toy") as run:
        module = toy.network(0)
        run.track(policy=toy.Weights(module))
        for step in run.steps(10):
            with torch.no_grad():
                module[0].weight.fill_(step)
            if run.due(2):
                run.evaluated({"eval_score": values[step]})
        result = run.finish()
    assert result["selected_step"] == 4 and result["rule"] == "best eval_score over 5 evaluations"
    assert module[0].weight[0, 0] == 4
    assert checkpoints(tmp_path / "run") == [4, 10]


@pytest.mark.parametrize(
    ("options", "reason", "last"),
    [
        ({"keep_best": "-eval_score", "patience": 2}, "no better eval_score in 2 evaluations", 6),
        ({"stop_at_kl": 3.5}, "eval_objective/kl 4 passed 3.5", 4),
    ],
)
def test_an_evaluation_can_end_the_run_for_good(tmp_path: Path, options: dict, reason: str, last: int) -> None:
    for _ in range(2):  # the second start finds it stopped, not unfinished
        with Run(config(tmp_path / "run", max_steps=10, **options), method="toy") as run:
            run.track()
            for step in run.steps(10):
                if run.due(2):
                    run.evaluated({"eval_score": float(step), "eval_objective/kl": float(step)})
            result = run.finish()
        assert (result["status"], result["reason"], result["steps"]) == ("stopped", reason, last)
    assert rows(tmp_path / "run")[-1]["step"] == last


def test_a_metric_that_is_not_measured_is_named_at_the_first_evaluation(tmp_path: Path) -> None:
    with Run(config(tmp_path / "run", keep_best="eval_reward"), method="toy") as run:
        run.track()
        with pytest.raises(InputError, match=r"(?s)no evaluation metric is called 'eval_reward'.*eval_score"):
            run.evaluated({"eval_score": 1.0})
    with pytest.raises(InputError, match="keep_best"):
        Run(config(tmp_path / "other", patience=3), method="toy")


def test_rows_are_written_at_logging_steps_evaluations_and_the_end(tmp_path: Path) -> None:
    with Run(config(tmp_path / "run", logging_steps=3), method="toy") as run:
        run.track()
        due = []
        for step in run.steps(8):
            run.log({"loss": torch.tensor(float(step))})
            due.append(run.due(0))
            if run.due(4):
                run.evaluated({"eval_score": 0.5})
    assert [(row["step"], row.get("loss")) for row in rows(tmp_path / "run")] == [
        (3, 3),
        (4, 4),
        (6, 6),
        (8, 8),
    ]
    assert due == [False] * 7 + [True]


def test_a_loss_that_is_not_finite_ends_the_run_and_names_its_step(tmp_path: Path) -> None:
    with Run(config(tmp_path / "run", logging_steps=50, save_steps=4), method="toy") as run:
        run.track(policy=toy.Weights(toy.network(0)))
        with pytest.raises(InputError, match=r"grad_norm is nan at step 6.*last checkpoint: checkpoint-4"):
            for step in run.steps(8):
                run.log({"loss": torch.tensor(1.0), "grad_norm": torch.tensor(float("nan") if step >= 6 else 1.0)})
    assert checkpoints(tmp_path / "run") == [4]


def test_a_value_that_json_lacks_becomes_null(tmp_path: Path) -> None:
    with Run(config(tmp_path / "run"), method="toy") as run:
        run.track()
        run.log({"perplexity": float("inf")})
        for _ in run.steps(1):
            pass
    assert rows(tmp_path / "run")[0]["perplexity"] is None


def test_too_little_free_space_is_seen_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match="no space left on disk: training needs"):
        toy.train(config(tmp_path / "run"))
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def test_a_disk_that_fills_up_while_writing_leaves_no_partial_checkpoint(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    toy.train(config(directory, max_steps=3))

    def full() -> None:
        # the optimizer state is larger than any file may be from here on, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (1600, resource.RLIM_INFINITY))
        try:
            toy.train(config(directory, max_steps=8))
        except InputError as error:
            os._exit(7 if "no space left on disk" in str(error) else 8)

    assert exit_of(in_child(full)) == 7
    assert checkpoints(directory) == [3] and not list(directory.glob(".tmp-*"))
    toy.train(config(directory, max_steps=8))
    assert checkpoints(directory) == [6, 8]


def test_two_objects_that_write_the_same_file_are_refused(tmp_path: Path) -> None:
    with Run(config(tmp_path / "run", save_steps=1), method="toy") as run:
        run.track(first=toy.Weights(toy.network(0)), second=toy.Weights(toy.network(1)))
        with pytest.raises(ValueError, match=r"first and second both write model.safetensors"):
            next(steps := run.steps(2))
            next(steps)


def test_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install wandb"):
        Run(config(tmp_path / "run", report_to="wandb"), method="toy")
    with pytest.raises(InputError, match="unknown tracker 'mlflow'"):
        Run(config(tmp_path / "run", report_to="mlflow"), method="toy")


def test_tensorboard_gets_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    toy.train(config(tmp_path / "run", report_to="tensorboard"))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))


def test_progress_without_a_terminal_is_plain_lines(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.train(config(ran, max_steps=12))
    said = capsys.readouterr().err
    assert "continuing" in said and "step 12/12  loss" in said and "\x1b" not in said
    assert said.strip().splitlines()[-1].startswith("complete: all 12 steps done")


def test_unsupported_launches_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(InputError, match="--fsdp_version 2"):
        Run(config(tmp_path / "run"), method="toy")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(InputError, match="DeepSpeed ZeRO stage 3"):
        Run(config(tmp_path / "run"), method="toy")
