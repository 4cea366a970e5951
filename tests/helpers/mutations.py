"""Good files with something changed at random: their bytes, or the pickle inside with checksums put right."""

import functools
import io
import itertools
import pickletools
import zipfile
from pathlib import Path

import safetensors.torch
import torch

from tests.helpers.hostile import release, safetensors_file

PICKLED = Path(__file__).parents[1] / "data" / "pickled"


def good_files():
    """Small files of every form."""
    state = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(2)}
    stream, old = io.BytesIO(), io.BytesIO()
    torch.save(state, stream)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    pickled = [(PICKLED / name).read_bytes() for name in ("tiny.pth", "tiny_unprepared.pth", "odd.pth")]
    forms = [stream.getvalue(), old.getvalue(), safetensors.torch.save(state), release(stream.getvalue())]
    return [*pickled, *forms, safetensors_file({})]


def changed(data, changes):
    """`data` with each of (kind, position, bytes) done to it: overwrite, insert, remove or repeat, anywhere."""
    for kind, position, new in changes:
        at = position % (len(data) + 1)
        end = at + len(new)
        if kind == "overwrite":
            data = data[:at] + new + data[end:]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        elif kind == "remove":
            data = data[:at] + data[end:]
        else:
            data = data[:end] + data[at:end] * 3 + data[end:]
    return data


def random_changes(random):
    """One to four changes for `changed`."""
    kinds = ("overwrite", "insert", "remove", "repeat")
    return [
        (random.choice(kinds), random.randrange(2**31), random.randbytes(random.choice((1, 1, 1, 2, 4, 8))))
        for _ in range(random.randint(1, 4))
    ]


def with_pickle(data, change):
    """The torch zip `data` with `change` done to the bytes of its pickle, and everything around it as it should be."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(stream, "w") as rewritten:
        for info in archive.infolist():
            held = archive.read(info)
            rewritten.writestr(info.filename, change(held) if info.filename.endswith("data.pkl") else held)
    return stream.getvalue()


def shuffled_opcodes(pickle, random):
    """A pickle with some of its opcodes left out, doubled, or replaced by others of its own."""
    starts = [position for _, _, position in pickletools.genops(pickle)] + [len(pickle)]
    opcodes = [pickle[start:end] for start, end in itertools.pairwise(starts)]
    for _ in range(random.randint(1, 3)):
        at, other = random.randrange(1, len(opcodes) - 1), random.randrange(1, len(opcodes) - 1)
        opcodes[at : at + random.choice((0, 1))] = random.choice(([], [opcodes[other]]))
    return b"".join(opcodes)


def random_mutations(random, count):
    """`count` files, by a random.Random: of bytes anywhere, of bytes in the pickle, of its opcodes."""
    files = good_files()
    for _ in range(count):
        changes = random_changes(random)
        way = random.choice(("bytes", "pickle", "opcodes"))
        if way == "bytes":
            yield changed(random.choice(files), changes)
        elif way == "pickle":
            yield with_pickle(random.choice(files[:4]), functools.partial(changed, changes=changes))
        else:
            yield with_pickle(random.choice(files[:4]), lambda held: shuffled_opcodes(held, random))
