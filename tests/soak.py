"""Run the program on random command lines: `python -m tests.soak --count 2000 --seed 0`.

Each has valid and broken values of some options, tiny images and odd files. Every run must end within 120 s with status
0, 1 or 2, print no traceback, and leave nothing half-written. Runs that break a rule are printed.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import ffnet.report.delivery  # noqa: F401  # forks need not import it
import ffnet.run.pipeline  # noqa: F401
import ffnet_quanteval
from ffnet.variants import VARIANTS
from tests.helpers.cityscapes_tree import write_tree
from tests.helpers.exports import export_simulation
from tests.helpers.networks import TOY, golden_state, random_batches, three_layer_network, toy_model
from tests.helpers.program import start_fork
from tests.helpers.simulations import simulate

TIMEOUT = 120  # seconds
LIBRARY_FILES = {".ses"}  # files that ONNX Runtime leaves in the temporary folder in every run
BROKEN_SHARE = 0.2  # share of broken values
NUMBERS = (["1", "2", "3"], ["0", "-1", "x", "1.5", "9" * 20, ""])
SWITCH = ([None], ["maybe"])


@dataclass(frozen=True)
class Grammar:
    """Which values an option takes: None is the option alone."""

    valid: list
    broken: list


def grammar(files):
    """Return the values of every option; `files` is what `write_files` returns."""
    numbers, switch = Grammar(*NUMBERS), Grammar(*SWITCH)
    outputs = Grammar(["new", "ne w/é/deep", "empty", "."], [*files["folders"], *files["garbage"], "new/inside", ""])
    inputs = [*files["garbage"], *files["folders"], "nowhere", ""]
    bits = Grammar(["4", "8", "16"], ["3", "17", "x"])
    return {
        "--model-name": Grammar([files["model"]], ["segmentation_ffnet14T_dBBB_mobile", "published", "ffnet40S", ""]),
        "--list-models": switch,
        "--checkpoint": Grammar([files["checkpoint"], files["checkpoint folder"]], inputs),
        "--resume": switch,
        "--cache-dir": Grammar(["cache"], files["garbage"]),
        "--onnx": Grammar([files["onnx"]], inputs),
        "--demo": switch,
        "--dataset-path": Grammar([files["tree"]], [*files["trees"], *inputs]),
        "--split": Grammar(["val", "train"], ["test", ""]),
        "--limit": numbers,
        "--default-param-bw": bits,
        "--default-output-bw": bits,
        "--quant-scheme": Grammar(["tf", "tf_enhanced"], ["minmax"]),
        "--cle": switch,
        "--no-cle": switch,
        "--config-file": Grammar(["default"], inputs),
        "--calibration-split": Grammar(["val", "train"], ["test"]),
        "--calibration-images": numbers,
        "--seed": Grammar(["0", "7"], ["-1", "x"]),
        "--encodings": Grammar([files["encodings"]], inputs),
        "--partial-encodings": switch,
        "--seq-mse": switch,
        "--adaround": Grammar([None, "2"], NUMBERS[1]),
        "--max-drop": Grammar(["0", "0.5", "100"], ["-1", "x", "101"]),
        "--recovery-images": numbers,
        "--selection-images": numbers,
        "--npu": Grammar([None, "sm8750", "snapdragon-8-gen-3", "list"], ["sm8570", ""]),
        "--npu-images": Grammar(["1", "all"], NUMBERS[1]),
        "--npu-fallback": switch,
        "--use-cuda": Grammar(["false"], ["true", "maybe"]),
        "--allow-tf32": switch,
        "--no-compile": switch,  # compiling takes minutes
        "--batch-size": numbers,
        "--num-workers": Grammar(["0", "2"], NUMBERS[1][1:]),
        "--quiet": switch,
        "--output-dir": outputs,
        "--worst": Grammar(["0", "2"], NUMBERS[1][1:]),
        "--sensitivity": switch,
        "--sensitivity-images": numbers,
        "--save-predictions": outputs,
        "--export": outputs,
        "--execute": switch,
        "--no-execute": switch,
        "--force": switch,
        "--fail-under": Grammar(["0", "100", "0.5"], ["-1", "x", "nan"]),
        "--help": switch,
        "--unknown": switch,
    }


def write_files(folder):
    """Write good, broken and odd inputs into a folder and return their paths by kind."""
    trees = {name: folder / name for name in ("good", "no label", "other size", "broken image", "odd file")}
    for path in trees.values():
        write_tree(path, "val", 3)
        write_tree(path, "train", 2, seed=1)
    next(trees["no label"].glob("gtFine/val/*/*.png")).unlink()
    write_tree(trees["other size"], "val", 1, size=(32, 64))
    image = next(trees["broken image"].glob("leftImg8bit/val/*/*.png"))
    image.write_bytes(image.read_bytes()[:-200])
    (trees["odd file"] / "leftImg8bit" / "val" / "readme.txt").touch()
    (folder / "nothing").mkdir()

    torch.save(golden_state(toy_model()), folder / "toy.pth")
    (folder / "weights").mkdir()
    shutil.copy(folder / "toy.pth", folder / "weights")
    state = golden_state(toy_model())
    torch.save(dict(list(state.items())[1:]), folder / "key missing.pth")
    torch.save({"pickled": [1, {"a": torch.ones(2)}]}, folder / "no weights.pth")
    (folder / "noise").write_bytes(random.Random(0).randbytes(5000))
    (folder / "empty file").touch()
    (folder / "list.json").write_text("[1, 2]")
    (folder / "page.html").write_text("<html></html>")
    (folder / "cut.pth").write_bytes((folder / "toy.pth").read_bytes()[:-3000])
    toy = simulate(toy_model(), random_batches())
    toy.save_encodings_to_json(str(folder), "toy")
    network = three_layer_network()
    exported = export_simulation(network, simulate(network, quant_scheme="tf"), random_batches()[0], folder / "export")
    garbage = ("key missing.pth", "no weights.pth", "noise", "empty file", "list.json", "page.html", "cut.pth")
    return {
        "model": TOY.name,
        "tree": trees["good"],
        "trees": [*list(trees.values())[1:], folder / "nothing"],
        "checkpoint": folder / "toy.pth",
        "checkpoint folder": folder / "weights",
        "encodings": folder / "toy.json",
        "onnx": exported.folder / "model.onnx",
        "garbage": [folder / name for name in garbage],
        "folders": [folder / "good"],
    }


def command_line(rng, options, files):
    """Return random arguments: often a small complete run, with up to five more options."""
    arguments = ["--use-cuda", "false"] if rng.random() < 0.95 else []
    kind = rng.random()
    if kind < 0.75:
        arguments += ["--dataset-path", files["tree"], "--model-name", files["model"], "--num-workers", "0"]
        arguments += ["--checkpoint", files["checkpoint"]]
    elif kind < 0.9:
        arguments += ["--dataset-path", files["tree"], "--onnx", files["onnx"]]
    for option in rng.sample(sorted(options), rng.randint(0, 5)):
        values = options[option].broken if rng.random() < BROKEN_SHARE else options[option].valid
        value = rng.choice(values)
        arguments += [option] if value is None else [option, value]
    return [str(argument) for argument in arguments]


@dataclass(frozen=True)
class Run:
    """How one run of the program ended."""

    status: int | None  # None: it was still running after TIMEOUT
    output: str  # stdout and stderr


def run_program(arguments, folder):
    """Run the program in a fork of this process with `folder` as working directory and its own temporary folder."""
    (folder / "tmp").mkdir()

    def run():
        os.setsid()
        os.chdir(folder)
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")
        try:
            return ffnet_quanteval.main(arguments)
        except SystemExit as end:
            return end.code or 0

    child, status, deadline = start_fork(run, folder / "log"), None, time.monotonic() + TIMEOUT
    while status is None and time.monotonic() < deadline:
        time.sleep(0.02)
        pid, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if pid else None
    if status is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return Run(status, (folder / "log").read_text(errors="replace"))


def faults(run, folder):
    """Return what is wrong with a run, as sentences."""
    if run.status is None:
        return [f"It was still running after {TIMEOUT} s."]
    found = []
    if run.status not in (0, 1, 2):
        found.append(f"The exit status is {run.status}.")
    if "Traceback" in run.output:
        found.append("A traceback was printed.")
    errors = run.output.count("ffnet_quanteval.py: error: ")
    if (run.status == 2) != bool(errors):
        found.append(f"Status {run.status} with {errors} error lines.")
    left = [path for path in (folder / "tmp").iterdir() if path.name not in LIBRARY_FILES]
    found += [f"Left behind: {path.relative_to(folder)}." for path in left]
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in LIBRARY_FILES and not is_whole(path):
            found.append(f"Half-written: {path.relative_to(folder)}.")
    return found


def is_whole(path):
    """Whether a file that the program wrote is complete."""
    if path.name.startswith("."):
        return False
    if path.name == "manifest.json":
        entries = json.loads(path.read_text())["files"].items()
        return all(hashlib.sha256((path.parent / name).read_bytes()).hexdigest() == e["sha256"] for name, e in entries)
    if path.name == "result.json":
        return bool(json.loads(path.read_text()))
    if path.suffix == ".png":
        return path.read_bytes().endswith(b"IEND\xaeB`\x82")
    return path.suffix != ".html" or path.read_text().rstrip().endswith("</html>")


def soak(count, seed, progress=False):
    """Run `count` command lines; return how often each status was seen, and the number of runs with faults."""
    rng, statuses, failures = random.Random(seed), collections.Counter(), 0
    with tempfile.TemporaryDirectory() as work:
        files = write_files(Path(work))
        options = grammar(files)
        for number in range(count):
            folder = Path(work) / "run"
            (folder / "empty").mkdir(parents=True)
            arguments = command_line(rng, options, files)
            run = run_program(arguments, folder)
            statuses[run.status] += 1
            if found := faults(run, folder):
                failures += 1
                print(number, " ".join(map(repr, arguments)), *found, run.output[-1500:], sep="\n", flush=True)
            elif progress and number % 50 == 49:
                print(number + 1, dict(statuses), f"{failures} with faults", file=sys.stderr, flush=True)
            shutil.rmtree(folder)
    return statuses, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    VARIANTS[TOY.name] = TOY
    statuses, failures = soak(args.count, args.seed, progress=True)
    print(f"{args.count} command lines: statuses {dict(statuses)}, {failures} with faults")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
