"""AIMET's encodings, read from a file in place of calibration.

Four forms are read: AIMET 1.x and 2.x by torch module (`<name>_torch.encodings`, `save_encodings_to_json`), and those
beside an ONNX file by tensor: 0.x, 1.0.0 and 2.0.0. Bit widths and symmetry are the file's, whatever the recipe says.
Where a quantizer stands in the network, and under which names files know the place, is in `ffnet.places`.
"""

import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from ffnet.errors import UserError

LARGEST_FILE = 32 << 20  # bytes; 80,000 channels, twice the largest FFNet's, take 24 MB as AIMET 1.x writes them


@dataclass(frozen=True)
class Encoding:
    """The grid of a tensor: value = (integer + offset) * scale, for integers from qmin to qmax."""

    qmin: int
    qmax: int
    scales: tuple  # of floats, one, or one a channel
    offsets: tuple  # of integers, as many


@dataclass(frozen=True)
class Encodings:
    """What a file says."""

    path: Path
    by_layer: bool  # activations are named after torch modules, "layer output 0"; else after ONNX tensors
    entries: dict  # name -> Encoding; weights are "layer.weight" in every form


@dataclass(frozen=True)
class Loaded:
    """What load_encodings found beside the entries that fit."""

    missing: tuple  # names of the quantizers that the file leaves out: still to be calibrated
    surplus: tuple  # names of the file's entries that fit no quantizer: not used
    untied: tuple  # names of quantizers that AIMET 2 shares and the file gives encodings of their own


def read_encodings(path):
    """The Encodings of a JSON file; UserError says what is wrong with it. AIMET is not imported."""
    path = Path(path)
    try:
        by_layer, entries = _parse(_read_json(path))
    except OSError as error:
        raise UserError(f"--encodings {path}: can't be read ({error.strerror})") from error
    except RecursionError as error:
        raise UserError(f"--encodings {path}: is nested too deeply to be AIMET's encodings") from error
    except ValueError as error:
        raise UserError(f"--encodings {path}: {error}; give a file of encodings as AIMET writes it") from error
    return Encodings(path, by_layer, entries)


def _read_json(path):
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"has {size} bytes, and encodings of the largest FFNet fit into {LARGEST_FILE}")
    text = path.read_bytes()
    try:
        return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"is not JSON ({error})") from error


def _without_repeats(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"names {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _no_constant(text):
    raise ValueError(f"holds {text}, which is no number")


def _parse(content):
    """(by_layer, {name: Encoding}) of the file's content."""
    if not isinstance(content, dict):
        raise ValueError("holds no encodings")
    version = content.get("version", "0.6.1")
    if not isinstance(version, str) or version.split(".")[0] not in ("0", "1", "2"):
        raise ValueError(f"has version {version!r}, and versions 0 to 2 are known")
    if "encodings" in content:
        return False, _listed(content["encodings"], _grid_of_version_2)
    if not {"activation_encodings", "param_encodings"} <= content.keys():
        raise ValueError("has neither 'encodings' nor 'activation_encodings' and 'param_encodings'")
    activations, params = content["activation_encodings"], content["param_encodings"]
    if isinstance(activations, list) and isinstance(params, list):
        return False, _listed(activations + params, _grid_of_version_1)
    if not isinstance(activations, dict) or not isinstance(params, dict):
        raise ValueError("'activation_encodings' and 'param_encodings' are neither two objects nor two lists")
    by_layer = any(isinstance(value, dict) and value.keys() & {"input", "output"} for value in activations.values())
    if by_layer:
        activations = dict(entry for name, value in activations.items() for entry in _sides(name, value))
    found = activations | params
    if not found:
        raise ValueError("holds no encodings")
    return by_layer, {name: _named(name, _legacy_grid, value) for name, value in found.items()}


def _named(name, grid, value):
    try:
        return grid(value)
    except ValueError as error:
        raise ValueError(f"the entry {name!r} {error}") from error


def _listed(values, grid):
    """{name: Encoding} of a list of entries that say their names."""
    if not isinstance(values, list) or not values:
        raise ValueError("holds no encodings")
    entries = {}
    for value in values:
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str):
            raise ValueError(f"has an entry without a name: {str(value)[:60]}")
        if name in entries:
            raise ValueError(f"names {name!r} twice")
        entries[name] = _named(name, grid, value)
    return entries


