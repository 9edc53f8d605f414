"""Text as arrays of tokens: files, folders, or the sources of Python itself.

A token is a byte, which needs no other package, or a token of a tokenizer that the
package tokenizers reads.
"""

import hashlib
import os
import pathlib
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt

from tpp_jax.errors import TPPError, require

SUFFIXES = (".md", ".py", ".rst", ".txt")
"""Endings of the names of the files that :func:`load_text` reads in a folder."""

PYTHON = "python"
_MOST_OF_PYTHON = 4_000_000  # bytes of Python's sources, which differ by version

_Tokens = UInt[np.ndarray, " tokens"]


class Text(NamedTuple):
    """Tokens of a text, some of which are kept for evaluation.

    Attributes:
      train: Tokens to train on, of the smallest unsigned type that holds them all.
      held_out: Tokens of the evaluation.
      vocabulary: Number of tokens that exist.
      bytes_per_token: Mean number of UTF-8 bytes of a token in ``held_out``.
    """

    train: _Tokens
    held_out: _Tokens
    vocabulary: int
    bytes_per_token: float


def load_text(
    source: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    *,
    held_out: float = 0.1,
    cache: str | os.PathLike[str] | None = None,
) -> Text:
    """Reads text and splits it into tokens.

    Whole files are held out, in the order of a hash of their content, as long as they
    fit into the share. Parts of one file are about the same things in the same words,
    so that the other part of a file in training would make the evaluation too easy; for
    the same reason a file counts only once if there are copies of it. If whole files
    fill less than half of the share, because there are few, the end of each file is
    held out instead, from the end of a line on.

    Args:
      source: File of text; or folder, of which all files in it and below it are read
        whose names end in one of :data:`SUFFIXES`, without hidden ones; or
        ``"python"``, the modules of Python's standard library that are single files, in
        alphabetical order, 4 MB at most. They differ between versions of Python.
      tokenizer: File of a tokenizer, the ``tokenizer.json`` of Hugging Face; None for
        bytes. A byte 0 ends each file among bytes; a tokenizer adds the special tokens
        to each file that it is made to add.
      held_out: Share of the bytes that is held out, between 0 and 1.
      cache: Folder in which the tokens of a tokenizer are kept, so that the next call
        does not compute them again; None for none.

    Returns:
      The tokens. Equal files give equal tokens.

    Raises:
      TPPError: If there is no text, a file is not UTF-8 or there is nothing to hold
        out; if the tokenizer cannot be read or the package tokenizers is not installed;
        or if the cache cannot be written.

    Example:
      >>> import tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> for name in "abcdefghij":
      ...     _ = (folder / f"{name}.txt").write_text(9 * name)
      >>> text = load_text(folder)
      >>> len(text.train), len(text.held_out), text.train.dtype, text.vocabulary
      (90, 10, dtype('uint8'), 256)
    """
    if not 0 < held_out < 1:
        raise TPPError(f"held_out is {held_out}, but a share is between 0 and 1")
    documents = list(dict.fromkeys(_documents(source)))
    parts = _split(documents, held_out)
    if not all(map(_size, parts)):
        raise TPPError(
            f"{_said(source)} has {_size(documents)} bytes of text, too few to hold "
            f"out a share of {held_out}: give more text"
        )
    if tokenizer is None:
        train, rest = map(_as_bytes, parts)
        vocabulary = 256
    else:
        train, rest, vocabulary = _encoded(pathlib.Path(tokenizer), parts, cache)
    return Text(train, rest, vocabulary, _size(parts[1]) / len(rest))


def _said(source: str | os.PathLike[str]) -> str:
    return "Python's library" if source == PYTHON else str(source)


def _size(documents: Sequence[bytes]) -> int:
    return sum(map(len, documents))


def _documents(source: str | os.PathLike[str]) -> Iterator[bytes]:
    """Yields the contents of the files, which are UTF-8 and not empty."""
    for file in _python_files() if source == PYTHON else _files(pathlib.Path(source)):
        content = file.read_bytes()
        try:
            content.decode()
        except UnicodeDecodeError as error:
            raise TPPError(
                f"{file} is not UTF-8 text: its byte {error.start} begins no "
                "character. Convert the file, or move it out of the folder"
            ) from None
        if content:
            yield content


