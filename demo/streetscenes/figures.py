"""People, bicycles, motorcycles and their riders.

Figures are flat, (s, y) in metres: s runs to the right, or ahead if a two-wheeler is seen from its side.
"""

import numpy as np
from numpy.random import Generator

from demo.streetscenes.canvas import Canvas
from demo.streetscenes.solids import Part, Place, cloth, figure, limb, oval
from demo.streetscenes.textures import Material, Numbers, plain
from demo.streetscenes.vehicles import pick

SKINS = ((0.85, 0.64, 0.52), (0.76, 0.54, 0.42), (0.50, 0.33, 0.24), (0.90, 0.72, 0.62))
HAIR = ((0.10, 0.08, 0.07), (0.30, 0.20, 0.12), (0.55, 0.42, 0.22), (0.45, 0.44, 0.43))
TOPS = ((0.70, 0.12, 0.14), (0.15, 0.25, 0.55), (0.88, 0.86, 0.82), (0.14, 0.14, 0.17), (0.85, 0.60, 0.12),
        (0.20, 0.42, 0.40), (0.60, 0.35, 0.50), (0.45, 0.28, 0.18))  # fmt: skip
TROUSERS = ((0.12, 0.15, 0.25), (0.10, 0.10, 0.11), (0.35, 0.31, 0.26), (0.22, 0.30, 0.45), (0.50, 0.46, 0.40))
VESTS = ((0.80, 0.95, 0.15), (1.0, 0.50, 0.08), (0.85, 0.95, 0.20))
HELMETS = ((0.92, 0.92, 0.94), (0.85, 0.10, 0.12), (0.95, 0.80, 0.10), (0.15, 0.35, 0.75))
FRAMES = ((0.75, 0.10, 0.10), (0.10, 0.40, 0.65), (0.10, 0.45, 0.20), (0.80, 0.78, 0.75), (0.90, 0.50, 0.05))
HIP = 0.92  # m above the ground
TYRE = plain((0.06, 0.06, 0.065))
CHROME = plain((0.72, 0.73, 0.75))
BLACK = plain((0.09, 0.09, 0.10))


def draw_person(canvas: Canvas, place: Place, rng: Generator) -> None:
    """Draw a walking or standing person of 1.6 to 1.9 m in random clothes."""
    parts = _walker(rng)
    scale = rng.uniform(0.92, 1.08)
    figure(canvas, place.facing(), [(p * scale, m) for p, m in parts], "person")


def _walker(rng: Generator) -> list[Part]:
    skin, hair = cloth(pick(rng, SKINS), 0.2), plain(pick(rng, HAIR), 0.15)
    colour = np.array(pick(rng, TOPS)) * rng.uniform(0.85, 1.1)
    top, sleeve, trousers = cloth(colour, 0.5), cloth(colour * 0.88, 0.15), cloth(pick(rng, TROUSERS), 0.2)
    stride, way = rng.uniform(0.06, 0.34), rng.choice((-1, 1))
    swing = stride * way
    far_arm = (limb((0.22 * way, 1.36), (0.2 * way - swing * 0.8, 0.95), 0.14, 0.11), sleeve)
    neck, head = (limb((0, 1.40), (0, 1.52), 0.12), skin), (oval((0, 1.61), 0.12, 0.155), skin)
    body = [far_arm, *_clothes(rng, top), *_near_arm(swing, way, sleeve, skin)]
    return [*_legs(stride, way, trousers), *body, neck, head, *_hair(rng, hair, way)]


def _legs(stride: float, way: float, trousers: Material) -> list[Part]:
    parts: list[Part] = []
    for sign in (-1, 1):
        foot = (sign * stride * way, 0.06 + 0.05 * (sign < 0))
        knee = (0.5 * foot[0] + 0.08 * way + sign * 0.03, 0.5)
        shoe = (limb(foot, (foot[0] + 0.13 * way, 0.05), 0.11, 0.09), BLACK)
        parts += [
            (limb((sign * 0.08, HIP), knee, 0.21, 0.17), trousers),
            (limb(knee, foot, 0.17, 0.13), trousers),
            shoe,
        ]
    return parts


