"""One round's items, made: answers drawn, ranked by a judge, and written before anything is trained on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from prefkit.domains.text.contests import Answer, Candidates, Contest, Origin, answer_of
from prefkit.domains.text.contests import stored_answers as data_answers
from prefkit.domains.text.generators import sampler_for
from prefkit.domains.text.policy import TextPolicy, reference_policy
from prefkit.domains.text.round_plan import Round
from prefkit.domains.text.round_store import RoundStore, counted, shared_items
from prefkit.domains.text.sampler import MAX_ROWS, Decoding, Sampler
from prefkit.engine.parts import dealt
from prefkit.engine.run import Run
from prefkit.protocols import Judge
from prefkit.records import Pair, Question, Ranked

T = TypeVar("T")
PIECE = MAX_ROWS
"""answers drawn, or prompts judged, between two writes to disk; dealt to the processes piece by piece"""
SPENT = ("comparisons", "judge_calls", "judge_tokens")
"""counts of a round that add up over rounds: the label budget"""
SAME = ("policy_version", "seed", "data", "draws", "prompts")
"""what two runs' rounds must have in common to have the same answers"""
Pairing = Callable[[Judge, Sequence[Question]], list[Ranked]]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Answers drawn to each prompt of a round, by the policy or by the start model."""

    num: int
    decoding: Decoding
    origin: Origin = "own"
    name: str = "own"
    """names the stream of random numbers: draws of equal names, seeds and policies give equal answers"""


@dataclass(frozen=True, kw_only=True)
class RoundMaker:
    """Draws and ranks the answers of rounds."""

    policy: TextPolicy
    sampler: Sampler
    pairs: Sequence[Pair]
    """the training rows"""
    store: RoundStore
    run: Run
    judge: Judge | None
    pairing: Pairing
    draws: Sequence[Draw]
    config: Any
    fingerprint: str
    """of the data"""
    judge_in_step: bool = False
    """whether the judge scores with the policy's own, perhaps sharded, weights"""

    def make(self, one: Round) -> list[Contest]:
        """The items of a round, on disk before they are returned."""
        made_by = self._made_by(one)
        before = self.store.about(one.number - 1)["spent"] if one.number > 1 else dict.fromkeys(SPENT, 0)

        def whole(items: list[Contest], **more: Any) -> list[Contest]:
            counts = counted(items)
            spent = {name: before[name] + counts[name] for name in SPENT}
            prompts = [self.pairs[item.row].source.prompt for item in items]
            self.store.write(one.number, items, {**about, **more, **counts, "spent": spent}, prompts)
            return items

        about: dict[str, Any] = {
            "round": one.number,
            "first_step": one.first_step,
            "steps": one.num_steps,
            "data": self.fingerprint,
            **made_by,
        }
        if one.offline:
            items = [Contest.stored(i, row, self.pairs[row]) for i, row in enumerate(one.rows)]
            return whole(items, offline=True)
        started = time.monotonic()
        about["draws"] = self._draws_as_json()
        candidates = self._shared(one, about)
        about["shared_from"] = self.config.share_samples if candidates else ""
        candidates = candidates or self._draw(one, made_by)
        drawn = time.monotonic()
        items = self._rank(one, candidates, made_by)
        seconds = {"drawing": round(drawn - started, 3), "judging": round(time.monotonic() - drawn, 3)}
        return whole(items, offline=False, seconds=seconds)

    def _made_by(self, one: Round) -> dict[str, Any]:
        """What every record of a round is made with: the policy's version is its start weights and the steps done."""
        version = f"{self.policy.fingerprint[:12]}@{one.first_step - 1}"
        return {"policy_version": version, "seed": self.config.seed}

    def _draws_as_json(self) -> list[dict[str, Any]]:
        return [
            {"num": draw.num, "origin": draw.origin, "name": draw.name, **vars(draw.decoding)} for draw in self.draws
        ]

    def _shared(self, one: Round, about: Mapping[str, Any]) -> list[Candidates]:
        """The candidates of another run's round where it drew what this one would."""
        if not self.config.share_samples or one.first_step != 1:
            return []  # later rounds of two runs are drawn from different policies
        wanted = {**about, "prompts": len(one.rows)}
        found = self.policy.world.on_main(lambda: shared_items(self.config.share_samples, one.number, wanted, SAME))
        same = found is not None and all(item.row == row for item, row in zip(found, one.rows, strict=True))
        if found is None or not same:
            self.run.say(f"the answers in {self.config.share_samples} are not those of this run: drawing its own")
            return []
        drawn = [[a for a in item.answers if a.log_prob is not None] for item in found]
        return [
            Candidates(position=i, row=row, answers=(*answers, *self._stored(row)))
            for i, (row, answers) in enumerate(zip(one.rows, drawn, strict=True))
        ]

    def _stored(self, row: int) -> tuple[Answer, ...]:
        return () if self.config.candidates == "own" else data_answers(self.pairs[row])

    def _draw(self, one: Round, made_by: Mapping[str, Any]) -> list[Candidates]:
        """The round's candidates: answers by the policy (and by the start model), then the data set's own."""
        parts = self.store.stage(one.number, "answers", made_by)
        done = parts.open()
        per_prompt = max(1, sum(draw.num for draw in self.draws))
        size = max(1, PIECE // per_prompt)
        missing = [place for place in range(len(one.rows)) if (place,) not in done]
        pieces = [missing[start : start + size] for start in range(0, len(missing), size)]
        stage = self.run.stage(f"round {one.number}, drawing", len(one.rows), len(done))
        if pieces and self.draws:
            self.sampler.refresh()
        for count, places in enumerate(self._dealt(pieces, True) if self.draws else ()):
            answers = [self._answers(one, draw, places) for draw in self.draws]
            rows = [
                {"position": place, "row": one.rows[place], **made_by, "answers": [vars(a) for a in joined]}
                for place, joined in zip(places, map(_flat, zip(*answers, strict=True)), strict=True)
            ]
            parts.append(rows)
            stage.update(min(len(one.rows), len(done) + (count + 1) * size * self.policy.world.size))
        parts.finish()
        rows = self.policy.world.on_main(parts.rows) if self.draws else []
        drawn = {row["position"]: tuple(answer_of(answer) for answer in row["answers"]) for row in rows}
        return [
            Candidates(position=i, row=row, answers=(*drawn.get(i, ()), *self._stored(row)))
            for i, row in enumerate(one.rows)
        ]

    def _answers(self, one: Round, draw: Draw, places: Sequence[int]) -> list[list[Answer]]:
        """A draw's answers to the prompts at these places of the round."""
        prompts = [self.pairs[one.rows[place]].prompt for place in places]
        settings: dict[str, Any] = {
            "num": draw.num,
            "decoding": draw.decoding,
            "seed": self.config.seed,
            "path": ("round", one.number, draw.name),
            "rows": places,
        }
        if draw.origin == "reference":
            with reference_policy(self.policy) as start:
                samples = sampler_for(start, self.config).sample(prompts, **settings)
        else:
            samples = self.sampler.sample(prompts, **settings)
        longest = self.config.max_length
        return [[Answer.drawn(sample, draw.origin, max_length=longest) for sample in found] for found in samples]

    def _rank(self, one: Round, candidates: Sequence[Candidates], made_by: Mapping[str, Any]) -> list[Contest]:
        """Ask the judge, a piece at a time; what it has said is on disk before the next piece is asked."""
        assert self.judge is not None, "an online round needs a judge"
        made_by = {**made_by, "judge": self.judge.name}
        parts = self.store.stage(one.number, "ranked", made_by)
        done = parts.open()
        missing = [found for found in candidates if (found.position,) not in done]
        pieces = [missing[start : start + PIECE] for start in range(0, len(missing), PIECE)]
        stage = self.run.stage(f"round {one.number}, judging", len(candidates), len(done))
        keep = self.config.unfinished == "keep"
        own = self.config.candidates != "data"
        for count, piece in enumerate(self._dealt(pieces, self.judge_in_step)):
            asked = [found.question(self.pairs[found.row], keep_unfinished=keep, keep_drawn=own) for found in piece]
            ranked = self.pairing(self.judge, [question for question, _ in asked])
            items = [
                Contest.of(found, result, places)
                for found, result, (_, places) in zip(piece, ranked, asked, strict=True)
            ]
            parts.append([{**item.to_json(), **made_by} for item in items])
            stage.update(min(len(candidates), len(done) + (count + 1) * PIECE * self.policy.world.size))
        parts.finish()
        return [Contest.from_json(row, str(parts.path)) for row in self.policy.world.on_main(parts.rows)]

    def _dealt(self, pieces: list[T], weights: bool) -> list[T]:
        """This process's pieces; where work on sharded `weights` gathers them, every process gets equally many."""
        world = self.policy.world
        if world.in_step and weights and pieces:
            pieces = pieces + [pieces[-1]] * (-len(pieces) % world.size)
        return dealt(pieces, world)


def _flat(lists: Sequence[Sequence[Answer]]) -> list[Answer]:
    return [answer for answers in lists for answer in answers]
