"""Rendered street scenes as a folder in Cityscapes' own layout: the images of the demo."""

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from demo.streetscenes.render import render_scene

VERSION = 1  # raise it with every change to what is drawn, so that no old folder is used
SPLITS = {  # split -> city -> seeds of its scenes
    "train": {"ahornfeld": range(0, 12), "erlenhafen": range(12, 24)},
    "val": {"lindenbruck": range(1000, 1012), "ulmenstadt": range(1012, 1024)},
}
FIRST_FREE_SEED = 10_000  # no split uses this or a larger seed; training does

SceneFiles = tuple[int, Path, Path]  # seed, path of the image, path of its label ids


def ensure_scenes(cache_dir: str | Path, progress: bool = True) -> Path:
    """Return the folder below `cache_dir` with `leftImg8bit` and `gtFine`; render it if it does not exist.

    The folder gets its name once it is complete, so an interrupted rendering leaves no folder. If two processes render
    at once, both use the folder of the first.

    Args:
        cache_dir: is created if it does not exist.
        progress: show a progress bar on stderr.

    Raises:
        OSError: if the folder can't be written.
    """
    folder = Path(cache_dir) / f"streetscenes-v{VERSION}"
    if folder.is_dir():
        return folder
    Path(cache_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".streetscenes-", dir=cache_dir) as temporary:
        work = Path(temporary) / folder.name
        render_files(scene_files(work), progress)
        try:
            work.rename(folder)
        except OSError:  # another process created it first
            if not folder.is_dir():
                raise
    return folder


def scene_files(root: Path) -> list[SceneFiles]:
    """Return the files of every scene."""
    rows = []
    for split, cities in SPLITS.items():
        for city, seeds in cities.items():
            for number, seed in enumerate(seeds):
                stem = f"{city}_{number:06d}_000019"
                image = root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png"
                rows.append((seed, image, root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png"))
    return rows


def render_files(rows: list[SceneFiles], progress: bool) -> None:
    """Render scenes on all cores."""
    bar = tqdm(total=len(rows), desc="rendering street scenes", unit="scene", disable=not progress)
    with bar, process_pool() as pool:
        for _ in pool.map(_render_file, rows):
            bar.update()


def process_pool() -> ProcessPoolExecutor:
    """Return a pool of one process per core, spawned because a fork of a process with torch's threads may hang."""
    return ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))


def _render_file(row: SceneFiles) -> None:
    seed, image_path, label_path = row
    for path, pixels in zip((image_path, label_path), render_scene(seed), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, compress_level=3)
