"""Reward models of any make score as their own forward pass does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import tiny
from prefkit.domains.text.classifier import OwnForward, label, load_scorer
from prefkit.domains.text.reward import MEAN, RewardModel
from prefkit.errors import InputError

CHAT = [{"role": "user", "content": "red dog"}]
ANSWERS = ["one two", "blue", "a longer answer with the moon and the sun in it", ""]


def sharpened(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.15)
    return model.eval()


def decoder(folder: Path, family: str = "llama", pad: int = 2) -> Path:
    config = tiny.config(family)
    config.num_labels, config.pad_token_id = 1, pad
    sharpened(t.AutoModelForSequenceClassification.from_config(config)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def word_tokenizer(longest: int = 64) -> Any:
    """BERT's form of text: [CLS] a [SEP] b [SEP], with token types."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *tiny.WORDS, "user", "assistant", ":"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made = t.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        eos_token="[SEP]", model_max_length=longest,
    )  # fmt: skip
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return made


def encoder(folder: Path, kind: str) -> Path:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    ids = {"vocab_size": 64, "pad_token_id": 0, "num_labels": 1, "max_position_embeddings": 80}
    configs = {"bert": t.BertConfig, "deberta": t.DebertaV2Config, "roberta": t.RobertaConfig}
    more = {"relative_attention": True, "pooler_hidden_size": 16} if kind == "deberta" else {}
    types = {"type_vocab_size": 2}
    config = configs[kind](**size, **ids, **more, **types)
    sharpened(t.AutoModelForSequenceClassification.from_config(config)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "pad"), [("llama", 0), ("llama", 2), ("qwen2", 2), ("gpt2", 0)])
def test_a_decoder_is_read_where_its_own_forward_reads(tmp_path: Path, family: str, pad: int) -> None:
    """Published models are read at the last token that their template writes, whatever it is."""
    folder = decoder(tmp_path, family, pad)
    scorer = load_scorer(str(folder), dtype="float32")
    assert isinstance(scorer, RewardModel)
    stock = t.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = t.AutoTokenizer.from_pretrained(folder)
    expected = []
    for answer in ANSWERS:
        text = tokenizer.apply_chat_template([*CHAT, {"role": "assistant", "content": answer}], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert ids[0, -2] == 2 and tokenizer.decode(ids[0, -1:]) == "\n", "ChatML writes a line break behind its end"
        with torch.no_grad():
            expected.append(float(stock(input_ids=ids).logits[0, 0]))
    assert scorer.judge([CHAT] * 4, ANSWERS, batch_size=3) == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 4) for score in expected}) == 4
    assert len(scorer.fingerprint) == 64


@pytest.mark.parametrize("kind", ["bert", "deberta", "roberta"])
def test_an_encoder_runs_its_own_forward_on_pairs(tmp_path: Path, kind: str) -> None:
    folder = encoder(tmp_path, kind)
    scorer = load_scorer(str(folder), dtype="float32")
    assert isinstance(scorer, OwnForward)
    stock = t.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = t.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        expected = [
            float(stock(**tokenizer("red dog", answer, return_tensors="pt")).logits[0, 0]) for answer in ANSWERS
        ]
    assert len({round(score, 4) for score in expected}) == 4
    for prompt in ("red dog", CHAT):
        for size in (1, 4):
            assert scorer.judge([prompt] * 4, ANSWERS, batch_size=size) == pytest.approx(expected, abs=1e-4)
    turns = [*CHAT, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "moon"}]
    with torch.no_grad():
        text = "user: red dog\nassistant: yes\nuser: moon"
        whole = float(stock(**tokenizer(text, "sun", return_tensors="pt")).logits[0, 0])
    assert scorer.judge([turns], ["sun"]) == pytest.approx([whole], abs=1e-4)


@pytest.mark.parametrize(("pad", "read"), [(0, -1), (2, -2)])
def test_our_own_reward_model_is_read_at_the_end_token(tmp_path: Path, pad: int, read: int) -> None:
    """It says in its config.json that it is ours. With the end token as padding, transformers reads the one before."""
    folder = decoder(tmp_path, pad=pad)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {MEAN: 0.25}))
    stock = t.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [1, 87, 85, 71, 84, 201, 289, 299, 2, 201, 1, 67, 85, 85, 75, 85, 86, 67, 80, 86, 201, 260, 71, 297, 2]
    with torch.no_grad():
        logits = stock.score(stock.model(torch.tensor([ids])).last_hidden_state)[0, :, 0]
    found = load_scorer(str(folder), dtype="float32").judge([CHAT], ["one two"])
    assert found == pytest.approx([float(logits[read]) - 0.25], abs=1e-4)


@pytest.mark.parametrize("own", [False, True])
def test_a_conversation_that_leaves_no_room_is_refused(tmp_path: Path, own: bool) -> None:
    folder = encoder(tmp_path, "bert") if own else decoder(tmp_path)
    if own:
        (folder / "chat_template.jinja").write_text(tiny.TEMPLATE)
    scorer = load_scorer(str(folder), dtype="float32")
    assert isinstance(scorer, OwnForward) is own
    assert len(scorer.judge([CHAT], ["dog " * 300])) == 1, "a long answer is cut"
    with pytest.raises(InputError, match="with the answer") as caught:
        scorer.judge([CHAT, [{"role": "user", "content": "dog " * 300}]], ["a", "b"])
    assert caught.value.where == "row 2"


def test_a_template_that_refuses_is_told(tmp_path: Path) -> None:
    folder = encoder(tmp_path, "bert")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system turns') }}")
    with pytest.raises(InputError, match="no system turns"):
        load_scorer(str(folder), dtype="float32").judge([CHAT], ["a"])


def test_a_long_answer_is_cut_and_a_long_prompt_refused(tmp_path: Path) -> None:
    scorer = load_scorer(str(encoder(tmp_path, "bert")), dtype="float32")
    assert len(scorer.judge(["red"], ["dog " * 300])) == 1
    with pytest.raises(InputError, match=r"prompt has 300 tokens, and the reward model takes 64") as caught:
        scorer.judge(["red", "dog " * 300], ["a", "b"])
    assert caught.value.where == "row 2"


def test_a_name_for_the_record_holds_no_folders(tmp_path: Path) -> None:
    assert label(str(tmp_path)) == tmp_path.name
    assert label("owner/name") == "owner/name"
