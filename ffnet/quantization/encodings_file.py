"""Parse AIMET's encodings files, without AIMET.

Four formats are read: those by torch module of AIMET 1.x and 2.x (`<name>_torch.encodings`, `save_encodings_to_json`),
and those by tensor beside an ONNX file, of versions 0.x, 1.0.0 and 2.0.0.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ffnet.system.errors import UserError
from ffnet.system.files import read_utf8

SECTIONS = ("encodings", "activation_encodings", "param_encodings")
LARGEST_FILE = 60 << 20  # bytes; the 55,123 channels of the largest FFNet take 15 MB as AIMET 1.x writes them
MOST_VALUES = 1_600_000  # a channel has 7; short values take much more memory and time than their bytes


@dataclass(frozen=True)
class Encoding:
    """How a tensor is quantized: value = (integer + offset) * scale, for integers from qmin to qmax."""

    qmin: int
    qmax: int
    scales: tuple[float, ...]  # one, or one per channel
    offsets: tuple[int, ...]  # as many as scales
    axis: int | None = None  # dimension of the channels; None if the file does not say it


@dataclass(frozen=True)
class EncodingsFile:
    """The content of an encodings file."""

    path: Path
    by_layer: bool  # activations are named after torch modules, "layer output 0"; otherwise after ONNX tensors
    entries: dict[str, Encoding]  # weights are named "layer.weight" in every format
    floats: tuple[str, ...] = ()  # entries of tensors that stay in float


def read_encodings(path: Path | str, allow_floats: bool = False) -> EncodingsFile:
    """Read a JSON file of encodings.

    Raises:
        UserError: If it can't be read, is not in one of AIMET's formats, or has entries of floats that are not allowed.
    """
    path = Path(path)
    try:
        by_layer, entries, floats = _parse(_read_json(path))
        if floats and not allow_floats:
            raise ValueError(f"the entry {floats[0]!r} has dtype 'float', but only integers are supported")
    except OSError as error:
        raise UserError(f"--encodings {path}: the file can't be read ({error.strerror}). Give another path.") from error
    except ValueError as error:
        raise UserError(f"--encodings {path}: {error}. Give an encodings file as AIMET writes it.") from error
    return EncodingsFile(path, by_layer, entries, tuple(floats))


def _read_json(path: Path) -> Any:
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"the file has {size} bytes, but the encodings of the largest FFNet fit into {LARGEST_FILE}")
    text = read_utf8(path)
    if text.count(",") > MOST_VALUES:
        raise ValueError(f"the file has more than {MOST_VALUES} values, but the largest FFNet needs a quarter of that")
    try:
        return json.loads(text, object_pairs_hook=_unique_names)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the file is not valid JSON ({error})") from error


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the file contains the name {name!r} twice")
    return unique


def _parse(content: Any) -> tuple[bool, dict[str, Encoding], list[str]]:
    """Return whether activations are named after layers, all entries of integers, and the names of those of floats."""
    content = content if isinstance(content, dict) else {}
    sections = [content[key] for key in SECTIONS if key in content] or [content]  # AdaRound wrote weights alone
    version = content.get("version", "0.6.1")
    if not isinstance(version, str) or version.split(".")[0] not in ("0", "1", "2"):
        raise ValueError(f"the file has version {version!r}, but only versions 0 to 2 are supported")
    by_layer = any(_is_layer(value) for part in sections if isinstance(part, dict) for value in part.values())
    entries: dict[str, Encoding] = {}
    floats: list[str] = []
    for name, value in itertools.chain.from_iterable(map(_named_entries, sections)):
        if name in entries or name in floats:
            raise ValueError(f"the file contains the entry {name!r} twice")
        if _is_float(value):
            floats.append(name)
            continue
        try:
            is_version_2 = isinstance(value, dict) and "output_dtype" in value
            entries[name] = _parse_version_2(value) if is_version_2 else _parse_versions_0_and_1(value)
        except ValueError as error:
            raise ValueError(f"the entry {name!r} {error}") from error
    if not entries and not floats:
        raise ValueError("the file contains no encodings")
    return by_layer, entries, floats


def _is_float(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    dtype = str(first.get("output_dtype", first.get("dtype"))).lower() if isinstance(first, dict) else ""
    return bool(re.fullmatch(r"b?float(16|32)?", dtype))


def _named_entries(section: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the content of each entry in a section of the file, one for each tensor of a layer."""
    if isinstance(section, list):
        for value in section:
            name = value.get("name") if isinstance(value, dict) else None
            if not isinstance(name, str):
                raise ValueError(f"the file has an entry without a name: {str(value)[:60]}")
            yield name, value
    elif isinstance(section, dict):
        for name, value in section.items():
            yield from _tensors_of_layer(name, value) if _is_layer(value) else [(name, value)]
    else:
        raise ValueError(f"the file has {str(section)[:60]} in place of encodings")


