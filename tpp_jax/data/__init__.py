"""Images and labels as plain arrays, and the augmentation that a step applies to them.

`load` reads a small data set into memory as uint8, `open_stream` decodes a large one
batch by batch; `augment`, `mix` and `normalize` are pure functions that the compiled
training step calls. The package does not depend on models.
"""

from tpp_jax.data.arrays import from_arrays, labelled_images, read_arrays
from tpp_jax.data.augment import augment, normalize
from tpp_jax.data.mixing import mix
from tpp_jax.data.sources import Dataset, load
from tpp_jax.data.streams import STREAMED, Stream, open_stream

__all__ = [
    "STREAMED",
    "Dataset",
    "Stream",
    "augment",
    "from_arrays",
    "labelled_images",
    "load",
    "mix",
    "normalize",
    "open_stream",
    "read_arrays",
]
