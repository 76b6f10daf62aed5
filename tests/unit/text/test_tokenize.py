"""Tokenization on three families: the failures users of other libraries report, turned into tests."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.tiny_tokenizers import CHATML, byte_bpe, chatml, families, sentencepiece, whole_words

from prefkit.domains.text.render import front_tokens, stop_tokens
from prefkit.domains.text.tokenize import (
    tokenize_completion,
    tokenize_pair,
    tokenize_pairs,
    tokenize_prompt,
    tokenize_prompts,
)
from prefkit.errors import InputError
from prefkit.records import Completion, Pair, Preference

FAMILIES = ("byte_bpe", "chatml", "sentencepiece")


def chat(question: str, chosen: str, rejected: str, **columns: Any) -> Preference:
    return Preference(
        prompt=[{"role": "user", "content": question}],
        chosen=[{"role": "assistant", "content": chosen}],
        rejected=[{"role": "assistant", "content": rejected}],
        **columns,
    )


def strings(prompt: str, chosen: str, rejected: str, **columns: Any) -> Preference:
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, **columns)


def text(tokenizer: Any, *parts: Any) -> str:
    ids = [token for part in parts for token in part]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def pair(tokenizer: Any, row: Preference, **options: Any) -> Pair:
    return tokenize_pair(tokenizer, row, **{"max_length": 200, **options})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("The capital of France is", " Paris.", " London."),
        ("A: ", "14", "15"),
        ("A:", "14", "15"),
        ("The sky ", "is blue", "is green"),
        ("Question:\n", "\nhow", "how"),
        ("cap", "ital", "able"),
    ],
)
def test_prompt_and_answer_read_as_the_full_text(family: str, prompt: str, chosen: str, rejected: str) -> None:
    tokenizer = families()[family]
    made = pair(tokenizer, strings(prompt, chosen, rejected))
    front = front_tokens(tokenizer)
    for answer, ids in ((chosen, made.chosen), (rejected, made.rejected)):
        assert list(ids)[-1] == tokenizer.eos_token_id
        assert text(tokenizer, made.prompt[len(front) :], ids[:-1]) == prompt + answer
    assert made.prompt == tokenize_prompt(tokenizer, prompt)


pieces = st.text(alphabet="aeiTh 14:.\n", max_size=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(FAMILIES), pieces.map(lambda s: "T" + s), pieces.map(lambda s: s + "h"))
def test_any_border_is_exact(family: str, prompt: str, answer: str) -> None:
    tokenizer = families()[family]
    full = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    made = tokenize_completion(tokenizer, Completion(prompt=prompt, completion=answer), max_length=99)
    bare = made.prompt[len(front_tokens(tokenizer)) :]
    assert text(tokenizer, bare, made.completion[:-1]) == text(tokenizer, full)
    assert made.prompt == tokenize_prompt(tokenizer, prompt)


def test_a_merge_across_the_border_is_encoded_apart() -> None:
    tokenizer = byte_bpe()
    whole = tokenizer(" capital", add_special_tokens=False)["input_ids"]
    assert len(whole) == 1, "the test needs a word that is one token"
    made = pair(tokenizer, strings(" cap", "ital", "able"))
    assert made.prompt == tokenize_prompt(tokenizer, " cap")
    assert text(tokenizer, made.prompt, made.chosen[:-1]) == " capital"


def test_a_border_that_cannot_be_kept_is_refused_with_the_row() -> None:
    tokenizer = whole_words(["capital", "cap", "ital", "able"])
    with pytest.raises(InputError, match="row 3, field 'chosen': a token straddles the border"):
        pair(tokenizer, strings("cap", "ital", " able", row=2))
    assert len(pair(tokenizer, strings("cap", " ital", " able")).chosen) == 2


def test_both_answers_share_the_prompt_ids() -> None:
    tokenizer = sentencepiece()
    made = pair(tokenizer, strings("The sky ", "is blue", " really"))
    assert made.prompt == tokenize_prompt(tokenizer, "The sky ")


def test_one_bos_whether_the_text_has_it_or_not() -> None:
    tokenizer = sentencepiece()
    for prompt in ("The sky", "<s>The sky"):
        assert list(pair(tokenizer, strings(prompt, " is", " was")).prompt).count(tokenizer.bos_token_id) == 1
    template = sentencepiece(template=True)
    made = pair(template, chat("The sky?", "blue", "green"))
    assert list(made.prompt).count(template.bos_token_id) == 1
    assert made.prompt[0] == template.bos_token_id
    assert template.bos_token_id not in made.chosen


@pytest.mark.parametrize("family", FAMILIES)
def test_one_eos_at_the_end_of_a_whole_answer(family: str) -> None:
    tokenizer = families()[family]
    eos = tokenizer.eos_token_id
    for answer in (" blue", " blue" + tokenizer.eos_token, " blue" + tokenizer.eos_token + "\n"):
        made = pair(tokenizer, strings("The sky is", answer, " green"))
        assert list(made.chosen).count(eos) == 1 and made.chosen[-1] == eos
    assert eos not in pair(tokenizer, strings("The sky is", " blue", " green"), append_eos=False).chosen
    with pytest.raises(InputError, match="row 1, field 'rejected': the end-of-sequence token stands inside"):
        pair(tokenizer, strings("The sky", " is", f" is{tokenizer.eos_token} blue"))


def test_a_chat_answer_ends_at_eos_without_the_line_break_behind() -> None:
    tokenizer = chatml()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = chat("What is the capital of France?", "Paris.", "\nLondon")
    made = pair(tokenizer, row)
    assert text(tokenizer, made.prompt) == (
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text(tokenizer, made.chosen) == "Paris.<|im_end|>"
    assert text(tokenizer, made.rejected) == "\nLondon<|im_end|>"
    assert made.prompt == tokenize_prompt(tokenizer, row.prompt)
    assert text(tokenizer, pair(tokenizer, row, append_eos=False).chosen) == "Paris."


def test_prompt_ids_begin_the_ids_of_the_whole_conversation() -> None:
    tokenizer = chatml()
    row = chat("Tell me a story.", "Once upon a time", "No")
    whole = tokenizer.apply_chat_template([*row.prompt, *row.chosen], tokenize=True, return_dict=False)
    made = pair(tokenizer, row)
    assert [*made.prompt, *made.chosen] == whole[: len(made.prompt) + len(made.chosen)]


def test_tool_turns_inside_an_answer_keep_their_own_ends() -> None:
    tokenizer = chatml()
    answer = [
        {"role": "assistant", "content": "I look"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "four"},
    ]
    row = Completion(prompt=[{"role": "user", "content": "2+2"}], completion=answer)
    made = tokenize_completion(tokenizer, row, max_length=200)
    assert text(tokenizer, made.completion).endswith("four<|im_end|>")
    assert list(made.completion).count(tokenizer.eos_token_id) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_answer_is_marked_and_has_no_eos(family: str) -> None:
    tokenizer = families()[family]
    row = strings("The sky", " is blue and the sea is green.", " is")
    whole = pair(tokenizer, row)
    limit = len(whole.prompt) + len(whole.chosen)
    assert not pair(tokenizer, row, max_length=limit).chosen_truncated
    for shorter in (1, 3):
        made = pair(tokenizer, row, max_length=limit - shorter)
        assert made.chosen == whole.chosen[:-shorter]
        assert tokenizer.eos_token_id not in made.chosen
        assert made.chosen_truncated and not made.rejected_truncated
        assert len(made.prompt) + len(made.chosen) == limit - shorter


def test_long_prompts_are_refused_or_dropped() -> None:
    tokenizer = byte_bpe()
    rows = [strings("A good film", " yes", " no", row=6), strings("A bad film " * 20, " yes", " no", row=7)]
    with pytest.raises(InputError, match=r"row 8, field 'prompt': the prompt has \d+ tokens.*max_length 20"):
        tokenize_pairs(tokenizer, rows, max_length=20)
    kept = tokenize_pairs(tokenizer, rows, max_length=20, long_prompts="drop")
    assert [made.source.row for made in kept] == [6]
    exact = len(tokenize_prompt(tokenizer, rows[0].prompt))
    with pytest.raises(InputError, match="no room"):
        pair(tokenizer, rows[0], max_length=exact)
    assert len(pair(tokenizer, rows[0], max_length=exact + 1).chosen) == 1


def test_conversations_need_a_template() -> None:
    with pytest.raises(InputError, match="no chat template"):
        pair(byte_bpe(), chat("a", "b", "c"))
    with pytest.raises(InputError, match="no chat template"):
        tokenize_prompt(byte_bpe(), [{"role": "user", "content": "a"}])


def test_a_template_that_rewrites_the_prompt_is_refused_with_the_row() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = CHATML.replace(
        "<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>{% endif"
    )
    with pytest.raises(InputError, match="row 4, field 'prompt': the chat template renders the prompt differently"):
        pair(tokenizer, chat("a", "b", "c", row=3))


def test_a_template_may_refuse_a_conversation() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(InputError, match=r"row 4, field 'prompt': .*no system turns"):
        pair(tokenizer, chat("a", "b", "c", row=3))


def test_template_options_of_a_row_reach_the_template() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = "{{ mood }}" + CHATML
    row = chat("a", "b", "c", extra={"chat_template_kwargs": {"mood": "calm"}})
    assert text(tokenizer, pair(tokenizer, row).prompt).startswith("calm<|im_start|>")
    assert tokenize_prompts(tokenizer, [row.prompt], extras=[row.extra]) == [pair(tokenizer, row).prompt]


def test_a_turn_closed_by_another_token_than_eos() -> None:
    tokenizer = chatml()
    tokenizer.eos_token = "<|endoftext|>"
    assert stop_tokens(tokenizer) == (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert text(tokenizer, pair(tokenizer, chat("a", "b", "c")).chosen) == "b<|im_end|>"
    tokenizer.chat_template = CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    assert stop_tokens(tokenizer) == (tokenizer.eos_token_id,)


def test_a_template_that_closes_nothing_gets_eos() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert text(tokenizer, pair(tokenizer, chat("a", "b", "c")).chosen) == " b\n<|im_end|>"


def test_empty_prompts() -> None:
    made = pair(sentencepiece(), strings("", "blue", "green"))
    assert made.prompt == [sentencepiece().bos_token_id]
    with pytest.raises(InputError, match="the prompt is empty"):
        pair(byte_bpe(), strings("", "blue", "green"))
    row = tokenize_completion(byte_bpe(), Completion(prompt="", completion="The sky is blue"), max_length=50)
    assert text(byte_bpe(), row.prompt, row.completion) == "The sky is blue<|endoftext|>"
    assert len(row.prompt) == 1


def test_an_empty_prompt_before_text_that_spells_out_bos() -> None:
    tokenizer = sentencepiece()
    bos = tokenizer.bos_token_id
    plain = tokenize_completion(tokenizer, Completion(prompt="", completion="The sky"), max_length=50)
    spelled = tokenize_completion(tokenizer, Completion(prompt="", completion="<s>The sky"), max_length=50)
    assert plain.prompt == spelled.prompt == [bos]
    assert list(spelled.completion).count(bos) == 0 and text(tokenizer, spelled.completion[:-1]).strip() == "The sky"
    made = pair(tokenizer, strings("", "<s>blue", "green"))
    assert made.prompt == [bos] and bos not in [*made.chosen, *made.rejected]


def test_text_rows_may_hold_several_turns() -> None:
    tokenizer = chatml()
    eos = tokenizer.eos_token_id
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert isinstance(whole, str)
    row = tokenize_completion(tokenizer, Completion(prompt="", completion=whole), max_length=200)
    assert text(tokenizer, row.prompt, row.completion) == whole.rstrip("\n")
    assert list(row.completion).count(eos) == 4
    unclosed = tokenize_completion(tokenizer, Completion(prompt="", completion=whole + "more"), max_length=200)
    assert list(unclosed.completion).count(eos) == 5 and unclosed.completion[-1] == eos
    with pytest.raises(InputError, match="twice at its end"):
        tokenize_completion(tokenizer, Completion(prompt="", completion="a<|im_end|><|im_end|>"), max_length=200)
    with pytest.raises(InputError, match="stands inside"):
        tokenize_completion(tokenizer, Completion(prompt="a", completion=whole), max_length=200)


def test_no_end_of_sequence_token() -> None:
    tokenizer = byte_bpe()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        pair(tokenizer, strings("a", " b", " c"))
    assert text(tokenizer, pair(tokenizer, strings("a", " b", " c"), append_eos=False).chosen) == " b"


def test_many_rows_equal_single_rows() -> None:
    tokenizer = chatml()
    rows: list[Preference] = [chat(f"What is {i}?", "blue " * (i % 5 + 1), "no", row=i) for i in range(30)]
    rows += [strings(f"The sky {i} ", "is blue", "was", row=30 + i) for i in range(10)]
    assert tokenize_pairs(tokenizer, rows, max_length=60) == [pair(tokenizer, row, max_length=60) for row in rows]
