"""Materials, which return the colors of points on a surface."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.random import Generator
from skimage.filters import gaussian

Numbers = np.ndarray | Sequence[Any]  # points, or an RGB color
# (u, v, depth), all (M,) in metres, u and v on the surface -> colors (M, 3)
Material = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

TILE = 512  # side of the noise texture


@cache
def _tile() -> np.ndarray:
    """Return fractal noise (TILE, TILE) float32, mean 0, mostly within -1..1, that tiles without a seam."""
    rng = np.random.default_rng(0)
    total = np.zeros((TILE, TILE))
    for sigma, weight in ((0.6, 0.5), (2, 0.35), (6, 0.35), (20, 0.35)):
        octave = gaussian(rng.standard_normal((TILE, TILE)), sigma, mode="wrap")
        total += weight * octave / octave.std()
    return (total / (2 * total.std())).astype(np.float32)


def noise(u: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """Return the noise at these points, with `scale` texels per metre."""
    columns = (u * np.float32(scale)).astype(np.int32) & (TILE - 1)
    return _tile()[(v * np.float32(scale)).astype(np.int32) & (TILE - 1), columns]


def cell_hash(i: np.ndarray, j: np.ndarray, salt: float) -> np.ndarray:
    """Return a pseudo-random number 0..1 for each integer cell."""
    mixed = np.sin(i * 12.9898 + j * 78.233 + salt * 37.719) * 43758.5453
    return mixed - np.floor(mixed)


def near(depth: np.ndarray, reach: float) -> np.ndarray:
    """Return weights that fall from 1 to 0; far beyond a depth of `reach` metres, a texture is finer than a pixel."""
    return reach / (reach + depth)


def tint(colour: Numbers, factor: np.ndarray) -> np.ndarray:
    """Return a color times a factor per point."""
    return np.asarray(colour, np.float32) * factor[:, None].astype(np.float32)


def plain(colour: Numbers, grain: float = 0.05, scale: float = 40) -> Material:
    """Return a material of one color with a little grain."""
    return lambda u, v, depth: tint(colour, 1 + grain * noise(u, v, scale))


def paint(colour: Numbers) -> Material:
    """Return car paint, which mirrors the sky above and is darker towards the ground."""

    def material(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
        mirrored = 0.16 * np.clip(np.sin(v * 5 + 0.4 * np.sin(u * 1.3)), 0, 1)[:, None]
        return tint(colour, 0.8 + 0.25 * np.clip(v, 0, 1) + 0.03 * noise(u, v, 30)) + mirrored.astype(np.float32)

    return material


def glass(colour: Numbers = (0.13, 0.17, 0.21)) -> Material:
    """Return dark glass with slanted reflections."""

    def material(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
        streak = np.clip(np.sin((u + 0.7 * v) * 3.1), 0, 1) ** 4
        return tint(colour, 0.8 + 0.35 * v) + tint((0.25, 0.29, 0.33), 0.55 * streak)

    return material


def asphalt(rng: Generator, markings: list[tuple[float, float, float]], crossing: float | None) -> Material:
    """Return the surface of a road.

    Args:
        rng: for color and wear.
        markings: rows (u, half width, dash period or 0) in metres; u counts from the left kerb.
        crossing: distance of a zebra crossing in metres, if there is one.
    """
    grey = rng.uniform(0.30, 0.42) * np.array([1.0, 0.99, 0.98 + rng.uniform(-0.02, 0.05)])
    patch, crack = rng.uniform(0, 300, 2)

    def material(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
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


def slabs(rng: Generator) -> Material:
    """Return the paving of a sidewalk, lighter and warmer than the road."""
    size = rng.uniform(0.5, 0.9)
    colour = np.array([0.66, 0.60, 0.56]) * rng.uniform(0.85, 1.1) + rng.uniform(-0.03, 0.03, 3)

    def material(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
        joint = (u % size < 0.045) | (v % size < 0.045)
        tone = 1 + 0.16 * (cell_hash(np.floor(u / size), np.floor(v / size), 1.0) - 0.5) + 0.08 * noise(u, v, 50)
        return tint(colour, tone - 0.28 * joint * near(depth, 12))

    return material


def grass(rng: Generator) -> Material:
    """Return a lawn."""
    colour = np.array([0.47, 0.60, 0.22]) * rng.uniform(0.85, 1.1) + np.array([rng.uniform(-0.03, 0.14), 0, 0])

    def material(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
        bare = np.clip(noise(u, v, 6) - 0.55, 0, 0.4)[:, None] * np.array([0.5, 0.1, 0.1], np.float32)
        return tint(colour, 1 + 0.22 * noise(u, v * 0.6, 70) * near(depth, 15) + 0.15 * noise(u, v, 9)) + bare

    return material


def brick(colour: Numbers, mortar: Numbers = (0.72, 0.69, 0.65), size: tuple[float, float] = (0.5, 0.17)) -> Material:
    """Return courses of bricks or blocks of `size` (length, height) in metres."""
    length, height = size

    def material(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
        course = np.floor(v / height)
        shifted = u / length + 0.5 * (course % 2)
        joint = (shifted % 1 < 0.07) | (v % height < 0.14 * height)
        tone = 1 + 0.3 * (cell_hash(np.floor(shifted), course, 3.0) - 0.5) + 0.10 * noise(u, v, 40)
        sharp = (near(depth, 60 * height) * joint)[:, None]
        return tint(colour, tone) * (1 - sharp) + tint(mortar, 1 + 0.05 * noise(u, v, 40)) * sharp

    return material


def concrete(colour: Numbers) -> Material:
    """Return cast panels with streaks of dirt."""

    def material(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
        joint = (u % 3.0 < 0.06) | (np.abs(v - 1.1) < 0.03)
        dirt = np.clip(noise(u * 6, v * 0.3, 8), 0, 1)
        return tint(colour, 1 + 0.08 * noise(u, v, 30) - 0.2 * dirt - 0.3 * joint)

    return material


FACADES = (
    (0.80, 0.74, 0.62), (0.72, 0.43, 0.33), (0.60, 0.57, 0.55), (0.84, 0.80, 0.74),
    (0.66, 0.52, 0.40), (0.55, 0.36, 0.30), (0.76, 0.66, 0.52), (0.58, 0.62, 0.66),
)  # fmt: skip


def facade(rng: Generator, height: float) -> Material:
    """Return the front of a house, with floors of windows, perhaps a shop at the bottom, and a cornice on top."""
    colour = np.array(FACADES[rng.integers(len(FACADES))]) * rng.uniform(0.85, 1.05)
    bay, floor = rng.uniform(1.9, 3.2), rng.uniform(2.9, 3.5)
    half, top = rng.uniform(0.24, 0.36), rng.uniform(0.72, 0.85)
    shop = rng.random() < 0.5
    shop_colour = rng.uniform(0.15, 0.6, 3)
    surface = brick(colour) if rng.random() < 0.4 else plain(colour, 0.08, 12)
    salt = rng.uniform(0, 50)

    def material(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
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
        pane = np.where((chance > 0.93)[:, None], np.array([0.95, 0.82, 0.5], np.float32), pane)
        colours = np.where(opening[:, None], pane, colours)
        return np.where(frame[:, None], tint((0.88, 0.87, 0.84), 0.9 + 0 * y), colours).astype(np.float32)

    return material
