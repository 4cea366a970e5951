"""What an earlier run left in its output folder, read without torch."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ffnet.config import PROGRESS_FOLDER, RESULT_FILE, Config
from ffnet.options import FLAGS, option_values
from ffnet.system.errors import UserError
from ffnet.system.files import read_utf8
from ffnet.system.schema import parse

SETTINGS, FINISHED = "settings.json", "finished"  # in PROGRESS_FOLDER, see ffnet.run.storage
IMAGES_DIGEST = "sha256 of the images and labels"  # key in SETTINGS
# Options that change neither the results nor the files that hold them.
HARMLESS = (
    "model.cache_dir", "runtime.num_workers", "runtime.quiet", "output.output_dir", "output.resume", "output.force",
    "output.fail_under",
)  # fmt: skip


@dataclass(frozen=True)
class EarlierRun:
    """The fields of `result.json` that later runs depend on."""

    model: str
    images: int
    precision: str
    label_set: str
    classes: dict[str, Any]
    backends: dict[str, Any]
    options: dict[str, Any]

    def repeats(self, config: Config) -> bool:
        """Return whether a run of one model has the same options."""
        ignored = {FLAGS[target].removeprefix("--").replace("-", "_") for target in HARMLESS}
        return all(self.options.get(name) == value or name in ignored for name, value in option_values(config).items())


def finished_run(folder: Path | None) -> EarlierRun | None:
    """Return the run of one model whose complete results a folder holds; None if it holds none that can be read."""
    if folder is None or not (folder / PROGRESS_FOLDER / FINISHED).is_file():
        return None
    try:
        content = json.loads(read_utf8(folder / RESULT_FILE))
        return parse(EarlierRun, {field.name: content[field.name] for field in fields(EarlierRun)})
    except (OSError, ValueError, LookupError, TypeError):
        return None


def baseline_run(config: Config) -> EarlierRun:
    """Return the run of one model that --baseline names; raise a UserError if the folder holds no finished run."""
    folder = config.output.baseline
    if run := finished_run(folder):
        return run
    raise UserError(
        f"--baseline {folder}: this folder holds no finished run. Name the --output-dir of a run that ended without an "
        "error; with several models, of the same ones."
    )
