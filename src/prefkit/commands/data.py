"""Check preference data before training, or convert it from another project's shape.

prefkit data check FILE                    every problem with file, row, field, mend; exit code 2 on errors
prefkit data convert IN --out OUT.jsonl    UltraFeedback, HH-RLHF, TL;DR, Nectar, ... to TRL's columns
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefkit.domains.text.check import Report, check
from prefkit.domains.text.columns import is_preference, parse_completions, parse_preferences
from prefkit.domains.text.convert import CONVERTERS, Conversion, Options, convert_file
from prefkit.domains.text.files import Source
from prefkit.domains.text.load import load
from prefkit.domains.text.show import show_conversion, show_report
from prefkit.errors import InputError
from prefkit.flags import NO, YES


def main(argv: Sequence[str]) -> int:
    """Run `prefkit data ...`; 0, or 2 where the data has errors. Raises InputError for unusable input."""
    options = _parser().parse_args([_underscored(word) for word in argv])
    return options.run(options)


def _underscored(word: str) -> str:
    """--max-length and --max_length are the same option."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefkit data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(title="commands", required=True, metavar="check | convert")
    _check_options(verbs.add_parser("check", help="print a report; exit code 2 on errors"))
    _convert_options(verbs.add_parser("convert", help="write TRL-shaped JSON lines"))
    return parser


def _check_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_check)
    parser.add_argument("file", help="jsonl, json, csv, parquet, folder saved by datasets, Hub id, or asset")
    parser.add_argument("--split", default="", help="split of FILE (default: train, or the only one)")
    parser.add_argument("--config", default="", help="configuration name on the Hub")
    parser.add_argument("--model", default="", help="tokenize with this model and forecast its memory")
    parser.add_argument("--eval", default="", help="held-out data that must not overlap")
    parser.add_argument("--eval_split", default="", help="split of --eval")
    parser.add_argument("--max_length", type=int, default=1024, help="prompt + answer tokens (1024)")
    parser.add_argument("--batch", type=int, default=8, help="rows per forward pass, for the forecast (8)")
    parser.add_argument("--lora_r", type=int, default=16, help="LoRA rank, for the forecast (16)")
    parser.add_argument(
        "--long_prompts", choices=("refuse", "drop"), default="refuse", help="prompts beyond max_length"
    )
    parser.add_argument(
        "--append_eos", type=_truth, nargs="?", const=True, default=True, help="end whole answers by a token (true)"
    )
    parser.add_argument("--no_append_eos", dest="append_eos", action="store_false", help="the same as false")
    parser.add_argument("--all", action="store_true", help="print every problem, not the first of each kind")
    parser.add_argument("--json", default="", help="also write the report to this file")


def _truth(word: str) -> bool:
    """`true` or `false`, spelled as for the training methods."""
    if word.lower() not in YES + NO:
        raise argparse.ArgumentTypeError(f"must be true or false, not {word!r}")
    return word.lower() in YES


def _convert_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_convert)
    parser.add_argument("file", help="jsonl, json, csv, parquet, folder saved by datasets, or Hub id")
    parser.add_argument("--out", required=True, help="JSON lines file to write")
    parser.add_argument(
        "--from", dest="shape", choices=tuple(CONVERTERS), default="", help="shape of IN (default: detected)"
    )
    parser.add_argument(
        "--pairs",
        choices=("best", "adjacent", "all"),
        default="best",
        help="of ranked answers: the best with each other, neighbours in rank, or all (best)",
    )
    parser.add_argument("--split", default="", help="split of IN (default: train, or the only one)")
    parser.add_argument("--config", default="", help="configuration name on the Hub")
    for name in ("prompt", "chosen", "rejected"):
        parser.add_argument(f"--{name}_key", default=name, help=f"column of the {name} (openrlhf; {name})")


def _load(name: str, *, split: str, config: str, what: str) -> Source:
    from prefkit import assets
    from prefkit.domains.text.packaged import dataset

    packaged = name in assets.ASSETS and not Path(name).exists()
    rows: Any = dataset(name) if packaged else name
    source = load(rows, split=split, config=config, what=what)
    return replace(source, name=name) if packaged else source


def _check(options: argparse.Namespace) -> int:
    source = _load(options.file, split=options.split, config=options.config, what="train")
    parse = parse_preferences if is_preference(source) else parse_completions
    rows, problems = parse(source)
    held: Sequence[Any] = ()
    if options.eval:
        evaluation = _load(options.eval, split=options.eval_split, config=options.config, what="evaluation")
        held, more = parse(evaluation)
        problems += [replace(problem, row=-1) for problem in more]  # row numbers are the training file's
    tokenizer, context = _model(options.model) if options.model else (None, 0)
    report = check(
        rows,
        tokenizer=tokenizer,
        evaluation=held,
        max_length=options.max_length,
        append_eos=options.append_eos,
        context=context,
        long_prompts=options.long_prompts,
        where=source.path_of_row,
        problems=problems,
        name=source.name,
    )
    show_report(report, every=options.all)
    if options.model:
        _show_memory(options, report, sequences=2 if is_preference(source) else 1)
    if options.json:
        _write_json(Path(options.json), report)
    return 2 if report.errors else 0


def _model(name: str) -> tuple[Any, int]:
    """The tokenizer of a model and the tokens it takes, as training finds them."""
    from prefkit.domains.text.config import Model
    from prefkit.domains.text.loading import context, load_tokenizer, resolve

    options = Model(model_name_or_path=name)
    return load_tokenizer(options, resolve(name)), context(options)


def _show_memory(options: argparse.Namespace, report: Report, *, sequences: int) -> None:
    from prefkit.domains.text.loading import resolve
    from prefkit.domains.text.memory import shape_of
    from prefkit.domains.text.show import show_memory

    if "total" in report.lengths:
        show_memory(
            shape_of(resolve(options.model)),
            report.lengths,
            rows=sequences * options.batch,
            lora_r=options.lora_r,
        )


def _write_json(path: Path, report: Report) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"cannot be written: {error.strerror}", where=str(path), mend="choose another --json"
        ) from error


def _convert(options: argparse.Namespace) -> int:
    source = _load(options.file, split=options.split, config=options.config, what="train")
    done: Conversion = convert_file(
        source,
        Path(options.out),
        shape=options.shape,
        options=Options(
            pairs=options.pairs,
            prompt_key=options.prompt_key,
            chosen_key=options.chosen_key,
            rejected_key=options.rejected_key,
        ),
    )
    show_conversion(done, options.out)
    return 0
