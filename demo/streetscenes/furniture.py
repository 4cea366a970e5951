"""Trees, poles, signs, traffic lights, walls, fences, benches and houses."""

import numpy as np
from numpy.random import Generator

from demo.streetscenes.canvas import Canvas
from demo.streetscenes.solids import Part, Place, box, figure, limb, loft, oval, panel
from demo.streetscenes.textures import Numbers, brick, concrete, facade, noise, plain, tint
from demo.streetscenes.vehicles import pick

Point = tuple[float, float]  # (x, z) on the ground, or (s, y) of a figure
Sign = tuple[tuple[tuple[int, float, float, Numbers], ...], str | None]

LEAVES = ((0.20, 0.34, 0.10), (0.26, 0.36, 0.09), (0.15, 0.28, 0.12), (0.32, 0.36, 0.10))
POLES = ((0.40, 0.42, 0.43), (0.30, 0.32, 0.31), (0.52, 0.53, 0.53), (0.25, 0.33, 0.30))
WHITE, RED, BLUE, YELLOW, BLACK = (
    (0.95, 0.95, 0.94),
    (0.80, 0.05, 0.06),
    (0.05, 0.22, 0.65),
    (0.98, 0.78, 0.05),
    (0.05, 0.05, 0.05),
)
SIGNS = (  # polygons (corners, phase, radius, color) from back to front, then the glyph
    (((24, 0, 1, RED), (24, 0, 0.76, WHITE)), "bar"),
    (((24, 0, 1, RED),), "white bar"),
    (((24, 0, 1, BLUE),), "arrow"),
    (((3, 0, 1.15, RED), (3, 0, 0.75, WHITE)), "bar"),
    (((3, np.pi, 1.15, RED), (3, np.pi, 0.75, WHITE)), None),
    (((8, np.pi / 8, 1, WHITE), (8, np.pi / 8, 0.92, RED)), "white bar"),
    (((4, 0, 1.1, WHITE), (4, 0, 0.8, YELLOW)), None),
    (((4, np.pi / 4, 1.2, BLUE),), "arrow"),
)
GLYPHS = {
    "bar": (BLACK, [(-0.12, -0.4), (0.12, -0.4), (0.12, 0.35), (-0.12, 0.35)]),
    "white bar": (WHITE, [(-0.65, -0.16), (0.65, -0.16), (0.65, 0.16), (-0.65, 0.16)]),
    "arrow": (WHITE, [(-0.13, -0.6), (0.13, -0.6), (0.13, 0.1), (0.4, 0.1), (0, 0.65), (-0.4, 0.1), (-0.13, 0.1)]),
}
LAMPS = ((1.5, 0.12, 0.08), (1.4, 0.85, 0.1), (0.15, 1.4, 0.6))  # red, amber, green