def _sides(layer, value):
    """("layer input 0", encoding) and so on, of a layer's entry: {"input": {"0": ...}}, or a list in place of that."""
    if not isinstance(value, dict) or not value.keys() <= {"input", "output"}:
        raise ValueError(f"the entry {layer!r} is not made of 'input' and 'output'")
    for side, tensors in value.items():
        if isinstance(tensors, list):
            tensors = {str(i): tensor for i, tensor in enumerate(tensors) if tensor is not None}
        if not isinstance(tensors, dict) or not all(index.isdecimal() for index in tensors):
            raise ValueError(f"the entry {layer!r} has an {side!r} that does not number its tensors")
        for index, tensor in tensors.items():
            yield f"{layer} {side} {index}", tensor


def _legacy_grid(value):
    """Of a 0.x entry: one object with min, max, scale, ..., or a list of them, one a channel."""
    channels = value if isinstance(value, list) else [value]
    if not channels or not all(isinstance(channel, dict) for channel in channels):
        raise ValueError("is neither an object nor a list of objects")
    bits, symmetric = _kind(channels[0], "bitwidth", "is_symmetric")
    if any(_kind(channel, "bitwidth", "is_symmetric") != (bits, symmetric) for channel in channels):
        raise ValueError("has channels that differ in bit width or symmetry")
    scales = [_scale(channel, "scale") for channel in channels]
    lows = [_whole(channel, "offset") for channel in channels]
    # AIMET 1.x's strict symmetry leaves the lowest integer out, so that the range ends at -max.
    strict = symmetric and bits > 2 and set(lows) == {1 - (1 << (bits - 1))}
    for channel, scale, low in zip(channels, scales, lows, strict=True):
        for key, integer in (("min", low), ("max", low + (1 << bits) - 1 - strict)):
            # A quarter of a step, or what float32 leaves of the digits.
            if key in channel and not abs(_number(channel, key) / scale - integer) <= max(0.25, 2.0 ** (bits - 21)):
                raise ValueError(f"has a {key} of {channel[key]}, but scale and offset give {integer * scale:g}")
    return _grid(bits, symmetric, scales, lows, strict)


def _grid_of_version_1(value):
    if value.get("enc_type") not in ("PER_TENSOR", "PER_CHANNEL") or "zero_point_shift" in value:
        raise ValueError("is neither PER_TENSOR nor PER_CHANNEL without a shift, the kinds that are read")
    bits, symmetric = _kind(value, "bw", "is_sym")
    return _grid(bits, symmetric, _list(value, "scale", _scale), _list(value, "offset", _whole))


def _grid_of_version_2(value):
    dtype = re.fullmatch(r"(u?)int(\d{1,2})", str(value.get("output_dtype")))
    if not dtype:
        raise ValueError(f"has output_dtype {value.get('output_dtype')!r}; only integers are read")
    if value.keys() & {"block_size", "per_block_int_scale", "per_channel_float_scale"}:
        raise ValueError("is quantized in blocks, which is not read")
    bits, signed = _bits(int(dtype[2])), not dtype[1]
    scales = _list(value, "y_scale", _scale)
    zero_points = [0] * len(scales)
    if value.get("y_zero_point") is not None:
        zero_points = _list(value, "y_zero_point", _whole)
    return _grid(bits, signed, scales, [_least(bits, signed) - zero_point for zero_point in zero_points])


