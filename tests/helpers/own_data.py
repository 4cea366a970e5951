"""Small data sets in other layouts than Cityscapes', of colored blocks with seven classes."""

import json

import numpy as np
from PIL import Image

NAMES = ("trail", "grass", "tree", "sky", "water", "rock", "vehicle")
COLORS = np.random.default_rng(7).integers(40, 216, (len(NAMES), 3))
IDS = (3, 1, 4, 15, 9, 2, 6)  # label ids, in the order of the train ids
LABEL_SET = {
    "name": "off-road",
    "classes": [
        {"name": name, "color": color.tolist(), "ids": [label_id]}
        for name, color, label_id in zip(NAMES, COLORS, IDS, strict=True)
    ],
    "ignored": [0],
}


def picture(rng, size, ids=IDS):
    """Return an image (H, W, 3) uint8 and its label (H, W) uint8 of blocks, a few of which are not scored."""
    blocks = rng.integers(0, len(ids), (size[0] // 16, size[1] // 16)).repeat(16, 0).repeat(16, 1)
    noise = rng.normal(0, 12, (*size, 3))
    label = np.array(ids, np.uint8)[blocks]
    label[:4] = 0
    return (COLORS[blocks % len(COLORS)] + noise).clip(0, 255).astype(np.uint8), label


def write_pair(image_path, label_path, pair, palette=False):
    """Write an image, as JPEG if its name says so, and its label; with `palette`, the ids are palette indices."""
    for path, pixels in zip((image_path, label_path), pair, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = Image.fromarray(pixels)
        if palette and path == label_path:
            file.putpalette(np.arange(768, dtype=np.uint8).tobytes())
        file.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def write_folders(root, split="val", count=6, sizes=((64, 128), (96, 128)), seed=0):
    """Write `count` JPEG images of two sizes and their labels in the layout `folders`."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        place = f"{'north' if index % 3 else 'south'}/{index:03d}"
        paths = root / "images" / split / f"{place}.jpg", root / "labels" / split / f"{place}.png"
        write_pair(*paths, picture(rng, sizes[index * len(sizes) // count]), palette=index % 2 == 1)
    (root / "classes.json").write_text(json.dumps(LABEL_SET))


def write_kitti(root, count=4, seed=0):
    """Write a tree as data_semantics.zip holds it; the sizes are a sixth of two of KITTI's.

    Source: https://www.cvlibs.net/datasets/kitti/eval_semantics.php and its development kit.
    """
    rng = np.random.default_rng(seed)
    for index in range(count):
        name = f"{index:06d}_10.png"
        pair = picture(rng, ((64, 208), (64, 192))[index % 2], ids=(7, 8, 11, 21, 23, 26, 33))
        write_pair(root / "training" / "image_2" / name, root / "training" / "semantic" / name, pair)


def write_bdd100k(root, split="val", count=4, seed=0):
    """Write a tree as the archives of BDD100K hold it, with 255 where nothing is scored.

    Source: https://doc.bdd100k.com/download.html and https://doc.bdd100k.com/format.html.
    """
    rng = np.random.default_rng(seed)
    for index in range(count):
        name = f"{index:08x}-{index:08x}"
        image, label = picture(rng, (64, 128), ids=tuple(range(7)))
        label[:4] = 255
        folder = root / "labels" / "sem_seg" / "masks" / split
        write_pair(root / "images" / "10k" / split / f"{name}.jpg", folder / f"{name}.png", (image, label))
