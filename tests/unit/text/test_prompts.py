import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefkit.domains.text.prompts import last_content, plain, split_messages, split_strings, turn_order


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky", "The sky is blue", "The"),
        ("Paris ", "London", ""),
        ("A: 14", "A: 15", "A:"),
        ("Pi is 3.14", "Pi is 3.15", "Pi is"),
        ("Q: hi A: yes", "Q: hi A: no", "Q: hi A:"),
        ("Q\nA:\nYes", "Q\nA:\nNo", "Q\nA:\n"),
        ("Say so", "Say\nso", "Say"),
        ("word", "words", ""),
        ("same text", "same text", "same"),
        (" a", " b", ""),
        ("", "x", ""),
        (
            "\n\nHuman: Hi\n\nAssistant: Yes I can",
            "\n\nHuman: Hi\n\nAssistant: Yes I will",
            "\n\nHuman: Hi\n\nAssistant:",
        ),
        ("POST: x\nTL;DR: He left home", "POST: x\nTL;DR: He left town", "POST: x\nTL;DR:"),
    ],
)
def test_string_prompts_end_at_a_turn_or_a_word(chosen: str, rejected: str, prompt: str) -> None:
    assert chosen[: split_strings(chosen, rejected)] == prompt


words = st.text(alphabet="ab1. \n", max_size=12)


@given(words, words, words)
def test_a_split_never_cuts_a_word_or_empties_an_answer(start: str, left: str, right: str) -> None:
    chosen, rejected = start + left, start + right
    end = split_strings(chosen, rejected)
    if end:
        assert chosen[:end] == rejected[:end]
        assert chosen[:end].strip() and chosen[end:].strip() and rejected[end:].strip()
        for text in (chosen, rejected):
            assert text[end - 1].isspace() or text[end].isspace()


def test_conversations_split_at_the_last_common_user_turn() -> None:
    shared = [user("a"), assistant("b"), user("c")]
    assert split_messages([*shared, assistant("x")], [*shared, assistant("y")]) == 3
    assert split_messages([*shared, assistant("x")], [*shared, assistant("x")]) == 3
    assert split_messages([user("a"), assistant("b")], [user("a"), assistant("b"), user("c"), assistant("d")]) == 1
    assert split_messages([user("a"), assistant("b")], [user("z"), assistant("b")]) == 0
    assert (
        split_messages([{"role": "system", "content": "s"}, user("a")], [{"role": "system", "content": "s"}, user("b")])
        == 0
    )


@pytest.mark.parametrize(
    ("prompt", "answer", "complaint"),
    [
        ([user("a")], [assistant("b")], ""),
        ([{"role": "system", "content": "s"}, user("a")], [assistant("b")], ""),
        ([user("a")], [assistant("b"), {"role": "tool", "content": "4"}, assistant("c")], ""),
        ([user("a"), user("b")], [assistant("c")], "prompt message 2: two user turns in a row"),
        ([assistant("a")], [assistant("c")], "prompt message 1: an assistant turn comes first"),
        ([user("a"), assistant("b")], [assistant("c")], "answer message 1: two assistant turns in a row"),
        ([user("a")], [user("a"), assistant("b")], "answer message 1: two user turns in a row"),
        (
            [user("a")],
            [assistant("b"), user("c"), assistant("d")],
            "answer message 2: a user turn inside the answer",
        ),
        (
            [user("a")],
            [assistant("b"), {"role": "tool", "content": "4"}],
            "the answer does not end with an assistant turn",
        ),
        (
            [{"role": "system", "content": "s"}],
            [assistant("b")],
            "answer message 1: an assistant turn after the system turn",
        ),
    ],
)
def test_turn_order(prompt: list, answer: list, complaint: str) -> None:
    assert turn_order(prompt, answer) == complaint


def test_plain_and_last_content() -> None:
    assert plain([user("a"), assistant("b")]) == "user: a\nassistant: b"
    assert plain("a") == last_content("a") == "a"
    assert last_content([user("a"), assistant("b")]) == "b"
