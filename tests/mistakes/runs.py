"""What all mistakes share: their types, and a run that ends in one."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from tests.experiment.test_errors import small_config
from tpp_jax.experiment import run

Make = Callable[[pathlib.Path], Any]
Cases = Iterator[tuple[str, Make]]
"""Title of each mistake, and a function of an empty folder that makes it."""


def train(folder: pathlib.Path, **fields: Any) -> Any:
    """Trains a small network by a config with some fields changed."""
    return run.train(small_config(**fields), folder / "run")
