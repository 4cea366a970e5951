"""The position of a thing on the ground, and the solids and flat figures that things are made of."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from demo.streetscenes.canvas import Canvas
from demo.streetscenes.textures import Material, Numbers, noise, tint

Part = tuple[np.ndarray, Material | None]  # flat polygon (N, 2) of a figure

FIGURE_NORMAL = np.array([0.35, 0.55, -0.76])  # round bodies are lit as if they faced upwards and the camera


@dataclass(frozen=True)
class Place:
    """A point on the ground and a heading (rad, 0 ahead, positive to the right).

    Local coordinates are (along the heading, up, to its right), in metres.
    """

    x: float
    z: float
    heading: float = 0.0
    y: float = 0.0

    def world(self, points: Numbers) -> np.ndarray:
        """Return local points (N, 3) in world coordinates (N, 3)."""
        a, y, b = np.asarray(points, float).reshape(-1, 3).T
        c, s = np.cos(self.heading), np.sin(self.heading)
        return np.stack([self.x + a * s + b * c, self.y + y, self.z + a * c - b * s], axis=1)

    def facing(self) -> "Place":
        """Return the same point with a heading straight away from the camera."""
        return Place(self.x, self.z, float(np.arctan2(self.x, self.z)), self.y)


def panel(canvas: Canvas, place: Place, points: Numbers, label: str, material: Material) -> None:
    """Paint a flat polygon of local points (N, 3)."""
    canvas.fill(place.world(points), label, material)


def loft(
    canvas: Canvas,
    place: Place,
    outline: Numbers,
    label: str,
    side: Material,
    strips: Mapping[int, Material] | None = None,
) -> None:
    """Paint a convex solid, which is a side outline stretched to both sides.

    Args:
        canvas: to paint on.
        place: position of the solid.
        outline: rows (along, up, half width); first the bottom edge from rear to front, then up the front.
        label: name of the class.
        side: material of both sides, with u from the rear and v from the bottom.
        strips: index of an edge -> its material, if it is not `side`.
    """
    outline = np.asarray(outline, float)
    right = outline * (1, 1, 1)
    left = outline * (1, 1, -1)
    centre = place.world(np.concatenate([left, right])).mean(axis=0)
    eye = np.array([0, canvas.camera.height, 0])
    for i in range(len(outline)):
        j = (i + 1) % len(outline)
        low, high = (i, j) if outline[i, 1] <= outline[j, 1] else (j, i)
        quad = place.world([left[low], right[low], right[high], left[high]])
        if _faces(quad, centre, eye):
            canvas.fill(quad, label, (strips or {}).get(i, side))
    for face in (left, right):
        corners = place.world(face)
        if _faces(corners, centre, eye):
            canvas.fill(corners, label, side)


def _faces(corners: np.ndarray, centre: np.ndarray, eye: np.ndarray) -> bool:
    normal = np.cross(corners[1] - corners[0], corners[2] - corners[1])
    outward = normal @ (corners.mean(axis=0) - centre)
    return outward * (normal @ (eye - corners[0])) > 0


def box(start: float, end: float, bottom: float, top: float, half: float) -> list[tuple[float, float, float]]:
    """Return the outline of a cuboid for `loft`."""
    return [(start, bottom, half), (end, bottom, half), (end, top, half), (start, top, half)]


def disc(
    canvas: Canvas,
    place: Place,
    centre: Numbers,
    radius: float,
    label: str,
    material: Material,
    facing_along: bool = False,
) -> None:
    """Paint a disc around a local point, in the plane of heading and up, or at a right angle to the heading."""
    angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    a, y, b = centre
    across, up = radius * np.cos(angles), radius * np.sin(angles)
    if facing_along:
        points = np.stack([np.full(20, a), y + up, b + across], axis=1)
    else:
        points = np.stack([a + across, y + up, np.full(20, b)], axis=1)
    panel(canvas, place, points, label, material)


def wheels(canvas: Canvas, place: Place, positions: Iterable[float], radius: float, half: float, label: str) -> None:
    """Paint wheels on the side that the camera sees."""
    eye = np.array([-place.x, -place.z])
    side = 1 if eye @ (np.cos(place.heading), -np.sin(place.heading)) > 0 else -1
    for along in positions:
        for scale, grey in ((1.2, 0.03), (1.0, 0.07), (0.62, 0.55), (0.25, 0.2)):
            lift = (scale - 1) * radius * (scale > 1)  # the wheel arch is above the wheel, not under the road
            centre = (along, radius + lift, side * (half + 0.012))
            disc(canvas, place, centre, radius * scale, label, _grey(grey))


def _grey(level: float) -> Material:
    colour = np.full(3, level, np.float32)
    return lambda u, v, depth: colour


def limb(start: Numbers, end: Numbers, width: float, end_width: float | None = None) -> np.ndarray:
    """Return a rounded bar between two points (s, y) as a polygon (N, 2) whose first edge is across its start."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    end_width = width if end_width is None else end_width
    along = (end - start) / (np.linalg.norm(end - start) + 1e-9)
    across = np.array([-along[1], along[0]])
    turn = np.linspace(-np.pi / 2, np.pi / 2, 7)[:, None]
    tip = end + end_width / 2 * (np.cos(turn) * along + np.sin(turn) * across)
    return np.concatenate([[start + across * width / 2, start - across * width / 2], tip])


def oval(centre: Numbers, half_s: float, half_y: float) -> np.ndarray:
    """Return an ellipse as a polygon (N, 2)."""
    angles = np.linspace(0.5 * np.pi, 2.5 * np.pi, 18, endpoint=False)
    return np.stack([centre[0] + half_s * np.cos(angles), centre[1] + half_y * np.sin(angles)], axis=1)


def cloth(colour: Numbers, width: float = 0.3) -> Material:
    """Return cloth that is shaded as if round in the direction of u, over `width` metres."""

    def material(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
        across = np.clip(2 * u / width - 1, -1, 1)
        return tint(colour, 1.05 - 0.3 * across**2 + 0.12 * noise(u, v, 35))

    return material


def figure(canvas: Canvas, place: Place, parts: Sequence[Part], label: str, edge_on: bool = False) -> None:
    """Paint flat parts in the plane across the heading or, if `edge_on`, along it."""
    for points, material in parts:
        s, y = np.asarray(points, float).T
        zero = np.zeros_like(s)
        local = np.stack([s, y, zero] if edge_on else [zero, y, s], axis=1)
        canvas.fill(place.world(local), label, material, normal=FIGURE_NORMAL)
