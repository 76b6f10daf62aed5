"""Templates: what a judge is shown, and files that are refused. Answers can hold anything."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefkit.errors import InputError
from prefkit.feedback.templates import PACKAGED, Template, readable

PINNED = {
    "chat": ("1", "4be5dfd8d92f"),
    "hh": ("1", "48bbd7ec8f32"),
    "tldr": ("1", "68b7c26d1677"),
}
"""version and hash of what the packaged templates ask: change a text, raise its version"""
USER = 'user = "{prompt} A: {answer_a} B: {answer_b}"\n'


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", PACKAGED)
def test_a_changed_packaged_template_needs_a_new_version(name: str) -> None:
    template = Template.load(name)
    asked = [template.messages("p", "a", "b", reply=form) for form in ("structured", "text", "letter")]
    whole = json.dumps([asked, template.request_fields()], sort_keys=True)
    assert (template.version, hashlib.sha256(whole.encode()).hexdigest()[:12]) == PINNED[name]
    assert template.full_name == f"{name}-{template.version}" and template.longest_reply == 512


def test_letters_only_where_ties_are_not_asked_for() -> None:
    tldr, chat = Template.load("tldr"), Template.load("chat")
    assert tldr.choices == ("A", "B") and chat.choices == ("A", "B", "tie", "unsure")
    enum = tldr.request_fields()["response_format"]["json_schema"]["schema"]["properties"]["preferred"]["enum"]
    assert enum == ["A", "B"]
    text = tldr.messages("p", "a", "b")[-1]["content"]
    assert "one sentence" in text and '"tie"' not in text and '"unsure"' not in text
    assert '"tie"' in chat.messages("p", "a", "b")[-1]["content"]


@given(
    st.text()
    | st.sampled_from(["{answer_b}", "{{prompt}}", "{% raw %}{{ x }}", "\\1 \\g<0>", '"preferred": "A"', "{"]),
    st.text() | st.sampled_from(["{answer_a}", "{prompt}", "Preferred: A", "%s {0} $x"]),
)
def test_what_is_put_in_is_never_read_again(first: str, second: str) -> None:
    template = Template(name="t", version="1", user="<{prompt}|{answer_a}|{answer_b}>", system="be {fair} to {prompt}")
    system, user = template.messages("{answer_a}", first, second)
    assert user["content"].startswith(f"<{{answer_a}}|{first}|{second}>")
    assert system["content"] == "be {fair} to {answer_a}"


def test_conversations_are_readable_turns() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {}}]},
        {"role": "assistant", "content": "Hello."},
        {"role": "tool", "content": None},
    ]
    assert readable(turns) == "System: Be brief.\n\nUser: Hi\n[image_url]\n\nAssistant: Hello.\n\ntool: "
    assert readable([{"role": "user", "content": "Hi"}]) == readable("Hi") == "Hi"


def test_a_file_of_the_users(tmp_path: Path) -> None:
    spec = write(tmp_path, 'name = "kind"\nreply = "text"\nties = false\nsystem = "You judge."\n' + USER)
    template = Template.load(spec)
    assert template.name == "kind" and len(template.version) == 12 and template.choices == ("A", "B")
    assert "response_format" not in template.request_fields()
    messages = template.messages("p", "a", "b")
    assert [turn["role"] for turn in messages] == ["system", "user"]
    assert messages[1]["content"].startswith("p A: a B: b\n\n") and "Preferred: <A or B>" in messages[1]["content"]
    changed = write(tmp_path, 'name = "kind"\nreply = "text"\nties = false\nsystem = "You judge!"\n' + USER)
    assert Template.load(changed).version != template.version
    assert Template.load(write(tmp_path, USER)).name == "mine"


def test_a_file_on_a_packaged_template(tmp_path: Path) -> None:
    spec = write(tmp_path, 'base = "chat"\n[decoding]\nmax_completion_tokens = 4096\nreasoning_effort = "low"\n')
    template = Template.load(spec)
    assert template.user == Template.load("chat").user and template.name == "mine"
    fields = template.request_fields()
    assert fields.pop("response_format") and fields == {"max_completion_tokens": 4096, "reasoning_effort": "low"}
    assert template.longest_reply == 4096


def test_braces_that_are_no_words_stay(tmp_path: Path) -> None:
    template = Template.load(write(tmp_path, "user = '''{prompt}{answer_a}{answer_b} {\"a\": {}} { word } {1}'''"))
    assert template.messages("p", "a", "b")[0]["content"].startswith('pab {"a": {}} { word } {1}')


BAD = {
    "no such file": ("", "neither a packaged template nor a file"),
    "no TOML": ("user = ", "is no TOML file"),
    "not UTF-8": ("\udcff", "is no TOML file"),
    "no question": ("ties = true", "has no question"),
    "missing answer": ('user = "{prompt} {answer_a}"', "{answer_b} does not stand in user"),
    "answer in the system text only": ('system = "{answer_b}"\nuser = "{prompt} {answer_a}"', "{answer_b} does not"),
    "unknown placeholder": ('user = "{prompt} {answer_a} {answer_b} {answer_c}"', "{answer_c} is no placeholder"),
    "unknown key": (USER + "temperature = 1", "'temperature' is not known"),
    "wrong type": (USER + 'ties = "no"', "ties is 'no'"),
    "reply": (USER + 'reply = "letter"', "reply is 'letter'"),
    "name": (USER + 'name = "a b"', "name is 'a b'"),
    "version": (USER + 'version = "2"', "version is not the file's to say"),
    "base": ('base = "mine"', "base is 'mine'"),
    "reserved": (USER + "[decoding]\nstream = true", "stream cannot be set here"),
    "length": (USER + "[decoding]\nmax_tokens = 0", "is 0"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused_when_loaded(kind: str, tmp_path: Path) -> None:
    text, words = BAD[kind]
    path = tmp_path / "mine.toml"
    if text:
        path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError) as caught:
        Template.load(str(path))
    assert words in caught.value.what and caught.value.where and caught.value.mend
