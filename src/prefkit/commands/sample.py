"""Answer a prompt, a file of prompts, or a person at the terminal: `prefkit sample RUN_OR_MODEL [-p TEXT]`.

prefkit sample runs/hypo-demo -p "Write a one-sentence verdict."      answers on the terminal
prefkit sample runs/hypo-demo --prompts held_out.jsonl --out a.jsonl  one JSON line for each answer, resumable
prefkit sample runs/hypo-demo                                         a conversation

Under `accelerate launch`, processes share the prompts of --out FILE; the file is the one that one process writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefkit.domains.text.cache import weights_fingerprint
from prefkit.domains.text.columns import read_prompts
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.prompts import Prompt
from prefkit.domains.text.sampler import MAX_ROWS, Decoding, TransformersSampler, check_prompts
from prefkit.domains.text.tokenize import tokenize_prompts
from prefkit.engine.parts import Parts, dealt, shown
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
    if policy.world.size > 1 and not options.out:
        raise InputError("several processes have no terminal to answer on", where="accelerate launch", mend="add --out")
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
    """Append what is missing in `path`, piece by piece, each forced to disk: killed, it goes on where it stopped.

    Pieces are cut from all prompts before any is dealt to a process or found done, so that neither the number of
    processes nor a kill changes which prompts are computed together.
    """
    version = weights_fingerprint(answerer.policy.module)[:16]
    fixed, world = answerer.fixed(version), answerer.policy.world
    by_row = {prompt.row: _plain(prompt.prompt) for prompt in prompts}
    out = Parts(path=path, world=world, key=lambda row, where: _key(row, where, by_row, fixed))
    done = out.open()
    size = max(1, MAX_ROWS // num)
    pieces = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    left = [piece for piece in pieces if any((p.row, index) not in done for p in piece for index in range(num))]
    mine = [(piece, answerer.tokens(piece)) for piece in dealt(left, world)]
    if done and world.is_main:
        missing = sum(any((p.row, index) not in done for index in range(num)) for p in prompts)
        print(f"{len(done)} answers are in {path}; {missing} of {len(prompts)} prompts are left", file=sys.stderr)
    for piece, ids in shown(mine, lambda one: len(one[0]), label="prompts", visible=world.is_main):
        drawn = answerer.answer(ids, [p.row for p in piece], num)
        out.append(
            [
                answerer.row(prompt, sample, version)
                for prompt, samples in zip(piece, drawn, strict=True)
                for sample in samples
                if (prompt.row, sample.index) not in done
            ]
        )
    out.finish()
    if world.is_main:
        print(f"{len(prompts) * num} answers: {path}")
    return 0


def _key(row: Mapping[str, Any], where: str, prompts: Mapping[int, Any], fixed: Mapping[str, Any]) -> tuple[int, int]:
    """(row, index) of an answer in the file; InputError unless it answers one of these prompts with these settings."""
    try:
        key = int(row["row"]), int(row["index"])
        changed = [name for name in FIXED if row[name] != fixed[name]]
        prompt = row["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("is no answer by prefkit sample", where=where, mend="choose another --out") from error
    if changed:
        told = ", ".join(f"{name} {row[name]!r} (now {fixed[name]!r})" for name in changed)
        raise InputError(f"was drawn with {told}", where=where, mend="choose another --out")
    if key[0] in prompts and prompts[key[0]] != prompt:
        raise InputError(
            f"answers another prompt than row {key[0] + 1} of the prompts", where=where, mend="choose another --out"
        )
    return key


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
