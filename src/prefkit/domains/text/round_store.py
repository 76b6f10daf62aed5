"""The files of a run's rounds: every answer, verdict and match, written stage by stage so that a kill costs a piece.

rounds/00002.jsonl             the round's items, whole: answers, verdicts, matches, one line per prompt
rounds/00002.json              what the round was made with (policy, seed, decoding), and its counts
rounds/00002.reference.jsonl   log-probs under the round's reference, where that is the model it started with
rounds/00002.answers.jsonl     answers drawn so far, and rounds/00002.ranked.jsonl, prompts judged so far; both are
                               gone once the round is whole
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefkit.domains.text.contests import Contest
from prefkit.domains.text.prompts import plain
from prefkit.engine import files
from prefkit.engine.parts import Parts
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.records import Text

FOLDER = "rounds"
STAGES = ("answers", "ranked")


class RoundStore:
    """The rounds of one run directory."""

    def __init__(self, directory: Path, world: World) -> None:
        self.folder = directory / FOLDER
        self.world = world
        world.on_main(lambda: self.folder.mkdir(exist_ok=True))

    def items(self, number: int) -> list[Contest] | None:
        """A whole round's items; None where it is not whole yet."""
        path = self.folder / f"{number:05d}.jsonl"
        if not path.exists():
            return None
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        return [Contest.from_json(json.loads(line), f"{path} line {i}") for i, line in enumerate(lines, start=1)]

    def about(self, number: int) -> dict[str, Any]:
        """What a whole round was made with, and its counts."""
        return files.read_json(self.folder / f"{number:05d}.json")

    def write(self, number: int, items: Sequence[Contest], about: Mapping[str, Any], prompts: Sequence[Text]) -> None:
        """Make a round whole: its items, each with its prompt. Called on every process; the main one writes."""
        made_by = {name: about[name] for name in ("round", "policy_version", "seed")}

        def whole() -> None:
            files.write_json(self.folder / f"{number:05d}.json", dict(about))
            rows = [
                {**made_by, "prompt": plain(prompt), **item.to_json()}
                for item, prompt in zip(items, prompts, strict=True)
            ]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            files.write_text(self.folder / f"{number:05d}.jsonl", text)
            for stage in STAGES:
                (self.folder / f"{number:05d}.{stage}.jsonl").unlink(missing_ok=True)

        self.world.on_main(whole)

    def reference(self, number: int) -> list[list[float]] | None:
        """Log-probs of the pool's scored answers under the round's reference; None where they are not written yet."""
        path = self.folder / f"{number:05d}.reference.jsonl"
        if not path.exists():
            return None
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]

    def write_reference(self, number: int, values: Sequence[Sequence[float]]) -> None:
        text = "".join(json.dumps(list(row)) + "\n" for row in values)
        path = self.folder / f"{number:05d}.reference.jsonl"
        self.world.on_main(lambda: files.write_text(path, text))

    def stage(self, number: int, name: str, made_by: Mapping[str, Any]) -> Parts:
        """The rows of one stage, known by their `position`, on disk before they are used.

        Raises InputError, when they are read, for rows that were made otherwise than `made_by`.
        """

        def key(row: Mapping[str, Any], where: str) -> tuple[int]:
            if any(row.get(field) != value for field, value in made_by.items()):
                raise InputError("was made with another policy, seed or judge", where=where, mend="delete the file")
            return (int(row["position"]),)

        return Parts(path=self.folder / f"{number:05d}.{name}.jsonl", world=self.world, key=key)


def shared_items(directory: str, number: int, about: Mapping[str, Any], keys: Sequence[str]) -> list[Contest] | None:
    """Another run's round where it was made as `about` says under `keys`; None where it was made otherwise.

    Raises InputError where the directory holds no rounds.
    """
    folder = Path(directory) / FOLDER
    if not folder.is_dir():
        raise InputError(
            "holds no rounds", where=f"--share_samples {directory}", mend="name the run directory of an online method"
        )
    path = folder / f"{number:05d}.jsonl"
    if not path.exists():  # the other run has not got so far; its counts alone are no whole round
        return None
    other = files.read_json(path.with_suffix(".json"))
    if any(other.get(key) != json.loads(json.dumps(about[key])) for key in keys):
        return None
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [Contest.from_json(json.loads(line), f"{path.name} line {i}") for i, line in enumerate(lines, start=1)]


def counted(items: Sequence[Contest]) -> dict[str, Any]:
    """What a round's items add up to: the label budget spent, what was dropped, how the judge behaved."""
    comparisons = [c for item in items for verdict in item.verdicts for c in verdict.comparisons]
    both = [c.orders for c in comparisons if c.orders is not None and None not in c.orders]
    agree = [_side(first) == _side(second) for first, second in both if first is not None and second is not None]
    known = [c.prob_first for c in comparisons if c.prob_first is not None]
    drawn = [answer for item in items for answer in item.answers if answer.log_prob is not None]
    verdicts = [verdict for item in items for verdict in item.verdicts]
    return {
        "prompts": len(items),
        "matches": sum(len(item.matches) for item in items),
        "dropped": _histogram(item.dropped for item in items if item.dropped),
        "duplicates": sum(len(item.answers) - len({answer.text for answer in item.answers}) for item in items),
        "comparisons": len(comparisons),
        "judge": verdicts[0].judge if verdicts else "",
        "judge_calls": sum(verdict.calls for verdict in verdicts),
        "judge_cached": sum(verdict.cached for verdict in verdicts),
        "judge_tokens": sum(verdict.tokens for verdict in verdicts),
        "order_agreement": _mean(agree),
        "tie_rate": _mean([prob == 0.5 for prob in known]),
        "without_probability": _histogram(c.reason or "unsure" for c in comparisons if c.prob_first is None),
        "answers": len(drawn),
        "answers_finished": _mean([answer.finished for answer in drawn]),
        "mean_length": _mean([float(len(answer.tokens)) for answer in drawn]),
        "own_rank": _histogram(str(rank) for rank in _own_ranks(items)),
        "chosen_origin": _histogram(item.answers[m.chosen].origin for item in items for m in item.matches),
        "rejected_origin": _histogram(item.answers[m.rejected].origin for item in items for m in item.matches),
    }


def _own_ranks(items: Sequence[Contest]) -> Iterator[int]:
    """Rank, from 1, of each prompt's first own answer among the distinct ones."""
    for item in items:
        first = next((i for i, answer in enumerate(item.answers) if answer.origin == "own"), None)
        if first is not None and item.verdicts and first in item.order:
            yield item.order.index(first) + 1


def _side(prob: float) -> int:
    return (prob > 0.5) - (prob < 0.5)


def _mean(values: Sequence[float | bool]) -> float | None:
    return sum(float(value) for value in values) / len(values) if values else None


def _histogram(names: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))