def _is_layer(value: Any) -> bool:
    """Return whether an entry describes the inputs and outputs of a layer rather than one tensor."""
    return isinstance(value, dict) and bool(value.keys() & {"input", "output"})


def _tensors_of_layer(layer: str, sides: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield ("layer input 0", encoding) and so on from {"input": {"0": ...}, ...} or {"input": [...], ...}."""
    for side, tensors in sides.items():
        if not isinstance(tensors, list | dict):
            raise ValueError(f"the entry {layer!r} has no tensors under {side!r}")
        for index, tensor in enumerate(tensors) if isinstance(tensors, list) else tensors.items():
            if tensor is not None:
                yield f"{layer} {side} {index}", tensor


def _parse_versions_0_and_1(value: Any) -> Encoding:
    """Parse an entry of version 0.x, an object or a list of one per channel, or of version 1.0.0, one with lists."""
    channels = value if isinstance(value, list) else [value]
    if not channels or not all(isinstance(channel, dict) for channel in channels):
        raise ValueError("is neither an object nor a list of objects")
    types = {_integer_type(channel) for channel in channels}
    if len(types) > 1:
        raise ValueError("has channels that differ in bit width or symmetry")
    ((bits, symmetric),) = types
    scales = [scale for channel in channels for scale in _scales(channel, "scale")]
    lows = [low for channel in channels for low in _integers(channel, "offset")]
    strict = symmetric and _is_strict(channels, bits, lows)
    for key, steps in (("min", 0), ("max", (1 << bits) - 1 - strict)):
        ends = [end for channel in channels if key in channel for end in _numbers(channel, key)]
        if ends and len(ends) != len(scales):
            raise ValueError(f"has lists of scales and {key} of lengths {len(scales)} and {len(ends)}")
        for end, scale, low in zip(ends, scales, lows, strict=False):  # version 1.0.0 has no min and max
            # A quarter of a step, or what float32 leaves of the digits.
            if abs(end / scale - low - steps) > max(0.25, 2.0 ** (bits - 21)):
                raise ValueError(f"has a {key} of {end:g}, but scale and offset give {(low + steps) * scale:g}")
    return _encoding(bits, symmetric, scales, lows, strict)


def _is_strict(channels: Sequence[dict[str, Any]], bits: int, lows: Sequence[int]) -> bool:
    """Check the offsets of a symmetric entry, and return whether it omits the lowest integer, as in AIMET 1.x.

    AIMET 1.x also has unsigned symmetry, with an offset of 0. Without min and max this can't be told from a signed
    integer with a zero point of 0, so that it is refused.
    """
    lowest = _smallest(bits, signed=True)
    if bits > 2 and set(lows) == {lowest + 1}:
        return True
    has_ranges = all({"min", "max"} <= channel.keys() for channel in channels)
    if wrong := set(lows) - ({lowest, 0} if has_ranges else {lowest}):
        raise ValueError(
            f"is symmetric with {bits} bits, but has an offset of {max(wrong)} in place of {lowest}; if its integers "
            "begin at 0, it must say that it is not symmetric"
        )
    return False


def _integer_type(value: dict[str, Any]) -> tuple[int, bool]:
    """Return the bit width of an entry, and whether it is symmetric."""
    if value.get("enc_type", "PER_TENSOR") not in ("PER_TENSOR", "PER_CHANNEL") or "zero_point_shift" in value:
        raise ValueError("is neither PER_TENSOR nor PER_CHANNEL, or has a zero_point_shift, which is not supported")
    if value.get("enc_type") == "PER_TENSOR" and len(_numbers(value, "scale")) > 1:
        raise ValueError(f"is PER_TENSOR, but has {len(value['scale'])} scales")
    if str(value.get("dtype", "int")).lower() != "int":
        raise ValueError(f"has dtype {value['dtype']!r}, but only int is supported")
    symmetry = str(value.get("is_symmetric", value.get("is_sym"))).lower()  # version 0.x has a bool as text
    if symmetry not in ("true", "false"):
        raise ValueError(f"has the symmetry {symmetry[:60]!r}, which is neither true nor false")
    return _bits(value.get("bitwidth", value.get("bw"))), symmetry == "true"


def _parse_version_2(value: dict[str, Any]) -> Encoding:
    dtype = re.fullmatch(r"(u?)int(\d{1,2})", str(value["output_dtype"]))
    if not dtype:
        raise ValueError(f"has output_dtype {value['output_dtype']!r}, but only integers are supported")
    if value.keys() & {"block_size", "per_block_int_scale", "per_channel_float_scale"}:
        raise ValueError("is quantized in blocks, which is not supported")
    bits, signed, scales = _bits(int(dtype[2])), not dtype[1], _scales(value, "y_scale")
    zero_points = _integers(value, "y_zero_point") if value.get("y_zero_point") is not None else [0] * len(scales)
    axis = value.get("axis")
    if axis is not None and (isinstance(axis, bool) or axis not in range(-8, 8)):
        raise ValueError(f"has the axis {str(axis)[:60]}, which is no dimension of a tensor")
    encoding = _encoding(bits, signed, scales, [_smallest(bits, signed) - zero_point for zero_point in zero_points])
    return replace(encoding, axis=axis)


def _encoding(bits: int, signed: bool, scales: Sequence[float], lows: Sequence[int], strict: bool = False) -> Encoding:
    """Return the Encoding whose smallest values are `lows` times `scales`; `strict`: without the lowest integer."""
    qmin = _smallest(bits, signed) + strict
    qmax = _smallest(bits, signed) + (1 << bits) - 1
    if len(scales) != len(lows) or not scales:
        raise ValueError(f"has lists of scales and offsets of lengths {len(scales)} and {len(lows)}")
    if not all(low <= 0 <= low + qmax - qmin for low in lows):
        raise ValueError(f"has an offset that leaves 0 outside of its {bits} bits")
    return Encoding(qmin, qmax, tuple(scales), tuple(low - qmin for low in lows))


def _smallest(bits: int, signed: bool) -> int:
    return -(1 << (bits - 1)) if signed else 0


def _bits(bits: Any) -> int:
    if bits not in range(2, 33):
        raise ValueError(f"has a bit width of {str(bits)[:60]}, but only integers from 2 to 32 are possible")
    return int(bits)


def _numbers(value: dict[str, Any], key: str) -> list[float]:
    """Return the numbers under `key`, one or a list of them."""
    found = value.get(key)
    numbers: list[Any] = found if isinstance(found, list) else [found]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < 1e37:
            raise ValueError(f"has {key!r} {str(number)[:60]!r}, which is not a number in the range of float32")
    return [float(number) for number in numbers]


def _scales(value: dict[str, Any], key: str) -> list[float]:
    numbers = _numbers(value, key)
    if numbers and min(numbers) < 1e-37:
        raise ValueError(f"has a {key} of {min(numbers):g}, which is not positive or below the range of float32")
    return numbers


def _integers(value: dict[str, Any], key: str) -> list[int]:
    numbers = _numbers(value, key)
    for number in numbers:
        if not number.is_integer():
            raise ValueError(f"has {key!r} {number:g}, which is not an integer")
    return [int(number) for number in numbers]
