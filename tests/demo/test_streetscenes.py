"""The rendered scenes against torchvision's Cityscapes reader and classes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from skimage.draw import polygon2mask
from torchvision.datasets import Cityscapes

from demo.streetscenes import scenes as streetscenes
from demo.streetscenes.canvas import Camera, Canvas, Light, rasterize
from demo.streetscenes.render import render_scene

EVALUATED = {c.id for c in Cityscapes.classes if not c.ignore_in_eval}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder with one scene per city, rendered in this process: starting others takes longer."""
    cities = {split: {c: s[:1] for c, s in cities.items()} for split, cities in streetscenes.SPLITS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streetscenes, "SPLITS", cities)
        patch.setattr(streetscenes, "process_pool", lambda: ThreadPoolExecutor(1))
        return streetscenes.ensure_scenes(tmp_path_factory.mktemp("cache"), progress=False)


@pytest.mark.slow
def test_torchvision_reads_the_folder_as_cityscapes(scenes):
    for split, cities in streetscenes.SPLITS.items():
        pairs = Cityscapes(str(scenes), split=split, mode="fine", target_type="semantic")
        assert {Path(path).parent.name for path in pairs.images} == set(cities)
        for image, label in pairs:
            assert image.mode == "RGB" and label.mode == "L" and image.size == label.size == (1024, 512)


@pytest.mark.slow
def test_the_files_hold_the_rendered_pixels(scenes):
    city, seeds = next(iter(streetscenes.SPLITS["val"].items()))
    image, label = render_scene(seeds[0])
    pairs = Cityscapes(str(scenes), split="val", mode="fine", target_type="semantic")
    found = next(i for i, path in enumerate(pairs.images) if Path(path).parent.name == city)
    assert (np.asarray(pairs[found][0]) == image).all() and (np.asarray(pairs[found][1]) == label).all()


@pytest.mark.slow
def test_an_existing_folder_is_not_rendered_again(scenes):
    before = {path: path.stat().st_mtime_ns for path in scenes.rglob("*")}
    assert streetscenes.ensure_scenes(scenes.parent) == scenes
    assert before == {path: path.stat().st_mtime_ns for path in scenes.rglob("*")}


def test_an_interrupted_rendering_leaves_no_files(tmp_path, monkeypatch):
    def interrupted(rows, progress):
        rows[0][1].parent.mkdir(parents=True)
        rows[0][1].touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(streetscenes, "render_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        streetscenes.ensure_scenes(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_third_of_the_val_scenes_show_each_class():
    seen = dict.fromkeys(EVALUATED, 0)
    seeds = [seed for seeds in streetscenes.SPLITS["val"].values() for seed in seeds]
    for seed in seeds:
        ids, counts = np.unique(render_scene(seed, 256, 512)[1], return_counts=True)
        for label in EVALUATED.intersection(ids[counts >= 50].tolist()):
            seen[label] += 1
    assert min(seen.values()) >= len(seeds) / 3


@pytest.fixture
def canvas():
    camera = Camera(focal=100, centre=100, horizon=50, height=1.5, yaw=0)
    flat = Light(np.array([0.0, 1, 0]), np.zeros(3), np.ones(3), np.zeros(3), visibility=1e9)
    return Canvas(camera, flat, 100, 200)


def test_the_camera_projects_by_similar_triangles(canvas):
    canvas.fill([(-1, 0, 10), (1, 0, 10), (1, 2, 10), (-1, 2, 10)], "wall")
    rows, columns = np.nonzero(canvas.label)
    assert (rows.min(), rows.max()) == (45, 65) and (columns.min(), columns.max()) == (90, 110)
    assert np.allclose(canvas.depth[canvas.label > 0], 10)


def test_large_polygons_have_the_same_pixels_as_in_scikit_image():
    angles = np.linspace(0.1, 6, 7)
    rows, columns = 60 + 90 * np.sin(angles), 80 + 70 * np.cos(angles)
    mask = np.zeros((128, 160), bool)
    mask[rasterize(rows, columns, mask.shape)] = True
    assert (mask != polygon2mask(mask.shape, np.stack([rows, columns], axis=1))).sum() <= 3  # on the very edge
