"""Pictures, boxes and what is between them. Pure numpy.

Pixels are float32 [height, width, 3], from -1 to 1. Boxes are float64 [boxes, 4]: left, top, right and
bottom, in pixels of the picture.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.float32]
Floats = npt.NDArray[np.floating]

# What the first network looks at: a field of so many pixels, at every other pixel.
FIELD, STRIDE = 12, 2


class Candidates(NamedTuple):
    """Boxes that may hold a face.

    Attributes:
        boxes: [boxes, 4].
        scores: [boxes], probabilities.
    """

    boxes: Floats
    scores: Floats

    def where(self, chosen: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> Candidates:
        """Those chosen."""
        return Candidates(self.boxes[chosen], self.scores[chosen])


def normalise(picture: npt.NDArray[np.uint8]) -> Pixels:
    """The pixels of a picture, uint8 [height, width, 3]."""
    return (picture.astype(np.float32) - np.float32(127.5)) / np.float32(128)


def scales(height: int, width: int, smallest: int, factor: float) -> list[float]:
    """By how much to shrink a picture, so that its faces of any size fill the field once.

    Args:
        height: Of the picture, in pixels.
        width: The same.
        smallest: Side of the smallest face that is looked for, in pixels.
        factor: From one scale to the next.
    """
    count = round(-math.log(min(height, width) / FIELD) / math.log(factor) - 1)
    return [FIELD / smallest * factor**i for i in range(count)]


def shrink(pixels: Pixels, scale: float) -> Pixels:
    """A smaller picture, whose pixels are means of the areas that they cover."""
    height, width, _ = pixels.shape
    lines = _means(pixels, int(height * scale))
    return np.ascontiguousarray(_means(lines.swapaxes(0, 1), int(width * scale)).swapaxes(0, 1))


def _means(source: Pixels, length: int) -> Pixels:
    """The first axis cut into parts of equal length, which need not be whole pixels: the mean of each."""
    sums = np.zeros((len(source) + 1, *source.shape[1:]))  # of all before a pixel
    np.cumsum(source, 0, out=sums[1:])
    edges = np.linspace(0, len(source), length + 1)
    whole = np.minimum(edges.astype(int), len(source) - 1)
    part = (edges - whole).reshape(-1, *[1] * (source.ndim - 1))
    means = np.diff(sums[whole] + part * source[whole], axis=0) * (length / len(source))
    return means.astype(np.float32)


def locate(face: Pixels, offsets: Pixels, scale: float, threshold: float) -> Candidates:
    """The candidates of one scale.

    Args:
        face: [height, width], of the grid.
        offsets: [height, width, 4].
        scale: Of the picture that the network saw.
        threshold: Least probability.
    """
    y, x = np.nonzero(face > threshold)
    begin = np.stack([x, y], 1) * STRIDE
    corners = np.concatenate([begin + 1, begin + FIELD], 1)
    boxes = corners + offsets[y, x].astype(float) * (FIELD - 1)
    return Candidates(boxes / scale, face[y, x])


def join(parts: list[Candidates]) -> Candidates:
    """All candidates of several lists."""
    none = Candidates(np.empty((0, 4)), np.empty(0))
    boxes, scores = zip(none, *parts, strict=True)
    return Candidates(np.concatenate(boxes), np.concatenate(scores))


def move(boxes: Floats, offsets: Floats) -> Floats:
    """Boxes whose corners are moved by parts of their sizes, [boxes, 4]."""
    return boxes + offsets * (np.tile(boxes[:, 2:] - boxes[:, :2], 2) + 1)


def square(boxes: Floats) -> Floats:
    """The squares around the centres of boxes, as wide as their longer sides."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).max(1, keepdims=True) / 2
    return np.concatenate([centre - half, centre + half], 1)


def distinct(found: Candidates, threshold: float, *, of_smaller: bool = False) -> npt.NDArray[np.intp]:
    """Which candidates to keep, the most probable first: those that overlap with no better one.

    Args:
        found: The candidates.
        threshold: Most overlap, in parts of the area of both boxes together.
        of_smaller: In parts of the area of the smaller box instead.
    """
    order = np.argsort(found.scores)[::-1]
    boxes = found.boxes[order]
    begin = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    end = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    both = np.maximum(end - begin, 0).prod(2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    whole = np.minimum(area[:, None], area) if of_smaller else area[:, None] + area - both
    overlaps_better = np.triu(both > threshold * whole, 1).any(0)
    return order[~overlaps_better]


def crop(pixels: Pixels, boxes: Floats, side: int) -> Pixels:
    """What is in the boxes, float32 [boxes, side, side, 3], grey (0) where they leave the picture."""
    height, width, _ = pixels.shape
    y = _samples(boxes[:, 1], boxes[:, 3], side, height)
    x = _samples(boxes[:, 0], boxes[:, 2], side, width)
    top, bottom, down, is_high = _neighbours(y, height)
    left, right, along, is_wide = _neighbours(x, width)
    down, along = down[:, :, None, None], along[:, None, :, None]

    def line(row: npt.NDArray[np.intp]) -> Pixels:
        row = row[:, :, None]
        from_left, from_right = pixels[row, left[:, None]], pixels[row, right[:, None]]
        mixed: Pixels = from_left + (from_right - from_left) * along
        return mixed

    above, below = line(top), line(bottom)
    is_inside = is_high[:, :, None, None] & is_wide[:, None, :, None]
    return np.where(is_inside, above + (below - above) * down, np.float32(0))


def _samples(begin: Floats, end: Floats, side: int, length: int) -> Floats:
    """[boxes, side]: where along an axis of a picture to look, from the first pixel to the last."""
    first, last = begin[:, None] / length * (length - 1), end[:, None] / length * (length - 1)
    return first + (last - first) * (np.arange(side) / (side - 1))


def _neighbours(
    samples: Floats, length: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Pixels, npt.NDArray[np.bool_]]:
    """The pixels on both sides, how far to go from one to the other, and whether there are any."""
    low = np.floor(samples)
    is_inside = (samples >= 0) & (samples <= length - 1)
    near, far = (np.clip(each, 0, length - 1).astype(np.intp) for each in (low, np.ceil(samples)))
    return near, far, (samples - low).astype(np.float32), is_inside
