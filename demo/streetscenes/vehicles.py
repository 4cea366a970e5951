"""Cars, trucks, buses and trams."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.random import Generator

from demo.streetscenes.canvas import Canvas
from demo.streetscenes.solids import Place, box, loft, panel, wheels
from demo.streetscenes.textures import Material, Numbers, cell_hash, glass, noise, paint, plain, tint

T = TypeVar("T")

CAR_COLOURS = (
    (0.85, 0.85, 0.86), (0.62, 0.64, 0.66), (0.10, 0.10, 0.12), (0.60, 0.07, 0.08), (0.10, 0.18, 0.45),
    (0.32, 0.34, 0.37), (0.12, 0.30, 0.22), (0.35, 0.50, 0.62), (0.50, 0.42, 0.32),
)  # fmt: skip
BUS_COLOURS = ((0.80, 0.10, 0.08), (0.90, 0.42, 0.05), (0.72, 0.08, 0.30), (0.85, 0.22, 0.12))
TRAM_COLOURS = (((0.95, 0.80, 0.12), (0.95, 0.93, 0.85)), ((0.92, 0.86, 0.20), (0.30, 0.30, 0.32)),
                ((0.55, 0.80, 0.25), (0.94, 0.93, 0.88)))  # fmt: skip
CARGO_COLOURS = ((0.88, 0.88, 0.87), (0.20, 0.36, 0.62), (0.78, 0.80, 0.83), (0.25, 0.45, 0.42), (0.90, 0.89, 0.84))
CAR_SHAPES = (  # length, belt, roof, rear glass foot, rear glass top, front glass top, front glass foot
    (4.5, 0.95, 1.46, -1.55, -0.85, 0.35, 1.15),  # saloon
    (4.2, 0.98, 1.52, -2.05, -1.65, 0.40, 1.20),  # hatchback
    (4.7, 1.08, 1.75, -2.25, -1.95, 0.50, 1.30),  # off-road
    (4.9, 1.10, 1.95, -2.40, -2.30, 1.05, 1.75),  # van
)
DARK = plain((0.06, 0.06, 0.065))
RUBBER = plain((0.11, 0.11, 0.12))
TAIL_LAMP = plain((0.85, 0.05, 0.04))
HEAD_LAMP = plain((1.1, 1.1, 1.0))


def pick(rng: Generator, table: Sequence[T]) -> T:
    """Return a random entry of a table."""
    return table[int(rng.integers(len(table)))]


def end_panels(
    canvas: Canvas, place: Place, label: str, rows: Iterable[tuple[float, float, float, float, float, Material]]
) -> None:
    """Paint rectangles (along, |b| from, |b| to, bottom, top, material) on front or rear, mirrored to both sides."""
    for along, inner, outer, low, high, material in rows:
        for sign in (-1, 1):
            b0, b1 = sorted((sign * inner, sign * outer))
            panel(
                canvas,
                place,
                [(along, low, b0), (along, low, b1), (along, high, b1), (along, high, b0)],
                label,
                material,
            )


def seen_end(place: Place) -> int:
    """Return 1 if the camera sees the front, -1 if it sees the rear."""
    return 1 if -(place.x * np.sin(place.heading) + place.z * np.cos(place.heading)) > 0 else -1


def draw_car(canvas: Canvas, place: Place, rng: Generator) -> None:
    """Draw a car of a random shape."""
    length, belt, roof, rear_foot, rear_top, front_top, front_foot = pick(rng, CAR_SHAPES)
    skin, end, half = paint(np.array(pick(rng, CAR_COLOURS)) * rng.uniform(0.9, 1.1)), length / 2, 0.9
    loft(canvas, place, box(-end + 0.1, end - 0.1, 0.16, 0.4, half - 0.05), "car", DARK)
    cabin = [
        (rear_foot, belt, half - 0.03),
        (front_foot, belt, half - 0.03),
        (front_top, roof, 0.7),
        (rear_top, roof, 0.7),
    ]
    loft(canvas, place, cabin, "car", _car_windows(skin, rear_top - rear_foot), {1: glass(), 2: skin, 3: glass()})
    nose = min(front_foot + 0.9, end - 0.15)
    body = [
        (-end, 0.32),
        (end, 0.32),
        (end, 0.62),
        (nose, belt - 0.12),
        (front_foot, belt),
        (-end + 0.1, belt),
        (-end, belt - 0.15),
    ]
    loft(canvas, place, [(a, y, half) for a, y in body], "car", _car_doors(skin, end + front_top))
    wheels(canvas, place, (-end + 0.85, end - 0.85), 0.34, half, "car")
    rows: tuple[tuple[float, float, float, float, Material], ...]
    if seen_end(place) < 0:
        rows = (
            (0.55, 0.88, 0.68, belt - 0.16, TAIL_LAMP),
            (0, 0.86, 0.32, 0.48, RUBBER),
            (0, 0.27, 0.52, 0.64, HEAD_LAMP),
        )
    else:
        rows = ((0, 0.5, 0.40, 0.60, DARK), (0.5, 0.86, 0.46, 0.62, HEAD_LAMP), (0, 0.27, 0.33, 0.45, HEAD_LAMP))
    end_panels(canvas, place, "car", [(seen_end(place) * (end + 0.015), *row) for row in rows])


def _car_windows(skin: Material, slope: float) -> Material:
    pane = glass()

    def material(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
        pillar = (np.abs(u - 1.35) < 0.07) | (v > 0.43) | (np.abs(u - slope * v / 0.5) < 0.12)
        return np.where(pillar[:, None], skin(u, v, depth), pane(u, v, depth))

    return material


def _car_doors(skin: Material, front: float) -> Material:
    def material(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
        seam = (np.abs(u - front) < 0.02) | (np.abs(u - front + 1.1) < 0.02) | (np.abs(v - 0.22) < 0.02)
        handle = (np.abs(v - 0.48) < 0.025) & (np.abs((front - u) % 1.1 - 0.85) < 0.1)
        return skin(u, v, depth) * np.where(seam | handle, 0.45, 1)[:, None].astype(np.float32)

    return material


def livery(
    colours: tuple[Numbers, Numbers], windows: tuple[float, float], doors: tuple[float, float], mullion: float
) -> Material:
    """Return the side of a bus or tram: two colors, windows (bottom, top) and doors (period, width) in metres."""
    upper, lower = colours
    pane = glass((0.10, 0.13, 0.16))

    def material(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
        low, high = windows
        body = np.where((v < low * 0.62)[:, None], tint(lower, 0.9 + 0.1 * v), tint(upper, 0.9 + 0.06 * v))
        body = body * (1 + 0.05 * noise(u, v, 8))[:, None]
        door = (u % doors[0] < doors[1]) & (v < high) & (v > 0.1)
        frame = (np.abs(u % doors[0] - doors[1] / 2) < 0.05) | (u % doors[0] < 0.06) | (u % doors[0] > doors[1] - 0.06)
        window = (v > low) & (v < high) & (u % mullion > 0.09)
        opening = np.where(door, ~frame, window)
        band = (v > low - 0.05) & (v < high + 0.05)
        body = np.where((band | door)[:, None], np.float32(0.07), body)
        return np.where(opening[:, None], pane(u, v, depth), body).astype(np.float32)

    return material


def windscreen(colour: Numbers, low: float, high: float, top: float, edge: float, width: float) -> Material:
    """Return the front or rear of a bus: glass between `low` and `high`, a destination board below `top`."""
    pane = glass((0.12, 0.15, 0.18))

    def material(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
        body = tint(colour, 0.9 + 0.06 * v)
        inside = (u > edge) & (u < width - edge)
        board = inside & (v > high + 0.06) & (v < top)
        letters = board & (cell_hash(np.floor(u * 14), np.floor(v * 14), 2.0) > 0.45) & (np.abs(u - width / 2) < 0.7)
        body = np.where(board[:, None], np.array([0.05, 0.05, 0.05], np.float32), body)
        body = np.where(letters[:, None], np.array([1.2, 0.75, 0.15], np.float32), body)
        return np.where((inside & (v > low) & (v < high))[:, None], pane(u, v, depth), body)

    return material


def draw_bus(canvas: Canvas, place: Place, rng: Generator) -> None:
    """Draw a bus."""
    colour = np.array(pick(rng, BUS_COLOURS))
    end, half = 5.2, 1.27
    side = livery((colour, colour * 0.75), (0.85, 2.05), (4.1, 1.3), 1.55)
    back = windscreen(colour, 1.35, 2.15, 2.5, 0.35, 2 * half)
    outline = [
        (-end, 0.35),
        (end, 0.35),
        (end + 0.1, 1.2),
        (end - 0.1, 2.95),
        (end - 0.5, 3.1),
        (-end + 0.3, 3.1),
        (-end, 2.9),
    ]
    rounded = plain(colour * 1.05)
    front = windscreen(colour, 0.05, 1.2, 1.7, 0.1, 2 * half)
    strips = {1: plain(colour * 0.85), 2: front, 3: rounded, 4: plain((0.75, 0.74, 0.72)), 5: rounded, 6: back}
    loft(canvas, place, [(a, y, half) for a, y in outline], "bus", side, strips)
    wheels(canvas, place, (-end + 2.4, end - 2.2), 0.5, half, "bus")
    along = seen_end(place) * (end + 0.03)
    lamp = HEAD_LAMP if along > 0 else TAIL_LAMP
    end_panels(canvas, place, "bus", ((along, 0.75, 1.2, 0.55, 0.85, lamp), (along, 0, 1.25, 0.3, 0.48, RUBBER)))


def draw_truck(canvas: Canvas, place: Place, rng: Generator) -> None:
    """Draw a truck."""
    cab_colour, cargo_colour = np.array(pick(rng, CAR_COLOURS)), np.array(pick(rng, CARGO_COLOURS))
    end, half = rng.uniform(3.4, 4.3), 1.22
    loft(canvas, place, box(-end, end, 0.45, 1.0, half - 0.15), "truck", DARK)
    nose = end - 1.95
    cab = [(nose, 0.55), (end, 0.55), (end, 1.55), (end - 0.25, 2.75), (nose, 2.8)]
    skin = paint(cab_colour)
    loft(
        canvas,
        place,
        [(a, y, half - 0.04) for a, y in cab],
        "truck",
        _cab_side(skin),
        {1: _grille(cab_colour), 2: glass(), 3: skin},
    )
    cargo = box(-end, nose - 0.15, 1.0, rng.uniform(3.3, 3.7), half)
    loft(
        canvas,
        place,
        cargo,
        "truck",
        _cargo_side(rng, cargo_colour),
        {2: plain(cargo_colour), 3: _cargo_doors(cargo_colour)},
    )
    wheels(canvas, place, (-end + 1.0, -end + 2.1, end - 1.0), 0.5, half, "truck")
    if seen_end(place) < 0:
        rows = ((-end - 0.02, 0.6, 1.15, 0.72, 0.95, TAIL_LAMP), (-end - 0.02, 0, 1.18, 0.45, 0.62, RUBBER))
    else:
        rows = ((end + 0.02, 0.65, 1.1, 0.68, 0.92, HEAD_LAMP), (end + 0.02, 0, 1.15, 0.5, 0.62, RUBBER))
    end_panels(canvas, place, "truck", rows)


def _cab_side(skin: Material) -> Material:
    pane = glass()

    def material(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
        window = (v > 1.05) & (v < 1.9) & (u > 0.55) & (u < 1.65)
        seam = (np.abs(u - 0.5) < 0.03) | (np.abs(u - 1.68) < 0.03)
        skinned = skin(u, v, depth) * np.where(seam, 0.6, 1)[:, None].astype(np.float32)
        return np.where(window[:, None], pane(u, v, depth), skinned)

    return material


def _grille(colour: Numbers) -> Material:
    return lambda u, v, depth: np.where(
        ((v > 0.4) & (v % 0.14 < 0.07))[:, None], np.float32(0.08), tint(colour, 0.9 + 0 * u)
    )


def _cargo_side(rng: Generator, colour: Numbers) -> Material:
    stripe = rng.uniform(0.1, 0.75, 3)
    centre, slant = rng.uniform(1.8, 3.4), rng.uniform(-0.5, 0.5)

    def material(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
        ribs = 1 + 0.07 * np.sign(np.sin(u * 9)) + 0.06 * noise(u, v, 5)
        logo = (((u - centre) / 1.25) ** 2 + ((v - 1.45) / 0.5) ** 2 < 1) | (np.abs(v - 0.55 - slant * 0.25 * u) < 0.1)
        return np.where(logo[:, None], tint(stripe, ribs), tint(colour, ribs))

    return material


def _cargo_doors(colour: Numbers) -> Material:
    def material(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
        seam = (np.abs(u - 1.22) < 0.03) | (np.abs(u - 0.7) < 0.025) | (np.abs(u - 1.74) < 0.025)
        hinge = ((u < 0.12) | (u > 2.32)) & (v % 0.8 < 0.2)
        hazard = (v < 0.22) & (((u + v) % 0.4) < 0.2)
        base = tint(colour, 0.92 - 0.5 * (seam | hinge) + 0.06 * noise(u, v, 6))
        base = np.where((v < 0.22)[:, None], np.array([0.9, 0.9, 0.88], np.float32), base)
        return np.where(hazard[:, None], np.array([0.8, 0.08, 0.06], np.float32), base)

    return material


def draw_tram(canvas: Canvas, place: Place, rng: Generator) -> None:
    """Draw a tram."""
    colours = pick(rng, TRAM_COLOURS)
    half, end, modules = 1.2, 10.5, 3
    roof = plain((0.55, 0.55, 0.54))
    side = livery(colours, (1.05, 2.25), (5.6, 1.5), 1.4)
    pitch = 2 * end / modules
    for k in range(modules):
        start, stop = -end + k * pitch + 0.2, -end + (k + 1) * pitch - 0.2
        loft(canvas, place, box(start + 0.4, stop - 0.4, 3.3, 3.75, 0.7), "train", roof)
        outline = box(start, stop, 0.18, 3.3, half)
        loft(canvas, place, outline, "train", side, {2: roof, 1: plain(colours[0]), 3: plain(colours[0])})
        if k < modules - 1:
            loft(canvas, place, box(stop - 0.1, stop + 0.5, 0.3, 3.2, half - 0.1), "train", plain((0.13, 0.13, 0.14)))
    along = seen_end(place)
    heading = place if along > 0 else type(place)(place.x, place.z, place.heading + np.pi, place.y)
    nose = [(end - 0.25, 0.18), (end + 0.45, 0.18), (end + 0.75, 1.15), (end + 0.2, 2.75), (end - 0.25, 3.3)]
    strips = {
        1: plain(colours[1]),
        2: windscreen(colours[0], 0.12, 1.45, 1.6, 0.16, 2 * half),
        3: windscreen(colours[0], 9, -0.1, 0.5, 0.4, 2 * half),
    }
    loft(canvas, heading, [(a, y, half - 0.02) for a, y in nose], "train", plain(colours[0]), strips)
    lamp = HEAD_LAMP if along > 0 else TAIL_LAMP
    end_panels(canvas, heading, "train", ((end + 0.68, 0.55, 0.95, 0.75, 1.05, lamp),))
