"""Describe a checkpoint file without running anything in it: `python -m ffnet.checkpoints FILE`.

It prints the form, the variants that the file matches, its number of classes, the keys, the sha256, and what loading
the file without these precautions would have imported.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import safetensors.torch

from ffnet.checkpoints.loading import InvalidCheckpointError, read_checkpoint
from ffnet.checkpoints.matching import matching_variants
from ffnet.checkpoints.unpickling import CheckpointContents
from ffnet.system.files import write_atomically
from ffnet.system.process import prepared_streams, print_lines
from ffnet.system.text import count, printable


def describe(path: Path, contents: CheckpointContents, sha256: str) -> Iterator[str]:
    """Yield the lines that the command prints."""
    yield f"{path}: {contents.form}"
    yield f"sha256 {sha256}"
    variants = matching_variants(contents)
    yield f"matches {', '.join(variants) or 'no FFNet variant'}"
    yield from contents.notes
    if variants:
        yield f"predicts {contents.classes} classes"
    for name in contents.names:
        yield f"would import {name}"
    yield count(len(contents.state_dict), "key")
    for key, tensor in contents.state_dict.items():
        yield f"    {key} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


@prepared_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 if the file cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m ffnet.checkpoints", description="Describe a checkpoint file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--member", default="", help="which checkpoint of a release zip, if it holds several")
    parser.add_argument("--save", type=Path, metavar="FILE.safetensors", help="also write the tensors to this file")
    args = parser.parse_args(argv)
    try:
        contents, sha256 = read_checkpoint(args.file, args.member)
        if args.member and contents.form != "release":
            raise InvalidCheckpointError(f"--member {args.member}: {args.file} is not a release zip. Remove --member.")
        if args.save and args.save.suffix != ".safetensors":
            raise InvalidCheckpointError(f"--save {args.save}: safetensors are written. End the name in .safetensors.")
        if args.save:
            write_atomically(args.save, safetensors.torch.save(contents.state_dict))
    except (InvalidCheckpointError, OSError) as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    print_lines(*(printable(line)[:1000] for line in describe(args.file, contents, sha256)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
