"""Print where every second of a run goes, from the start of Python to the end of the process.

    python -m benchmarks.accounting [--model-name NAME] [--images N] [--cuda] [--option OPTION ...]

The first run reads the packages' files from the disk, the second from memory. Times are exclusive: what one row counts,
no other does. The weights are random, and a few rendered scenes make up the images. Linux only.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.account import REST
from benchmarks.inputs import option_parser, write_checkpoint, write_images
from benchmarks.program import ROOT
from benchmarks.timing import describe_machine, markdown
from ffnet.variants import DEFAULT_MODEL

SCENES = 4  # number of different images


def run_once(options: Sequence[str | Path]) -> dict[str, float]:
    """Run the program in a process of its own, and return the seconds by row."""
    with tempfile.TemporaryDirectory() as name:
        account = Path(name) / "account.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.account",
            account,
            *options,
            "--output-dir",
            Path(name) / "out",
            "--quiet",
        ]
        begin = time.time()
        subprocess.run(list(map(str, command)), check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        end = time.time()
        content = json.loads(account.read_text())
    rows = {
        "start of Python": content["begin"] - begin,
        **content["seconds"],
        "end of the process": end - content["end"],
    }
    return {**rows, "whole run": end - begin}


def forget_files() -> None:
    """Ask the system to drop the packages' files from its memory."""
    for package in map(Path, sys.path):
        for path in package.rglob("*") if package.name == "site-packages" else ():
            if path.is_file() and path.suffix in (".py", ".pyc", ".so") or ".so." in path.name:
                with contextlib.suppress(OSError), path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(cold: dict[str, float], warm: dict[str, float]) -> list[Sequence[str]]:
    """Return the rows of both runs, and how much of the whole run no row names."""
    names = list(dict.fromkeys([*warm, *cold]))
    rows: list[Sequence[str]] = [("what", "files on disk, s", "files in memory, s")]
    rows += [(name, *(f"{run.get(name, 0.0):.2f}" for run in (cold, warm))) for name in names]
    unnamed = (f"{100 * run[REST] / run['whole run']:.1f} %" for run in (cold, warm))
    return [*rows, (f"share of the {REST}", *unnamed)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program twice and print the table."""
    parser = option_parser("accounting", __doc__, DEFAULT_MODEL)
    parser.add_argument("--images", type=int, default=8, help="default %(default)s")
    parser.add_argument("--cuda", action="store_true", help="run on a GPU")
    parser.add_argument("--option", action="append", default=[], help="further option of the program, such as --cle")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder / "images", args.images, scenes=SCENES)
        options: list[str | Path] = ["--dataset-path", images.root, "--model-name", args.model_name, *args.option]
        options += ["--checkpoint", write_checkpoint(args.model_name, folder / "weights.pth")]
        options += ["--use-cuda", str(args.cuda).lower()]
        forget_files()
        runs = run_once(options), run_once(options)
    print("\n".join([f"{args.model_name}, {args.images} images: {describe_machine()}", "", *markdown(table(*runs))]))


if __name__ == "__main__":
    main()
