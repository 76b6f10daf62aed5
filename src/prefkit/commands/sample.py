"""Answer a prompt, a file of prompts, or a person at the terminal: `prefkit sample RUN_OR_MODEL [-p TEXT]`.

prefkit sample runs/hypo-demo -p "Write a one-sentence verdict."      answers on the terminal
prefkit sample runs/hypo-demo --prompts held_out.jsonl --out a.jsonl  one JSON line for each answer, resumable
prefkit sample runs/hypo-demo                                         a conversation
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefkit.domains.text.cache import weights_fingerprint
from prefkit.domains.text.columns import read_prompts
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.prompts import Prompt
from prefkit.domains.text.sampler import MAX_ROWS, Decoding, TransformersSampler, check_prompts
from prefkit.domains.text.tokenize import tokenize_prompts
from prefkit.engine import files
from prefkit.errors import InputError
from prefkit.records import Message, Sample, Text

FIXED = ("seed", "policy_version", "dtype", "temperature", "top_p", "max_new_tokens", "stop_strings")
"""fields that every row of one answers file shares: a file never mixes two models or two settings"""
HELP = "/new starts over, /exit (or Ctrl-D) leaves"


def main(argv: Sequence[str]) -> int:
    """Loads the model, then answers what was asked. Raises InputError for prompts or a model that cannot be used."""
    options = _parser().parse_args([_underscored(word) for word in argv])
    decoding = Decoding(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        stop_strings=tuple(options.stop_strings),
    )
    given = _given(options)
    policy = TextPolicy.pretrained(options.model, dtype=options.dtype)
    chat = _chat(policy, options.chat)
    answerer = _Answerer(policy, decoding, options.seed)
    if given is None:
        return _converse(answerer, chat)
    prompts = [dataclasses.replace(prompt, prompt=_turn(prompt.prompt, chat)) for prompt in given]
    if options.out:
        return _write(answerer, prompts, options.num, Path(options.out))
    _show(answerer, prompts, options.num)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefkit sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="RUN_OR_MODEL", help="run directory, model or adapter folder, Hub id, or packaged asset")
    add("-p", "--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given several times")
    add(
        "--prompts",
        default="",
        metavar="FILE",
        help="prompts: jsonl, json, csv, parquet or txt (one a line), or a Hub id",
    )
    add("--out", default="", metavar="FILE", help="write JSON lines; answers already in the file are not drawn again")
    add("--num", type=int, default=1, help="answers to each prompt (1)")
    add("--temperature", type=float, default=1.0, help="0 takes the likeliest token (1.0)")
    add("--top_p", type=float, default=1.0, help="nucleus (1.0)")
    add("--max_new_tokens", type=int, default=256, help="longest answer (256)")
    add("--stop_strings", nargs="+", default=[], metavar="TEXT", help="an answer also ends after any of these")
    add("--seed", type=int, default=0, help="the same seed gives the same answers (0)")
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="put prompts that are plain text into the chat template (default: where the model has one)",
    )
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="compute dtype (auto)")
    return parser


def _underscored(word: str) -> str:
    """--top-p and --top_p are the same option; --no-chat keeps argparse's spelling."""
    name, equals, value = word.partition("=")
    if not name.startswith("--") or name in ("--no-chat", "--no_chat"):
        return "--no-chat" if name == "--no_chat" else word
    return "--" + name[2:].replace("-", "_") + equals + value


def _given(options: argparse.Namespace) -> list[Prompt] | None:
    """The prompts to answer; None for a conversation at the terminal."""
    if options.seed < 0:
        raise InputError(f"seed is {options.seed}", where="--seed", mend="0 or more")
    if options.num < 1:
        raise InputError(f"num is {options.num}", where="--num", mend="1 or more")
    if options.prompt and options.prompts:
        raise InputError("-p and --prompts exclude each other", mend="keep one of them")
    if options.prompts:
        return read_prompts(options.prompts)
    if options.prompt:
        return [Prompt(prompt=text, row=row) for row, text in enumerate(options.prompt)]
    if options.out:
        raise InputError("--out needs prompts", mend="add -p TEXT or --prompts FILE")
    if not sys.stdin.isatty():
        raise InputError("no prompt given", mend="add -p TEXT or --prompts FILE, or run it in a terminal to converse")
    return None


def _chat(policy: TextPolicy, asked: bool | None) -> bool:
    has = bool(policy.tokenizer.chat_template)
    if asked and not has:
        raise InputError(
            "the model has no chat template", where="--chat", mend="leave --chat off, or set one in its tokenizer"
        )
    return has if asked is None else asked


def _turn(prompt: Text, chat: bool) -> Text:
    return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt


