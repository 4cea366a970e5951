"""Reads the files in a list under an audit hook: `python -m tests.helpers.watched LIST.json`.

It prints a line of JSON for each. It is a process of its own, because an audit hook cannot be removed.
"""

import json
import resource
import sys
import warnings
from pathlib import Path

import torch

from ffnet.checkpoints.loading import InvalidCheckpointError, read_checkpoint

PICKLED = Path(__file__).parents[1] / "data" / "pickled"
# Audit events that reading a file has no business with; "open" is looked at more closely.
WATCHED = ("exec", "compile", "import", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "urllib.")
WATCHED += ("pickle.", "marshal.", "code.", "tempfile.", "webbrowser.", "mmap.", "glob.", "ftplib.", "http.")


class Watch:
    """Notes the audit events of forbidden kinds while a file is read."""

    def __init__(self):
        self.path = None  # path of the file that may be opened; None: nothing is watched
        self.seen = []

    def __call__(self, event, args):
        if self.path is None:
            return
        if event == "open" and args[0] != self.path or event.startswith(WATCHED):
            self.seen.append(f"{event} {args}"[:200])


def warm_up():
    """Reads a good file of each kind, so that whatever is imported on first use is there."""
    for name in ("tiny.pth", "odd.pth"):
        read_checkpoint(PICKLED / name)
    import encodings.cp437  # noqa: F401 - how zipfile reads the names in a zip
    import encodings.raw_unicode_escape  # noqa: F401 - and pickletools a text of protocol 0

    import safetensors.torch  # noqa: F401

    str(torch.zeros(1))  # imports parts of torch
    warnings.simplefilter("ignore")  # the text of a warning is read from the source file


def outcome(path):
    """("ok", ""), or the kind of the error and its text."""
    try:
        read_checkpoint(path)
    except InvalidCheckpointError as error:
        return "InvalidCheckpointError", str(error)
    except BaseException as error:
        return type(error).__name__, str(error)
    return "ok", ""


def self_test(watch):
    """What the hook sees of code that runs and of a file that is opened."""
    watch.path = "self-test"
    exec("open('/dev/null').close()")
    watch.path = None
    return watch.seen


def main(listed):
    warm_up()
    watch = Watch()
    sys.addaudithook(watch)
    print(json.dumps(self_test(watch)))
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in listed:
        watch.path, watch.seen = path, []
        kind, message = outcome(path)
        watch.path = None
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline
        row = {"path": path, "kind": kind, "message": message, "seen": watch.seen, "grown_kb": grown}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
