"""Class folders: the image files of one folder for each class, each of them once.

Links to files and folders are followed, as long as no image is reached twice. A warning
counts the files that are ignored (hidden files, unsupported image formats).
"""

import collections
import dataclasses
import os
import pathlib
import unicodedata
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from tpp_jax.errors import TPPError

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
# Endings of images that are not read, which a warning mentions.
_OTHER_ENDINGS = {
    *(".gif", ".tif", ".tiff", ".jfif", ".jpe", ".jp2", ".heic", ".heif", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".tga", ".ico", ".svg", ".dcm", ".npy"),
}
_TRAIN, _TEST = ("train",), ("val", "validation", "test")
_SHOWN = 3  # number of examples in a message

_Identity = tuple[int, int]  # device and number of a folder or file


class ClassFolders:
    """The image files of a folder of classes, in the order of their names."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Searches the folder.

        Args:
          folder: Folder that holds one folder per class.

        Raises:
          TPPError: If there are no classes, a class has no images, a link leads to an
            image that is also read elsewhere, or a folder cannot be read.
        """
        self._folder = folder
        ignored = _Ignored()
        self.classes = []
        for entry in _entries(folder):
            if _is_hidden(entry, ignored):
                continue
            if _is_folder(entry):
                self.classes.append(entry.name)
            elif _ending(entry.name) in ENDINGS:
                ignored.outside.append(entry.name)
        search = _Search(folder, ignored)
        names: list[bytes] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            before = ignored.others.total()
            found = sorted(search.images(name))
            if not found:
                others = ignored.others.total() - before
                hint = f", but {others} of unsupported types" if others else ""
                raise TPPError(
                    f"the class folder {folder / name} holds no images{hint}"
                )
            names += map(os.fsencode, found)
            labels += [label] * len(found)
        if not labels:
            raise TPPError(
                f"{folder} holds no folders: it needs one for each class, with images"
            )
        search.check_links(map(os.fsdecode, names))
        if summary := ignored.summary():
            warnings.warn(f"{folder}: ignored {summary}", stacklevel=4)
        # ImageNet's names take 40 MB in each process as an array, 100 MB as a list.
        self._names, self._labels = np.asarray(names), np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        return pathlib.Path(self.name(i)).read_bytes(), int(self._labels[i])

    def name(self, i: int) -> str:
        """Returns the path of a file."""
        return str(self._folder / os.fsdecode(self._names[i].item()))


def open_folders(data_dir: str | None) -> tuple[ClassFolders, ClassFolders, int]:
    """Returns the training and the test files in a folder, and the number of classes.

    Args:
      data_dir: Folder that holds ``train`` and ``val`` (or ``validation`` or ``test``).

    Raises:
      TPPError: If the classes for training and testing are not the same.
    """
    if not data_dir:
        raise TPPError(
            "data set 'folder' needs data_dir: the folder that holds train/ and val/"
        )
    root = pathlib.Path(data_dir).expanduser()
    train, test = (_split_folder(root, names) for names in (_TRAIN, _TEST))
    if train.classes != test.classes:
        unpaired = sorted(set(train.classes) ^ set(test.classes))
        plain = [_plain(name) for name in unpaired]
        hint = ""
        if len(set(plain)) < len(plain):
            hint = "; some differ only in case or in the encoding of an accent"
        more = " and more" if len(unpaired) > 5 else ""
        raise TPPError(
            f"train and val of {root} do not have the same classes: only one of them "
            f"has {', '.join(unpaired[:5])}{more}{hint}"
        )
    return train, test, len(train.classes)


