"""Images and labels as plain arrays, and the augmentation that a step applies to them.

`load` reads a whole small data set into memory as uint8; `augment` and `normalize` are
pure functions that the compiled training step calls. Nothing here knows of models.
"""

from tpp_jax.data.augment import augment, normalize
from tpp_jax.data.sources import Dataset, load

__all__ = ["Dataset", "augment", "load", "normalize"]
