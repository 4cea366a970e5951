"""The plan of a random street: a list of things on the ground, which the renderer draws from far to near."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.random import Generator

from demo.streetscenes import figures, furniture, vehicles
from demo.streetscenes.canvas import Canvas
from demo.streetscenes.solids import Place

Draw = Callable[[Canvas, Place, Generator], None]

LANE = 3.4  # m
KERB = 0.14  # m, height of the sidewalk
TRAFFIC = {  # draw, and length, width, height in metres
    "car": (vehicles.draw_car, (4.5, 1.8, 1.5)),
    "truck": (vehicles.draw_truck, (8.0, 2.4, 3.4)),
    "bus": (vehicles.draw_bus, (10.6, 2.5, 3.1)),
    "train": (vehicles.draw_tram, (22.5, 2.4, 3.3)),
}


@dataclass(frozen=True)
class Thing:
    """An object on the ground that casts a shadow."""

    place: Place
    draw: Draw
    size: tuple[float, float, float]  # length along the heading, width, height, in metres


@dataclass(frozen=True)
class Side:
    """One side of the street, distances in metres from the camera's lane, towards that side."""

    sign: int  # -1 left, +1 right
    kerb: float
    verge: float  # width of the grass between kerb and sidewalk; may be 0
    walk: float  # width of the sidewalk

    @property
    def boundary(self) -> float:
        """Distance of the houses and gardens."""
        return self.kerb + self.verge + self.walk


@dataclass(frozen=True)
class Street:
    """A straight street."""

    left: Side
    right: Side
    parking: bool  # cars are parked along the right kerb
    tram: bool  # the leftmost lane carries a tram
    lanes: int  # to the left of the camera's

    @property
    def sides(self) -> tuple[Side, Side]:
        """Both sides, left first."""
        return self.left, self.right


def plan_street(rng: Generator) -> Street:
    """Return a random street."""
    parking, tram = rng.random() < 0.6, rng.random() < 0.7
    lanes = 2 if tram else int(rng.integers(1, 3))
    kerbs = (LANE * (lanes + 0.5) + 0.3, LANE / 2 + (2.5 if parking else 0.3))
    verges = np.where(rng.random(2) < 0.6, rng.uniform(1.4, 2.4, 2), 0)
    walks = rng.uniform(2.4, 3.6, 2)
    left, right = (Side(s, k, v, w) for s, k, v, w in zip((-1, 1), kerbs, verges.tolist(), walks.tolist(), strict=True))
    return Street(left, right, parking, tram, lanes)


def populate(street: Street, rng: Generator) -> list[Thing]:
    """Return the things on road and sidewalks; no two overlap."""
    things: list[Thing] = []
    for thing in [
        *_traffic(street, rng),
        *_posts(street, rng),
        *_two_wheelers(street, rng),
        *_people(street, rng),
        *_furniture(street, rng),
    ]:
        if not any(_collide(thing, other) for other in things):
            things.append(thing)
    return things


def _collide(one: Thing, other: Thing, gap: float = 0.25) -> bool:
    (x0, z0), (x1, z1) = _reach(one), _reach(other)
    beside = abs(one.place.x - other.place.x) < x0 + x1 + gap
    return beside and abs(one.place.z - other.place.z) < z0 + z1 + gap


def _reach(thing: Thing) -> tuple[float, float]:
    """Return half the extent along x and along z."""
    length, width, _ = thing.size
    c, s = abs(np.cos(thing.place.heading)), abs(np.sin(thing.place.heading))
    return (length * s + width * c) / 2, (length * c + width * s) / 2


def _traffic(street: Street, rng: Generator) -> list[Thing]:
    heavy = [kind for kind in ("truck", "bus") if rng.random() < 0.7]
    rng.shuffle(heavy)
    lead = heavy.pop() if heavy and rng.random() < 0.35 else "car"
    things = _queue(rng, 0.0, 0.0, rng.uniform(9, 15), [lead, "car"])
    if street.tram:
        things += _queue(rng, -LANE * street.lanes, rng.choice((0, np.pi)), rng.uniform(7, 15), ["train"])
    open_lanes = street.lanes - street.tram
    for lane in range(1, open_lanes + 1):
        kinds = [heavy.pop() if heavy else "car", "car", "car"]
        kinds = kinds if rng.random() < 0.5 else kinds[1:] + kinds[:1]
        things += _queue(rng, -LANE * lane, np.pi, rng.uniform(6, 12), kinds)
    if street.parking:
        things += _queue(
            rng, LANE / 2 + 1.25, 0.0, rng.uniform(5, 9), [heavy.pop() if heavy else "car", "car", "car"], 1.2
        )
    return things


