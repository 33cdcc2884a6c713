"""Placeholders: filled in for an instance, literal braces, and what is no placeholder."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slum.errors import ConfigError
from slum.interpolate import interpolate, placeholders, unknown


def fill(text: str, port: int | None = 8000) -> str:
    return interpolate(text, name="web", id="acme", data_dir="/d", socket="/s.sock", port=port)


def test_each_placeholder() -> None:
    assert fill("{name} {id} {data_dir} {socket} {port}") == "web acme /d /s.sock 8000"


def test_values_are_not_filled_in_again() -> None:
    assert interpolate("{name}", name="{id}", id="x", data_dir="", socket="", port=None) == "{id}"


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{{id}}", "{id}"),
        ("{{{id}}}", "{acme}"),
        ('{{"a": "{id}"}}', '{"a": "acme"}'),
        ("${{HOME}}", "${HOME}"),
        ("", ""),
    ],
)
def test_braces_can_be_written(text: str, filled: str) -> None:
    assert unknown(text) == ()
    assert fill(text) == filled


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{ID}", ("{ID}",)),
        ("{", ("{",)),
        ("a}b", ("}",)),
        ("{}", ("{}",)),
        ("{id} {x} {y}", ("{x}", "{y}")),
        ("{id", ("{",)),
    ],
)
def test_anything_else_in_braces_is_refused(text: str, parts: tuple[str, ...]) -> None:
    assert unknown(text) == parts
    with pytest.raises(ConfigError, match="has no value here"):
        fill(text)


def test_a_placeholder_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="port"):
        fill("--port {port}", port=None)


@given(st.text(alphabet="{}ab id", max_size=20))
def test_what_is_not_unknown_can_be_filled(text: str) -> None:
    if unknown(text):
        with pytest.raises(ConfigError):
            fill(text)
    else:
        fill(text)
        assert placeholders(text) <= {"id"}


@given(st.text(max_size=20))
def test_escaping_gives_any_text_back(text: str) -> None:
    assert fill(text.replace("{", "{{").replace("}", "}}")) == text
