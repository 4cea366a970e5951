"""A pinhole camera over a ground plane, and a canvas with a depth buffer that planar polygons are painted on.

World coordinates are metres: x right, y up, z ahead; the camera stands above (0, 0, 0).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from skimage.draw import polygon
from torchvision.datasets import Cityscapes

from demo.streetscenes.textures import Material, Numbers

Cover = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (u, v) -> whether each point belongs to a polygon
Pixels = tuple[np.ndarray, np.ndarray]  # rows, columns
NO_PIXELS: Pixels = (np.empty(0, int), np.empty(0, int))

LABELS = {c.name: c.id for c in Cityscapes.classes}
NEAR = 0.4  # m; nothing closer is drawn
COPLANAR = 1.003  # a later polygon covers an earlier one unless it is this much deeper


@dataclass(frozen=True)
class Camera:
    """A camera whose lens is shifted, not pitched, to move the horizon, so that vertical lines stay vertical."""

    focal: float  # pixels
    centre: float  # column of the vanishing point of straight ahead, at yaw 0
    horizon: float  # row
    height: float  # m above the ground
    yaw: float  # rad, to the right

    def view(self, points: Numbers) -> np.ndarray:
        """Return world points (N, 3) along the camera's axes (N, 3)."""
        x, y, z = np.asarray(points, float).T
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        return np.stack([c * x - s * z, y - self.height, s * x + c * z], axis=1)

    def project(self, view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows and columns of points (N, 3) along the camera's axes, beyond NEAR."""
        return self.horizon - self.focal * view[:, 1] / view[:, 2], self.centre + self.focal * view[:, 0] / view[:, 2]


@dataclass(frozen=True)
class Light:
    """The light on a surface: the sky from all sides, the sun from one, and the haze in between."""

    towards_sun: np.ndarray  # (3,) unit vector
    sun: np.ndarray  # (3,) colour
    sky: np.ndarray  # (3,) colour
    haze: np.ndarray  # (3,) colour
    visibility: float  # m; at this distance the haze replaces 63 % of the color

    def on(self, normal: np.ndarray) -> np.ndarray:
        """Return the factors (3,) of the colors of a surface with this unit normal."""
        return self.sky * (0.82 + 0.18 * normal[1]) + self.sun * max(0.0, float(normal @ self.towards_sun))


class Canvas:
    """An image (H, W, 3) float32, its label ids (H, W) uint8, and depths (H, W) in metres along the view axis."""

    def __init__(self, camera: Camera, light: Light, height: int, width: int) -> None:
        self.camera, self.light = camera, light
        self.image = np.zeros((height, width, 3), np.float32)
        self.label = np.zeros((height, width), np.uint8)
        self.depth = np.full((height, width), np.inf, np.float32)

    def fill(
        self,
        corners: Numbers,
        label: str,
        material: Material | None = None,
        cover: Cover | None = None,
        normal: np.ndarray | None = None,
    ) -> None:
        """Paint a planar polygon.

        On its surface, u runs in metres from the first corner towards the second, v at a right angle to it, upwards
        unless the polygon is level.

        Args:
            corners: world coordinates (N, 3).
            label: name of the class.
            material: returns colors (M, 3) or (3,); None: leave the colors as they are.
            cover: which points belong to the polygon; None: all.
            normal: replaces the polygon's own normal in the lighting.
        """
        corners = np.asarray(corners, float)
        rows, columns = self._inside(corners)
        if len(rows) == 0:
            return
        plane = _Plane(self.camera, corners)
        depth, u, v = plane.at(rows, columns)
        keep = (depth > 0) & (depth <= self.depth[rows, columns] * COPLANAR)
        if cover is not None:
            keep &= cover(u, v)
        if not keep.all():
            rows, columns, depth, u, v = rows[keep], columns[keep], depth[keep], u[keep], v[keep]
        if len(rows) == 0:
            return
        self.label[rows, columns] = LABELS[label]
        self.depth[rows, columns] = depth
        if material is not None:
            colour = material(u, v, depth) * self.light.on(plane.normal if normal is None else normal)
            clear = np.exp(-depth / self.light.visibility)[:, None]
            self.image[rows, columns] = colour * clear + self.light.haze * (1 - clear)

    def _inside(self, corners: Numbers) -> Pixels:
        view = clip_near(self.camera.view(corners))
        if len(view) < 3:
            return NO_PIXELS
        return rasterize(*self.camera.project(view), self.label.shape)

    def mask(self, corners: Numbers) -> np.ndarray:
        """Return the pixels (H, W) bool of a polygon, hidden ones included."""
        mask = np.zeros(self.label.shape, bool)
        mask[self._inside(np.asarray(corners, float))] = True
        return mask


class _Plane:
    """The plane of a polygon: its normal towards the camera, and the points at which pixels show it."""

    def __init__(self, camera: Camera, corners: np.ndarray) -> None:
        origin = corners[0]
        rolled = np.roll(corners, -1, axis=0)
        normal = np.cross(corners - origin, rolled - origin).sum(axis=0)
        normal /= np.linalg.norm(normal) + 1e-12
        eye = np.array([0, camera.height, 0])
        self.normal = normal if normal @ (eye - origin) > 0 else -normal
        along = corners[1] - origin
        along /= np.linalg.norm(along) + 1e-12
        up = np.cross(along, normal)
        up = up if up[1] > 0 or (up[1] == 0 and up[2] > 0) else -up
        axes = camera.view(np.stack([along, up, self.normal]) + eye)
        start = camera.view(origin[None])[0]
        self.camera, self.axes, self.start = camera, axes.astype(np.float32), start.astype(np.float32)

    def at(self, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the depth in metres, u and v of pixels, each (M,) float32; depth is negative behind the camera."""
        x = (columns.astype(np.float32) - np.float32(self.camera.centre)) / np.float32(self.camera.focal)
        y = (np.float32(self.camera.horizon) - rows.astype(np.float32)) / np.float32(self.camera.focal)
        along, up, normal = self.axes
        slope = x * normal[0] + y * normal[1] + normal[2]
        slope = np.where(np.abs(slope) < 1e-6, np.float32(1e-6), slope)
        depth = (normal @ self.start) / slope
        u = depth * (x * along[0] + y * along[1] + along[2]) - along @ self.start
        v = depth * (x * up[0] + y * up[1] + up[2]) - up @ self.start
        return depth, u, v


def rasterize(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, ...]) -> Pixels:
    """Return the pixels inside a polygon.

    scikit-image tests each pixel of the bounding box against each edge, which would take most of a scene's time. Large
    polygons are convex, so that one half-plane per edge suffices.
    """
    top, left = max(0, int(rows.min())), max(0, int(columns.min()))
    bottom, right = min(shape[0], int(rows.max()) + 2), min(shape[1], int(columns.max()) + 2)
    if bottom <= top or right <= left:
        return NO_PIXELS
    down, across = np.roll(rows, -1) - rows, np.roll(columns, -1) - columns
    turns = across * np.roll(down, -1) - down * np.roll(across, -1)
    if (bottom - top) * (right - left) < 2000 or turns.min() < 0 < turns.max():
        return polygon(rows, columns, shape)
    y, x = np.arange(top, bottom)[:, None], np.arange(left, right)[None]
    inside = np.ones((bottom - top, right - left), bool)
    sign = 1 if turns.sum() > 0 else -1
    for r, c, dr, dc in zip(rows, columns, sign * down, sign * across, strict=True):
        inside &= dc * y - dr * x >= dc * r - dr * c
    found = np.nonzero(inside)
    return found[0] + top, found[1] + left


def clip_near(view: np.ndarray) -> np.ndarray:
    """Return the piece beyond NEAR of a polygon (N, 3) along the camera's axes (Sutherland-Hodgman)."""
    inside = view[:, 2] > NEAR
    if inside.all():
        return view
    points = []
    for i in range(len(view)):
        p, q = view[i - 1], view[i]
        if inside[i - 1] != inside[i]:
            points.append(p + (q - p) * (NEAR - p[2]) / (q[2] - p[2]))
        if inside[i]:
            points.append(q)
    return np.array(points).reshape(-1, 3)