def _clothes(rng: Generator, top: Material) -> list[Part]:
    """Return the trunk, perhaps in a coat, perhaps with a bag on the back."""
    half = np.array([(0.24, 1.40), (0.21, 1.1), (0.22, HIP - 0.08)])
    trunk = np.concatenate([half[:1] * (-1, 1), half, half[:0:-1] * (-1, 1)])
    coat = [(np.array([(-0.24, 1.0), (0.24, 1.0), (0.33, 0.58), (-0.33, 0.58)]), top)] if rng.random() < 0.3 else []
    parts: list[Part] = [*coat, (trunk, top), (limb((-0.16, 1.38), (0.16, 1.38), 0.17), top)]
    if rng.random() < 0.35:
        bag = cloth(np.array(pick(rng, TOPS)) * 0.8, 0.3)
        parts.append((np.array([(-0.16, 1.4), (0.16, 1.4), (0.18, 1.0), (-0.18, 1.0)]), bag))
    return parts


def _near_arm(swing: float, way: float, sleeve: Material, skin: Material) -> list[Part]:
    elbow, hand = (-0.27 * way, 1.12), (-0.2 * way + swing, 0.9)
    upper, lower = limb((-0.24 * way, 1.36), elbow, 0.14, 0.12), limb(elbow, hand, 0.12, 0.1)
    return [(upper, sleeve), (lower, sleeve), (oval(hand, 0.06, 0.07), skin)]


def _hair(rng: Generator, hair: Material, way: float) -> list[Part]:
    style = rng.integers(3)
    cap = oval((-0.02 * way, 1.68), 0.135, 0.11)
    if style == 0:
        return [(cap, hair)]
    if style == 1:  # long, or seen from behind
        return [(oval((0, 1.62), 0.145, 0.17), hair), (limb((0, 1.6), (-0.02 * way, 1.38), 0.22, 0.16), hair)]
    return [(cap, hair), (limb((-0.06 * way, 1.66), (-0.1 * way, 1.5), 0.13, 0.12), hair)]


def _rim(centre: Numbers, radius: float, thick: float, rim: Material, inner: Material) -> list[Part]:
    """Return a wheel: tyre, the surface between the spokes, and hub."""
    return [
        (oval(centre, radius, radius), rim),
        (oval(centre, radius - thick, radius - thick), inner),
        (oval(centre, 0.06, 0.06), CHROME),
    ]


def _bicycle_side(rng: Generator) -> list[Part]:
    frame = plain(np.array(pick(rng, FRAMES)), 0.04)
    rear, front, saddle, crank, head = (-0.55, 0.36), (0.58, 0.36), (-0.22, 0.92), (-0.08, 0.34), (0.42, 0.88)
    spokes = plain((0.45, 0.46, 0.48), 0.1)
    bars = ((rear, crank), (crank, saddle), (saddle, head), (crank, head), (rear, saddle), (head, front))
    outline = np.array([(-0.6, 0.5), (-0.3, 0.95), (0.45, 1.05), (0.66, 0.5), (0.3, 0.3), (-0.3, 0.3)])
    parts = [(outline, None), *_rim(rear, 0.36, 0.055, TYRE, spokes), *_rim(front, 0.36, 0.055, TYRE, spokes)]
    parts += [(limb(a, b, 0.065), frame) for a, b in bars]
    parts += [
        (limb((-0.4, 0.95), (-0.1, 0.97), 0.09), BLACK),
        (limb(head, (0.38, 1.08), 0.06), frame),
        (limb((0.3, 1.1), (0.5, 1.07), 0.06), BLACK),
        (oval(crank, 0.1, 0.1), CHROME),
        (limb((-0.85, 0.76), (-0.3, 0.76), 0.05), BLACK),
    ]
    if rng.random() < 0.4:
        parts.append((np.array([(0.5, 0.8), (0.82, 0.8), (0.86, 1.06), (0.46, 1.06)]), plain((0.50, 0.36, 0.20), 0.2)))
    return parts


