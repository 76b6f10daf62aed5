"""The HTML pages: complete, self-contained, escaped, and honest about what is not shown to be true."""

import json
import re
from html.parser import HTMLParser

import pytest

import run_directory
from prefkit.commands import report
from prefkit.errors import InputError
from prefkit.report import curves, page, wording
from prefkit.report.read import Estimate, read

EVIL = "<script>alert('x')</script>"


class Links(HTMLParser):
    """Collects every address a page would load, and its unclosed tags."""

    def __init__(self):
        super().__init__()
        self.loaded, self.open, self.images = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.images += tag == "img"
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "link", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_directory.build(tmp_path_factory.mktemp("page") / "hypo-demo", steps=40, num_pairs=40, num_prompts=9)


@pytest.fixture(scope="module")
def html(run):
    return page.write(run).read_text()


def test_the_page_is_one_file(html, run):
    links = Links()
    links.feed(html)
    assert links.open == []
    assert links.images == len(list((run / "plots").glob("*.png"))) >= 10
    assert all(value.startswith("data:image/png;base64,") for value in links.loaded)
    assert "http://" not in html and "https://" not in html and "@import" not in html and "url(" not in html


def test_sections_and_print_style(html):
    for section in ("result", "change", "curves", "samples", "data", "selection", "commands", "environment", "config"):
        assert f'<section id="{section}">' in html
    assert "@media print" in html and 'name="viewport"' in html


def test_headline_says_what_was_trained_and_what_is_excluded(html):
    assert "HyPO trained a LoRA adapter on smollm2-135m-instruct on rotten-tomatoes for 40 optimizer steps." in html
    assert "0.5 is excluded: the whole interval lies above it, over 40 rows in 20 groups." in html


def test_non_default_options_come_first_with_their_defaults(html):
    first, rest = html.split("options at their defaults")
    assert re.search(r"<th scope=\"row\">kl_weight</th>\s*<td>0.01</td>\s*<td>0.0001</td>", first)
    assert "weight_decay" in rest and "weight_decay" not in first


def test_commands_name_the_run(html, run):
    for line in (
        f"prefkit hypo --from {run} --output_dir {run}-again",
        f"prefkit resume {run}",
        f"prefkit report {run}",
    ):
        assert line in html


def test_everything_from_the_run_is_escaped(tmp_path):
    folder = run_directory.build(tmp_path / "run", steps=3, config={"dataset_name": EVIL, "output_dir": EVIL})
    samples = [{"row": 0, "group": EVIL, "prompt": [{"role": "user", "content": EVIL}], "answer_final": EVIL}]
    run_directory.rows(folder / "evaluation" / "samples.jsonl", samples)
    run_directory.write(folder / "data.json", {"problems": [{"what": EVIL}], EVIL: EVIL})
    text = page.write(folder).read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 6


def test_chance_is_called_chance(tmp_path):
    folder = run_directory.build(tmp_path / "run", steps=3, effect=0)
    path = folder / "evaluation.json"
    content = json.loads(path.read_text())
    content["intervals"] = {"eval_rewards/accuracies": run_directory.interval(0.52, 0.07)}
    run_directory.write(path, content)
    text = page.write(folder).read_text()
    assert "no difference beyond chance" in text
    assert "0.5 is not excluded" in text


@pytest.mark.parametrize(
    ("mean", "groups", "kind"),
    [(0.7, 20, "good"), (0.3, 20, "bad"), (0.52, 20, "open"), (0.7, 3, "few"), (0.7, 1, "few")],
)
def test_verdicts(mean, groups, kind):
    estimate = Estimate(mean=mean, low=mean - 0.1, high=mean + 0.1, n=60, groups=groups, level=0.95, method="bootstrap")
    found, sentence = wording.judge("rewards/accuracies", estimate)
    assert found == kind
    assert ("too narrow" in sentence) == (groups < 10)


def test_held_out_rows_that_chose_the_step_are_owned_up_to(tmp_path):
    folder = run_directory.build(tmp_path / "run", steps=3)
    result = json.loads((folder / "result.json").read_text())
    run_directory.write(folder / "result.json", result | {"rule": "best eval_gold over 5 evaluations"})
    assert "somewhat optimistic" in wording.split_note(read(folder))
    data = json.loads((folder / "data.json").read_text())
    run_directory.write(folder / "data.json", data | {"parts": {"train": 9, "test": 5, "selection": 5}})
    assert "others chose the step" in wording.split_note(read(folder))


def test_a_run_that_is_still_going_gets_a_page(tmp_path):
    folder = run_directory.build(tmp_path / "run", steps=2, finished=False)
    (folder / "evaluation.json").unlink()
    (folder / "evaluation" / "samples.jsonl").unlink()
    text = page.write(folder).read_text()
    assert "has not finished" in text and "Held-out result" not in text


def test_runs_without_numbers_have_no_figures(tmp_path):
    folder = run_directory.build(tmp_path / "run", steps=1)
    (folder / "metrics.jsonl").write_text("")
    assert curves.draw(read(folder), tmp_path / "plots") == []


def test_a_page_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written.*\n  mend: choose another --out"):
        page.write(run, tmp_path / "file" / "report.html")


def test_smoothing_keeps_a_constant_and_the_mean_of_noise():
    assert curves.smoothed([2.0] * 40) == pytest.approx([2.0] * 40)
    line = [float(place) for place in range(90)]
    assert curves.smoothed(line)[10:80] == pytest.approx(line[10:80])
    noisy = [(-1.0) ** place for place in range(90)]
    assert max(map(abs, curves.smoothed(noisy)[5:-5])) < 0.2


def test_the_command_for_one_run_writes_page_figures_and_card(tmp_path, capsys):
    folder = run_directory.build(tmp_path / "run", steps=3)
    (folder / "model").mkdir()
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    card = folder / "model" / "README.md"
    assert card.read_text().startswith("---\n")
    card.write_text("mine")
    report.main([str(folder), "--out", str(tmp_path / "elsewhere.html")])
    assert card.read_text() == "mine"
    assert (tmp_path / "elsewhere.html").is_file()


def test_the_command_for_several_runs(tmp_path, capsys):
    folders = [
        run_directory.build(tmp_path / name, steps=12, effect=effect, seed=seed, config={"beta": 0.1 * (seed + 1)})
        for seed, (name, effect) in enumerate((("a", 1.0), ("b", 0.2)))
    ]
    other = run_directory.build(tmp_path / "c", steps=12, num_pairs=7)
    out = tmp_path / "both.html"
    assert report.main([*map(str, folders), str(other), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    text = out.read_text()
    links = Links()
    links.feed(text)
    assert links.open == [] and all(value.startswith("data:") for value in links.loaded)
    assert "a minus b" in text and "a minus c" not in text
    assert "No paired differences between a and c" in text and "7 match" in text
    assert re.search(r"<th scope=\"row\">beta</th>\s*<td>0.1</td>\s*<td>0.2</td>", text)


def test_the_same_run_twice_is_refused(run):
    with pytest.raises(InputError, match="stands twice"):
        report.main([str(run), str(run)])
