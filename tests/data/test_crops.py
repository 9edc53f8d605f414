"""Crops have torchvision's pixels: as it gave them, and where it is, as it gives them.

What it gave lies beside this file, every few pixels of it. With torchvision,

    python -m tests.data.test_crops

writes it anew.
"""

import contextlib
import importlib.resources
import io
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tpp_jax.data import crops, open_stream
from tpp_jax.errors import TPPError

RECORDED = pathlib.Path(__file__).parent / "images" / "torchvision_crops.npz"
TEST_SIZES = [(256, 224), (36, 32), (32, 32), (33, 24), (25, 31)]
TRAIN_SIZE = 24


def picture(height: int, width: int) -> Image.Image:
    """Blocks of random colours, as big as those that JPEG works on."""
    colours = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, 40, 3))
    pixels = np.kron(colours, np.ones((8, 8, 1)))[:height, :width]
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def files() -> dict[str, bytes]:
    """Image files of all kinds that ImageNet holds, and some that it does not."""
    folder = importlib.resources.files("sklearn.datasets") / "images"
    palette = picture(45, 77).quantize(16)
    return {
        "china": (folder / "china.jpg").read_bytes(),
        "flower": (folder / "flower.jpg").read_bytes(),
        "grey": encoded(picture(67, 301).convert("L"), "jpeg"),
        "cmyk": encoded(picture(131, 90).convert("CMYK"), "jpeg"),
        "small": encoded(picture(21, 30), "jpeg"),
        "palette": encoded(palette, "png"),
        "transparent palette": encoded(palette, "png", transparency=bytes(range(16))),
        "alpha": encoded(picture(50, 33).convert("RGBA"), "png"),
    }


def boxes(image: Image.Image) -> list[tuple[int, int, int, int]]:
    """Left, top, width and height of three parts: all, much, and a corner."""
    width, height = image.size
    much = width // 3, height // 4, width // 2, height // 2
    return [(0, 0, width, height), much, (width - 7, height - 9, 7, 9)]