def _motorcycle_side(rng: Generator) -> list[Part]:
    colour = np.array(pick(rng, FRAMES)) * rng.uniform(0.8, 1.1)
    skin, engine = plain(colour, 0.06), plain((0.30, 0.30, 0.32), 0.4, 20)
    rear, front = (-0.72, 0.34), (0.78, 0.34)
    hub = plain((0.38, 0.38, 0.40))
    parts = [*_rim(rear, 0.34, 0.12, TYRE, hub), *_rim(front, 0.34, 0.12, TYRE, hub)]
    parts += [
        (np.array([(-0.7, 0.3), (0.4, 0.3), (0.5, 0.75), (-0.6, 0.75)]), BLACK),
        (np.array([(-0.3, 0.25), (0.35, 0.25), (0.4, 0.7), (-0.3, 0.7)]), engine),
        (np.array([(-0.25, 0.72), (0.45, 0.68), (0.5, 0.95), (0.2, 1.08), (-0.15, 0.9)]), skin),
        (np.array([(-1.05, 0.95), (-0.9, 0.75), (-0.3, 0.7), (-0.2, 0.85)]), skin),
        (np.array([(-0.95, 0.97), (-0.2, 0.83), (-0.1, 0.92), (-0.4, 0.97)]), BLACK),
        (limb((0.5, 1.0), front, 0.09), CHROME),
        (limb((-0.1, 0.26), (-0.98, 0.36), 0.12), CHROME),
        (np.array([(0.42, 0.75), (0.75, 0.8), (0.72, 1.1), (0.42, 1.3), (0.36, 1.05)]), skin),
        (limb((0.3, 1.12), (0.48, 1.08), 0.06), BLACK),
        (oval((0.72, 0.95), 0.09, 0.1), plain((1.05, 1.05, 0.9))),
        (limb((0.5, 0.72), (1.05, 0.66), 0.06), skin),
    ]
    return parts


def _rider_clothes(rng: Generator) -> tuple[Material, Material, Material, Material]:
    top = np.array(pick(rng, VESTS)) * rng.uniform(0.85, 1.05)
    return cloth(top, 0.4), cloth(top * 0.85, 0.15), cloth(pick(rng, TROUSERS), 0.2), cloth(pick(rng, HELMETS), 0.3)


def _rider_side(rng: Generator, hip: Numbers, shoulder: Numbers, hand: Numbers, foot: Numbers) -> list[Part]:
    top, sleeve, legs, helmet = _rider_clothes(rng)
    hip, shoulder = np.array(hip), np.array(shoulder)
    knee = (hip + foot) / 2 + (0.22, 0.12)
    elbow = (shoulder + hand) / 2 + (-0.05, -0.1)
    head = shoulder + (0.1, 0.27)
    return [
        (limb(hip, knee, 0.22, 0.18), legs),
        (limb(knee, foot, 0.17, 0.13), legs),
        (limb(foot, np.array(foot) + (0.17, -0.02), 0.11), BLACK),
        (limb(hip, shoulder, 0.32, 0.34), top),
        (limb(shoulder, elbow, 0.16, 0.13), sleeve),
        (limb(elbow, hand, 0.13, 0.11), sleeve),
        (oval(head, 0.13, 0.15), cloth(pick(rng, SKINS), 0.2)),
        (oval(head + (-0.02, 0.06), 0.16, 0.13), helmet),
    ]


