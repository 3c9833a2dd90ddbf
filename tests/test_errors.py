"""The exception tree, and how each error looks on the wire."""

from __future__ import annotations

import re
from collections.abc import Iterator
from http import HTTPStatus

import pytest

from embeddings_mcp import errors
from embeddings_mcp.errors import WIRE_FORMS, EmbeddingsError, InputTooLong, Overloaded, wire_form


def descendants(cls: type[EmbeddingsError]) -> Iterator[type[EmbeddingsError]]:
    yield cls
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from descendants(child)


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn: dict[str, str] = {}
    branch: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ((?:\||`| |--)*)([A-Z]\w+)", line):
            depth = len(found[1]) // 4
            drawn[found[2]] = branch[depth - 1] if depth else "Exception"
            branch[depth:] = [found[2]]
    assert drawn == {cls.__name__: cls.__mro__[1].__name__ for cls in descendants(EmbeddingsError)}


def test_every_error_that_a_caller_can_get_has_its_own_wire_form() -> None:
    assert set(WIRE_FORMS) == set(descendants(EmbeddingsError)) - {errors.InvalidSetting}
    codes = [form.code for form in WIRE_FORMS.values()]
    assert len(set(codes)) == len(codes)
    for cls, form in WIRE_FORMS.items():
        assert (HTTPStatus(form.status) < HTTPStatus.INTERNAL_SERVER_ERROR) == (form.type != "server_error"), cls


def test_an_error_without_a_wire_form_has_that_of_its_nearest_ancestor() -> None:
    class TooSoon(Overloaded):
        """Not in the table."""

    assert wire_form(TooSoon("later", retry_after=1)) == WIRE_FORMS[Overloaded]
    assert wire_form(errors.InvalidSetting("no")) == WIRE_FORMS[EmbeddingsError]


NEXT_TWENTY = ", ".join(f"`text {index}`" for index in range(2, 22))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputTooLong(index=3, tokens=1302, max_tokens=256), "`text 3` has 1,302 tokens, and the model takes 256:"),
        (
            InputTooLong(index=0, tokens=None, max_tokens=8192),
            "`text 0` has more than the 8,192 tokens that the model takes: shorten it",
        ),
        (
            InputTooLong(index=0, tokens=None, max_tokens=None),
            "`text 0` has more tokens than the model takes: shorten it",
        ),
        (
            InputTooLong(index=0, tokens=9, max_tokens=8, others=range(2, 24)),
            f"`text 0` has 9 tokens, and the model takes 8 (too long as well: {NEXT_TWENTY}, and 2 more): shorten them",
        ),
        (
            InputTooLong(index=0, tokens=9, max_tokens=8, certain=False),
            "a text (probably `text 0`, the longest of those",
        ),
    ],
)
def test_the_message_about_a_text_that_is_too_long_says_what_is_known(error: InputTooLong, message: str) -> None:
    assert error.message.startswith(message)
    assert str(error) == error.message
    assert "`truncate` to 'END' or 'START'" in error.message


def test_the_error_about_a_text_can_be_translated_to_its_request_field() -> None:
    error = InputTooLong(index=5, tokens=9, max_tokens=8, certain=False, others=[6])
    named = error.reindexed(lambda index: [index - 3], "other[{}]".format)
    assert named.param == "other[2]"
    assert "(probably `other[2]`" in named.message
    assert "(too long as well: `other[3]`)" in named.message
    assert (named.index, named.tokens, named.max_tokens, named.certain) == (2, 9, 8, False)
    assert error.param is None