def _grid(bits, signed, scales, lows, strict=False):
    """The Encoding; `lows`: the integers that, times the scale, are the least values."""
    qmin = _least(bits, signed) + strict
    qmax = _least(bits, signed) + (1 << bits) - 1
    if len(scales) != len(lows) or not scales:
        raise ValueError(f"has {len(scales)} scales and {len(lows)} offsets")
    for low in lows:
        if not low <= 0 <= low + qmax - qmin:
            raise ValueError(f"has an offset that leaves 0 outside of its {bits} bits")
    return Encoding(qmin, qmax, tuple(scales), tuple(low - qmin for low in lows))


def _least(bits, signed):
    return -(1 << (bits - 1)) if signed else 0


def _kind(value, bits_key, symmetry_key):
    """(bit width, whether symmetric) of an entry of integers."""
    if str(value.get("dtype", "int")).lower() != "int":
        raise ValueError(f"has dtype {value['dtype']!r}; only int is read")
    symmetry = str(value.get(symmetry_key)).lower()  # AIMET writes a bool as text
    if symmetry not in ("true", "false"):
        raise ValueError(f"has {symmetry_key!r} {value.get(symmetry_key)!r}, neither true nor false")
    return _bits(_whole(value, bits_key)), symmetry == "true"


def _bits(bits):
    if bits not in range(2, 33):
        raise ValueError(f"has a bit width of {bits}, and 2 to 32 are possible")
    return bits


def _list(value, key, read):
    """The numbers under `key`, one or a list of them."""
    found = value.get(key)
    return [read({key: number}, key) for number in (found if isinstance(found, list) else [found])]


def _number(value, key):
    found = value.get(key)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise ValueError(f"has {key!r} {str(found)[:60]!r}, which is no number")
    if abs(found) > 1e38:  # infinity too, which JSON writes as 1e999
        raise ValueError(f"has {key!r} beyond float32")
    return float(found)


def _scale(value, key):
    found = _number(value, key)
    if not 1e-37 < found < 1e37:  # float32's range
        raise ValueError(f"has a {key} of {found:g}, which is no step between numbers")
    return found


def _whole(value, key):
    found = _number(value, key)
    if not found.is_integer():
        raise ValueError(f"has {key!r} {found:g}, which is no whole number")
    return int(found)


def load_encodings(sim, encodings, partial=False):
    """Sets every quantizer of the uncalibrated `sim` to the file's encodings, and keeps calibration from changing them.

    Returns Loaded. UserError lists what the file lacks and has too much; with `partial`, it is left to the caller to
    calibrate what is missing. UserError also where an entry fits its quantizer badly or two contradict each other.
    """
    from ffnet import places

    slots = places.slots(sim)
    found, surplus = places.match(sim, slots, encodings)
    chosen, missing, untied = _choose(slots, found)
    for slot, encoding in chosen:
        _check_fit(slot, encoding, encodings.path)
    if not chosen:
        raise UserError(f"--encodings {encodings.path}: no entry fits this network, {_some(surplus)} for one")
    if not partial and (missing or surplus):
        lists = (("nothing for", missing), ("entries that no quantizer takes:", surplus))
        said = "; ".join(f"{text} {_some(names)} ({len(names)})" for text, names in lists if names)
        raise UserError(
            f"--encodings {encodings.path}: has {said}. Give the file of this network and recipe, or "
            "--partial-encodings to calibrate what is missing and leave out what is too much"
        )
    for slot, encoding in chosen:
        if slot.name in untied:
            slot.container[slot.key] = _fresh(slot.quantizer)
        _set(slot, encoding, encodings.path)
    return Loaded(tuple(missing), tuple(surplus), tuple(untied))