def some(pixels: np.ndarray) -> np.ndarray:
    """About twelve rows and columns of an image."""
    step = max(1, len(pixels) // 12)
    return pixels[::step, ::step]


def theirs_to_test(image: Image.Image, resize: int, size: int) -> np.ndarray:
    from torchvision import transforms

    steps = [transforms.Resize(resize), transforms.CenterCrop(size)]
    return np.asarray(transforms.Compose(steps)(image))


def theirs_to_train(image: Image.Image, box: tuple[int, ...]) -> np.ndarray:
    from torchvision.transforms.functional import resized_crop

    left, top, width, height = box
    size = [TRAIN_SIZE, TRAIN_SIZE]
    return np.asarray(resized_crop(image, top, left, height, width, size))


def record() -> None:
    arrays = {}
    for name, content in files().items():
        image = Image.open(io.BytesIO(content)).convert("RGB")
        for sizes in TEST_SIZES:
            arrays[f"{name} {sizes}"] = some(theirs_to_test(image, *sizes))
        for i, box in enumerate(boxes(image)):
            arrays[f"{name} box {i}"] = some(theirs_to_train(image, box))
    np.savez_compressed(RECORDED, **arrays)


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """JPEG decoders may differ by one grey level between versions."""
    assert ours.dtype == np.uint8
    np.testing.assert_allclose(ours.astype(int), theirs.astype(int), rtol=0, atol=1)


@pytest.mark.parametrize("name", files())
def test_images_of_all_kinds_are_cropped_as_torchvision_did(name, monkeypatch):
    image = crops.decode(files()[name])
    recorded = np.load(RECORDED)
    for sizes in TEST_SIZES:
        ours = crops.crop_to_test(image, *sizes)
        assert ours.shape == (sizes[1], sizes[1], 3)
        assert_same(some(ours), recorded[f"{name} {sizes}"])
    for i, box in enumerate(boxes(image)):
        monkeypatch.setattr(crops, "_random_box", lambda *_, box=box: box)
        ours = crops.crop_to_train(
            image, np.random.default_rng(0), TRAIN_SIZE, flip=False
        )
        assert_same(some(ours), recorded[f"{name} box {i}"])


@pytest.mark.parametrize("name", files())
def test_images_of_all_kinds_are_cropped_as_torchvision_does(name, monkeypatch):
    pytest.importorskip("torchvision")
    image = crops.decode(files()[name])
    for sizes in [*TEST_SIZES, (232, 224), (64, 64), (40, 64)]:
        ours = crops.crop_to_test(image, *sizes)
        np.testing.assert_array_equal(ours, theirs_to_test(image, *sizes))
    for box in boxes(image):
        monkeypatch.setattr(crops, "_random_box", lambda *_, box=box: box)
        ours = crops.crop_to_train(
            image, np.random.default_rng(0), TRAIN_SIZE, flip=False
        )
        np.testing.assert_array_equal(ours, theirs_to_train(image, box))


SIDES = st.integers(1, 700)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@given(width=SIDES, height=SIDES, resize=st.integers(1, 40), size=st.integers(1, 40))
def test_a_test_crop_has_its_size_whatever_the_image(width, height, resize, size):
    image = Image.new("RGB", (width, height), (9, 9, 9))
    pixels = crops.crop_to_test(image, resize, size)
    assert pixels.shape == (size, size, 3)
    # What is not border is the image, in the middle of both sides.
    filled = [np.flatnonzero(pixels[:, :, 0].any(axis=axis)) for axis in (0, 1)]
    for side, places in zip((width, height), filled, strict=True):
        expected = min(size, int(resize * side / min(width, height)))
        assert len(places) == expected
        assert abs(places[0] - (size - 1 - places[-1])) <= 1


@given(width=SIDES, height=SIDES, seed=st.integers(0, 1000))
def test_a_random_part_lies_in_the_image_and_has_an_allowed_shape(width, height, seed):
    rng = np.random.default_rng(seed)
    left, top, w, h = crops._random_box((width, height), rng, SCALE, RATIO)
    assert 0 <= left <= left + w <= width and w >= 1
    assert 0 <= top <= top + h <= height and h >= 1
    # Both sides are rounded, by half a pixel at most.
    assert RATIO[0] * (h - 0.5) - 0.5 <= w <= RATIO[1] * (h + 0.5) + 0.5


def test_the_parts_areas_and_shapes_are_uniform_as_far_as_they_fit():
    rng = np.random.default_rng(0)
    draws = [
        crops._random_box((4000, 3000), rng, (0.08, 0.5), RATIO) for _ in range(4000)
    ]
    left, _, width, height = np.array(draws).T
    shares = np.sort(width * height / 12e6)
    logs = np.sort(np.log(width / height) / math.log(4 / 3))
    places = np.sort(left / (4000 - width))
    uniform = np.linspace(0, 1, 4000)
    np.testing.assert_allclose(shares, 0.08 + 0.42 * uniform, atol=0.02)
    np.testing.assert_allclose(logs, 2 * uniform - 1, atol=0.06)
    np.testing.assert_allclose(places, uniform, atol=0.03)


@pytest.mark.parametrize(
    ("size", "box"),
    [((1000, 12), (492, 0, 16, 12)), ((12, 1000), (0, 492, 12, 16))],
)
def test_of_a_long_image_the_middle_is_taken(size, box):
    rng = np.random.default_rng(0)
    assert crops._random_box(size, rng, SCALE, RATIO) == box


def test_half_of_the_training_crops_are_mirrored_and_are_the_same_crops():
    image = picture(60, 80)
    mirrored = 0
    for seed in range(300):
        plain, flipped = (
            crops.crop_to_train(image, np.random.default_rng(seed), 16, flip=flip)
            for flip in (False, True)
        )
        is_mirrored = np.array_equal(flipped, plain[:, ::-1])
        assert is_mirrored or np.array_equal(flipped, plain)
        mirrored += is_mirrored
    assert 120 < mirrored < 180


# Kinds of images

GREYS = np.array([[0, 128, 129, 30000], [60000, 65279, 65406, 65535]])


def read(image, form="png", **options):
    return np.asarray(crops.decode(encoded(image, form, **options)))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_greys_of_16_bits_are_scaled(mode):
    greys = np.rint(GREYS / 257).astype(np.uint8)
    raw = GREYS.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]).tobytes()
    image = Image.frombytes(mode, (4, 2), raw)
    found = np.asarray(crops._to_rgb(image))
    np.testing.assert_array_equal(found, np.repeat(greys[..., None], 3, -1))
    if mode == "I;16":
        np.testing.assert_array_equal(read(image), found)