class Crown:
    """Foliage in a plane: blobs of leaves (s, y, radius) with a ragged rim, lit from above and from the sun's side."""

    def __init__(self, rng: Generator, blobs: Numbers, corner: Numbers, sun_side: float) -> None:
        self.blobs = np.asarray(blobs, np.float32) - np.array((*corner, 0), np.float32)
        self.colour = np.array(pick(rng, LEAVES)) * rng.uniform(0.85, 1.15)
        self.shift, self.sun_side = rng.uniform(0, 200), sun_side

    def _height(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        best, across, up = np.full(u.shape, -9, np.float32), 0 * u, 0 * u
        for s, y, radius in self.blobs:
            x, z = (u - s) / radius, (v - y) / radius
            height = 1 - x * x - z * z
            higher = height > best
            best = np.where(higher, height, best)
            across, up = np.where(higher, x, across), np.where(higher, z, up)
        return best, across, up

    def cover(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return which points are leaves."""
        ragged = 0.28 * noise(u + self.shift, v, 22) + 0.15 * noise(u, v + self.shift, 60)
        return self._height(u, v)[0] + ragged > 0.12

    def material(self, u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Return the colors of the leaves."""
        height, across, up = self._height(u, v)
        leaves = noise(u, v + self.shift, 55) * 0.35 + noise(u + self.shift, v, 18) * 0.4
        lit = 0.85 + 0.55 * up + 0.3 * across * self.sun_side + 0.2 * np.clip(height, 0, 1) + leaves
        return tint(self.colour, np.clip(lit, 0.25, 2.2))


def _crown(canvas: Canvas, place: Place, rng: Generator, blobs: Numbers) -> None:
    blobs = np.asarray(blobs)
    low = (blobs[:, :2] - blobs[:, 2:] * 1.15).min(axis=0)
    high = (blobs[:, :2] + blobs[:, 2:] * 1.15).max(axis=0)
    low[1] = max(low[1], 0)
    place = place.facing()
    quad = place.world([(0, low[1], low[0]), (0, low[1], high[0]), (0, high[1], high[0]), (0, high[1], low[0])])
    crown = Crown(rng, blobs, low, np.sign(canvas.light.towards_sun[0]))
    canvas.fill(quad, "vegetation", crown.material, crown.cover, normal=np.array([0, 0.8, -0.6]))


def draw_tree(canvas: Canvas, place: Place, rng: Generator) -> None:
    """Draw a tree."""
    height, spread = rng.uniform(4.5, 8), rng.uniform(1.3, 2.2)
    bark = plain((0.30, 0.24, 0.19), 0.3, 15)
    trunk = [(limb((0, 0), (rng.uniform(-0.2, 0.2), height - spread), 0.42, 0.3), bark)]
    figure(canvas, place.facing(), trunk, "vegetation")
    count = 7
    around = rng.uniform(-1, 1, (count, 2)) * (spread * 0.75, spread * 0.8)
    radii = rng.uniform(0.5, 0.8, count) * spread
    _crown(canvas, place, rng, [(s, height + y - 0.3, r) for (s, y), r in zip(around, radii, strict=True)])


def draw_bush(canvas: Canvas, place: Place, rng: Generator) -> None:
    """Draw a bush."""
    size = rng.uniform(0.6, 1.1)
    centres = np.linspace(-1.2, 1.2, 4) * size
    _crown(canvas, place, rng, [(s, size * rng.uniform(0.5, 0.8), size * rng.uniform(0.6, 0.85)) for s in centres])


def _pole_parts(rng: Generator, height: float, width: float) -> list[Part]:
    colour = np.array(pick(rng, POLES))
    metal = plain(colour, 0.08)
    shine = plain(colour * 1.45, 0.05)
    shaft = np.array([(-width / 2, 0), (width / 2, 0), (width / 2, height), (-width / 2, height)])
    foot = np.array([(-0.8, 0), (0.8, 0), (0.8, 0.7), (-0.8, 0.7)]) * (width, 1)
    return [(foot, metal), (shaft, metal), (shaft * (0.3, 1) - (width * 0.12, 0), shine)]


def draw_lamp_post(canvas: Canvas, place: Place, rng: Generator) -> None:
    """Draw a lamp post whose arm is over the road."""
    height, side = rng.uniform(6, 8), -np.sign(place.x)
    parts = _pole_parts(rng, height, rng.uniform(0.26, 0.34))
    arm = [(limb((0, height - 0.1), (side * 1.4, height + 0.4), 0.18), parts[0][1])]
    figure(canvas, place.facing(), parts + arm, "pole")
    lamp = [(limb((side * 1.2, height + 0.4), (side * 2.1, height + 0.4), 0.24), plain((0.85, 0.85, 0.8)))]
    figure(canvas, place.facing(), lamp, "static")


def _sign_parts(sign: Sign, centre: Numbers, radius: float) -> list[Part]:
    shapes, glyph = sign
    parts: list[Part] = []
    for corners, phase, size, colour in shapes:
        angles = phase + np.pi / 2 + np.arange(corners) * 2 * np.pi / corners
        polygon = np.stack([np.cos(angles), np.sin(angles)], axis=1) * size * radius + centre
        parts.append((polygon, plain(colour, 0.03)))
    if glyph:
        colour, outline = GLYPHS[glyph]
        parts.append((np.array(outline) * radius * 0.8 + centre, plain(colour, 0.02)))
    return parts


def draw_sign(canvas: Canvas, place: Place, rng: Generator) -> None:
    """Draw a pole with one or two traffic signs."""
    radius, height = rng.uniform(0.44, 0.56), rng.uniform(2.3, 2.9)
    figure(canvas, place.facing(), _pole_parts(rng, height + radius, 0.2), "pole")
    parts = _sign_parts(pick(rng, SIGNS), (0, height), radius)
    if rng.random() < 0.35:
        parts += _sign_parts(pick(rng, SIGNS), (0, height - 2.1 * radius), radius * 0.9)
    figure(canvas, place.facing(), parts, "traffic sign")


def draw_traffic_light(canvas: Canvas, place: Place, rng: Generator) -> None:
    """Draw a traffic light, perhaps with a second head over the road."""
    height = rng.uniform(3.1, 3.5)
    figure(canvas, place.facing(), _pole_parts(rng, height - 0.3, 0.26), "pole")
    heads = [(0, height - 0.85)]
    if rng.random() < 0.5:  # a second one over the road
        out, top = -np.sign(place.x) * rng.uniform(2.2, 3), height + 1.5
        metal = plain(pick(rng, POLES))
        mast = [(limb((0, height - 0.6), (0, top + 0.1), 0.24), metal), (limb((0, top), (out, top), 0.2), metal)]
        figure(canvas, place.facing(), mast, "pole")
        heads.append((out, height + 0.6))
    lit = int(rng.integers(3))
    for foot in heads:
        _signal_head(canvas, place, foot, lit)


def _signal_head(canvas: Canvas, place: Place, foot: Point, lit: int) -> None:
    s, low = foot
    place = place.facing()
    high = low + 1.5
    back = [(-0.42, low), (0.42, low), (0.42, high), (-0.42, high)]
    inner = [(-0.34, low + 0.08), (0.34, low + 0.08), (0.34, high - 0.08), (-0.34, high - 0.08)]
    parts = [
        (np.array(back) + (s, 0), plain((0.62, 0.60, 0.30))),
        (np.array(inner) + (s, 0), plain((0.05, 0.055, 0.05))),
    ]
    for k, colour in enumerate(LAMPS):
        bright = 1 if k == lit else 0.22
        parts.append((oval((s, high - 0.32 - 0.43 * k), 0.19, 0.19), plain(np.array(colour) * bright, 0.03)))
    figure(canvas, place, parts, "traffic light")


def draw_wall(canvas: Canvas, start: Point, end: Point, rng: Generator) -> None:
    """Draw a garden wall between two points (x, z) on the ground."""
    place, length = _between(start, end)
    grey = np.array([0.62, 0.62, 0.60]) * rng.uniform(0.85, 1.1)
    stone = brick(np.array([0.56, 0.51, 0.44]) * rng.uniform(0.9, 1.1), (0.40, 0.38, 0.35), (0.9, 0.42))
    material = concrete(grey) if rng.random() < 0.4 else stone
    height = rng.uniform(1.7, 2.4)
    loft(canvas, place, box(0, length, 0, height, 0.15), "wall", material)
    loft(canvas, place, box(-0.05, length + 0.05, height, height + 0.14, 0.24), "wall", plain(grey * 1.05))


def draw_fence(canvas: Canvas, start: Point, end: Point, rng: Generator) -> None:
    """Draw a fence with gaps between its bars; the gaps are labelled as fence too, as in Cityscapes."""
    place, length = _between(start, end)
    colour = np.array(pick(rng, ((0.92, 0.91, 0.88), (0.13, 0.15, 0.14), (0.45, 0.29, 0.16), (0.12, 0.30, 0.20))))
    height, period = rng.uniform(1.3, 1.7), rng.uniform(0.22, 0.3)
    share, metal = rng.uniform(0.4, 0.55), plain(colour, 0.1)

    def bars(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        rail = (np.abs(v - 0.3) < 0.07) | (np.abs(v - height + 0.25) < 0.07)
        return (u % period < period * share) | rail | (u % 2.4 < 0.16)

    quad = place.world([(0, 0, 0), (length, 0, 0), (length, height, 0), (0, height, 0)])
    canvas.fill(quad, "fence")
    canvas.fill(quad, "fence", metal, bars)


def _between(start: Point, end: Point) -> tuple[Place, float]:
    (x0, z0), (x1, z1) = start, end
    return Place(x0, z0, float(np.arctan2(x1 - x0, z1 - z0)), 0.14), float(np.hypot(x1 - x0, z1 - z0))


def draw_hedge(canvas: Canvas, start: Point, end: Point, rng: Generator) -> None:
    """Draw a hedge between two points (x, z) on the ground."""
    place, length = _between(start, end)
    colour, shift, height = np.array(pick(rng, LEAVES)), rng.uniform(0, 100), rng.uniform(1.3, 1.9)

    def leaves(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
        return tint(colour, np.clip(0.75 + 0.25 * v + 0.45 * noise(u + shift, v, 40) + 0.2 * noise(u, v, 11), 0.3, 2))

    loft(canvas, place, box(0, length, 0, height, 0.5), "vegetation", leaves)


def draw_house(canvas: Canvas, place: Place, rng: Generator, length: float, depth: float) -> None:
    """Draw a house of `length` along the street and `depth` across it; `place` is the centre of its ground."""
    height = rng.uniform(7, 17)
    front = facade(rng, height)
    roof = plain(pick(rng, ((0.40, 0.22, 0.17), (0.28, 0.28, 0.30), (0.35, 0.30, 0.27))), 0.15, 10)
    loft(canvas, place, box(-length / 2, length / 2, 0, height, depth / 2), "building", front, {2: roof})
    if height < 13:
        ridge = [
            (-length / 2, height, depth / 2 + 0.2),
            (length / 2, height, depth / 2 + 0.2),
            (length / 2, height + 2.2, depth / 2 - 2),
            (-length / 2, height + 2.2, depth / 2 - 2),
        ]
        loft(canvas, place, ridge, "building", roof)


def draw_bench(canvas: Canvas, place: Place, rng: Generator) -> None:
    """Draw a bench."""
    wood = plain((0.48, 0.32, 0.18), 0.2, 12)
    for along in (-0.75, 0.75):
        loft(canvas, place, box(along - 0.05, along + 0.05, 0, 0.45, 0.25), "static", plain((0.2, 0.2, 0.2)))
    loft(canvas, place, box(-0.9, 0.9, 0.42, 0.52, 0.28), "static", wood)
    panel(canvas, place, [(-0.9, 0.55, 0.26), (0.9, 0.55, 0.26), (0.9, 0.95, 0.3), (-0.9, 0.95, 0.3)], "static", wood)


def draw_bin(canvas: Canvas, place: Place, rng: Generator) -> None:
    """Draw a litter bin."""
    colour = pick(rng, ((0.95, 0.45, 0.08), (0.25, 0.28, 0.25), (0.2, 0.3, 0.5)))
    loft(canvas, place, box(-0.3, 0.3, 0, 1.0, 0.3), "static", plain(colour))
    loft(canvas, place, box(-0.33, 0.33, 1.0, 1.1, 0.33), "static", plain((0.15, 0.15, 0.15)))
