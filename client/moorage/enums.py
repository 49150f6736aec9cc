"""Enumerations of the wire as plain words: MODEL_STATE_READY is "ready"."""

from __future__ import annotations

from typing import Any

from moorage.errors import InvalidRequest


def name_of(enum: Any, number: int) -> str:
    """Gives the word for a value.

    Args:
        enum: The enumeration.
        number: The value; one of a newer server is its own word.

    Returns:
        The word.
    """
    value = enum.DESCRIPTOR.values_by_number.get(number)
    return _word(enum, value) if value else str(number)


def number_of(enum: Any, option: str, word: object) -> Any:
    """Gives the value for a word.

    Args:
        enum: The enumeration.
        option: What it stands for, in errors.
        word: The word.

    Returns:
        The value.

    Raises:
        InvalidRequest: There is no such word.
    """
    known = {_word(enum, value): value.number for value in enum.DESCRIPTOR.values if value.number}
    if not isinstance(word, str) or word not in known:
        raise InvalidRequest(f"{option} is {word!r}; known are {', '.join(known)}")
    return known[word]


def _word(enum: Any, value: Any) -> str:
    prefix = enum.DESCRIPTOR.values[0].name.removesuffix("UNSPECIFIED")
    return str(value.name.removeprefix(prefix).lower())
