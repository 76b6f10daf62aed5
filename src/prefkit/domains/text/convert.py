"""Other projects' data shapes -> rows with TRL's columns.

Each converter takes one row and yields rows to write. A structural fault raises InputError with file, row and
field; rows that are whole but give no usable pair (a tie, an empty answer, no common prompt) are counted with
the reason.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Literal

from prefkit.domains.text.files import Row, Source
from prefkit.domains.text.prompts import split_messages, turn_order
from prefkit.errors import InputError

Pairs = Literal["best", "adjacent", "all"]
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class _Skip(Exception):
    """This row gives no pair; the message is the reason counted."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """`pairs`: of ranked answers, the best with each other, neighbours, or all. Keys: OpenRLHF's columns."""

    pairs: Pairs = "best"
    prompt_key: str = "prompt"
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"


@dataclass
class Conversion:
    """What a conversion did."""

    shape: str
    read: int = 0
    written: int = 0
    skipped: Counter[str] = field(default_factory=Counter[str])


def convert_file(source: Source, out: Path, *, shape: str = "", options: Options | None = None) -> Conversion:
    """Write the converted rows to `out` (JSON lines) at once: a broken-off conversion leaves no file.

    An empty `shape` is detected from the first row. Raises InputError for an unknown shape, a broken row, an
    output that is the input, or no pair at all.
    """
    shape = shape or detect(source.rows[0])
    if shape not in CONVERTERS:
        found = ", ".join(source.rows[0])
        what = f"unknown shape {shape!r}" if shape else f"no known shape has the columns {found}"
        raise InputError(what, where=source.name, mend=f"pass --from one of {', '.join(CONVERTERS)}")
    if out.suffix != ".jsonl":
        raise InputError("must end in .jsonl", where=str(out), mend=f"write to {out.with_suffix('.jsonl')}")
    if out.exists() and Path(source.name).exists() and out.samefile(source.name):
        raise InputError("is the input file", where=str(out), mend="choose another --out")
    done = Conversion(shape)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as stream:
            for row in convert_rows(source, done, options or Options()):
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        if not done.written:
            reasons = ", ".join(f"{count} {reason}" for reason, count in done.skipped.most_common())
            raise InputError(f"gives no pair ({reasons})", where=source.name, mend="check --from and the columns")
        os.replace(temporary, out)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(out), mend="free space or rights") from error
    finally:
        temporary.unlink(missing_ok=True)
    return done


def convert_rows(source: Source, done: Conversion, options: Options) -> Iterator[Row]:
    """The converted rows; counts go to `done`."""
    converter = CONVERTERS[done.shape]
    for place, row in enumerate(source.rows):
        done.read += 1
        try:
            for pair in converter(row, options):
                done.written += 1
                yield {key: value for key, value in pair.items() if value is not None}
        except _Skip as reason:
            done.skipped[str(reason)] += 1
        except KeyError as missing:
            raise InputError(
                f"has no {missing.args[0]!r}, which {done.shape} rows have; found {', '.join(row)}",
                where=f"{source.path_of_row(place)}, field {missing.args[0]!r}",
                mend=f"pass --from with the right shape, one of {', '.join(CONVERTERS)}",
            ) from missing
        except (TypeError, AttributeError, ValueError, IndexError) as error:
            raise InputError(
                f"is not a {done.shape} row: {error}",
                where=source.path_of_row(place),
                mend=f"pass --from with the right shape, one of {', '.join(CONVERTERS)}",
            ) from error


def detect(row: Mapping[str, Any]) -> str:
    """The foreign shape a row has, or "" (also for rows that already have TRL's columns)."""
    columns = set(row)
    chosen = row.get("chosen")
    tests = (
        ("tldr", {"info", "summaries", "choice"} <= columns),
        ("nectar", {"prompt", "answers"} <= columns),
        ("nemo-rl", {"context", "completions"} <= columns),
        ("llama-factory", {"conversations", "chosen"} <= columns or {"instruction", "chosen"} <= columns),
        ("ultrafeedback", {"prompt", "chosen", "rejected"} <= columns and _repeats_prompt(row)),
        ("hh", isinstance(chosen, str) and "prompt" not in columns and _TURN.match(chosen) is not None),
    )
    return next((shape for shape, fits in tests if fits), "")


def _repeats_prompt(row: Mapping[str, Any]) -> bool:
    return isinstance(row["prompt"], str) and isinstance(row["chosen"], (list, tuple))


def _rest(row: Row, *used: str) -> Row:
    return {key: value for key, value in row.items() if key not in used}


