"""Materials: each function returns `material(u, v, depth) -> colours`, with u and v in metres on the surface."""

from functools import cache

import numpy as np
from skimage.filters import gaussian

TILE = 512  # side of the noise texture


@cache
def _tile():
    """Fractal noise (TILE, TILE), float32, mean 0, mostly within -1..1, that tiles without a seam."""
    rng = np.random.default_rng(0)
    total = np.zeros((TILE, TILE))
    for sigma, weight in ((0.6, 0.5), (2, 0.35), (6, 0.35), (20, 0.35)):
        octave = gaussian(rng.standard_normal((TILE, TILE)), sigma, mode="wrap")
        total += weight * octave / octave.std()
    return (total / (2 * total.std())).astype(np.float32)


def noise(u, v, scale):
    """Noise at these points; `scale` texels a metre."""
    columns = (u * np.float32(scale)).astype(np.int32) & (TILE - 1)
    return _tile()[(v * np.float32(scale)).astype(np.int32) & (TILE - 1), columns]


def cell_hash(i, j, salt):
    """A pseudo-random number 0..1 for each integer cell."""
    mixed = np.sin(i * 12.9898 + j * 78.233 + salt * 37.719) * 43758.5453
    return mixed - np.floor(mixed)


def near(depth, reach):
    """1 close by, fading to 0 where a texture of this reach (m) is finer than a pixel."""
    return reach / (reach + depth)


def tint(colour, factor):
    return np.asarray(colour, np.float32) * factor[:, None].astype(np.float32)


def plain(colour, grain=0.05, scale=40):
    """One colour with a little grain."""
    return lambda u, v, depth: tint(colour, 1 + grain * noise(u, v, scale))


def paint(colour):
    """Car paint: the sky mirrored above, darker towards the ground."""

    def material(u, v, depth):
        mirrored = 0.16 * np.clip(np.sin(v * 5 + 0.4 * np.sin(u * 1.3)), 0, 1)[:, None]
        return tint(colour, 0.8 + 0.25 * np.clip(v, 0, 1) + 0.03 * noise(u, v, 30)) + mirrored.astype(np.float32)

    return material


def glass(colour=(0.13, 0.17, 0.21)):
    """Dark glass with slanted reflections."""

    def material(u, v, depth):
        streak = np.clip(np.sin((u + 0.7 * v) * 3.1), 0, 1) ** 4
        return tint(colour, 0.8 + 0.35 * v) + tint((0.25, 0.29, 0.33), 0.55 * streak)

    return material


def asphalt(rng, markings, crossing):
    """Road; u is metres to the right of the left kerb.

    `markings`: (u, half width, dash period or 0) rows; `crossing`: distance of a zebra crossing, or None.
    """
    grey = rng.uniform(0.30, 0.42) * np.array([1.0, 0.99, 0.98 + rng.uniform(-0.02, 0.05)])
    patch, crack = rng.uniform(0, 300, 2)

    def material(u, v, depth):
        tone = 1 + 0.13 * noise(u, v, 60) * near(depth, 12) + 0.10 * noise(u + patch, v, 3)
        tone = tone - 0.25 * (np.abs(noise(u + crack, v, 2.1)) < 0.012) * near(depth, 10)
        tone = tone - 0.15 * (cell_hash(np.floor(u / 2.5), np.floor(v / 5), patch) > 0.93)
        white = np.zeros(u.shape, bool)
        for position, half, period in markings:
            on = np.abs(u - position) < half
            white |= on & (v % period < period * 0.5) if period else on
        if crossing is not None:
            white &= v < crossing - 1.2
            white |= (np.abs(v - crossing - 1.6) < 1.6) & (u % 1.0 < 0.5)
        worn = 0.78 + 0.15 * noise(u, v, 25)
        return np.where(white[:, None], tint((1, 1, 0.97), worn), tint(grey, tone))

    return material


def slabs(rng):
    """Paved sidewalk, lighter and warmer than the road."""
    size = rng.uniform(0.5, 0.9)
    colour = np.array([0.66, 0.60, 0.56]) * rng.uniform(0.85, 1.1) + rng.uniform(-0.03, 0.03, 3)

    def material(u, v, depth):
        joint = (u % size < 0.045) | (v % size < 0.045)
        tone = 1 + 0.16 * (cell_hash(np.floor(u / size), np.floor(v / size), 1.0) - 0.5) + 0.08 * noise(u, v, 50)
        return tint(colour, tone - 0.28 * joint * near(depth, 12))

    return material