def _plain(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _split_folder(root: pathlib.Path, names: Sequence[str]) -> ClassFolders:
    for name in names:
        if (root / name).is_dir():
            return ClassFolders(root / name)
    raise TPPError(
        f"there is no folder {root / names[0]}: data_dir must hold train/ and "
        "val/, each with a folder of images for every class"
    )


@dataclasses.dataclass
class _Ignored:
    """Files that exist and are not read.

    Attributes:
      hidden: Names of hidden folders and images.
      outside: Names of images outside of the class folders.
      others: Number of images of unsupported types, by ending.
    """

    hidden: list[str] = dataclasses.field(default_factory=list)
    outside: list[str] = dataclasses.field(default_factory=list)
    others: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def summary(self) -> str:
        counts = [
            (len(self.hidden), "hidden files and folders", self.hidden),
            (len(self.outside), "images outside of the class folders", self.outside),
            (self.others.total(), "images of unsupported types", self.others),
        ]
        return ", ".join(
            f"{count} {noun} ({_some(names)})" for count, noun, names in counts if count
        )


def _some(names: Sequence[str] | collections.Counter) -> str:
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:_SHOWN]) + (", …" if len(unique) > _SHOWN else "")


class _Search:
    """A search for images under one folder that enters no folder twice."""

    def __init__(self, root: pathlib.Path, ignored: _Ignored) -> None:
        self._root, self._ignored = root, ignored
        # A link to this folder or to one that contains it would be followed endlessly.
        above = root.resolve()
        self._above = {_identity(path): path for path in (above, *above.parents)}
        self._seen: dict[_Identity, str] = {}
        self._links: dict[str, _Identity] = {}

    def images(self, name: str) -> Iterator[str]:
        """Yields the images in a class folder and the folders in it, as paths."""
        folders = [name]
        while folders:
            folder = folders.pop()
            self._enter(folder)
            for entry in _entries(self._root / folder):
                if _is_hidden(entry, self._ignored):
                    continue
                path = os.path.join(folder, entry.name)
                ending = _ending(entry.name)
                if _is_folder(entry):
                    folders.append(path)
                elif ending in ENDINGS:
                    if entry.is_symlink():
                        self._links[path] = _identity(self._root / path)
                    if not entry.is_file():
                        raise TPPError(
                            f"{self._root / path} is named like an image, but is not a "
                            "file (a pipe, a socket or a device): remove it"
                        )
                    yield path
                elif ending in _OTHER_ENDINGS:
                    self._ignored.others[ending] += 1

    def _enter(self, folder: str) -> None:
        path = self._root / folder
        identity = _identity(path)
        if identity in self._above:
            raise TPPError(
                f"{path} is a link that leads back to {self._above[identity]}: its "
                "images would be read endlessly. Remove the link"
            )
        first = self._seen.setdefault(identity, folder)
        if first != folder:
            raise TPPError(
                f"{path} and {self._root / first} are the same folder, through a link: "
                "its images would be read twice. Remove the link"
            )

    def check_links(self, names: Iterator[str]) -> None:
        """Checks that no link leads to a file that is also read by another name.

        Args:
          names: Paths of all images.

        Raises:
          TPPError: If a link does.
        """
        if not self._links:
            return
        first: dict[_Identity, str] = {}
        for name in names:
            if name not in self._links:
                first[_identity(self._root / name)] = name
        for link, identity in self._links.items():
            if identity in first:
                raise TPPError(
                    f"{self._root / link} is a link to an image that is also read as "
                    f"{first[identity]}. Remove the link"
                )
            first[identity] = link


def _entries(folder: pathlib.Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise TPPError(f"{folder} cannot be read ({error.strerror})") from error


def _is_hidden(entry: os.DirEntry[str], ignored: _Ignored) -> bool:
    if not entry.name.startswith("."):
        return False
    if _ending(entry.name) in ENDINGS or _is_folder(entry):
        ignored.hidden.append(entry.name)
    return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        raise TPPError(
            f"{entry.path} cannot be followed ({error.strerror}): remove that link"
        ) from error


def _identity(path: pathlib.Path) -> _Identity:
    try:
        status = path.stat()
    except OSError as error:
        raise TPPError(
            f"{path} is a link that leads nowhere ({error.strerror}): remove it"
            if path.is_symlink()
            else f"{path} cannot be read ({error.strerror})"
        ) from error
    return status.st_dev, status.st_ino


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()