def _queue(rng: Generator, x: float, heading: float, start: float, kinds: list[str], gap: float = 6.0) -> list[Thing]:
    """Return vehicles behind each other in a lane, of which the first begins at `start`."""
    things = []
    for kind in kinds:
        draw, size = TRAFFIC[kind]
        place = Place(x + rng.uniform(-0.2, 0.2), start + size[0] / 2, heading + rng.uniform(-0.03, 0.03))
        things.append(Thing(place, draw, size))
        start += size[0] + gap * rng.uniform(0.8, 2)
    return things


def _two_wheelers(street: Street, rng: Generator) -> list[Thing]:
    things = []
    for kind in ("bicycle", "motorcycle"):
        if rng.random() < 0.8:
            things.append(_ridden(street, rng, kind))
        for _ in range(rng.integers(1, 4) if kind == "bicycle" else rng.integers(1, 3)):
            side = street.sides[rng.integers(2)]
            x = side.sign * (side.kerb + rng.uniform(0.8, side.boundary - side.kerb - 1.2))
            things.append(
                _wheeler(x, rng.uniform(7, 13), rng.choice((-1, 1)) * rng.uniform(1.2, 1.9), kind, False, KERB)
            )
    return things


def _ridden(street: Street, rng: Generator, kind: str) -> Thing:
    if rng.random() < 0.6:  # crossing, or turning
        return _wheeler(
            rng.uniform(-4.5, 2.0), rng.uniform(6, 9.5), rng.choice((-1, 1)) * rng.uniform(1.1, 2.0), kind, True
        )
    return _wheeler(rng.choice((-1.1, 1.1)) + rng.uniform(-0.3, 0.3), rng.uniform(5.5, 9), 0.0, kind, True)


def _wheeler(x: float, z: float, heading: float, kind: str, ridden: bool, y: float = 0.0) -> Thing:
    draw = partial(figures.draw_two_wheeler, kind=kind, ridden=ridden)
    return Thing(Place(x, z, heading, y), draw, (1.9, 0.5, 1.8 if ridden else 1.1))


def _people(street: Street, rng: Generator) -> list[Thing]:
    things = []
    for _ in range(rng.integers(4, 9)):
        side = street.sides[rng.integers(2)]
        x = side.sign * (side.boundary - rng.uniform(0.5, side.walk - 0.3))
        things.append(Thing(Place(x, rng.uniform(7, 18), 0, KERB), figures.draw_person, (0.3, 0.5, 1.75)))
    for _ in range(rng.integers(0, 3)):  # on the road
        things.append(Thing(Place(rng.uniform(-4, 2.2), rng.uniform(6.5, 10)), figures.draw_person, (0.3, 0.5, 1.75)))
    return things


POSTS = (  # draw, height, smallest and largest number per side, range of distances
    (furniture.draw_sign, 2.8, 1, 2, (7, 14)),
    (furniture.draw_traffic_light, 3.4, 0, 1, (7.5, 13)),
)


def _posts(street: Street, rng: Generator) -> list[Thing]:
    things = []
    for side in street.sides:
        x = side.sign * (side.kerb + 0.55)
        for draw, height, least, most, (start, stop) in POSTS:
            for _ in range(rng.integers(least, most + 1)):
                things.append(_post(x + side.sign * rng.uniform(-0.1, 0.6), rng.uniform(start, stop), draw, height))
        for z in np.arange(rng.uniform(7, 13), 70, rng.uniform(13, 20)):
            things.append(_post(x, z, furniture.draw_lamp_post, 7))
    return things


def _furniture(street: Street, rng: Generator) -> list[Thing]:
    things = []
    for side in street.sides:
        x = side.sign * (side.kerb + 0.55)
        if rng.random() < 0.6:
            for z in np.arange(rng.uniform(11, 16), 80, rng.uniform(8, 12)):
                things.append(Thing(Place(x + side.sign * 0.4, z, 0, KERB), furniture.draw_tree, (1, 1, 6)))
        back = side.sign * (side.boundary - 0.45)
        if rng.random() < 0.4:
            things.append(
                Thing(Place(back, rng.uniform(8, 15), np.pi / 2, KERB), furniture.draw_bench, (1.8, 0.5, 0.9))
            )
        if rng.random() < 0.4:
            things.append(Thing(Place(x, rng.uniform(8, 14), 0, KERB), furniture.draw_bin, (0.6, 0.6, 1.1)))
    return things


def _post(x: float, z: float, draw: Draw, height: float) -> Thing:
    return Thing(Place(x, z, 0, KERB), draw, (0.25, 0.25, height))