class _Answerer:
    """A policy with settings: prompts in, samples out, the same for the same seed and row."""

    def __init__(self, policy: TextPolicy, decoding: Decoding, seed: int) -> None:
        self.policy, self.decoding, self.seed = policy, decoding, seed
        self.sampler = TransformersSampler(policy)

    def tokens(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of prompts; InputError for one that leaves no room for an answer."""
        places = [prompt.where or f"prompt {prompt.row + 1}" for prompt in prompts]
        ids = tokenize_prompts(
            self.policy.tokenizer,
            [prompt.prompt for prompt in prompts],
            extras=[prompt.extra for prompt in prompts],
            where=lambda place: places[place],
        )
        for place, one in zip(places, ids, strict=True):
            try:
                check_prompts(self.policy, [one], self.decoding)
            except InputError as error:
                raise InputError(error.what, where=place, mend=error.mend) from error
        return ids

    def answer(self, ids: Sequence[Sequence[int]], rows: Sequence[int], num: int) -> list[list[Sample]]:
        return self.sampler.sample(ids, num=num, decoding=self.decoding, seed=self.seed, path=("sample",), rows=rows)

    def row(self, prompt: Prompt, sample: Sample, version: str) -> dict[str, Any]:
        """One line of the answers file; the answer has the prompt's form, so that the file is training data too."""
        text = isinstance(prompt.prompt, str)
        return {
            "row": prompt.row,
            "index": sample.index,
            "prompt": prompt.prompt if text else list(prompt.prompt),
            "completion": sample.text if text else [{"role": "assistant", "content": sample.text}],
            "log_prob": sum(sample.log_probs),
            "tokens": len(sample.tokens),
            "finished": sample.finished,
            **self.fixed(version),
        }

    def fixed(self, version: str) -> dict[str, Any]:
        how = self.decoding
        dtype = str(self.policy.dtype).removeprefix("torch.")
        stops = list(how.stop_strings)
        values = (self.seed, version, dtype, how.temperature, how.top_p, how.max_new_tokens, stops)
        return dict(zip(FIXED, values, strict=True))


def _show(answerer: _Answerer, prompts: Sequence[Prompt], num: int) -> None:
    """Answers on the terminal; bare for one prompt and one answer, so that they can be piped."""
    bare = len(prompts) == num == 1
    for prompt, ids in zip(prompts, answerer.tokens(prompts), strict=True):
        samples = answerer.answer([ids], [prompt.row], num)[0]
        if bare:
            print(samples[0].text)
            continue
        print(f"> {_last(prompt.prompt)}")
        for sample in samples:
            note = "" if sample.finished else "  [cut off at --max_new_tokens]"
            print(f"{f'{sample.index + 1}. ' if num > 1 else ''}{sample.text}{note}")
        print()


def _last(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _write(answerer: _Answerer, prompts: Sequence[Prompt], num: int, path: Path) -> int:
    """Append what is missing in `path`, piece by piece, each forced to disk: killed, it goes on where it stopped."""
    version = weights_fingerprint(answerer.policy.module)[:16]
    done = _done(path, prompts, answerer.fixed(version))
    missing = [p for p in prompts if any((p.row, index) not in done for index in range(num))]
    ids = answerer.tokens(missing)
    if done:
        print(f"{len(done)} answers are in {path}; {len(missing)} of {len(prompts)} prompts are left", file=sys.stderr)
    size = max(1, MAX_ROWS // num)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.full_disk_is_an_input_error(path.parent), path.open("a", encoding="utf-8") as out:
        for start in _progress(range(0, len(missing), size), len(missing)):
            piece = missing[start : start + size]
            drawn = answerer.answer(ids[start : start + size], [p.row for p in piece], num)
            lines = [
                json.dumps(answerer.row(prompt, sample, version), ensure_ascii=False) + "\n"
                for prompt, samples in zip(piece, drawn, strict=True)
                for sample in samples
                if (prompt.row, sample.index) not in done
            ]
            out.write("".join(lines))
            out.flush()
            os.fsync(out.fileno())
    print(f"{len(prompts) * num} answers: {path}")
    return 0


def _progress(starts: range, total: int) -> Iterator[int]:
    """The pieces' starts, behind a bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("prompts", total=total)
        for start in starts:
            yield start
            bar.update(task, completed=min(total, start + starts.step))


def _done(path: Path, prompts: Sequence[Prompt], fixed: Mapping[str, Any]) -> set[tuple[int, int]]:
    """(row, index) of the answers in the file, whose last line a kill may have cut: that one is removed.

    Raises InputError where the file holds anything but answers to these prompts by this model with these settings.
    """
    if not path.exists():
        return set()
    if path.is_dir():
        raise InputError("is a folder", where=f"--out {path}", mend="name a file")
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    by_row = {prompt.row: prompt.prompt for prompt in prompts}
    done: set[tuple[int, int]] = set()
    for number, line in enumerate(whole.decode("utf-8", errors="replace").splitlines(), start=1):
        where = f"{path} line {number}"
        try:
            row: Any = json.loads(line)
            key = int(row["row"]), int(row["index"])
            changed = [name for name in FIXED if row[name] != fixed[name]]
            prompt = row["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError("is no answer by prefkit sample", where=where, mend="choose another --out") from error
        if changed:
            told = ", ".join(f"{name} {row[name]!r} (now {fixed[name]!r})" for name in changed)
            raise InputError(f"was drawn with {told}", where=where, mend="choose another --out")
        if key[0] in by_row and _plain(by_row[key[0]]) != prompt:
            raise InputError(
                f"answers another prompt than row {key[0] + 1} of the prompts", where=where, mend="choose another --out"
            )
        done.add(key)
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return done


def _plain(prompt: Text) -> Any:
    """A prompt as it reads back from JSON."""
    return json.loads(json.dumps(prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]))


def _converse(answerer: _Answerer, chat: bool) -> int:
    """Read a line, answer it, remember both (with a chat template), until the end of input."""
    kind = "conversation" if chat else "one prompt a line; the model has no chat template, or --no-chat"
    print(f"{kind}; {HELP}", file=sys.stderr)
    history: list[Message] = []
    turn = 0
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return 0
        if line in ("/exit", "/quit"):
            return 0
        if line == "/new":
            history.clear()
        if not line or line == "/new":
            continue
        asked: Text = [*history, {"role": "user", "content": line}] if chat else line
        try:
            ids = answerer.tokens([Prompt(prompt=asked, row=turn)])
        except InputError as error:
            print(f"{error.what}; {HELP}", file=sys.stderr)
            continue
        text = answerer.answer(ids, [turn], 1)[0][0].text
        print(text)
        turn += 1
        if chat:
            history += [{"role": "user", "content": line}, {"role": "assistant", "content": text}]