def _rider_rear(rng: Generator, seat: float) -> list[Part]:
    top, sleeve, legs, helmet = _rider_clothes(rng)
    parts: list[Part] = []
    for sign in (-1, 1):
        parts += [
            (limb((sign * 0.1, seat), (sign * 0.22, seat - 0.35), 0.22, 0.18), legs),
            (limb((sign * 0.22, seat - 0.35), (sign * 0.18, 0.3 + 0.1 * sign), 0.17, 0.13), legs),
            (limb((sign * 0.22, seat + 0.5), (sign * 0.34, seat + 0.2), 0.15, 0.12), sleeve),
            (limb((sign * 0.34, seat + 0.2), (sign * 0.3, seat + 0.1), 0.12), sleeve),
        ]
    torso = np.array([(-0.25, seat + 0.55), (0.25, seat + 0.55), (0.2, seat - 0.08), (-0.2, seat - 0.08)])
    return [
        *parts,
        (torso, top),
        (limb((-0.15, seat + 0.55), (0.15, seat + 0.55), 0.18), top),
        (oval((0, seat + 0.8), 0.15, 0.18), helmet),
    ]


def _bicycle_rear(rng: Generator) -> list[Part]:
    frame = plain(np.array(pick(rng, FRAMES)), 0.04)
    return [
        (limb((0, 0.1), (0, 0.72), 0.16), TYRE),
        (limb((-0.15, 0.33), (0.15, 0.33), 0.08), CHROME),
        (oval((0, 0.72), 0.09, 0.1), plain((0.85, 0.05, 0.04))),
        (limb((0, 0.7), (0, 0.95), 0.12), frame),
        (limb((-0.3, 1.08), (0.3, 1.08), 0.08), BLACK),
        (limb((-0.12, 0.96), (0.12, 0.96), 0.14), BLACK),
    ]


def _motorcycle_rear(rng: Generator) -> list[Part]:
    skin = plain(np.array(pick(rng, FRAMES)), 0.06)
    return [
        (limb((0, 0.12), (0, 0.68), 0.24), TYRE),
        (limb((0.2, 0.3), (0.2, 0.5), 0.14), CHROME),
        (np.array([(-0.24, 0.55), (0.24, 0.55), (0.3, 0.85), (0.16, 1.0), (-0.16, 1.0), (-0.3, 0.85)]), skin),
        (limb((-0.1, 0.8), (0.1, 0.8), 0.1), plain((0.9, 0.05, 0.04))),
        (limb((-0.42, 1.12), (0.42, 1.12), 0.08), BLACK),
        (oval((-0.45, 1.2), 0.09, 0.07), CHROME),
        (oval((0.45, 1.2), 0.09, 0.07), CHROME),
    ]


SIDE = {  # parts of the two-wheeler; hip, shoulder, hand and foot of its rider
    "bicycle": (_bicycle_side, ((-0.22, 1.0), (0.12, 1.52), (0.4, 1.12), (-0.05, 0.3))),
    "motorcycle": (_motorcycle_side, ((-0.3, 0.95), (-0.02, 1.48), (0.4, 1.14), (-0.08, 0.36))),
}
REAR = {"bicycle": (_bicycle_rear, 1.0), "motorcycle": (_motorcycle_rear, 1.0)}  # parts; height of the seat


def draw_two_wheeler(canvas: Canvas, place: Place, rng: Generator, kind: str, ridden: bool) -> None:
    """Draw a bicycle or motorcycle from its side or, if it heads along the view, from behind."""
    view = np.arctan2(place.x, place.z)
    if abs(np.sin(place.heading - view)) > 0.5:
        vehicle, joints = SIDE[kind]
        figure(canvas, place, vehicle(rng), kind, edge_on=True)
        if ridden:
            figure(canvas, place, _rider_side(rng, *joints), "rider", edge_on=True)
    else:
        vehicle, seat = REAR[kind]
        figure(canvas, place.facing(), vehicle(rng), kind)
        if ridden:
            figure(canvas, place.facing(), _rider_rear(rng, seat), "rider")
