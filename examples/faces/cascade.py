"""The cascade: what each user's pictures go through, from pixels to faces. Runs in the application's process.

    pyramid     the picture at several scales
    proposal    the first network, on all scales at the same time
    propose     candidates, and crops of them
    refinement  the second network, on all crops together
    refine      fewer candidates, and larger crops of them
    output      the third network
    conclude    faces

The networks are models of the pool. What lies between them is numpy in a thread: the event loop of this
process is the pool's front and serves all users, so nothing may hold it up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from examples.faces import geometry
from examples.faces.geometry import Candidates, Floats, Pixels
from examples.faces.networks import OUTPUT, PROPOSAL, REFINEMENT
from pool import Predictor, Retry
from pool.flow import Model, Pipeline, Pipelines, Step, each

SMALLEST_PIXELS, FACTOR = 20, 0.709
# Least probabilities, and most overlaps, of those who trained the networks.
PROPOSAL_SCORE, REFINEMENT_SCORE, OUTPUT_SCORE = 0.6, 0.7, 0.8
SAME_SCALE_OVERLAP, OVERLAP = 0.5, 0.7
REFINEMENT_SIDE, OUTPUT_SIDE = 24, 48

A = TypeVar("A")
B = TypeVar("B")
Picture = npt.NDArray[np.uint8]  # [height, width, 3]: red, green, blue
Outputs = dict[str, npt.NDArray[Any]]


class Face(NamedTuple):
    """A face in a picture.

    Attributes:
        box: [4]: left, top, right, bottom, in pixels.
        probability: That it is one.
        landmarks: [5, 2]: x and y of left eye, right eye, nose, left and right corner of the mouth.
    """

    box: Floats
    probability: float
    landmarks: Floats


@dataclass
class Search:
    """What a user's pipeline knows of the picture under way; it has one at a time.

    Attributes:
        pixels: Of the picture.
        scales: By which it was shrunk.
        boxes: Those whose crops are looked at.
    """

    pixels: Pixels = field(default_factory=lambda: np.empty((0, 0, 3), np.float32))
    scales: list[float] = field(default_factory=list)
    boxes: Floats = field(default_factory=lambda: np.empty((0, 4)))


def cascade(predictor: Predictor) -> Pipelines[Search, Picture, list[Face]]:
    """Pipelines that find the faces in their users' pictures.

    Args:
        predictor: Of the three networks.
    """
    # Each size of picture takes a slot, and one client may not have all: pool.toml has one more. Of crops
    # there may be more than there is room for; those try again.
    proposal = Model(predictor, PROPOSAL, in_flight=15).predict()
    refinement = Model(predictor, REFINEMENT, in_flight=7).predict(retry=Retry(attempts=20))
    output = Model(predictor, OUTPUT).predict(retry=Retry(attempts=20))
    # One thread: several would wait for the same interpreter lock, and have the loop wait for all of them.
    thread = ThreadPoolExecutor(1, "cascade")

    def work(function: Callable[[Search, A], B]) -> Step[Search, A, B]:
        async def run(user: Pipeline[Search, Any, Any], message: A) -> B:
            return await asyncio.get_running_loop().run_in_executor(thread, function, user.state, message)

        return Step(run)

    steps = (
        work(pyramid) | each(proposal) | work(propose)
        | refinement | work(refine)
        | output | work(conclude)
    )  # fmt: skip
    return Pipelines(steps, lambda _: Search())


def pyramid(search: Search, picture: Picture) -> list[Pixels]:
    """The picture at several scales, a row each."""
    search.pixels = geometry.normalise(picture)
    search.scales = geometry.scales(picture.shape[0], picture.shape[1], SMALLEST_PIXELS, FACTOR)
    return [geometry.shrink(search.pixels, scale)[None] for scale in search.scales]


def propose(search: Search, levels: list[Outputs]) -> Pixels:
    """What may be faces, in small."""
    found = []
    for scale, level in zip(search.scales, levels, strict=True):
        here = geometry.locate(level["face"][0], level["offsets"][0], scale, PROPOSAL_SCORE)
        found.append(here.where(geometry.distinct(here, SAME_SCALE_OVERLAP)))
    joined = geometry.join(found)
    search.boxes = geometry.square(joined.where(geometry.distinct(joined, OVERLAP)).boxes)
    return geometry.crop(search.pixels, search.boxes, REFINEMENT_SIDE)


def refine(search: Search, outputs: Outputs) -> Pixels:
    """What probably is, larger."""
    found = Candidates(geometry.move(search.boxes, outputs["offsets"]), outputs["face"])
    found = found.where(found.scores > REFINEMENT_SCORE)
    search.boxes = geometry.square(found.where(geometry.distinct(found, OVERLAP)).boxes)
    return geometry.crop(search.pixels, search.boxes, OUTPUT_SIDE)


def conclude(search: Search, outputs: Outputs) -> list[Face]:
    """The faces, the most probable first."""
    begin, end = search.boxes[:, None, :2], search.boxes[:, None, 2:]
    landmarks = begin - 1 + (end - begin + 1) * outputs["landmarks"].reshape(-1, 2, 5).swapaxes(1, 2)
    found = Candidates(geometry.move(search.boxes, outputs["offsets"]), outputs["face"])
    is_face = found.scores > OUTPUT_SCORE
    found, landmarks = found.where(is_face), landmarks[is_face]
    height, width, _ = search.pixels.shape
    boxes = np.clip(found.boxes, 0, [width - 1, height - 1, width - 1, height - 1])
    return [
        Face(boxes[i], float(found.scores[i]), landmarks[i])
        for i in geometry.distinct(found, OVERLAP, of_smaller=True)
    ]
