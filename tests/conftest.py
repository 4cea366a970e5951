"""Small Cityscapes trees that tests make for themselves."""

import numpy as np
import pytest
import torch
from skimage.io import imsave

SIZE = (64, 128)  # height, width
CITIES = ("aachen", "zurich")


def write_tree(root, split="val", count=4, size=SIZE, seed=0):
    """`count` images of noise with blocky labels of all ids, in Cityscapes' layout; returns their stems."""
    rng = np.random.default_rng(seed)
    stems = []
    for index in range(count):
        city = CITIES[index % len(CITIES)]
        stem = f"{city}_{index:06d}_000019"
        folders = [root / kind / split / city for kind in ("leftImg8bit", "gtFine")]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        labels = rng.integers(0, 34, (size[0] // 8, size[1] // 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        imsave(folders[0] / f"{stem}_leftImg8bit.png", image, check_contrast=False)
        imsave(folders[1] / f"{stem}_gtFine_labelIds.png", labels, check_contrast=False)
        stems.append(stem)
    return stems


@pytest.fixture
def tree(tmp_path):
    """A folder with four val and three train images."""
    write_tree(tmp_path, "val", 4)
    write_tree(tmp_path, "train", 3, seed=1)
    return tmp_path


def pytest_collection_modifyitems(config, items):
    """Tests marked cuda run where there is a GPU; elsewhere they are deselected, which pytest counts and tells."""
    if torch.cuda.is_available():
        return
    elsewhere = [item for item in items if item.get_closest_marker("cuda")]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]
