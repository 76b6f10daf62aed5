"""The pairwise ranker: its rows, its forward, both published layouts, and the judge on it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from prefkit.errors import InputError
from prefkit.feedback.ranker import PairRanker, RankerJudge, RankerModule
from prefkit.feedback.ranker_input import FIRST, MARKERS, SECOND, SOURCE, Batch, Form, Reader, texts_of
from prefkit.feedback.ranker_layout import context_of, read_out_of
from prefkit.feedback.ranking import order_of
from prefkit.records import Question
from tiny_encoders import deberta, encoder_tokenizer

SHORT = Form(source_maxlength=12, candidate_maxlength=8)
QUESTION = Question(prompt="red blue", answers=["cat dog", "one two three", "sun", "yes no maybe moon"])


def ranker(seed: int = 0, form: Form = SHORT, sharp: float = 8.0) -> PairRanker:
    """A random ranker on a tiny DeBERTa; `sharp` spreads its logits."""
    from transformers import AutoModel

    torch.manual_seed(seed)
    made = PairRanker.start(AutoModel.from_config(deberta()), encoder_tokenizer(), form, seed=seed)
    with torch.no_grad():
        for weight in made.module.parameters():
            if weight.dim() > 1:
                weight.mul_(sharp)
    return made


def words(reader: Reader, ids: Sequence[int]) -> str:
    return " ".join(reader.tokenizer.convert_ids_to_tokens(list(ids)))


def a_row(made: PairRanker, source: str, first: str, second: str) -> Any:
    reader = made.reader
    return reader.row(reader.sources([source])[0], *reader.candidates([first, second]))


# rows


def test_a_row_has_the_published_form() -> None:
    made = ranker()
    row = a_row(made, "red blue", "cat", "one two")
    assert words(made.reader, row.ids) == (
        f"[CLS] {SOURCE} red blue [SEP] [CLS] {FIRST} cat [SEP] [CLS] {SECOND} one two [SEP]"
    )
    assert [words(made.reader, [row.ids[place]]) for place in row.places] == [SOURCE, FIRST, SECOND]
    assert not (row.cut_source or row.cut_first or row.cut_second)


def test_the_parts_are_what_the_published_code_encodes() -> None:
    """tokenizer.encode(prefix + text) for each part, truncated by transformers itself."""
    made = ranker()
    tokenizer, source, first, second = made.tokenizer, "red " * 30, "cat " * 30, "dog one"
    expected = tokenizer.encode(SOURCE + source, max_length=12, truncation=True)
    room = (12 + 2 * 8 - len(expected)) // 2
    expected += tokenizer.encode(FIRST + first, max_length=room, truncation=True)
    expected += tokenizer.encode(SECOND + second, max_length=room, truncation=True)
    row = a_row(made, source, first, second)
    assert list(row.ids) == expected
    assert (row.cut_source, row.cut_first, row.cut_second) == (True, True, False)


def test_candidates_get_the_room_a_short_source_leaves() -> None:
    made = ranker()
    row = a_row(made, "red", "cat " * 30, "dog " * 30)
    assert len(row.ids) == 4 + 2 * ((28 - 4) // 2) == SHORT.longest
    made.reader.form = replace(SHORT, cut_source="left")
    row = a_row(made, "red " * 20 + "blue", "cat", "dog")
    assert words(made.reader, row.ids[:12]).endswith("red blue [SEP]") and row.cut_source


def test_a_text_cannot_forge_a_marker() -> None:
    made = ranker()
    row = a_row(made, f"red {SECOND} blue", f"cat [SEP] {SECOND} dog", "<|candidate|> one [CLS]")
    markers = [made.reader.markers[marker] for marker in MARKERS]
    assert [token for token in row.ids if token in markers] == markers[:3]
    assert row.ids.count(2) == row.ids.count(1) == 3
    assert [row.ids[place] for place in row.places] == markers[:3]


def test_a_causal_tokenizer_gets_its_end_token() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(list(MARKERS))
    reader = Reader(tokenizer, replace(SHORT, read_out="ends"))
    row = reader.row(reader.sources(["red"])[0], *reader.candidates(["blue", "green"]))
    end = tokenizer.eos_token_id
    assert [row.ids[place] for place in row.places] == [end, end, end] and row.places[-1] == len(row.ids) - 1
    assert row.ids[0] == tokenizer.convert_tokens_to_ids(SOURCE)


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(InputError, match="does not know the ranker's markers"):
        Reader(encoder_tokenizer(), SHORT)
    with pytest.raises(InputError, match="leave no text") as caught:
        ranker(form=Form(source_maxlength=3, candidate_maxlength=8))
    assert "--source_maxlength" in str(caught.value)


def test_conversations_take_the_published_form() -> None:
    user, reply = {"role": "user", "content": "red?"}, {"role": "assistant", "content": "blue."}
    assert texts_of("red?", ["a", "b"]) == ("red?", ["a", "b"])
    assert texts_of([user], ["a", [{"role": "assistant", "content": "b"}]]) == ("red?", ["a", "b"])
    assert texts_of([{"role": "system", "content": "Be brief."}, user], ["a"]) == ("Be brief.\nred?", ["a"])
    source, candidates = texts_of([user, reply, {"role": "user", "content": "why?"}], ["a", "b"])
    assert source == (
        "Finish the following coversation in each i-th turn by filling in <Response i> with your response."
        "USER: red?\nAssistant: <Response 1>\nUSER: why?\nAssistant: <Response 2>"
    )
    assert candidates == ["<Response 1>: blue.\n<Response 2>: a", "<Response 1>: blue.\n<Response 2>: b"]


# the forward


class _Known(nn.Module):
    """A backbone whose hidden state at a place is (token, place)."""

    def __init__(self) -> None:
        super().__init__()
        text = SimpleNamespace(hidden_size=2)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        place = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return SimpleNamespace(last_hidden_state=torch.stack((input_ids, place), -1).float())


def test_logits_by_hand() -> None:
    module = RankerModule(_Known(), tasks=2, dtype=torch.float32).eval()
    assert list(module.state_dict()) == [f"head_layer.{i}.{kind}" for i in (1, 4) for kind in ("weight", "bias")]
    first, last = module.head_layer[1], module.head_layer[4]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.0], [0.0, -0.1, 0.0, 0.2]]))
        first.bias.copy_(torch.tensor([0.05, -0.05]))
        last.weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, 0.5]]))
        last.bias.copy_(torch.tensor([9.0, -7.0]))
    batch = Batch(torch.tensor([[3, 1, 4, 1, 5]]), torch.ones(1, 5, dtype=torch.long), torch.tensor([[0, 2, 4]]))

    def scores(token: float, place: float) -> list[float]:
        hidden = [math.tanh(0.1 * 3 + 0.3 * token + 0.05), math.tanh(0.2 * place - 0.05)]
        return [hidden[0] + 2 * hidden[1] + 9, -hidden[0] + 0.5 * hidden[1] - 7]

    one, two = scores(4, 2), scores(5, 4)
    expected = ((one[0] - two[0]) + (one[1] - two[1])) / 2
    assert module(batch).tolist() == pytest.approx([expected], abs=1e-6)


def test_padding_and_neighbours_change_nothing() -> None:
    made = ranker()
    rows = [a_row(made, "red blue", "cat", "dog one two"), a_row(made, "sun " * 6, "yes no maybe one", "star " * 7)]
    with torch.no_grad():
        together = made.logits(rows)
        apart = torch.cat([made.logits([row]) for row in rows])
    assert len(rows[0].ids) < len(rows[1].ids)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    assert abs(float(apart[0] - apart[1])) > 1e-3


def test_a_fresh_ranker_depends_on_the_seed_alone() -> None:
    from transformers import AutoModel

    torch.manual_seed(0)
    backbone = AutoModel.from_config(deberta()).state_dict()

    def start(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed * 7 + 3)
        fresh = AutoModel.from_config(deberta())
        fresh.load_state_dict(backbone)
        return PairRanker.start(fresh, encoder_tokenizer(), SHORT, seed=seed).module.state_dict()

    one, again, other = start(1), start(1), start(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    embeddings = "pretrained_model.embeddings.word_embeddings.weight"
    assert one[embeddings].shape[0] == 24 and torch.equal(one[embeddings][:20], backbone[embeddings.partition(".")[2]])
    assert not torch.equal(one[embeddings][20:], other[embeddings][20:])
    assert not torch.equal(one["head_layer.1.weight"], other["head_layer.1.weight"])


# folders


def published(made: PairRanker, folder: Path, layout: str) -> Path:
    """What llm-blender publishes: PairRM (its own settings, the backbone beside it) or PairRM-hf."""
    made.save(folder)
    settings = json.loads((folder / "config.json").read_text())
    if layout == "hf":
        for key in ("source_maxlength", "candidate_maxlength", "prefkit_ranker"):
            settings.pop(key)
    else:
        (folder / "backbone").mkdir()
        deberta(vocab_size=30).save_pretrained(folder / "backbone")  # larger than the ranker's, as DeBERTa-v3's is
        encoder_tokenizer().save_pretrained(folder / "backbone")
        for file in folder.glob("tokenizer*"):
            file.unlink()
        settings = {"ranker_type": "pairranker", "model_type": "deberta", "model_name": "backbone", "n_tasks": 1}
        settings |= {"source_maxlength": 12, "candidate_maxlength": 8, "drop_out": 0.05, "loss_type": "instructgpt"}
        settings |= {"reduce_type": "linear", "inference_mode": "bubble", "fp16": True}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("layout", ["hf", "blender"])
def test_both_published_layouts_give_the_same_logits(tmp_path: Path, layout: str) -> None:
    made = ranker()
    found = PairRanker.load(published(made, tmp_path / "PairRM", layout), device="cpu", dtype="float32")
    rows = [a_row(one, "red blue", "cat", "dog one two") for one in (made, found)]
    assert rows[0] == rows[1]
    assert torch.equal(found.logits([rows[0]]), made.logits([rows[0]]).detach())
    assert found.form == (SHORT if layout == "blender" else Form())
    assert found.version.startswith("PairRM@") and len(found.version) == 7 + 12
    assert not any(weight.requires_grad for weight in found.module.parameters())


def test_a_saved_ranker_has_the_published_names(tmp_path: Path) -> None:
    ranker().save(tmp_path / "made")
    names = set(load_file(tmp_path / "made" / "model.safetensors"))
    heads = {f"head_layer.{i}.{kind}" for i in (1, 4) for kind in ("weight", "bias")}
    assert heads < names and all(name.startswith("pretrained_model.") for name in names - heads)
    settings = json.loads((tmp_path / "made" / "config.json").read_text())
    assert settings["architectures"] == ["DebertaV2PairRM"] and settings["model_type"] == "deberta-v2"
    assert [settings[f"{name}_prefix_id"] for name in ("source", "cand1", "cand2", "cand")] == [20, 21, 22, 23]
    assert settings["vocab_size"] == 24 and settings["sep_token_id"] == 2 and settings["n_tasks"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["made"], "nothing unfinished is left"


def test_an_old_encoder_s_extras_are_passed_over(tmp_path: Path) -> None:
    made = ranker()
    made.save(tmp_path / "r")
    file = tmp_path / "r" / "model.safetensors"
    state = load_file(file) | {
        "pretrained_model.embeddings.position_ids": torch.arange(4)[None],
        "pretrained_model.pooler.dense.weight": torch.zeros(2, 2),
    }
    save_file(state, file)
    found = PairRanker.load(tmp_path / "r", device="cpu", dtype="float32")
    assert torch.equal(found.module.state_dict()["head_layer.1.bias"], made.module.state_dict()["head_layer.1.bias"])


def spoil(folder: Path, how: str) -> None:
    file, config = folder / "model.safetensors", folder / "config.json"
    state, settings = load_file(file), json.loads(config.read_text())
    match how:
        case "pickled":
            file.unlink()
            torch.save(state, folder / "pytorch_model.bin")
        case "empty":
            file.unlink()
        case "damaged":
            file.write_bytes(file.read_bytes()[:-9])
        case "lacking":
            del state["head_layer.4.weight"]
            save_file(state, file)
        case "strange":
            save_file(state | {"head_layer.6.weight": torch.zeros(1)}, file)
        case "shape":
            save_file(state | {"head_layer.4.weight": torch.zeros(3, 16)}, file)
        case "markers":
            config.write_text(json.dumps(settings | {"cand1_prefix_id": 5}))
        case "another":
            config.write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
        case _:
            config.write_text(json.dumps({"ranker_type": "summareranker"}))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("pickled", ("pytorch_model.bin", "pickle", "weights_only=True", "save_file")),
        ("empty", ("holds no weights",)),
        ("damaged", ("cannot be read", "model.safetensors")),
        ("lacking", ("lacks head_layer.4.weight", "model.safetensors")),
        ("strange", ("has head_layer.6.weight",)),
        ("shape", ("head_layer.4.weight has shape (3, 16), not (1, 16)",)),
        ("markers", ("cand1_prefix_id is 5", "the tokenizer has 21")),
        ("another", ("is no pairwise ranker (LlamaForCausalLM)", "reward:MODEL")),
        ("kind", ("is no pairwise ranker (summareranker)",)),
    ],
)
def test_folders_that_cannot_be_used_are_refused(tmp_path: Path, how: str, said: tuple[str, ...]) -> None:
    ranker().save(tmp_path / "r")
    spoil(tmp_path / "r", how)
    with pytest.raises(InputError) as caught:
        PairRanker.load(tmp_path / "r", device="cpu")
    assert all(word in str(caught.value) for word in (*said, "mend")), str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no ranker folder"):
        PairRanker.load(tmp_path / "nowhere")


def test_where_features_stand_and_how_long_rows_may_be() -> None:
    import transformers as t

    assert read_out_of(deberta()) == read_out_of(t.BertConfig()) == read_out_of(t.ModernBertConfig()) == "markers"
    assert read_out_of(t.LlamaConfig()) == read_out_of(t.GPT2Config()) == "ends"
    for config in (t.T5Config(), t.ViTConfig()):
        with pytest.raises(InputError, match="neither an encoder nor a causal model"):
            read_out_of(config)
    assert context_of(deberta()) == 0 and context_of(deberta(position_biased_input=True)) == 64
    assert context_of(t.RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    assert context_of(t.LlamaConfig(max_position_embeddings=128)) == 128


# the judge


def probs(judge: RankerJudge, question: Question) -> dict[tuple[int, int], float | None]:
    return {(c.first, c.second): c.prob_first for c in judge.judge([question])[0].comparisons}


def test_both_orders_are_asked_and_their_logits_averaged() -> None:
    made = ranker()
    verdict = RankerJudge(made).judge([QUESTION])[0]
    assert [(c.first, c.second) for c in verdict.comparisons] == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    texts = QUESTION.answers
    for found in verdict.comparisons:
        pair = (texts[found.first], texts[found.second])
        with torch.no_grad():
            ahead = float(made.logits([a_row(made, "red blue", *pair)]))
            behind = -float(made.logits([a_row(made, "red blue", *reversed(pair))]))
        expected = 1 / (1 + math.exp(-(ahead + behind) / 2))
        assert found.prob_first == pytest.approx(expected, abs=1e-5) and found.orders is not None
        assert found.orders == pytest.approx((1 / (1 + math.exp(-ahead)), 1 / (1 + math.exp(-behind))), abs=1e-5)
        assert found.orders[0] != pytest.approx(found.orders[1], abs=1e-4), "a random ranker minds the order"
    assert verdict.calls == 12 and verdict.tokens == 2 * sum(
        len(a_row(made, "red blue", texts[c.first], texts[c.second]).ids) for c in verdict.comparisons
    )
    assert verdict.scores is None and verdict.judge == "ranker:in memory"


def test_a_pair_the_other_way_round_has_the_other_probability() -> None:
    judge = RankerJudge(ranker())
    wanted = probs(judge, replace(QUESTION, pairs=((2, 0), (0, 2), (3, 1))))
    assert list(wanted) == [(2, 0), (0, 2), (3, 1)]
    forward = probs(judge, QUESTION)
    for first, second in ((0, 2), (1, 3)):
        turned, straight = wanted[second, first], forward[first, second]
        assert turned is not None and straight is not None
        assert turned == pytest.approx(1 - straight, abs=1e-6)
    assert RankerJudge(ranker()).judge([replace(QUESTION, pairs=((2, 0), (0, 2)))])[0].calls == 2


def test_equal_answers_tie_and_an_order_of_k_does_not_mind_their_places() -> None:
    judge = RankerJudge(ranker())
    twice = judge.judge([Question(prompt="red", answers=["cat dog", "cat dog", "sun"])])[0]
    tie, one, other = twice.comparisons
    assert (tie.prob_first, tie.orders, twice.calls) == (0.5, None, 2), "not read, so no agreement of orders to count"
    assert (one.prob_first, one.orders) == (other.prob_first, other.orders) and one.prob_first != 0.5
    answers = list(QUESTION.answers)
    straight = judge.judge([QUESTION])[0]
    shuffled = replace(QUESTION, answers=[answers[i] for i in (2, 0, 3, 1)])
    turned = judge.judge([shuffled])[0]
    best = [answers[place] for place in order_of(QUESTION, straight)]
    assert best == [shuffled.answers[place] for place in order_of(shuffled, turned)]
    wins = {
        word: sum(
            p
            for c in straight.comparisons
            if c.prob_first is not None
            for p, place in ((c.prob_first, c.first), (1 - c.prob_first, c.second))
            if answers[place] == word
        )
        for word in answers
    }
    assert best == sorted(answers, key=lambda word: -wins[word])


def test_batches_change_no_verdict() -> None:
    made = ranker()
    questions = [QUESTION, Question(prompt="sun", answers=["moon", "star star"]), Question(prompt="one", answers=[])]
    small, big = (RankerJudge(made, batch_size=size).judge(questions) for size in (1, 64))
    for one, two in zip(small, big, strict=True):
        assert [c.prob_first for c in one.comparisons] == pytest.approx(
            [c.prob_first for c in two.comparisons], abs=1e-5
        )
    assert not small[2].comparisons
    assert RankerJudge(made, batch_size=3).judge(questions) == RankerJudge(made, batch_size=3).judge(questions)
    assert RankerJudge(made).judge([]) == []


def test_what_was_cut_is_counted_and_said_once() -> None:
    said: list[str] = []
    judge = RankerJudge(ranker(), say=said.append)
    judge.judge([QUESTION])
    assert not said and judge.cut_sources == judge.cut_answers == 0
    long = Question(prompt="red " * 40, answers=["cat " * 40, "dog", "sun " * 40])
    judge.judge([long, QUESTION])
    assert (judge.cut_sources, judge.cut_answers) == (1, 2)
    judge.judge([long])
    assert (judge.cut_sources, judge.cut_answers) == (2, 4)
    assert len(said) == 1 and "1 prompts and 2 answers" in said[0] and "12 tokens" in said[0]


def test_a_logit_that_is_no_number_is_no_verdict() -> None:
    made = ranker()
    with torch.no_grad():
        made.module.head_layer[4].bias.fill_(math.nan)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    found = RankerJudge(made).judge([QUESTION])[0].comparisons
    assert all(c.prob_first is None and c.reason == "failed" for c in found)


def test_other_weights_have_another_name(tmp_path: Path) -> None:
    for seed in (0, 1):
        ranker(seed).save(tmp_path / str(seed) / "judge")
    names = [RankerJudge(PairRanker.load(tmp_path / str(seed) / "judge")).name for seed in (0, 1)]
    assert all(name.startswith("ranker:judge@") for name in names) and names[0] != names[1]
    assert RankerJudge(PairRanker.load(tmp_path / "0" / "judge")).name == names[0]


def test_bfloat16_comes_close(tmp_path: Path) -> None:
    ranker(sharp=2.0).save(tmp_path / "r")
    exact, rough = (
        RankerJudge(PairRanker.load(tmp_path / "r", device="cpu", dtype=d)) for d in ("float32", "bfloat16")
    )
    wanted, found = probs(exact, QUESTION), probs(rough, QUESTION)
    assert {weight.dtype for weight in rough.ranker.module.pretrained_model.parameters()} == {torch.bfloat16}
    assert list(found.values()) == pytest.approx(list(wanted.values()), abs=0.05)
