"""examples/faces: the answers of the package whose networks it runs, whoever else sends pictures."""

from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

if importlib.util.find_spec("mtcnn") is None:  # not imported yet: it imports TensorFlow
    pytest.skip("the extra `examples` is not installed", allow_module_level=True)
data = pytest.importorskip("skimage.data", reason="the extra `examples` is not installed")

from examples.faces import geometry  # noqa: E402
from examples.faces.cascade import SMALLEST_PIXELS, cascade  # noqa: E402
from examples.faces.geometry import Candidates  # noqa: E402
from pool import AsyncClient, Pool  # noqa: E402

program = importlib.import_module("examples.faces.__main__")

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def astronaut():
    return data.astronaut()


@pytest.fixture(scope="module")
def portrait(astronaut):
    """A smaller one of hers, for tests with many."""
    return np.ascontiguousarray(astronaut[:230, 90:340])


@pytest.fixture(scope="module")
def faces_of(tensorflow_backend):
    """What the package finds: boxes [faces, 4], probabilities [faces], landmarks [faces, 5, 2]."""
    assert tensorflow_backend  # prepared: it cannot be, once TensorFlow has run something
    from mtcnn import MTCNN

    detector = MTCNN()
    gc.collect()
    gc.freeze()  # as in `tensorflow_backend`: it imports Keras

    def find(picture):
        found = detector.detect_faces(picture, output_type="numpy", box_format="xyxy")
        return found[:, 1:5], found[:, 5], found[:, 6:].reshape(-1, 2, 5).swapaxes(1, 2)

    return find


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Runs a function of a pool that serves the example's models."""
    folder = tmp_path_factory.mktemp("faces")
    shutil.copy(Path(program.__file__).with_name("pool.toml"), folder)
    program.make_models(folder / "models")
    loop = asyncio.new_event_loop()
    pool = Pool.from_file(folder / "pool.toml")
    loop.run_until_complete(pool.start())
    yield lambda work: loop.run_until_complete(asyncio.wait_for(work(pool), PATIENCE_S))
    loop.run_until_complete(pool.close())
    loop.close()


def assert_same(faces, boxes, probabilities, landmarks):
    assert len(faces) == len(boxes)
    np.testing.assert_allclose([face.box for face in faces], boxes, atol=0.5)
    np.testing.assert_allclose([face.probability for face in faces], probabilities, atol=1e-3)
    np.testing.assert_allclose([face.landmarks for face in faces], landmarks, atol=0.5)


def test_finds_what_the_package_finds(served, faces_of, astronaut, portrait):
    pictures = [
        astronaut,
        portrait[:, ::-1],
        portrait[::2, ::2],
        np.concatenate([portrait, portrait[:, ::-1]], 1),
    ]

    async def work(pool):
        users = cascade(pool)
        return await asyncio.gather(*map(users.send, range(len(pictures)), pictures))

    answers = served(work)
    assert [len(faces) for faces in answers] == [1, 1, 1, 2]
    for picture, faces in zip(pictures, answers, strict=True):
        assert_same(faces, *faces_of(np.ascontiguousarray(picture)))


def test_many_users_share_batches_and_get_their_own_answers(served, portrait):
    pictures = program.variants(portrait, 24)

    async def work(pool):
        users = cascade(pool)
        alone = [await users.send("alone", picture) for picture in pictures]
        before = (await pool.status())["models"]
        together = await asyncio.gather(*map(users.send, range(len(pictures)), pictures))
        after = (await pool.status())["models"]
        await users.close()
        return alone, together, before, after

    earlier = served(lambda pool: pool.status())["models"]
    alone, together, before, after = served(work)
    assert all(len(faces) == 1 for faces in alone)
    for mine, same in zip(together, alone, strict=True):
        assert_same(mine, *zip(*same, strict=True))

    def ran(name, key):
        return before[name][key] - earlier[name][key], after[name][key] - before[name][key]

    for name in ("refinement", "output"):
        rows_alone, rows = ran(name, "rows")
        batches_alone, batches = ran(name, "batches")
        assert rows == rows_alone
        assert batches < batches_alone
        assert rows / batches > 1
    assert not any(code != "OK" for model in after.values() for code in model["answers"])


def test_a_server_gives_the_same(served, portrait, tmp_path):
    async def work(pool):
        await pool.serve(f"ipc://{tmp_path}/pool.sock")
        async with AsyncClient(f"ipc://{tmp_path}/pool.sock") as client:
            return await cascade(pool).send("ann", portrait), await cascade(client).send("ben", portrait)

    mine, theirs = served(work)
    assert_same(theirs, *zip(*mine, strict=True))


def test_pictures_are_read_upright_and_no_larger_than_fits(served, tmp_path):
    rotated = Image.Exif()
    rotated[0x0112] = 6  # as a phone writes that is held upright
    Image.new("RGB", (2000, 1000)).save(tmp_path / "large.jpg", exif=rotated)
    assert program.read(tmp_path / "large.jpg").shape == (1600, 800, 3)

    async def work(pool):
        side = program.LARGEST_PIXELS * geometry.FIELD // SMALLEST_PIXELS
        await pool.predict("proposal", np.zeros((1, side, side, 3), np.float32))

    served(work)


