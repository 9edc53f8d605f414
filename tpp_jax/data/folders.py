"""Class folders: the image files of a folder for each class, each of them once.

Links to files and folders are followed, as long as no image is reached twice. What is
left out (hidden files, other kinds of images) is counted in a warning.
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
# Endings of images that are not read, so that leaving them out is worth a word.
_OTHER_ENDINGS = {
    *(".gif", ".tif", ".tiff", ".jfif", ".jpe", ".jp2", ".heic", ".heif", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".tga", ".ico", ".svg", ".dcm", ".npy"),
}
_TRAIN, _TEST = ("train",), ("val", "validation", "test")
_SHOWN = 3  # examples in a message

_Identity = tuple[int, int]  # device and number of a folder or file


class ClassFolders:
    """The files of a folder of classes, in the order of their names."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Searches the folder.

        Raises:
          TPPError: there are no classes, one has no images, an image would be read
            twice by a link, or a folder cannot be read.
        """
        self._folder = folder
        left = _LeftOut()
        self.classes = []
        for entry in _entries(folder):
            if _is_hidden(entry, left):
                continue
            if _is_folder(entry):
                self.classes.append(entry.name)
            elif _ending(entry.name) in ENDINGS:
                left.outside.append(entry.name)
        search = _Search(folder, left)
        names: list[bytes] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            before = left.others.total()
            found = sorted(search.images(name))
            if not found:
                others = left.others.total() - before
                but = f" that are read, but {others} of other kinds" if others else ""
                raise TPPError(f"the class folder {folder / name} holds no images{but}")
            names += map(os.fsencode, found)
            labels += [label] * len(found)
        if not labels:
            raise TPPError(
                f"{folder} holds no folders: it needs one for each class, with images"
            )
        search.check_links(map(os.fsdecode, names))
        if said := left.said():
            warnings.warn(f"{folder}: left out {said}", stacklevel=4)
        # As an array: ImageNet's names take 40 MB in each process, in a list 100 MB.
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

    Raises:
      TPPError: it does not hold the same classes to train and to test.
    """
    if not data_dir:
        raise TPPError(
            "data set 'folder' needs to know where: give the folder that holds train/ "
            "and val/ by --config.data.dir"
        )
    root = pathlib.Path(data_dir).expanduser()
    train, test = (_split_folder(root, names) for names in (_TRAIN, _TEST))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        alike = [_plain(name) for name in odd]
        hint = ""
        if len(set(alike)) < len(alike):
            hint = "; some differ only in capitals or in how an accent is written"
        raise TPPError(
            f"train and val of {root} do not have the same classes: "
            f"{', '.join(odd[:5])}{' and more' if len(odd) > 5 else ''} in one only"
            f"{hint}"
        )
    return train, test, len(train.classes)


def _plain(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _split_folder(root: pathlib.Path, names: Sequence[str]) -> ClassFolders:
    for name in names:
        if (root / name).is_dir():
            return ClassFolders(root / name)
    raise TPPError(
        f"there is no folder {root / names[0]}: --config.data.dir must hold train/ and "
        "val/, each with a folder of images for every class"
    )


@dataclasses.dataclass
class _LeftOut:
    """What is there and is not read.

    Attributes:
      hidden: names of hidden folders and images.
      outside: names of images that lie in no class folder.
      others: number of images of other kinds, by ending.
    """

    hidden: list[str] = dataclasses.field(default_factory=list)
    outside: list[str] = dataclasses.field(default_factory=list)
    others: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def said(self) -> str:
        parts = [
            (len(self.hidden), "hidden files and folders", self.hidden),
            (len(self.outside), "images outside of the class folders", self.outside),
            (self.others.total(), "images of kinds that are not read", self.others),
        ]
        return ", ".join(
            f"{count} {what} ({_some(names)})" for count, what, names in parts if count
        )


def _some(names: Sequence[str] | collections.Counter) -> str:
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:_SHOWN]) + (", …" if len(unique) > _SHOWN else "")


class _Search:
    """A search for images under one folder that comes to no folder twice."""

    def __init__(self, root: pathlib.Path, left: _LeftOut) -> None:
        self._root, self._left = root, left
        # A link to the folder itself or to one that it is in would lead here again.
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
                if _is_hidden(entry, self._left):
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
                            f"{self._root / path} is named like an image and is no "
                            "file (a pipe, a socket or a device): remove it"
                        )
                    yield path
                elif ending in _OTHER_ENDINGS:
                    self._left.others[ending] += 1

    def _enter(self, folder: str) -> None:
        path = self._root / folder
        identity = _identity(path)
        if identity in self._above:
            raise TPPError(
                f"{path} is a link that leads back to {self._above[identity]}: its "
                "images would be read again and again. Remove the link"
            )
        first = self._seen.setdefault(identity, folder)
        if first != folder:
            raise TPPError(
                f"{path} and {self._root / first} are one folder, by a link: its "
                "images would be read twice. Remove the link"
            )

    def check_links(self, names: Iterator[str]) -> None:
        """Checks that no link leads to a file that is read by another name too.

        Raises:
          TPPError: one does.
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
                    f"{self._root / link} is a link to an image that is read as "
                    f"{first[identity]} too. Remove the link"
                )
            first[identity] = link


def _entries(folder: pathlib.Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise TPPError(f"{folder} cannot be read ({error.strerror})") from error


def _is_hidden(entry: os.DirEntry[str], left: _LeftOut) -> bool:
    if not entry.name.startswith("."):
        return False
    if _ending(entry.name) in ENDINGS or _is_folder(entry):
        left.hidden.append(entry.name)
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
