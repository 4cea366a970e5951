"""Small folders in Cityscapes' layout."""

import numpy as np
from skimage.io import imsave

SIZE = (64, 128)  # height, width
CITIES = ("aachen", "zurich")


def write_tree(root, split="val", count=4, size=SIZE, seed=0):
    """Write `count` images of noise with blocky labels of all ids; return their stems."""
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
