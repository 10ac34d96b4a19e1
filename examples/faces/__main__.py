"""`python -m examples.faces`: find the faces in pictures and draw them. The application's process."""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from examples.faces.cascade import Face, Picture, cascade
from examples.faces.networks import NAMES
from pool import Pool, Predictor

HERE = Path(__file__).parent
LARGEST_PIXELS = 1600
COLOUR, DARK = "#00e5a0", "#06281e"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m examples.faces", description="Find faces in pictures.")
    parser.add_argument("pictures", nargs="*", type=Path, help="files; none for scikit-image's astronaut")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the drawn pictures")
    parser.add_argument("--users", type=int, default=0, help="then measure so many users at the same time")
    parser.add_argument("--config", type=Path, default=HERE / "pool.toml", help=argparse.SUPPRESS)
    given = parser.parse_args()
    pictures = dict(zip(names_of(given.pictures), map(read, given.pictures), strict=True))
    if not pictures:
        from skimage import data

        pictures["astronaut"] = data.astronaut()
    make_models(given.config.parent / "models")
    asyncio.run(serve(given.config, pictures, given.output, given.users))


def names_of(files: Sequence[Path]) -> list[str]:
    """A name for each file that no other has: its own without the ending, and a number if that is taken."""
    stems = {file.stem for file in files}
    names: dict[str, None] = {}
    for file in files:
        name, number = file.stem, 1
        while name in names or (number > 1 and name in stems):
            number += 1
            name = f"{file.stem}-{number}"
        names[name] = None
    return list(names)


def read(file: Path) -> Picture:
    """A picture from a file, upright, and no larger than a slot of the first network holds."""
    image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    image.thumbnail((LARGEST_PIXELS, LARGEST_PIXELS))
    return np.asarray(image)


def make_models(folder: Path) -> None:
    """Have the networks exported, once, by a process of its own: this one never imports TensorFlow.

    Raises:
        subprocess.CalledProcessError: that failed, and said why.
    """
    if not all((folder / name / "1").exists() for name in NAMES):
        subprocess.run([sys.executable, "-m", "examples.faces.networks", str(folder)], check=True)


async def serve(config: Path, pictures: dict[str, Picture], output: Path, users: int) -> None:
    """Find faces with a pool of this process's own."""
    async with Pool.from_file(config) as pool:
        await find(pool, pictures, output)
        if users:
            await crowd(pool, next(iter(pictures.values())), users)
        print_batches(await pool.status())


async def find(predictor: Predictor, pictures: dict[str, Picture], output: Path) -> None:
    """Find the faces in all pictures at the same time, draw and print them."""
    finders = cascade(predictor)
    answers = await asyncio.gather(*map(finders.send, pictures, pictures.values()))
    for (name, picture), faces in zip(pictures.items(), answers, strict=True):
        file = output / f"{name}.faces.png"
        draw(picture, faces).save(file)
        print(f"{file}: {len(faces)} faces")
        for face in faces:
            print("  box", *face.box.round().astype(int), f" probability {face.probability:.4f}")
    await finders.close()


async def crowd(predictor: Predictor, picture: Picture, users: int) -> None:
    """Have many users each send a variant of a picture at the same time, and print how long that took."""
    finders = cascade(predictor)
    began = time.monotonic()
    answers = await asyncio.gather(*map(finders.send, range(users), variants(picture, users)))
    rate = users / (time.monotonic() - began)
    print(f"{users} users: {sum(map(len, answers))} faces, {rate:.1f} pictures/s")
    await finders.close()


def variants(picture: Picture, count: int) -> list[Picture]:
    """A picture cut, mirrored and made smaller, differently for each of many users."""
    found = []
    height, width, _ = picture.shape
    for i in range(count):
        top, left, size = i % 5 * height // 50, i % 7 * width // 50, 1 - i % 3 / 5
        cut = Image.fromarray(picture[top:, left:][:, :: (-1) ** i])
        found.append(np.asarray(cut.resize((int(cut.width * size), int(cut.height * size)))))
    return found


def print_batches(status: dict[str, Any]) -> None:
    """For each model, how many requests and rows ran in how many batches."""
    for name, model in status["models"].items():
        requests, rows, batches = model["answers"].get("OK", 0), model["rows"], model["batches"]
        each = rows / max(1, batches)  # of a picture that is too small for a face, nothing is asked
        print(f"{name:10}  {requests} requests  {rows} rows  {batches} batches  {each:.1f} rows each")


def draw(picture: Picture, faces: list[Face]) -> Image.Image:
    """The picture with a box around each face, its landmarks, and its probability."""
    image = Image.fromarray(picture)
    pen = ImageDraw.Draw(image)
    line = max(2, image.width // 250)
    font = ImageFont.load_default(6 * line)
    for face in faces:
        left, top, right, bottom = face.box.round()
        pen.rectangle((left, top, right, bottom), outline=COLOUR, width=line)
        for x, y in face.landmarks.round():
            pen.ellipse((x - line, y - line, x + line, y + line), fill=COLOUR, outline=DARK)
        text = f"{face.probability:.1%}"
        label = pen.textbbox((left, top), text, font, anchor="lb")
        pen.rectangle((label[0], label[1] - line, label[2] + 2 * line, top), fill=COLOUR)
        pen.text((left + line, top - line / 2), text, DARK, font, anchor="lb")
    return image


if __name__ == "__main__":
    main()