def _some(names, most=12):
    """The names in one line, the first of them where there are many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more


def _choose(slots, found):
    """([(slot, encoding)], names of missing quantizers, names of slots to untie) of `found`, {slot name: encoding}.

    AIMET 2 lets the inputs and the output of a concatenation share a quantizer: one entry is then enough for all.
    AIMET 1.x gave each its own, and may have found different encodings.
    """
    shared = {}
    for slot in slots:
        shared.setdefault(id(slot.quantizer), []).append(slot)
    chosen, missing, untied = [], [], []
    for group in shared.values():
        named = [(slot, found[slot.name]) for slot in group if slot.name in found]
        if len({encoding for _, encoding in named}) > 1:
            chosen += named
            untied += [slot.name for slot, _ in named]
            group = [slot for slot in group if slot.name not in found]
        elif named:
            chosen.append(named[0])
            continue
        missing += [slot.name for slot in group[:1]]
    return chosen, missing, untied


def _check_fit(slot, encoding, path):
    """UserError unless the slot's quantizer can hold the encoding."""
    from aimet_torch.quantization.affine import QuantizeDequantize

    quantizer = slot.quantizer
    if type(quantizer) is not QuantizeDequantize or quantizer.block_size:
        raise UserError(f"--encodings {path}: {slot.name} is {quantizer}, which takes no encodings of this kind")
    count, wanted = len(encoding.scales), math.prod(quantizer.shape)
    if count != wanted:
        raise UserError(
            f"--encodings {path}: {slot.name} needs {wanted} scales and the file has {count}; give the file of this "
            "network, made with the same choice of per-channel or per-tensor quantization"
        )
    if encoding.qmax - encoding.qmin >= 1 << 31:
        raise UserError(f"--encodings {path}: {slot.name} has 32 bits, and AIMET simulates at most 31")


def _set(slot, encoding, path):
    """Gives the slot's quantizer the encoding for good: calibration leaves it alone."""
    import torch

    quantizer = slot.container[slot.key]
    quantizer.qmin, quantizer.qmax = encoding.qmin, encoding.qmax
    quantizer.symmetric = encoding.qmin < 0 and not any(encoding.offsets)
    scale = torch.tensor(encoding.scales, dtype=torch.float64).reshape(quantizer.shape)
    offset = torch.tensor(encoding.offsets, dtype=torch.float64).reshape(quantizer.shape)
    quantizer.set_range(*_range(scale, offset, encoding))
    quantizer.allow_overwrite(False)
    held = quantizer.get_scale().detach().cpu()
    if not torch.allclose(held, scale.float(), rtol=2**-23, atol=0):
        raise UserError(
            f"--encodings {path}: {slot.name} has a scale of {scale.min():g}, and AIMET simulates none so small"
        )
    if not torch.equal(quantizer.get_offset().detach().cpu().double(), offset):
        raise UserError(f"--encodings {path}: {slot.name} has an offset that AIMET's float32 can't hold")


def _range(scale, offset, encoding):
    """float32 least and largest values from which AIMET's arithmetic, (max - min) / steps, gives `scale` back.

    Merely rounded they may give its neighbour; so the ends are moved by a few units in the last place, both of them,
    because a difference that falls half-way between two floats is rounded to every other one only.
    """
    import torch

    low = (scale * (offset + encoding.qmin)).float()
    high = (scale * (offset + encoding.qmax)).float()
    best = (torch.full_like(low, torch.inf), low, high)
    near, far = (0, 1, -1), (0, 1, -1, 2, -2, 3, -3)  # of the ends of smaller and larger magnitude
    for small, large in itertools.product(near, far):
        upper = torch.where(high >= -low, large, small)
        ends = _moved(low, large + small - upper), _moved(high, upper)
        error = ((ends[1] - ends[0]) / (encoding.qmax - encoding.qmin) - scale.float()).abs()
        best = tuple(torch.where(error < best[0], new, old) for new, old in zip((error, *ends), best, strict=True))
    return best[1:]


def _moved(value, units):
    """The float32 values so many units in the last place farther from zero."""
    import torch

    return (value.view(torch.int32) + units.int()).view(torch.float32)


def _fresh(quantizer):
    """A quantizer of the same kind, not yet calibrated, that nothing else shares."""
    from aimet_torch.quantization.affine import QuantizeDequantize

    fresh = QuantizeDequantize(quantizer.shape, quantizer.qmin, quantizer.qmax, quantizer.symmetric)
    return fresh.to(next(quantizer.parameters()).device)