def test_pictures_of_one_name_do_not_take_each_others_place(tmp_path, monkeypatch):
    files = []
    for i, name in enumerate(["a.png", "there/a.png", "a.bmp", "b.png", "a-2.png"]):
        files.append(tmp_path / name)
        files[i].parent.mkdir(exist_ok=True)
        Image.new("RGB", (20 + i, 10)).save(files[i])
    assert program.names_of(files) == ["a", "a-3", "a-4", "b", "a-2"]
    found = {}

    async def serve(_config, pictures, _output, _users):
        found.update(pictures)

    monkeypatch.setattr(program, "serve", serve)
    monkeypatch.setattr(program, "make_models", lambda _: None)
    monkeypatch.setattr("sys.argv", ["faces", *map(str, files)])
    program.main()
    assert {name: picture.shape[1] for name, picture in found.items()} == {
        "a": 20,
        "a-3": 21,
        "a-4": 22,
        "b": 23,
        "a-2": 24,
    }


def test_where_there_is_no_face_or_no_picture(served, portrait):
    async def work(pool):
        users = cascade(pool)
        sky = np.full((64, 80, 3), 127, np.uint8)
        nothing = [sky, sky[:12, :12], sky[:5], sky[:1, :1]]
        assert await asyncio.gather(*(users.send("ann", each) for each in nothing)) == [[]] * 4
        outcomes = await asyncio.gather(
            users.send("ann", portrait), users.send("ben", sky[0]), users.send("ann", portrait),
            return_exceptions=True,
        )  # fmt: skip
        assert [type(each) for each in outcomes] == [list, ValueError, list]
        await users.close()

    served(work)


def test_pictures_are_drawn_and_batches_told(served, portrait, tmp_path, capsys):
    pictures = {"her": portrait, "sky": np.zeros((40, 40, 3), np.uint8)}

    async def work(pool):
        await program.find(pool, pictures, tmp_path)
        await program.crowd(pool, portrait, 6)
        program.print_batches(await pool.status())
        return await cascade(pool).send("her", portrait)

    (face,) = served(work)
    drawn = np.asarray(Image.open(tmp_path / "her.faces.png"))
    left, top, right, bottom = face.box.round().astype(int)
    green = (0, 0xE5, 0xA0)
    for x, y in [
        (left, bottom - 20),
        (right, bottom - 20),
        (left + 20, bottom),
        *face.landmarks.round().astype(int),
    ]:
        assert tuple(drawn[y, x]) == green
    assert (drawn[bottom + 5 :] == portrait[bottom + 5 :]).all()
    assert not np.asarray(Image.open(tmp_path / "sky.faces.png")).any()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("her.faces.png: 1 faces")
    assert lines[1] == f"  box {left} {top} {right} {bottom}  probability {face.probability:.4f}"
    assert "6 users: 6 faces" in lines[3]
    assert [line.split()[0] for line in lines[4:]] == ["proposal", "refinement", "output"]


def test_a_model_that_nobody_asked_ran_no_batch(capsys):
    program.print_batches({"models": {"proposal": {"answers": {}, "rows": 0, "batches": 0}}})
    assert capsys.readouterr().out == "proposal    0 requests  0 rows  0 batches  0.0 rows each\n"


# -- geometry --------------------------------------------------------------------------------------

sides = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)


@given(sides, sides, st.floats(0.1, 1), seeds)
def test_shrinking_is_what_tensorflow_does(height, width, scale, seed):
    import tensorflow as tf

    pixels = np.random.default_rng(seed).random((height, width, 3), np.float32) - np.float32(0.5)
    target = (int(height * scale), int(width * scale))
    if 0 in target:
        return
    expected = tf.image.resize(pixels, target, tf.image.ResizeMethod.AREA)
    np.testing.assert_allclose(geometry.shrink(pixels, scale), expected, atol=1e-5)


# Not of whole numbers: no sample lies on the edge of the picture, inside in one precision and not in another.
boxes = st.lists(
    st.tuples(
        *[st.integers(-20, 50).map(lambda n: n + 0.37)] * 2, *[st.integers(1, 40).map(lambda n: n + 0.19)] * 2
    ),
    max_size=8,
)


def corners(listed):
    array = np.array(listed, float).reshape(-1, 4)
    return np.concatenate([array[:, :2], array[:, :2] + array[:, 2:]], 1)


@given(boxes, seeds)
def test_crops_are_what_tensorflow_makes(boxes, seed):
    import tensorflow as tf

    pixels = np.random.default_rng(seed).random((30, 40, 3), np.float32)
    found = geometry.crop(pixels, corners(boxes), 6)
    parts = (corners(boxes) / [40, 30, 40, 30])[:, [1, 0, 3, 2]]
    expected = tf.image.crop_and_resize(pixels[None], parts, [0] * len(boxes), (6, 6)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


@given(boxes, seeds, st.floats(0.1, 0.9), st.booleans())
def test_what_is_distinct(boxes, seed, threshold, of_smaller):
    found = Candidates(corners(boxes), np.random.default_rng(seed).permutation(len(boxes)) / 10)

    def overlap(a, b):
        sides = np.minimum(found.boxes[a, 2:], found.boxes[b, 2:]) - np.maximum(
            found.boxes[a, :2], found.boxes[b, :2]
        )
        both = np.maximum(sides, 0).prod()
        areas = [(found.boxes[each, 2:] - found.boxes[each, :2]).prod() for each in (a, b)]
        return both / (min(areas) if of_smaller else sum(areas) - both)

    better = sorted(range(len(boxes)), key=lambda each: -found.scores[each])
    expected = [
        each
        for i, each in enumerate(better)
        if all(overlap(each, other) <= threshold for other in better[:i])
    ]
    assert geometry.distinct(found, threshold, of_smaller=of_smaller).tolist() == expected
