"""Parse AIMET's encodings files, without AIMET.

Four formats are read: those by torch module of AIMET 1.x and 2.x (`<name>_torch.encodings`, `save_encodings_to_json`),
and those by tensor beside an ONNX file, of versions 0.x, 1.0.0 and 2.0.0.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffnet.system.errors import UserError
from ffnet.system.files import read_utf8

LARGEST_FILE = 32 << 20  # bytes; 80,000 channels, twice the largest FFNet's, take 24 MB as AIMET 1.x writes them


@dataclass(frozen=True)
class Encoding:
    """How a tensor is quantized: value = (integer + offset) * scale, for integers from qmin to qmax."""

    qmin: int
    qmax: int
    scales: tuple[float, ...]  # one, or one per channel
    offsets: tuple[int, ...]  # as many as scales


@dataclass(frozen=True)
class EncodingsFile:
    """The content of an encodings file."""

    path: Path
    by_layer: bool  # activations are named after torch modules, "layer output 0"; otherwise after ONNX tensors
    entries: dict[str, Encoding]  # weights are named "layer.weight" in every format


def read_encodings(path: Path | str) -> EncodingsFile:
    """Read a JSON file of encodings; raise a UserError if it can't be read or is not in one of AIMET's formats."""
    path = Path(path)
    try:
        by_layer, entries = _parse(_read_json(path))
    except OSError as error:
        raise UserError(f"--encodings {path}: the file can't be read ({error.strerror}). Give another path.") from error
    except ValueError as error:
        raise UserError(f"--encodings {path}: {error}. Give an encodings file as AIMET writes it.") from error
    return EncodingsFile(path, by_layer, entries)


def _read_json(path: Path) -> Any:
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"the file has {size} bytes, but the encodings of the largest FFNet fit into {LARGEST_FILE}")
    text = read_utf8(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the file is not valid JSON ({error})") from error
    except RecursionError as error:
        raise ValueError("the file is nested too deeply") from error


def _parse(content: Any) -> tuple[bool, dict[str, Encoding]]:
    """Return whether the entries are named after layers, and the entries."""
    if not isinstance(content, dict):
        raise ValueError("the file contains no encodings")
    version = content.get("version", "0.6.1")
    if not isinstance(version, str) or version.split(".")[0] not in ("0", "1", "2"):
        raise ValueError(f"the file has version {version!r}, but only versions 0 to 2 are supported")
    if "encodings" in content:
        return False, _parse_entries(_named_entries(content["encodings"]), _parse_version_2)
    activations, params = content.get("activation_encodings"), content.get("param_encodings")
    if isinstance(activations, list) and isinstance(params, list):
        return False, _parse_entries(_named_entries(activations + params), _parse_version_1)
    if not isinstance(activations, dict) or not isinstance(params, dict):
        raise ValueError("the file has neither 'encodings' nor 'activation_encodings' and 'param_encodings'")
    by_layer = any(isinstance(value, dict) and value.keys() & {"input", "output"} for value in activations.values())
    if by_layer:
        activations = dict(entry for name, value in activations.items() for entry in _tensors_of_layer(name, value))
    return by_layer, _parse_entries((activations | params).items(), _parse_legacy)


def _parse_entries(values: Iterable[tuple[str, Any]], parse: Callable[[Any], Encoding]) -> dict[str, Encoding]:
    entries: dict[str, Encoding] = {}
    for name, value in values:
        if name in entries:
            raise ValueError(f"the file contains the entry {name!r} twice")
        try:
            entries[name] = parse(value)
        except ValueError as error:
            raise ValueError(f"the entry {name!r} {error}") from error
    if not entries:
        raise ValueError("the file contains no encodings")
    return entries


def _named_entries(values: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the content of each entry of a list."""
    if not isinstance(values, list):
        raise ValueError("the file contains no encodings")
    for value in values:
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str):
            raise ValueError(f"the file has an entry without a name: {str(value)[:60]}")
        yield name, value