def _files(source: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of a source, sorted by their place in it."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise TPPError(
            f"there is no file or folder {source} to read text from; {PYTHON!r} reads "
            "the sources of Python's own library"
        )
    places = sorted(file.relative_to(source).as_posix() for file in source.rglob("*"))
    names = [
        place
        for place in places
        if place.endswith(SUFFIXES)
        and not any(part.startswith(".") for part in place.split("/"))
        and (source / place).is_file()
    ]
    if not names:
        raise TPPError(
            f"the folder {source} holds no text: no names of files in it or below it "
            f"end in {', '.join(SUFFIXES)}"
        )
    return [source / name for name in names]


def _python_files() -> Iterator[pathlib.Path]:
    """Yields modules of the standard library until they have enough bytes."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    # Without what a distribution of Python adds to the folder.
    modules = [
        file
        for file in sorted(folder.glob("*.py"))
        if file.stem in sys.stdlib_module_names
    ]
    if not modules:
        raise TPPError(
            f"Python's library is not there as source files in {folder}: name a file "
            "or a folder of text instead"
        )
    size = 0
    for file in modules:
        size += file.stat().st_size
        if size > _MOST_OF_PYTHON:
            return
        yield file


def _split(documents: Sequence[bytes], share: float) -> tuple[list[bytes], list[bytes]]:
    """Returns what is trained on and what is held out; see :func:`load_text`."""
    quota, size, chosen = share * _size(documents), 0, set()
    for document in sorted(documents, key=lambda d: hashlib.sha256(d).digest()):
        if size + len(document) <= quota:
            size += len(document)
            chosen.add(document)
    if size >= quota / 2:
        train = [document for document in documents if document not in chosen]
        return train, [document for document in documents if document in chosen]
    ends = [(d, _line_end(d, round((1 - share) * len(d)))) for d in documents]
    return [d[:end] for d, end in ends], [d[end:] for d, end in ends]


def _line_end(document: bytes, start: int) -> int:
    """Returns where the next line begins, or the next character in the last line."""
    found = document.find(b"\n", start, len(document) - 1)
    if found >= 0:
        return found + 1
    while start < len(document) and document[start] & 0xC0 == 0x80:
        start += 1
    return start


def _as_bytes(documents: Sequence[bytes]) -> _Tokens:
    return np.frombuffer(b"".join(d + b"\0" for d in documents if d), np.uint8)


def _encoded(
    file: pathlib.Path,
    parts: Sequence[Sequence[bytes]],
    cache: str | os.PathLike[str] | None,
) -> tuple[_Tokens, _Tokens, int]:
    """Returns the tokens of both parts and the size of the vocabulary."""
    require("text", "tokenizers")
    # Optional, and needed only here.
    import tokenizers  # pyright: ignore[reportMissingImports]

    try:
        content = file.read_text(encoding="utf-8")
        tokenizer = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # tokenizers raises plain exceptions
        raise TPPError(
            f"{file} is no tokenizer that the package tokenizers reads ({error}): give "
            "the tokenizer.json of a model"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    key = hashlib.sha256(f"{tokenizers.__version__}\n{content}".encode())
    for document in (d for part in (*parts, [b"held out"]) for d in part):
        key.update(len(document).to_bytes(8, "big") + document)
    kept = None if cache is None else pathlib.Path(cache) / f"{key.hexdigest()}.npz"
    found = None if kept is None else _read(kept)
    if found is None:
        dtype = np.min_scalar_type(vocabulary - 1)
        found = [_ids(tokenizer, part).astype(dtype) for part in parts]
        if kept is not None:
            _write(kept, found)
    train, rest = found
    if not (len(train) and len(rest)):
        raise TPPError(f"the tokenizer {file} makes no tokens of the text")
    return train, rest, vocabulary


def _ids(tokenizer: Any, documents: Sequence[bytes]) -> np.ndarray:
    encodings = tokenizer.encode_batch([d.decode() for d in documents if d])
    return np.concatenate([np.asarray(e.ids, np.int64) for e in encodings])


def _read(file: pathlib.Path) -> list[_Tokens] | None:
    """Returns the tokens that a file keeps; None without one that can be read."""
    try:
        with file.open("rb") as stream, np.load(stream) as arrays:
            return [arrays["train"], arrays["held_out"]]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(file: pathlib.Path, parts: Sequence[_Tokens]) -> None:
    """Keeps tokens in a file that is complete or not there."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            partial = pathlib.Path(folder) / file.name
            np.savez(partial, train=parts[0], held_out=parts[1])
            os.replace(partial, file)
    except OSError as error:
        raise TPPError(
            f"cannot keep tokens in the folder {file.parent} ({error}): name another "
            "one as the cache, or none"
        ) from None