def grass(rng):
    colour = np.array([0.47, 0.60, 0.22]) * rng.uniform(0.85, 1.1) + np.array([rng.uniform(-0.03, 0.14), 0, 0])

    def material(u, v, depth):
        bare = np.clip(noise(u, v, 6) - 0.55, 0, 0.4)[:, None] * np.float32([0.5, 0.1, 0.1])
        return tint(colour, 1 + 0.22 * noise(u, v * 0.6, 70) * near(depth, 15) + 0.15 * noise(u, v, 9)) + bare

    return material


def brick(colour, mortar=(0.72, 0.69, 0.65), size=(0.5, 0.17)):
    """Courses of bricks or blocks, (length, height) in metres."""
    length, height = size

    def material(u, v, depth):
        course = np.floor(v / height)
        shifted = u / length + 0.5 * (course % 2)
        joint = (shifted % 1 < 0.07) | (v % height < 0.14 * height)
        tone = 1 + 0.3 * (cell_hash(np.floor(shifted), course, 3.0) - 0.5) + 0.10 * noise(u, v, 40)
        sharp = (near(depth, 60 * height) * joint)[:, None]
        return tint(colour, tone) * (1 - sharp) + tint(mortar, 1 + 0.05 * noise(u, v, 40)) * sharp

    return material


def concrete(colour):
    """Cast panels with streaks of dirt."""

    def material(u, v, depth):
        joint = (u % 3.0 < 0.06) | (np.abs(v - 1.1) < 0.03)
        dirt = np.clip(noise(u * 6, v * 0.3, 8), 0, 1)
        return tint(colour, 1 + 0.08 * noise(u, v, 30) - 0.2 * dirt - 0.3 * joint)

    return material


FACADES = (
    (0.80, 0.74, 0.62), (0.72, 0.43, 0.33), (0.60, 0.57, 0.55), (0.84, 0.80, 0.74),
    (0.66, 0.52, 0.40), (0.55, 0.36, 0.30), (0.76, 0.66, 0.52), (0.58, 0.62, 0.66),
)  # fmt: skip


def facade(rng, height):
    """A house front: windows with frames and sills in floors, a shop at the bottom, a cornice on top."""
    colour = np.array(FACADES[rng.integers(len(FACADES))]) * rng.uniform(0.85, 1.05)
    bay, floor = rng.uniform(1.9, 3.2), rng.uniform(2.9, 3.5)
    half, top = rng.uniform(0.24, 0.36), rng.uniform(0.72, 0.85)
    shop = rng.random() < 0.5
    shop_colour = rng.uniform(0.15, 0.6, 3)
    surface = brick(colour) if rng.random() < 0.4 else plain(colour, 0.08, 12)
    salt = rng.uniform(0, 50)

    def material(u, v, depth):
        storey, column = np.floor(v / floor), np.floor(u / bay)
        x, y = np.abs(u / bay - column - 0.5), v / floor - storey
        chance = cell_hash(column, storey, salt)
        ground = storey == 0
        low = np.where(ground & shop, 0.12, 0.28)
        wide = np.where(ground & shop, 0.44, half)
        opening = (x < wide) & (y > low) & (y < top) & (v < height - 0.5)
        frame = opening & (
            (x > wide - 0.03) | (y > top - 0.03) | (y < low + 0.03) | (x < 0.015) | (np.abs(y - 0.6) < 0.01)
        )
        colours = surface(u, v, depth)
        band = (y > 0.955) | (y < 0.02) | (v > height - 0.45)
        colours = np.where(band[:, None], colours * 1.13, colours)
        colours = np.where((ground & shop)[:, None], tint(shop_colour, 0.9 + 0.2 * y), colours)
        pane = (
            tint((0.16, 0.20, 0.25), 0.7 + 0.8 * y + 0.5 * chance) + 0.10 * (noise(u + 9 * chance, v, 4) > 0.3)[:, None]
        )
        curtain = opening & (chance > 0.6) & (x > wide * 0.45)
        pane = np.where(curtain[:, None], tint((0.62, 0.60, 0.54), 0.7 + 0.3 * y), pane)
        pane = np.where((chance > 0.93)[:, None], np.float32([0.95, 0.82, 0.5]), pane)
        colours = np.where(opening[:, None], pane, colours)
        return np.where(frame[:, None], tint((0.88, 0.87, 0.84), 0.9 + 0 * y), colours).astype(np.float32)

    return material