COLOURS = [(250, 0, 10), (0, 200, 20), (30, 0, 90), (255, 255, 255)]


def palette_image(**info):
    image = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2), "P")
    image.putpalette(sum(COLOURS, ()))
    image.info |= info
    return image


@pytest.mark.parametrize("transparency", [None, 2, b"\x00\x80\xff\x10"])
def test_a_palette_gives_its_colours_transparent_or_not(transparency):
    options = {} if transparency is None else {"transparency": transparency}
    found = read(palette_image(), **options)
    np.testing.assert_array_equal(found.reshape(4, 3), COLOURS)


@pytest.mark.parametrize("form", ["png", "webp"])
def test_transparency_is_left_out(form):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, 255
    pixels[0, :, 3] = 10
    options = {"lossless": True, "exact": True} if form == "webp" else {}
    found = read(Image.fromarray(pixels), form, **options)
    np.testing.assert_array_equal(found, pixels[..., :3])


def test_greys_with_transparency_and_of_one_bit_are_read():
    levels = np.array([[7, 80], [160, 250]], np.uint8)
    both = np.stack([levels, 255 - levels], -1)
    found = read(Image.fromarray(both, "LA"))
    np.testing.assert_array_equal(found, np.repeat(levels[..., None], 3, -1))
    found = read(Image.fromarray(levels), transparency=80)
    np.testing.assert_array_equal(found, np.repeat(levels[..., None], 3, -1))
    bits = Image.fromarray(levels > 100)
    assert bits.mode == "1"
    for form in ("png", "bmp"):
        np.testing.assert_array_equal(read(bits, form)[..., 0], 255 * (levels > 100))


def test_cmyk_is_read_as_its_colours():
    colours = Image.new("RGB", (16, 16), (200, 40, 90))
    found = read(colours.convert("CMYK"), "jpeg", quality=100)
    assert abs(found.astype(int) - (200, 40, 90)).max() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_an_image_is_turned_as_exif_says(orientation, form):
    """Pillow's own ImageOps.exif_transpose says what is upright."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture(20, 30), form, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    found = crops.decode(content)
    assert found.size == ((30, 20) if orientation < 5 else (20, 30))
    np.testing.assert_array_equal(found, expected.convert("RGB"))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, as it opens one
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_damaged_exif_costs_no_image(exif):
    plain = encoded(picture(20, 30), "jpeg")
    content = encoded(picture(20, 30), "jpeg", exif=exif)
    np.testing.assert_array_equal(crops.decode(content), crops.decode(plain))


@pytest.mark.parametrize(
    ("form", "described"),
    [("gif", "a GIF"), ("tiff", "a TIFF"), ("pdf", "a PDF"), ("ppm", "not an image$")],
)
def test_other_kinds_of_content_are_refused_whatever_the_ending(form, described):
    with pytest.raises(OSError, match=f"its content is .*{described}"):
        crops.decode(encoded(picture(20, 30), form))


def test_of_those_that_are_read_the_content_counts_and_not_the_ending(tmp_path):
    """ImageNet has a PNG whose name ends in JPEG."""
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        content = encoded(picture(20, 30), "png")
        (tmp_path / split / "a" / "0.JPEG").write_bytes(content)
    stream = open_stream("folder", str(tmp_path), image_size=20, resize=20)
    [(images, _)] = stream.test_batches(1)
    np.testing.assert_array_equal(
        images[0], crops.crop_to_test(picture(20, 30), 20, 20)
    )
    (tmp_path / "val" / "a" / "0.JPEG").write_bytes(encoded(picture(9, 9), "gif"))
    message = "0.JPEG cannot be read .its content is not a supported image, but a"
    with pytest.raises(TPPError, match=message):
        list(stream.test_batches(1))


@pytest.mark.parametrize("form", ["png", "bmp", "webp", "jpeg"])
def test_damaged_files_raise_only_the_documented_errors(form):
    rng = np.random.default_rng(0)
    whole = encoded(picture(40, 60), form)
    for _ in range(300):
        content = bytearray(whole[: rng.integers(len(whole))])
        for place in rng.integers(0, len(content) or 1, 3 if content else 0):
            content[place] = rng.integers(256)
        # A changed byte may also make another image.
        with contextlib.suppress(*crops.DAMAGED):
            crops.decode(bytes(content))


if __name__ == "__main__":
    record()
