"""Downloads and prepares TFDS data sets in the format that `tpp_jax.data.load` reads.

    pip install 'tpp_jax[prepare]'
    python -m tpp_jax.data.prepare cifar10 mnist --data_dir=~/tensorflow_datasets

Only this file needs TensorFlow, which TFDS uses to encode images. TFDS's own command
`tfds build` would do the same, but needs Apache Beam even for data sets without it.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

from tpp_jax.data.sources import NAMES
from tpp_jax.errors import TPPError, require

IMAGENET_FILES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
"""Files of ImageNet that must be downloaded manually, after registering."""


def prepare(name: str, data_dir: str | None = None) -> str:
    """Downloads a data set and writes it as array_record files, unless it exists.

    Args:
      name: Name of the data set: one of `tpp_jax.data.sources.NAMES` other than
        ``digits``, or ``imagenet2012``.
      data_dir: Folder to write to, or None for TFDS's default.

    Returns:
      The folder that holds the prepared data set.

    Raises:
      TPPError: If the name is unknown, TensorFlow is missing, the folder holds the data
        set in another format, the download fails, or ImageNet's files are missing.
    """
    choices = [known for known in NAMES if known != "digits"] + ["imagenet2012"]
    if name not in choices:
        raise TPPError(
            f"{name!r} cannot be prepared. Choose from: {', '.join(choices)}; digits "
            "needs no preparation."
        )
    require("prepare", "tensorflow", "importlib_resources", "tensorflow_datasets")
    import tensorflow_datasets as tfds

    data_dir = os.path.expanduser(data_dir) if data_dir else None
    present = tfds.builder(name, data_dir=data_dir)
    if present.info.splits:
        formats = sorted(f.value for f in present.info.available_file_formats())
        if "array_record" not in formats:
            raise TPPError(
                f"{present.data_dir} holds {name} as {', '.join(formats)}. Choose "
                "another --data_dir, or delete that folder first."
            )
        return str(present.data_dir)
    if name == "imagenet2012":
        _check_imagenet_files(pathlib.Path(present.data_dir).parents[1])
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    try:
        builder.download_and_prepare()
    except OSError as error:  # raised for network failures and full disks
        raise TPPError(
            f"{name} could not be downloaded or written to "
            f"{data_dir or builder.data_dir}"
            f" ({error}). Check the network and the disk, then run the command again."
        ) from error
    return str(builder.data_dir)


def _check_imagenet_files(data_dir: pathlib.Path) -> None:
    """Raises if a file is missing, since TFDS would omit its split without an error."""
    folder = data_dir / "downloads" / "manual"
    if missing := [file for file in IMAGENET_FILES if not (folder / file).exists()]:
        raise TPPError(
            f"imagenet2012 is not free to download: register at image-net.org, and put "
            f"{' and '.join(missing)} into {folder}. Then run the command again."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: Command-line arguments; None for those of the process.

    Returns:
      The exit status: 0, or 1 if an error was printed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tpp_jax.data.prepare",
        description="Downloads TFDS data sets and prepares them for tpp_jax.",
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="such as cifar10")
    parser.add_argument("--data_dir", help="default: ~/tensorflow_datasets")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow loads
    try:
        for name in options.names:
            print(f"{name} is ready in {prepare(name, options.data_dir)}")
    except TPPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