def _tensors_of_layer(layer: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield ("layer input 0", encoding) and so on from {"input": {"0": ...}, ...} or {"input": [...], ...}."""
    if not isinstance(value, dict) or not value.keys() <= {"input", "output"}:
        raise ValueError(f"the entry {layer!r} does not consist of 'input' and 'output'")
    for side, tensors in value.items():
        if isinstance(tensors, list):
            tensors = {str(i): tensor for i, tensor in enumerate(tensors) if tensor is not None}
        if not isinstance(tensors, dict) or not all(index.isdecimal() for index in tensors):
            raise ValueError(f"the entry {layer!r} has an {side!r} whose tensors are not numbered")
        for index, tensor in tensors.items():
            yield f"{layer} {side} {index}", tensor


def _parse_legacy(value: Any) -> Encoding:
    """Parse an entry of version 0.x: one object with min, max, scale, ..., or a list of them, one per channel."""
    channels = value if isinstance(value, list) else [value]
    if not channels or not all(isinstance(channel, dict) for channel in channels):
        raise ValueError("is neither an object nor a list of objects")
    types = {_integer_type(channel, "bitwidth", "is_symmetric") for channel in channels}
    if len(types) > 1:
        raise ValueError("has channels that differ in bit width or symmetry")
    ((bits, symmetric),) = types
    lists = {key: [channel.get(key) for channel in channels] for key in ("scale", "offset")}
    scales, lows = _scales(lists, "scale"), _integers(lists, "offset")
    # AIMET 1.x's strict symmetry omits the lowest integer, so that the range ends at -max.
    strict = symmetric and bits > 2 and set(lows) == {1 - (1 << (bits - 1))}
    for channel, scale, low in zip(channels, scales, lows, strict=True):
        for key, integer in (("min", low), ("max", low + (1 << bits) - 1 - strict)):
            bound = _numbers({key: [channel.get(key, integer * scale)]}, key)[0]
            if abs(bound / scale - integer) > max(0.25, 2.0 ** (bits - 21)):  # steps; float32 has no more digits
                raise ValueError(f"has a {key} of {channel[key]}, but scale and offset give {integer * scale:g}")
    return _encoding(bits, symmetric, scales, lows, strict)


def _parse_version_1(value: dict[str, Any]) -> Encoding:
    if value.get("enc_type") not in ("PER_TENSOR", "PER_CHANNEL") or "zero_point_shift" in value:
        raise ValueError("is neither PER_TENSOR nor PER_CHANNEL, or has a zero_point_shift, which is not supported")
    bits, symmetric = _integer_type(value, "bw", "is_sym")
    return _encoding(bits, symmetric, _scales(value, "scale"), _integers(value, "offset"))


def _parse_version_2(value: dict[str, Any]) -> Encoding:
    dtype = re.fullmatch(r"(u?)int(\d{1,2})", str(value.get("output_dtype")))
    if not dtype:
        raise ValueError(f"has output_dtype {value.get('output_dtype')!r}, but only integers are supported")
    if value.keys() & {"block_size", "per_block_int_scale", "per_channel_float_scale"}:
        raise ValueError("is quantized in blocks, which is not supported")
    bits, signed, scales = _bits(int(dtype[2])), not dtype[1], _scales(value, "y_scale")
    has_zero_points = value.get("y_zero_point") is not None
    zero_points = _integers(value, "y_zero_point") if has_zero_points else [0] * len(scales)
    return _encoding(bits, signed, scales, [_smallest(bits, signed) - zero_point for zero_point in zero_points])


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


def _integer_type(value: dict[str, Any], bits_key: str, symmetry_key: str) -> tuple[int, bool]:
    """Return the bit width of an entry, and whether it is symmetric."""
    if str(value.get("dtype", "int")).lower() != "int":
        raise ValueError(f"has dtype {value['dtype']!r}, but only int is supported")
    symmetry = str(value.get(symmetry_key)).lower()  # AIMET writes a bool as text
    if symmetry not in ("true", "false"):
        raise ValueError(f"has {symmetry_key!r} {value.get(symmetry_key)!r}, which is neither true nor false")
    return _bits(value.get(bits_key)), symmetry == "true"


def _bits(bits: Any) -> int:
    if bits not in range(2, 33):
        raise ValueError(f"has a bit width of {str(bits)[:60]}, but only integers from 2 to 32 are possible")
    return int(bits)


def _numbers(value: dict[str, Any], key: str) -> list[float]:
    """Return the numbers under `key`, one or a list of them."""
    found = value.get(key)
    numbers = found if isinstance(found, list) else [found]
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