def _pair(prompt: Any, chosen: Any, rejected: Any, **columns: Any) -> Row:
    for answer in (chosen, rejected):
        text = answer if isinstance(answer, str) else "".join(message["content"] for message in answer)
        if not text.strip():
            raise _Skip("empty answer")
    if chosen == rejected:
        raise _Skip("identical answers")
    if not isinstance(prompt, str):
        complaint = turn_order(prompt, chosen) or turn_order(prompt, rejected)
        if complaint:
            raise _Skip("turns out of order")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def _split(chosen: Sequence[Row], rejected: Sequence[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    border = split_messages(chosen, rejected)
    if not border:
        raise _Skip("no common prompt")
    answers = list(chosen[border:]), list(rejected[border:])
    if any(message["role"] == "user" for answer in answers for message in answer):
        raise _Skip("differs before the last turn")
    return list(chosen[:border]), *answers


def transcript(text: str) -> list[Row]:
    """Messages of an HH-RLHF transcript ("\\n\\nHuman: ... \\n\\nAssistant: ..."); else ValueError."""
    marks = list(_TURN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise ValueError("the transcript does not begin with '\\n\\nHuman:' or '\\n\\nAssistant:'")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[mark[1]], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


def _ultrafeedback(row: Row, options: Options) -> Iterator[Row]:
    prompt, chosen, rejected = _split(row["chosen"], row["rejected"])
    yield _pair(prompt, chosen, rejected, **_rest(row, "prompt", "chosen", "rejected", "messages"))


def _hh(row: Row, options: Options) -> Iterator[Row]:
    prompt, chosen, rejected = _split(transcript(row["chosen"]), transcript(row["rejected"]))
    yield _pair(prompt, chosen, rejected, **_rest(row, "chosen", "rejected"))


def _tldr(row: Row, options: Options) -> Iterator[Row]:
    info, summaries, choice = row["info"], row["summaries"], row["choice"]
    if choice not in (0, 1):
        raise _Skip("no choice")
    if info.get("post"):
        head = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}"
    else:
        head = f"ARTICLE: {info['article']}"
    chosen, rejected = summaries[choice], summaries[1 - choice]
    yield _pair(
        f"{head}\n\nTL;DR:",
        " " + chosen["text"].strip(),
        " " + rejected["text"].strip(),
        group=info.get("id"),
        judge=row.get("worker"),
        policy_chosen=chosen.get("policy"),
        policy_rejected=rejected.get("policy"),
        split=row.get("split"),
    )


def _ranked(prompt: Any, answers: Sequence[tuple[float, Any, Row]], options: Options) -> Iterator[Row]:
    """Pairs of (rank, answer, columns), lower rank better; ties and identical answers give none."""
    ordered = sorted(answers, key=lambda answer: answer[0])
    if len(ordered) < 2:
        raise _Skip("fewer than two answers")
    found = {
        "best": [(ordered[0], other) for other in ordered[1:]],
        "adjacent": list(pairwise(ordered)),
        "all": list(combinations(ordered, 2)),
    }[options.pairs]
    empty = True
    for (better, chosen, left), (worse, rejected, right) in found:
        if better == worse or chosen == rejected:
            continue
        columns = {f"{key}_chosen": value for key, value in left.items()}
        columns |= {f"{key}_rejected": value for key, value in right.items()}
        yield _pair(prompt, chosen, rejected, **columns)
        empty = False
    if empty:
        raise _Skip("only ties")


def _nectar(row: Row, options: Options) -> Iterator[Row]:
    prompt = transcript(row["prompt"])
    while prompt and prompt[-1]["role"] == "assistant" and not prompt[-1]["content"]:
        prompt.pop()
    answers = [
        (
            float(answer["rank"]),
            [{"role": "assistant", "content": answer["answer"].strip()}],
            {"rank": answer["rank"], "model": answer.get("model")},
        )
        for answer in row["answers"]
        if answer["answer"].strip()
    ]
    source = row.get("source")
    for pair in _ranked(prompt, answers, options):
        yield {**pair, "source": ", ".join(source) if isinstance(source, list) else source}


def _nemo(row: Row, options: Options) -> Iterator[Row]:
    context = row["context"]
    prompt = [{"role": "user", "content": context}] if isinstance(context, str) else context
    answers: list[tuple[float, Any, Row]] = []
    for completion in row["completions"]:
        answer = completion["completion"]
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        answers.append((float(completion["rank"]), answer, {}))
    for pair in _ranked(prompt, answers, options):
        yield {**pair, **_rest(row, "context", "completions")}


def _openrlhf(row: Row, options: Options) -> Iterator[Row]:
    keys = options.prompt_key, options.chosen_key, options.rejected_key
    chosen, rejected, prompt = row[keys[1]], row[keys[2]], row.get(keys[0])
    rest = _rest(row, *keys)
    if isinstance(chosen, str):
        if prompt is None:
            yield {"chosen": chosen, "rejected": rejected, **rest}
            return
        yield _pair(prompt, chosen, rejected, **rest)
        return
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if prompt is None or list(chosen[: len(prompt)]) == list(prompt):
        prompt, chosen, rejected = _split(chosen, rejected)
    yield _pair(prompt, chosen, rejected, **rest)


def _llama_factory(row: Row, options: Options) -> Iterator[Row]:
    messages: list[Row] = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    if "conversations" in row:
        messages += [_spoken(turn) for turn in row["conversations"]]
        chosen, rejected = _spoken(row["chosen"]), _spoken(row["rejected"])
        used = ("conversations", "chosen", "rejected", "system")
    else:
        for question, answer in row.get("history") or ():
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
        messages.append({"role": "user", "content": question})
        chosen = {"role": "assistant", "content": row["chosen"]}
        rejected = {"role": "assistant", "content": row["rejected"]}
        used = ("instruction", "input", "history", "chosen", "rejected", "system")
    yield _pair(messages, [chosen], [rejected], **_rest(row, *used))


def _spoken(turn: Row) -> Row:
    speaker = turn["from"]
    if speaker not in _SPEAKERS:
        raise _Skip(f"a turn from {speaker!r}")
    return {"role": _SPEAKERS[speaker], "content": turn["value"]}


CONVERTERS: dict[str, Callable[[Row, Options], Iterator[Row]]] = {
    "ultrafeedback": _ultrafeedback,
    "hh": _hh,
    "tldr": _tldr,
    "nectar": _nectar,
    "openrlhf": _openrlhf,
    "llama-factory": _llama_factory,
    "nemo-rl": _nemo,
}
