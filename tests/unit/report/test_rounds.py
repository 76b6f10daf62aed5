"""The page's section on rounds, the terminal's line and the card's: what was drawn, who judged, at what cost.

The round files are written by the code that writes them in a run.
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import run_directory
from prefkit.domains.text.contests import Answer, Contest
from prefkit.domains.text.round_store import RoundStore, counted
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.feedback.replies import Replies, Reply
from prefkit.records import Comparison, Match, Verdict
from prefkit.report import card, comparison, curves, judges, page, rounds, table, wording
from prefkit.report.read import read
from prefkit.report.round_counts import read_rounds

EVIL = "<script>alert('x')</script>"
GOLD = "gold:rotten-tomatoes@seed0"


def answers(*texts, origins=("own", "chosen", "rejected")):
    return tuple(
        Answer(
            text=text,
            tokens=tuple(range(len(text))),
            origin=origin,
            finished=len(text) < 9,
            log_prob=-12.5 if origin in ("own", "reference") else None,
        )
        for text, origin in zip(texts, origins, strict=False)
    )


def item(position, best="own", *, judge=GOLD, scores=True, calls=3, cached=0, tokens=0, text="a film"):
    """Three candidates; `best` names the one that wins, the data's rejected answer loses."""
    order = {"own": (0, 1, 2), "chosen": (1, 0, 2)}[best]
    rank = {place: place_in_order for place_in_order, place in enumerate(order)}
    comparisons = [
        Comparison(first=i, second=j, prob_first=1.0 if rank[i] < rank[j] else 0.0, orders=(1.0, 1.0))
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    values = [float(3 - rank[place]) for place in range(3)] if scores else None
    verdict = Verdict(judge=judge, comparisons=comparisons, scores=values, calls=calls, cached=cached, tokens=tokens)
    return Contest(
        position=position,
        row=position,
        answers=answers(text, "warm, moving", "dull"),
        order=order,
        matches=(Match(chosen=order[0], rejected=2),),
        verdicts=(verdict,),
    )


def dropped(position, why="tie"):
    comparison = Comparison(first=0, second=1, prob_first=0.5 if why == "tie" else None, reason="unparsable")
    verdict = Verdict(judge=GOLD, comparisons=[comparison], calls=2)
    both = answers("one", "two", origins=("own", "own"))
    return Contest(position=position, row=position, answers=both, order=(0, 1), verdicts=(verdict,), dropped=why)


def stored(position):
    pair = answers("better", "worse", origins=("chosen", "rejected"))
    return Contest(position=position, row=position, answers=pair, order=(0, 1), matches=(Match(chosen=0, rejected=1),))


def write(folder: Path, items, *, steps=2, offline=(), prompt="Write a review of Ran."):
    """Rounds of the given items as a run leaves them."""
    store = RoundStore(folder, World.start())
    for number, found in enumerate(items, 1):
        about = {"round": number, "first_step": (number - 1) * steps + 1, "steps": steps, "policy_version": "ab@0"}
        about |= {"seed": 0, "offline": number in offline, "seconds": {"drawing": 1.5, "judging": 0.25}}
        store.write(number, found, about | counted(found), [prompt] * len(found))
    return folder


def online(folder: Path, items, *, config=None, method="selm", offline=(), **about):
    given = {"judge": "gold:rotten-tomatoes"} | (config or {})
    write(run_directory.build(folder, method=method, steps=6, config=given), items, offline=offline, **about)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds") / "selm-demo"
    return online(folder, [[item(0), item(1, "chosen")], [item(0), dropped(1)], [item(0), item(1)]])


def section(folder: Path):
    found = rounds.section(read(folder), folder / "plots")
    assert found is not None
    return found


def body(found, title):
    return next(part for part in found["tables"] if part["title"] == title)


def test_counts_add_up_over_rounds(run):
    found = read_rounds(read(run))
    assert found is not None
    total = found.total
    assert (len(found.each), total.prompts, total.matches, total.comparisons, total.calls) == (3, 6, 5, 16, 17)
    assert total.dropped == {"tie": 1} and total.chosen == {"chosen": 1, "own": 4}
    assert total.mean_length == pytest.approx((5 * len("a film") + 2 * len("one")) / 7)
    assert total.ties == pytest.approx(1 / 16) and total.agreement == 1
    assert (total.drawing, total.judging, total.judge) == (4.5, 0.75, GOLD)


def test_curves_show_where_rounds_begin(tmp_path):
    folder = online(tmp_path / "run", [[item(0)], [item(0)], [item(0)]])
    assert "a round begins" not in page.write(folder).read_text()
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    told = [row | ({"rounds/round": (row["step"] + 1) // 2} if row["step"] else {}) for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in told))
    assert curves.borders(read(folder)) == [2.5, 4.5]
    assert "a round begins" in page.write(folder).read_text()
    many = [{"step": step, "rounds/round": step} for step in range(1, curves.MOST_BORDERS + 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in many))
    assert curves.borders(read(folder)) == []


def test_a_round_in_the_making_is_left_out(run, tmp_path):
    folder = online(tmp_path / "run", [[item(0)], [item(0)]])
    (folder / "rounds" / "00002.jsonl").unlink()
    found = read_rounds(read(folder))
    assert found is not None and [one.first for one in found.each] == [1]
    assert read_rounds(read(run_directory.build(tmp_path / "other", steps=2))) is None


def test_tables_of_the_section(run):
    found = section(run)
    assert found["judge"] == GOLD and any("simulated" in note for note in found["judge_notes"])
    titles = ("Answers drawn", "Asked of the judge", "What was trained on")
    drawn, judged, used = (body(found, title)["rows"] for title in titles)
    assert drawn[0] == ("1", "1–2", "2", "2", "6.0", "100\u00a0%", "1.5 s")
    assert [row[0] for row in drawn] == ["1", "2", "3", "all"]
    assert judged[1][:3] == ("2", "4", "5") and "Tokens" not in body(found, "Asked of the judge")["columns"]
    assert used[1][:3] == ("2", "1", "1 tie")
    assert used[0][4] == "data's\u00a0chosen\u00a050\u00a0%, own\u00a050\u00a0%"


def test_the_page_shows_rounds_and_escapes_answers(tmp_path):
    folder = online(tmp_path / "run", [[item(0, text=EVIL)], [item(0)]], prompt=EVIL)
    html = page.write(folder).read_text()
    assert '<section id="rounds">' in html and "Prompts as they were ranked" in html
    assert "<script" not in html and html.count("&lt;script&gt;") >= 2
    assert (folder / "plots" / "rounds-length.png").is_file()
    assert not (folder / "plots" / "rounds-chosen.png").exists()  # own in every round: no curve


def test_runs_without_rounds_have_no_such_section(tmp_path):
    folder = run_directory.build(tmp_path / "run", steps=3)
    assert rounds.section(read(folder), folder / "plots") is None and rounds.summary(read(folder)) == ""
    assert '<section id="rounds">' not in page.write(folder).read_text()


def test_thousands_of_rounds_are_added_up(tmp_path):
    folder = online(tmp_path / "run", [[item(0, "own" if number % 2 else "chosen")] for number in range(45)], steps=1)
    found = section(folder)
    rows = body(found, "What was trained on")["rows"]
    assert len(rows) == 16 and rows[0][0] == "1–3" and rows[-1][:2] == ("all", "45") and found["folded"]
    assert "45 rounds, 3 added up in each row." in found["note"]
    assert [example["round"] for example in found["examples"]] == ["1", "23", "45"]


def test_examples_show_every_candidate_in_order(run):
    first = section(run)["examples"][0]
    assert [candidate["rank"] for candidate in first["candidates"]] == ["1", "2", "3"]
    best, _, worst = first["candidates"]
    assert (best["kind"], best["score"], worst["kind"]) == ("chosen", "score 3.00", "rejected")
    assert best["text"] == "a film" and "6 tokens" in best["tags"] and "log-prob" in best["tags"]
    assert first["remarks"] == "probability of 1 over 2: 1.00, 1 over 3: 1.00, 2 over 3: 1.00"


def test_examples_without_scores_tell_wins_and_why_there_is_no_pair(tmp_path):
    folder = online(tmp_path / "run", [[item(0, "chosen", scores=False), dropped(1, "unsure")]])
    won, none = section(folder)["examples"]
    assert [candidate["score"] for candidate in won["candidates"]] == ["wins 1.00", "wins 0.50", "wins 0.00"]
    assert won["remarks"].startswith("probability of 1 over 2: 1.00, 2 over 3: 1.00, 1 over 3: 1.00")
    assert none["remarks"] == "no pair: unsure · probability of 1 over 2: unparsable"
    assert all(candidate["score"] == "" for candidate in none["candidates"])


def test_one_round_gives_its_first_prompts(tmp_path):
    folder = online(tmp_path / "run", [[item(place, text=f"text {place}") for place in range(5)]])
    texts = [example["candidates"][0]["text"] for example in section(folder)["examples"]]
    assert texts == ["text 0", "text 1", "text 2"]


def test_offline_rounds_have_no_judge(tmp_path):
    folder = online(tmp_path / "run", [[stored(0)], [stored(0)]], method="sdpo", config={"judge": ""}, offline=(1, 2))
    found = section(folder)
    assert found["judge"] == "" and "stored pairs" in found["judge_notes"][0]
    assert [part["title"] for part in found["tables"]] == ["What was trained on"]
    assert rounds.summary(read(folder)) == (
        "2 rounds; stored pairs, nobody was asked; 2 pairs to train on; 0 prompts dropped"
    )


def test_the_terminal_line(run):
    line = f"3 rounds; 16 comparisons in 17 calls by {GOLD}; 5 pairs to train on; 1 prompt dropped (1 tie)"
    assert rounds.summary(read(run)) == line
    console = Console(width=200, record=True, file=io.StringIO())
    table.print_summary(run, console=console)
    assert line in console.export_text()


def test_cost_is_bounded_or_read_from_the_replies(tmp_path):
    prices = {"judge_price_in": 1.0, "judge_price_out": 10.0}
    name = "llm:some-model@chat-1"
    folder = online(tmp_path / "run", [[item(0, judge=name, tokens=2_000_000, cached=2)]], config=prices)
    facts = dict(section(folder)["facts"])
    assert facts["Cost of the judge"] == "2.0000 to 20.0000" and facts["Replies from the cache"] == "2"
    replies = Replies(folder / "judge-cache")
    replies.keep("one", Reply(content="A", tokens_in=1_500_000, tokens_out=500_000), {})
    replies.waste("two", "timed out", 250_000)
    replies.close()
    assert dict(section(folder)["facts"])["Cost of the judge"] == "6.7500"
    shared = online(tmp_path / "shared", [[item(0, judge=name)]], config=prices | {"judge_cache": "somewhere"})
    assert dict(section(shared)["facts"])["Cost of the judge"] == "0.0000 to 0.0000"


def test_a_judge_that_also_evaluates_is_owned_up_to(tmp_path):
    config = {"gold_reward": "rotten-tomatoes"}
    folder = online(tmp_path / "run", [[item(0)]], config=config)
    assert any("gold reward of the evaluation, too" in note for note in section(folder)["judge_notes"])
    assert judges.same_as_evaluation({"judge": "gold:a:b", "gold_reward": "rotten-tomatoes"}) == ""
    assert judges.same_as_evaluation({"judge": "reward:runs/r", "reward_model": "runs/r"}) == "reward_model"
    assert judges.same_as_evaluation({"judge": "", "gold_reward": ""}) == ""


@pytest.mark.parametrize("kind", judges.KINDS)
def test_what_judges_are_said_to_be(kind):
    assert judges.described(f"{kind}:name@1") and judges.described("unheard-of:name") == ""
    assert ("simulated" in judges.provenance(f"{kind}:name")) == (kind != "stored")


def test_the_card_names_judge_rounds_and_budget(run):
    (run / "model").mkdir()
    text = card.write(run)[0].read_text()
    assert f"Judge: `{GOLD}`, a gold reward" in text and "simulated" in text
    assert "Rounds: 3, with 7 answers drawn and 5 pairs" in text
    assert "Label budget: 16 comparisons asked, 17 calls of the judge" in text
    assert "they are not the judgment of people" in text and "pipeline_tag: text-generation" in text


def test_places_of_a_judge_stay_out_of_the_card():
    assert wording.named("reward:/home/someone/private/rm") == "reward:rm"
    assert wording.named("stored:~/labels.jsonl") == "stored:labels.jsonl"
    assert wording.named("llm:org/models/some") == "llm:org/models/some"
    assert wording.named("gold:my_rewards:politeness") == "gold:my_rewards:politeness"


def test_a_comparison_of_runs_tells_label_budgets(run, tmp_path):
    plain = run_directory.build(tmp_path / "dpo", method="dpo", steps=3)
    text = comparison.write([read(run), read(plain)], tmp_path / "both.html").read_text()
    assert "Comparisons asked" in text
    alone = comparison.write([read(plain)], tmp_path / "one.html").read_text()
    assert "Comparisons asked" not in alone


def test_the_judge_before_it_was_used(tmp_path):
    folder = online(tmp_path / "run", [[item(0, judge="self:frozen:abc chat-1 T=1")]], method="osp")
    assert section(folder)["quality"] is None
    spread = {"mean": 0.75, "low": 0.5, "high": 1.0, "n": 4, "groups": 2, "level": 0.95, "method": "bootstrap"}
    measured = {"num": 4, "accuracy": spread, "order_agreement": spread, "mass": 0.9, "temperature": 2.0}
    run_directory.write(folder / "evaluation" / "judge.json", measured)
    rows = dict(section(folder)["quality"]["rows"])
    assert rows["Right by their labels"] == "0.750 [0.500, 1.000]; 0.5 is chance"
    assert "place" not in rows["Orders agree"]
    by_place = measured | {"order_agreement": spread | {"mean": 0.1, "low": 0.0, "high": 0.2}}
    run_directory.write(folder / "evaluation" / "judge.json", by_place)
    assert "the place decides" in dict(section(folder)["quality"]["rows"])["Orders agree"]
    assert not any("Calibration" in name for name in rows), "nothing was fitted without labels"
    calibration = {"ece_before": 0.2, "ece_after": 0.05}
    run_directory.write(folder / "evaluation" / "judge.json", measured | {"calibration": calibration})
    rows = dict(section(folder)["quality"]["rows"])
    assert rows["Calibration error at temperature 1, and as fitted"] == "0.200, 0.050"


@pytest.mark.parametrize(("config", "marked"), [({"baseline": "policy"}, True), ({"baseline": "reference"}, False)])
def test_the_baseline_of_osp_is_named_as_such(tmp_path, config, marked):
    folder = online(tmp_path / "run", [[item(0, "chosen")]], method="osp", config=config)
    found = section(folder)
    columns = body(found, "What was trained on")["columns"]
    assert ("Rank of the baseline" in columns) == marked and ("Rank of the own answer" in columns) != marked
    assert ("the baseline" in found["note"]) == marked
    tags = [candidate["tags"] for candidate in found["examples"][0]["candidates"]]
    assert [("the baseline" in tag) for tag in tags] == [False, marked, False], "the first answer, ranked second"


def test_strengths_are_told_with_the_answers_they_belong_to(tmp_path):
    soft = dataclasses.replace(item(0, "chosen"), matches=(Match(chosen=1, rejected=0, strength=0.75, weight=0.5),) * 8)
    remarks = section(online(tmp_path / "run", [[soft]]))["examples"][0]["remarks"]
    assert "trained on with strength 1 over 2 0.75" in remarks and remarks.endswith("and 2 more")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("00001.json", "{", "damaged JSON"),
        ("00001.json", '{"round": 1}', "counts of a round .KeyError: 'first_step'"),
        ("00001.jsonl", "{\n", "damaged JSON at line 1"),
        ("00001.jsonl", '{"prompt": "p"}\n', "an item of an unexpected shape .KeyError: 'answers'"),
    ],
)
def test_damage_is_named(tmp_path, name, content, words):
    folder = online(tmp_path / "run", [[item(0)]])
    (folder / "rounds" / name).write_text(content)
    with pytest.raises(InputError, match=words) as error:
        section(folder)
    assert name in str(error.value)


def test_answers_with_line_separators_stay_in_their_line(tmp_path):
    folder = online(tmp_path / "run", [[item(0, text="a\u2028b\x85c"), item(1, text="second")]])
    assert [example["candidates"][0]["text"] for example in section(folder)["examples"]] == ["a\u2028b\x85c", "second"]
    assert json.loads((folder / "rounds" / "00001.json").read_text())["prompts"] == 2
