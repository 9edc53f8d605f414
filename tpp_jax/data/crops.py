"""From JPEG bytes to the pixels that torchvision's transforms would give, by Pillow.

Networks trained in PyTorch score here what they score there only if their images are
resized by the same filter and cropped at the same pixel. These are the two pipelines of
ImageNet: a random crop, resized and mirrored, to train; resize and centre crop to test.
"""

import io
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

DAMAGED = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises of files that are no images, or damaged."""

_BILINEAR = Image.Resampling.BILINEAR  # Pillow's is antialiased


_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
"""What Pillow is asked to open. It knows many more, some by programs of others."""

# Content of other kinds, by how it begins, for a message.
_OTHERS = {
    b"GIF8": "a GIF",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"%PDF": "a PDF",
    b"%!PS": "PostScript",
    b"<": "text (a web page or SVG)",
    b"\0\0\1\0": "an icon",
}

# EXIF's orientation → what puts the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


def decode(content: bytes) -> Image.Image:
    """Decodes a JPEG, PNG, BMP or WebP file to RGB, upright.

    Greyscale, palette and CMYK images, which ImageNet has some of, are converted; greys
    of 16 bits are scaled to 8. Transparency is left out, as by torchvision: a pixel
    keeps its colour. An image that EXIF says was taken with the camera turned is turned
    back, which torchvision leaves to the user.

    Raises:
      One of `DAMAGED`: it is not such an image, or cut short.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError as error:  # it speaks of the BytesIO
        raise OSError(f"its content is {_described(content)}") from error
    upright = _UPRIGHT.get(_orientation(image))
    image = _to_rgb(image)
    return image if upright is None else image.transpose(upright)


def _described(content: bytes) -> str:
    for start, what in _OTHERS.items():
        if content.startswith(start):
            return f"no image that is read here, but {what}"
    if content[4:8] == b"ftyp":
        return "no image that is read here, but HEIC, AVIF or a film"
    return "no image"


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # of any kind; the pixels are whole where this text is not
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image  # convert would copy it
    if image.mode.startswith("I"):  # 16 bits, by Pillow's version in 16 or 32
        greys = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((greys + 128) // 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns if it is left out
    return image.convert("RGB")


def crop_to_train(
    image: Image.Image,
    rng: np.random.Generator,
    size: int = 224,
    *,
    flip: bool = True,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> UInt8[np.ndarray, "size size 3"]:
    """A random part of an image, resized, and mirrored half of the time.

    torchvision's RandomResizedCrop and RandomHorizontalFlip: the part's share of the
    area is uniform on ``scale`` and the logarithm of its aspect ratio on that of
    ``ratio``; after ten parts that do not fit, it is the largest central one that does.

    Args:
      image: RGB.
      rng: what the part is drawn from.
      size: height and width of the result, in pixels.
      flip: whether to mirror at random.
      scale: least and largest share of the area.
      ratio: least and largest width / height.

    Example:
      >>> image = Image.new("RGB", (500, 375))
      >>> crop_to_train(image, np.random.default_rng(0)).shape
      (224, 224, 3)
    """
    left, top, width, height = _random_box(image.size, rng, scale, ratio)
    part = image.crop((left, top, left + width, top + height))
    part = part.resize((size, size), _BILINEAR)
    if flip and rng.random() < 0.5:  # by Pillow: a reversed array is slow to copy
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(part)


def _random_box(
    image_size: tuple[int, int],
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draws left, top, width and height of a part of an image."""
    image_width, image_height = image_size
    for _ in range(10):
        area = image_width * image_height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image_width and 0 < height <= image_height:
            left = rng.integers(image_width - width, endpoint=True)
            top = rng.integers(image_height - height, endpoint=True)
            return int(left), int(top), width, height
    width = min(image_width, max(1, round(image_height * ratio[1])))
    height = min(image_height, max(1, round(image_width / ratio[0])))
    return (image_width - width) // 2, (image_height - height) // 2, width, height


def crop_to_test(
    image: Image.Image, resize: int = 256, size: int = 224
) -> UInt8[np.ndarray, "size size 3"]:
    """The centre of an image whose shorter side was resized.

    torchvision's Resize and CenterCrop, with their rounding.

    Args:
      image: RGB.
      resize: the shorter side before the crop, in pixels.
      size: height and width of the result, in pixels; if larger than ``resize``, the
        image gets a black border.

    Example:
      >>> crop_to_test(Image.new("RGB", (500, 375))).shape
      (224, 224, 3)
    """
    short = min(image.size)
    width, height = (int(resize * side / short) for side in image.size)
    # Across, then down, as Pillow does within one call: the pixels are the same, but
    # columns that the crop leaves out are not resized down, which is a tenth less work.
    image = image.resize((width, image.height), _BILINEAR)
    if width > size:
        left = round((width - size) / 2)
        image = image.crop((left, 0, left + size, image.height))
    image = image.resize((image.width, height), _BILINEAR)
    if min(width, height) < size:
        across, down = max(size - width, 0), max(size - height, 0)
        border = across // 2, down // 2, (across + 1) // 2, (down + 1) // 2
        image = ImageOps.expand(image, border)
    top = round((image.height - size) / 2)
    return np.asarray(image.crop((0, top, size, top + size)))
