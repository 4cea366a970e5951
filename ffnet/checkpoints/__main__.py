"""Say what a checkpoint file is, without running anything in it: `python -m ffnet.checkpoints FILE`.

It prints the form, the variants that the file matches, the keys, the sha256, and what loading the file without these
precautions would have imported and run.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ffnet.checkpoints.loading import InvalidCheckpointError, printable, read_checkpoint
from ffnet.checkpoints.matching import matching_variants
from ffnet.checkpoints.unpickling import CheckpointContents
from ffnet.system.files import write_atomically
from ffnet.system.text import count

SHOWN_LINES = 8  # of the Python text that a file carries
FORMS = {
    "state_dict": "a state_dict",
    "release": "an FFNet release zip that holds a state_dict",
    "module": "a whole pickled module",
    "prepared": "a prepared file: a whole pickled torch.fx module",
    "equalized": "an equalized file: a whole pickled torch.fx module whose batch norms are folded",
    "safetensors": "a safetensors file",
}


def describe(path: Path, contents: CheckpointContents, sha256: str) -> Iterator[str]:
    """Yield the lines that the command prints."""
    variants = matching_variants(contents.state_dict, contents.equalized)
    yield f"{path}: {FORMS[contents.form]}"
    yield f"sha256 {sha256}"
    yield f"matches {', '.join(variants) or 'no FFNet variant'}"
    yield from contents.notes()
    for name in contents.names:
        yield f"would import {name}"
    for text in contents.code:
        yield f"would run {count(len(text.splitlines()), 'line')} of Python, none of which was run:"
        yield from (f"    {line}" for line in text.strip().splitlines()[:SHOWN_LINES])
    yield count(len(contents.state_dict), "key")
    for key, tensor in contents.state_dict.items():
        yield f"    {key} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def save_safetensors(state_dict: dict[str, Tensor], path: Path) -> None:
    """Write a state_dict as a safetensors file."""
    if path.suffix != ".safetensors":
        raise InvalidCheckpointError(
            f"--save {path}: only safetensors files are written. End the name in .safetensors."
        )
    try:
        write_atomically(path, safetensors.torch.save(state_dict))
    except OSError as error:
        raise InvalidCheckpointError(
            f"--save {path}: the file cannot be written ({error.strerror}). Name another one."
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 if the file cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m ffnet.checkpoints", description="Say what a checkpoint file is.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--member", default="", help="which checkpoint of a release zip, if it holds several")
    parser.add_argument("--save", type=Path, metavar="FILE.safetensors", help="also write the tensors to this file")
    args = parser.parse_args(argv)
    try:
        contents, sha256 = read_checkpoint(args.file, args.member)
        if args.member and contents.form != "release":
            raise InvalidCheckpointError(f"--member {args.member}: {args.file} is not a release zip. Remove --member.")
        if args.save:
            save_safetensors(contents.state_dict, args.save)
    except InvalidCheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    for line in describe(args.file, contents, sha256):
        print(printable(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
