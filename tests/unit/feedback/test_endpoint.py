"""Addresses, keys and model names: what is refused before anything is sent."""

from __future__ import annotations

import pytest

from prefkit.errors import InputError
from prefkit.feedback.endpoint import Endpoint, key_from, same_model


@pytest.mark.parametrize(
    ("asked", "given", "same"),
    [
        ("gpt-4o", "gpt-4o", True),
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("gpt-4", "gpt-4-0613", True),
        ("Org/Model", "org/model", True),
        ("haiku-latest", "haiku-20241022", True),
        ("llama3", "llama3:latest", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("gpt-4o", "gpt-4o-mini-2024-07-18", False),
        ("gpt-4o-2024-08-06", "gpt-4o-2024-05-13", False),
        ("gpt-4o-2024-08-06", "gpt-4o", False),
        ("qwen-7b", "qwen-72b", False),
    ],
)
def test_names_of_models(asked: str, given: str, same: bool) -> None:
    assert same_model(asked, given) is same
    assert Endpoint(base_url="http://x/v1", model="deployment", served_as=asked).is_served_by(given) is same


def test_a_reply_without_a_name_is_taken() -> None:
    assert Endpoint(base_url="http://x/v1", model="m").is_served_by("")


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://x/v1", "http://", "http://x:port/v1", "http://[x", "http://x/v1/chat/completions"],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(InputError, match="judge_base_url"):
        Endpoint(base_url=url, model="m")


@pytest.mark.parametrize("url", ["https://me:hunter2@x/v1", "https://x/v1?key=hunter2", "https://hunter2@x/v1"])
def test_secrets_in_an_address_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InputError) as caught:
        Endpoint(base_url=url, model="m")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"concurrency": 0}, {"retries": -1}, {"max_calls": -1}, {"timeout": 0}, {"model": ""}, {"key": "k\ny"}]
)
def test_options_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Endpoint(**{"base_url": "http://x/v1", "model": "m", **options})  # pyright: ignore[reportArgumentType]


def test_the_same_judge_by_another_spelling() -> None:
    one, two = (Endpoint(base_url=url, model="m") for url in ("http://X:8000/v1", "http://x:8000/v1/"))
    assert one.identity == two.identity and one.url.lower() == two.url
    assert one.identity != Endpoint(base_url="http://x:8001/v1", model="m").identity


def test_keys() -> None:
    assert key_from({}) == "" and key_from({"OPENAI_API_KEY": " k\n"}) == "k"
    assert key_from({"OPENAI_API_KEY": "o", "PREFKIT_JUDGE_API_KEY": "p"}) == "p"
    end = Endpoint(base_url="http://x/v1", model="m", key="sk-123456789")
    assert "sk-123456789" not in repr(end) and end.blacked_out("a sk-123456789 b") == "a [key] b"
    assert Endpoint(base_url="http://x/v1", model="m", key="EMPTY").blacked_out("EMPTY") == "EMPTY"
