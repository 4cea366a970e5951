"""The types of option values, as argparse calls them: each turns text into a value, or says what is wrong with it."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ffnet.chips import CHIPS, find_chip
from ffnet.config import LIST_CHIPS
from ffnet.system.errors import UserError
from ffnet.variants import MODEL_GROUPS, find_variant


def model_names(text: str) -> tuple[str, ...]:
    """Return the names of one model or of a group of them."""
    if text in MODEL_GROUPS:
        return MODEL_GROUPS[text]
    try:
        return (find_variant(text).name,)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def chips(text: str) -> tuple[str, ...]:
    """Return the part name of a chip, or of all of them, or LIST_CHIPS."""
    words = {LIST_CHIPS: (LIST_CHIPS,), "all": tuple(CHIPS)}
    try:
        return words.get(text.lower()) or (find_chip(text).part,)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def boolean(text: str) -> bool:
    """Return whether text says yes."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false. Give one of {', '.join(words)}.")
    return words[text.lower()]


def integer(least: int, most: int = 10**9, word: str = "") -> Callable[[str], int | str]:
    """Return an argparse type for whole numbers from `least` to `most`, and for `word` if it is not empty."""

    def number(text: str) -> int | str:
        if word and text.lower() == word:
            return word
        if not (text.isascii() and text.isdecimal()) or len(text) > len(str(most)) or not least <= int(text) <= most:
            bounds = f"of at least {least}" if most == 10**9 else f"from {least} to {most}"
            alternative = f", nor `{word}`" if word else ""
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number {bounds}{alternative}.")
        return int(text)

    return number


def size(text: str) -> tuple[int, int]:
    """Return height and width of "512x1024"."""
    height, _, width = text.lower().partition("x")
    if not all(side.isascii() and side.isdecimal() and 32 <= int(side[:6]) <= 8192 for side in (height, width)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a height and a width from 32 to 8192, such as 512x1024.")
    return int(height), int(width)


def plain_text(text: str) -> str:
    """Accept text that is not empty and that every library can open as a file name."""
    if not text:
        raise argparse.ArgumentTypeError("the value is empty. Name a file or folder.")
    if text != text.encode(errors="ignore").decode():
        raise argparse.ArgumentTypeError(f"{text!r} is not valid UTF-8, and not every library can open it. Rename it.")
    return text


def path(text: str) -> Path:
    """Return a path that every library can open."""
    return Path(plain_text(text))


def percentage_points(text: str) -> float:
    """Return a number from 0 to 100."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of percentage points from 0 to 100.")
    return value
