"""From JPEG bytes to the same pixels as torchvision's transforms give, by Pillow.

Networks trained in PyTorch reach the same accuracy here only if their images are
resized with the same filter and cropped at the same pixel. The two pipelines of
ImageNet are: a random crop, resized and mirrored, for training; resize and centre crop
for testing.
"""

import io
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

DAMAGED = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""Exceptions that Pillow raises for files that are damaged or not images."""

_BILINEAR = Image.Resampling.BILINEAR  # Pillow's is antialiased


_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
"""Formats that Pillow may open. It knows many more, some through external programs."""

# Other types of content by their first bytes, for a message.
_OTHERS = {
    b"GIF8": "a GIF",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"%PDF": "a PDF",
    b"%!PS": "PostScript",
    b"<": "text (a web page or SVG)",
    b"\0\0\1\0": "an icon",
}

# Transformation that puts an image upright, by its orientation in EXIF.
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

    Greyscale, palette and CMYK images, of which ImageNet has some, are converted; greys
    of 16 bits are scaled to 8. Transparency is discarded, as in torchvision: a pixel
    keeps its colour. An image whose EXIF orientation is not upright is rotated or
    mirrored accordingly, which torchvision leaves to the user.

    Args:
      content: Content of the file.

    Raises:
      One of `DAMAGED`: If the content is not such an image, or is truncated.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError as error:  # its message names the BytesIO
        raise OSError(f"its content is {_described(content)}") from error
    upright = _UPRIGHT.get(_orientation(image))
    image = _to_rgb(image)
    return image if upright is None else image.transpose(upright)


def _described(content: bytes) -> str:
    for start, description in _OTHERS.items():
        if content.startswith(start):
            return f"not a supported image, but {description}"
    if content[4:8] == b"ftyp":
        return "not a supported image, but HEIC, AVIF or a video"
    return "not an image"


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # of any type: damaged EXIF data says nothing about the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image  # convert would copy it
    if image.mode.startswith("I"):  # 16 bits, which some versions of Pillow widen to 32
        greys = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((greys + 128) // 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns without this step
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
    """Returns a random part of an image, resized, and mirrored half of the time.

    The same as torchvision's RandomResizedCrop and RandomHorizontalFlip: the part's
    share of the area is uniform on ``scale`` and the logarithm of its aspect ratio on
    that of ``ratio``. After ten draws that do not fit, the largest central part with an
    aspect ratio in ``ratio`` is taken.

    Args:
      image: Image in RGB.
      rng: Random generator.
      size: Height and width of the result, in pixels.
      flip: Whether to mirror at random.
      scale: Smallest and largest share of the area.
      ratio: Smallest and largest width / height.

    Example:
      >>> image = Image.new("RGB", (500, 375))
      >>> crop_to_train(image, np.random.default_rng(0)).shape
      (224, 224, 3)
    """
    left, top, width, height = _random_box(image.size, rng, scale, ratio)
    part = image.crop((left, top, left + width, top + height))
    part = part.resize((size, size), _BILINEAR)
    if flip and rng.random() < 0.5:  # Pillow mirrors, as reversed arrays copy slowly
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
    """Resizes an image and returns its centre.

    The same as torchvision's Resize and CenterCrop, including the rounding.

    Args:
      image: Image in RGB.
      resize: Length of the shorter side before the crop, in pixels.
      size: Height and width of the result, in pixels; if larger than ``resize``, the
        image gets a black border.

    Example:
      >>> crop_to_test(Image.new("RGB", (500, 375))).shape
      (224, 224, 3)
    """
    short = min(image.size)
    width, height = (int(resize * side / short) for side in image.size)
    # First the width, then the height, as Pillow does within one call: the pixels are
    # the same, but cropped columns are not resized again, which saves a tenth.
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
