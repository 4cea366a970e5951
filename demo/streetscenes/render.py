"""Render street scenes as seen from a car, with Cityscapes label ids."""

import numpy as np
from numpy.random import Generator
from scipy.spatial import ConvexHull
from skimage.draw import ellipse
from skimage.filters import gaussian
from skimage.transform import resize

from demo.streetscenes import furniture, textures
from demo.streetscenes.canvas import LABELS, Camera, Canvas, Light
from demo.streetscenes.solids import Place
from demo.streetscenes.street import KERB, LANE, Side, Street, Thing, plan_street, populate

HEIGHT, WIDTH = 512, 1024
FAR = 160.0  # m; length of the street

# Side of the street, kind of boundary, z from, z to, place of the house behind it, its length, its depth
Lot = tuple[Side, str, float, float, Place, float, float]


def render_scene(seed: int, height: int = HEIGHT, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """Return the image (H, W, 3) uint8 RGB and the label ids (H, W) uint8 of the scene with this seed."""
    rng = np.random.default_rng(seed)
    light = random_light(rng)
    canvas = Canvas(random_camera(rng, height, width), light, height, width)
    street = plan_street(rng)
    things = populate(street, rng)
    paint_sky(canvas, rng)
    paint_ground(canvas, street, rng)
    houses = line_houses(street, rng)
    paint_shadows(canvas, things, houses)
    build(canvas, street, houses, rng)
    for thing in sorted(things, key=lambda thing: -np.hypot(thing.place.x, thing.place.z)):
        thing.draw(canvas, thing.place, rng)
    paint_hood(canvas, rng)
    return expose(canvas.image, rng), canvas.label


def random_camera(rng: Generator, height: int, width: int) -> Camera:
    """Return a camera behind the windscreen of a car."""
    return Camera(
        focal=width * rng.uniform(0.58, 0.68),
        centre=width * rng.uniform(0.46, 0.54),
        horizon=height * rng.uniform(0.41, 0.48),
        height=rng.uniform(1.35, 1.65),
        yaw=rng.uniform(-0.06, 0.06),
    )


def random_light(rng: Generator) -> Light:
    """Return the light of a clear noon, of a low warm sun, or of an overcast sky."""
    elevation, azimuth = rng.uniform(0.3, 1.15), rng.uniform(0, 2 * np.pi)
    towards = np.array([np.cos(elevation) * np.sin(azimuth), np.sin(elevation), np.cos(elevation) * np.cos(azimuth)])
    clear = 0.0 if rng.random() < 0.3 else rng.uniform(0.6, 1.0)
    warm = clear * np.clip(1 - elevation, 0, 0.7)
    sun = clear * rng.uniform(0.6, 0.8) * np.array([1 + 0.1 * warm, 1 - 0.12 * warm, 0.95 - 0.5 * warm])
    sky = (0.88 - 0.32 * clear) * np.array([0.97, 1.0, 1.05 + 0.06 * clear])
    haze = np.array([0.78, 0.82, 0.87]) * (0.85 + 0.15 * clear) + warm * np.array([0.12, 0.02, -0.12])
    return Light(towards, sun, sky, haze, rng.uniform(90, 320))


def paint_sky(canvas: Canvas, rng: Generator) -> None:
    """Paint a gradient down to the haze, with clouds."""
    height, width, _ = canvas.image.shape
    rows = int(canvas.camera.horizon) + 2
    clear = canvas.light.sun.max() > 0
    zenith = np.array([0.27, 0.48, 0.80]) if clear else np.array([0.66, 0.70, 0.75])
    share = np.linspace(0, 1, rows)[:, None, None] ** 1.6
    sky = zenith * (1 - share) + canvas.light.haze * share
    small = (rows // 4, width // 4)
    clouds = sum(resize(rng.standard_normal((2 * n, 3 * n)), small, order=3) / n**0.6 for n in (2, 4, 9, 18))
    clouds = resize(clouds, (rows, width), order=1)
    cover = np.clip(clouds - rng.uniform(-0.2, 0.9), 0, 1)[..., None] * (0.85 if clear else 0.25)
    bright = np.array([0.97, 0.96, 0.95]) - 0.10 * np.clip(clouds[..., None] - 1, 0, 1)
    canvas.image[:rows] = sky * (1 - cover) + bright * cover
    canvas.label[:rows] = LABELS["sky"]
    canvas.image[rows:] = canvas.light.haze
    canvas.label[rows:] = LABELS["terrain"]


def paint_ground(canvas: Canvas, street: Street, rng: Generator) -> None:
    """Paint road, tram rails, sidewalks and lawns."""
    left, right = -street.left.kerb, street.right.kerb
    lanes = [LANE * (street.lanes - k) + 0.3 for k in range(street.lanes)]
    markings = [(u, 0.09, 0 if k == 0 and street.tram else 6.0) for k, u in enumerate(lanes)]
    markings += [(0.25, 0.07, 0), (right - left - (2.6 if street.parking else 0.25), 0.07, 0)]
    crossing = rng.uniform(6, 11) if rng.random() < 0.4 else None
    road = textures.asphalt(rng, markings, crossing)
    canvas.fill(_strip(left, right, 0), "road", road)
    if street.tram:
        track = -LANE * street.lanes
        for rail in (track - 0.72, track + 0.72):
            canvas.fill(_strip(rail - 0.08, rail + 0.08, 0.005), "road", textures.plain((0.16, 0.15, 0.15)))
            canvas.fill(_strip(rail - 0.03, rail + 0.03, 0.006), "road", textures.plain((0.62, 0.62, 0.64)))
    lawn, paving = textures.grass(rng), textures.slabs(rng)
    stone = textures.plain((0.66, 0.66, 0.64), 0.1, 6)
    for side in street.sides:
        canvas.fill(_strip(side.sign * side.boundary, side.sign * 90, KERB), "terrain", lawn)
        canvas.fill(_strip(side.sign * (side.kerb + side.verge), side.sign * side.boundary, KERB), "sidewalk", paving)
        if side.verge:
            canvas.fill(_strip(side.sign * side.kerb, side.sign * (side.kerb + side.verge), KERB), "terrain", lawn)
        inner = side.sign * side.kerb
        canvas.fill(_strip(inner, side.sign * (side.kerb + 0.22), KERB), "sidewalk", stone)
        kerb = [(inner, 0, 0.5), (inner, 0, FAR), (inner, KERB, FAR), (inner, KERB, 0.5)]
        canvas.fill(kerb, "sidewalk", textures.plain((0.52, 0.52, 0.51), 0.1, 6))


def _strip(x0: float, x1: float, y: float) -> list[tuple[float, float, float]]:
    x0, x1 = sorted((x0, x1))
    return [(x0, y, 0.5), (x1, y, 0.5), (x1, y, FAR), (x0, y, FAR)]


BOUNDARIES = ("house", "wall", "fence", "hedge")


def line_houses(street: Street, rng: Generator) -> list[Lot]:
    """Return the lots along the street, each with a house, a wall, a fence or a hedge at the sidewalk."""
    first = rng.permutation(["wall", "fence"])
    rows = []
    for side, kind in zip(street.sides, first, strict=True):
        z = 2.0
        while z < FAR - 20:
            stop = z + (rng.uniform(12, 17) if z < 3 else rng.uniform(8, 16))
            setback = 0 if kind == "house" else rng.uniform(4, 12)
            depth = rng.uniform(8, 12)
            x = side.sign * (side.boundary + setback + depth / 2)
            rows.append((side, str(kind), z, stop, Place(x, (z + stop) / 2, 0, KERB), stop - z - 0.05, depth))
            z, kind = stop, rng.choice(BOUNDARIES, p=(0.5, 0.17, 0.18, 0.15))
    return rows


DRAW_BOUNDARY = {"wall": furniture.draw_wall, "fence": furniture.draw_fence, "hedge": furniture.draw_hedge}


def build(canvas: Canvas, street: Street, houses: list[Lot], rng: Generator) -> None:
    """Draw houses, gardens and their boundaries from far to near."""
    _draw_far_end(canvas, rng)
    for side, kind, start, stop, place, length, depth in sorted(houses, key=lambda row: -row[2]):
        if kind == "house" or rng.random() < 0.75:
            furniture.draw_house(canvas, place, rng, length, depth)
        if kind == "house":
            continue
        for _ in range(rng.integers(1, 4)):
            garden = Place(side.sign * (side.boundary + rng.uniform(2, 4)), rng.uniform(start + 1, stop - 1), 0, KERB)
            (furniture.draw_tree if rng.random() < 0.5 else furniture.draw_bush)(canvas, garden, rng)
        x = side.sign * (side.boundary + 0.2)
        DRAW_BOUNDARY[kind](canvas, (x, start), (x, stop), rng)


def _draw_far_end(canvas: Canvas, rng: Generator) -> None:
    """Draw a row of houses, or trees, or only the haze."""
    end = rng.integers(3)
    for x in np.arange(-60, 61, 12.0) if end < 2 else ():
        if end == 0:
            furniture.draw_house(canvas, Place(x, FAR, np.pi / 2), rng, 12, 10)
        else:
            furniture.draw_tree(canvas, Place(x + rng.uniform(-3, 3), FAR - 5), rng)


def paint_shadows(canvas: Canvas, things: list[Thing], houses: list[Lot]) -> None:
    """Darken the ground below things and, if the sun shines, in their shadows; before anything is drawn on it."""
    sun = canvas.light.towards_sun
    blocks = [(t.place, t.size) for t in things]
    contact = np.zeros(canvas.label.shape, bool)
    for place, (length, width, _) in blocks:
        contact |= canvas.mask(_footprint(place, length * 1.04, width * 1.1))
    dark = 0.5 * gaussian(contact.astype(np.float32), 2.5)
    if canvas.light.sun.max() > 0:
        cast = np.zeros(canvas.label.shape, bool)
        blocks += [(place, (length, depth, 10.0)) for *_, place, length, depth in houses]
        for place, (length, width, height) in blocks:
            foot = _footprint(place, length, width)
            cast |= canvas.mask(_hull(foot, foot - sun / sun[1] * height * (1, 0, 1)))
        shade = canvas.light.sky.mean() / (canvas.light.sky + canvas.light.sun * sun[1]).mean()
        dark = np.maximum(dark, (1 - shade * 0.95) * gaussian(cast.astype(np.float32), 1.2))
    dark[canvas.label == LABELS["sky"]] = 0
    canvas.image *= (1 - dark)[..., None].astype(np.float32)


def _footprint(place: Place, length: float, width: float) -> np.ndarray:
    a, b = length / 2, width / 2
    corners = place.world([(-a, 0, -b), (a, 0, -b), (a, 0, b), (-a, 0, b)])
    return corners * (1, 0, 1)


def _hull(foot: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Return the convex hull on the ground of a footprint and its moved copy."""
    points = np.concatenate([foot, moved])
    return points[ConvexHull(points[:, [0, 2]], qhull_options="QJ").vertices]


def paint_hood(canvas: Canvas, rng: Generator) -> None:
    """Paint the hood of the camera's own car at the bottom edge."""
    height, width, _ = canvas.image.shape
    colour = rng.uniform(0.05, 0.35) * np.array([1, 1, 1.05])
    rows, columns = ellipse(
        height * 1.06, width * 0.5, height * rng.uniform(0.11, 0.15), width * 0.46, canvas.label.shape
    )
    up = (rows - rows.min()) / max(1, height - rows.min())
    shine = np.clip(1 - up * 1.4, 0, 1) ** 2 * 0.5 + 0.1 * np.cos((columns / width - 0.5) * 9)
    canvas.image[rows, columns] = colour * (1.1 - 0.4 * up[:, None]) + shine[:, None] * canvas.light.haze * 0.5
    canvas.label[rows, columns] = LABELS["ego vehicle"]


def expose(image: np.ndarray, rng: Generator) -> np.ndarray:
    """Return the image as a sensor records it, uint8: blur, vignette, exposure, white balance, contrast, noise."""
    height, width, _ = image.shape
    image = gaussian(image, rng.uniform(0.45, 0.8), channel_axis=-1)
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    gain = rng.uniform(0.85, 1.15) * (1 - 0.14 * (x * x + y * y) / 2)
    balance = 1 + rng.uniform(-0.04, 0.04, 3)
    image = np.clip(image * (gain[..., None] * balance).astype(np.float32), 0, None)
    image = image / (1 + 0.18 * image**3) * 1.08  # highlights roll off
    image += rng.uniform(0.004, 0.012) * rng.standard_normal(image.shape, np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
