"""Images and labels as plain arrays, their augmentation, and text as tokens.

`load` reads a small data set into memory as uint8, `open_stream` decodes a large one
batch by batch; `augment`, `mix` and `normalize` are pure functions that the compiled
training step calls. `load_text` reads text as tokens. The package does not depend on
models.
"""

from tpp_jax.data.arrays import from_arrays, read_arrays
from tpp_jax.data.augment import augment, normalize
from tpp_jax.data.mixing import mix
from tpp_jax.data.sources import Dataset, load
from tpp_jax.data.streams import STREAMED, Stream, open_stream
from tpp_jax.data.text import Text, load_text

__all__ = [
    "STREAMED",
    "Dataset",
    "Stream",
    "Text",
    "augment",
    "from_arrays",
    "load",
    "load_text",
    "mix",
    "normalize",
    "open_stream",
    "read_arrays",
]
