"""Rendered street scenes as a folder in Cityscapes' own layout: the data of a run that brings none."""

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

VERSION = 1  # of the renderer: a change to what it draws counts this up, so that no old folder is taken for new
SPLITS = {  # split -> city -> seeds of its scenes
    "train": {"ahornfeld": range(0, 12), "erlenhafen": range(12, 24)},
    "val": {"lindenbruck": range(1000, 1012), "ulmenstadt": range(1012, 1024)},
}
FIRST_FREE_SEED = 10_000  # from here on no split has a scene: whoever trains draws from these


def ensure_scenes(cache_dir, progress=True):
    """The folder with `leftImg8bit` and `gtFine` below `cache_dir`, rendered where it is not there yet.

    It gets its name only when it is whole, so an interrupted rendering leaves no folder, and of two processes that
    render at once the first one's stays. `progress`: a bar on stderr. OSError where the folder cannot be written.
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
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def scene_files(root):
    """Rows (seed, path of the image, path of its label ids) for every scene."""
    rows = []
    for split, cities in SPLITS.items():
        for city, seeds in cities.items():
            for number, seed in enumerate(seeds):
                stem = f"{city}_{number:06d}_000019"
                image = root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png"
                rows.append((seed, image, root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png"))
    return rows


def render_files(rows, progress):
    """Render rows (seed, image path, label path), on all cores."""
    bar = tqdm(total=len(rows), desc="rendering street scenes", unit="scene", disable=not progress)
    with bar, process_pool() as pool:
        for _ in pool.map(_render_file, rows):
            bar.update()


def process_pool():
    """A pool of one process a core; spawned, because a fork of a process with torch's threads may hang."""
    return ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))


def _render_file(row):
    from PIL import Image

    from datasets.streetscenes.render import render_scene

    seed, image_path, label_path = row
    for path, pixels in zip((image_path, label_path), render_scene(seed), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, compress_level=3)
