"""A pinhole camera over a ground plane, and a canvas with a depth buffer that planar polygons are painted on.

World coordinates are metres: x right, y up, z ahead; the camera stands above (0, 0, 0).
"""

from dataclasses import dataclass

import numpy as np
from skimage.draw import polygon
from torchvision.datasets import Cityscapes

LABELS = {c.name: c.id for c in Cityscapes.classes}
NEAR = 0.4  # m; nothing closer is drawn
COPLANAR = 1.003  # what is painted later wins unless it lies this much deeper


@dataclass(frozen=True)
class Camera:
    """Vertical lines stay vertical: the horizon is moved by shifting the lens, not by pitching."""

    focal: float  # pixels
    centre: float  # column of the vanishing point of straight ahead, at yaw 0
    horizon: float  # row
    height: float  # m above the ground
    yaw: float  # rad, to the right

    def view(self, points):
        """World (N, 3) -> camera axes (N, 3)."""
        x, y, z = np.asarray(points, float).T
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        return np.stack([c * x - s * z, y - self.height, s * x + c * z], axis=1)

    def project(self, view):
        """Camera axes (N, 3), in front of NEAR -> rows, columns."""
        return self.horizon - self.focal * view[:, 1] / view[:, 2], self.centre + self.focal * view[:, 0] / view[:, 2]


@dataclass(frozen=True)
class Light:
    """What falls on a surface: the sky from all sides, the sun from one, and the haze in between."""

    towards_sun: np.ndarray  # (3,) unit vector
    sun: np.ndarray  # (3,) colour
    sky: np.ndarray  # (3,) colour
    haze: np.ndarray  # (3,) colour
    visibility: float  # m until the haze has taken 63 %

    def on(self, normal):
        """(3,) factor for a surface with this unit normal."""
        return self.sky * (0.82 + 0.18 * normal[1]) + self.sun * max(0.0, float(normal @ self.towards_sun))


class Canvas:
    """image (H, W, 3) float32, label (H, W) uint8 ids, depth (H, W) m along the view axis."""

    def __init__(self, camera, light, height, width):
        self.camera, self.light = camera, light
        self.image = np.zeros((height, width, 3), np.float32)
        self.label = np.zeros((height, width), np.uint8)
        self.depth = np.full((height, width), np.inf, np.float32)

    def fill(self, corners, label, material=None, cover=None, normal=None):
        """Paint a planar polygon, world corners (N, 3).

        `material(u, v, depth)` gives colours (M, 3) or (3,), None leaves the colour as it is; `cover(u, v)` says which
        points belong to it. u runs in metres from the first corner towards the second, v square to it, up where it can.
        `normal` replaces the polygon's own in the lighting.
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

    def _inside(self, corners):
        view = clip_near(self.camera.view(corners))
        if len(view) < 3:
            return (), ()
        return rasterize(*self.camera.project(view), self.label.shape)

    def mask(self, corners):
        """The pixels (H, W), bool, of a polygon seen through everything."""
        mask = np.zeros(self.label.shape, bool)
        mask[self._inside(np.asarray(corners, float))] = True
        return mask


class _Plane:
    """The plane of a polygon: its normal towards the camera, and what a pixel's ray meets on it."""

    def __init__(self, camera, corners):
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

    def at(self, rows, columns):
        """Depth in metres, u and v of these pixels, each (M,) float32; depth is negative behind the camera."""
        x = (columns.astype(np.float32) - np.float32(self.camera.centre)) / np.float32(self.camera.focal)
        y = (np.float32(self.camera.horizon) - rows.astype(np.float32)) / np.float32(self.camera.focal)
        along, up, normal = self.axes
        slope = x * normal[0] + y * normal[1] + normal[2]
        slope = np.where(np.abs(slope) < 1e-6, np.float32(1e-6), slope)
        depth = (normal @ self.start) / slope
        u = depth * (x * along[0] + y * along[1] + along[2]) - along @ self.start
        v = depth * (x * up[0] + y * up[1] + up[2]) - up @ self.start
        return depth, u, v


def rasterize(rows, columns, shape):
    """The pixels, (rows, columns), inside a polygon.

    scikit-image tests each pixel of the bounding box against each edge in turn, which would be most of a scene's time;
    the large polygons are convex, and for these a half-plane an edge does.
    """
    top, left = max(0, int(rows.min())), max(0, int(columns.min()))
    bottom, right = min(shape[0], int(rows.max()) + 2), min(shape[1], int(columns.max()) + 2)
    if bottom <= top or right <= left:
        return (), ()
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


def clip_near(view):
    """The part of a polygon, camera axes (N, 3), beyond NEAR (Sutherland and Hodgman)."""
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
