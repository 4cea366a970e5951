"""Read JSON values as the dataclasses that they were written from, with a check of every type."""

import dataclasses
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

LARGEST = (1 << 63) - 1  # arrays of counts hold no larger number


def parse(hint: Any, value: Any, name: str = "the content", **given: Any) -> Any:
    """Return a value of a JSON file as an instance of a type.

    Args:
        hint: A dataclass, or a type hint of None, bool, int, float, str, list, dict, tuple, unions of them, or Any.
        value: The value as `json` read it.
        name: Name of the value, for errors.
        given: Fields of the dataclass that the file does not hold.

    Raises:
        ValueError: If the value is of another type, has other fields, or holds a number that is not finite.
    """
    if hint is Any or (type(value) is hint and (hint not in (int, float) or abs(value) <= LARGEST)):
        return value
    if hint is float and type(value) is int and abs(value) <= LARGEST:
        return float(value)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return parse(next(each for each in arguments if each is not type(None)), value, name, **given)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = {key: each for key, each in get_type_hints(hint).items() if key not in given}
        if wrong := set(hints) ^ set(value):
            raise ValueError(f"{name} lacks or should not have {min(wrong, key=str)!r}")
        return hint(**{key: parse(each, value[key], key) for key, each in hints.items()}, **given)
    if origin is dict and isinstance(value, dict):
        return {key: parse(arguments[1], each, key) for key, each in value.items()}
    if origin is list and isinstance(value, list):
        return [parse(arguments[0], each, name) for each in value]
    if origin is tuple and isinstance(value, list) and arguments[-1] is Ellipsis:
        return tuple(parse(arguments[0], each, name) for each in value)
    if origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        return tuple(parse(each, item, name) for each, item in zip(arguments, value, strict=True))
    raise ValueError(f"{name} can't be {str(value)[:40]}")
