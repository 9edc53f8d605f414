"""Class folders: each image is read once, and a warning counts ignored files."""

import os
import socket
import warnings

import numpy as np
import pytest
from PIL import Image

from tpp_jax.data import open_stream
from tpp_jax.data.folders import ClassFolders
from tpp_jax.errors import TPPError


def image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 6, 3), value, np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    """Two classes of two images, to train and to test."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for i in range(2):
                image(tmp_path / "data" / split / name / f"{i}.png", 50 * i)
    return tmp_path / "data"


def read(root):
    """The names of the training images, relative to their folder."""
    files = ClassFolders(root / "train")
    names = [os.path.relpath(files.name(i), root / "train") for i in range(len(files))]
    assert len(set(names)) == len(names)
    return names


PLAIN = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("train/cat/loop", "train/cat"),
        ("train/cat/loop", "train"),
        ("train/cat/loop", "."),
        ("train/cat/deep/loop", "train/cat"),
        ("train/cat/loop", "/"),
        ("train/loop", "train"),
        ("train/loop", "/"),
        ("train/zoo", "train/cat"),
        ("train/ant", "train/cat"),
        ("train/cat/more", "train/dog"),
        ("train/cat/itself", "train/cat/itself"),
        ("train/cat/0.jpg", "train/cat/0.jpg"),
        ("train/cat/2.png", "train/cat/0.png"),
        ("train/dog/2.png", "train/cat/0.png"),
        ("train/cat/2.png", "nowhere.png"),
    ],
)
def test_a_link_by_which_an_image_is_read_twice_is_named(root, link, target):
    (root / link).parent.mkdir(exist_ok=True)
    image(root / "train/cat/deep/9.png")
    (root / link).symlink_to(target if target == "/" else root / target)
    with pytest.raises(TPPError, match=f"{link} .*[Rr]emove") as caught:
        open_stream("folder", str(root))
    assert len(str(caught.value)) < 400


def test_two_links_to_one_image_or_folder_are_named(root, tmp_path):
    image(tmp_path / "disk" / "a.png")
    for name in ("a.png", "b.png"):
        (root / "train/cat" / name).symlink_to(tmp_path / "disk" / "a.png")
    with pytest.raises(TPPError, match=r"cat/b.png is a link to an image .*cat/a.png"):
        read(root)
    for name in ("a.png", "b.png"):
        (root / "train/cat" / name).unlink()
        (root / "train/cat" / name[0]).symlink_to(tmp_path / "disk")
    with pytest.raises(TPPError, match=r"cat/a and .*cat/b are the same folder"):
        read(root)


def test_links_to_other_folders_and_images_are_followed(root, tmp_path):
    for i in range(3):
        image(tmp_path / "disk" / "bird" / f"{i}.png")
        image(tmp_path / "disk" / "more" / f"{i}.png")
    image(tmp_path / "disk" / "single.png")
    (root / "train/bird").symlink_to(tmp_path / "disk/bird")
    (root / "train/dog/more").symlink_to(tmp_path / "disk/more")
    (root / "train/cat/single.png").symlink_to(tmp_path / "disk/single.png")
    expected = [*PLAIN, "cat/single.png"]
    expected += [
        f"{folder}/{i}.png" for folder in ("bird", "dog/more") for i in range(3)
    ]
    assert sorted(read(root)) == sorted(expected)


def test_a_split_may_be_a_link(root, tmp_path):
    (root / "train").rename(tmp_path / "elsewhere")
    (root / "train").symlink_to(tmp_path / "elsewhere")
    assert read(root) == PLAIN


def test_a_set_of_links_alone_is_read(root, tmp_path):
    """As a choice of ImageNet's classes often is."""
    (root / "train").rename(tmp_path / "all")
    for name in PLAIN:
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / name).symlink_to(tmp_path / "all" / name)
    assert read(root) == PLAIN


# Ignored files


def test_hidden_files_and_folders_are_left_out_and_counted(root):
    image(root / "train/.ipynb_checkpoints/0.png")
    image(root / "train/cat/.ipynb_checkpoints/0-checkpoint.png")
    image(root / "train/cat/.git/objects/0.png")
    (root / "train/cat/._0.jpg").write_bytes(b"\0\5\x16\7")
    (root / "train/cat/.DS_Store").write_bytes(b"")
    message = r"train: ignored 4 hidden files and folders \(.ipynb_checkpoints, "
    with pytest.warns(UserWarning, match=message):
        assert read(root) == PLAIN


def test_a_hidden_link_is_not_followed(root):
    (root / "train/cat/.loop").symlink_to(root)
    with pytest.warns(UserWarning, match=r"1 hidden files and folders \(.loop\)"):
        assert read(root) == PLAIN


def test_images_of_other_kinds_and_places_are_counted(root):
    image(root / "train/stray.png")
    image(root / "train/cat/a.gif")
    image(root / "train/cat/deep/b.GIF")
    image(root / "train/dog/c.tiff")
    message = (
        r"1 images outside of the class folders \(stray.png\), 3 images of "
        r"unsupported types \(.gif, .tiff\)"
    )
    with pytest.warns(UserWarning, match=message):
        assert read(root) == PLAIN


def test_other_files_are_no_matter(root):
    for name in ("README.txt", "cat/labels.csv", "cat/Thumbs.db", ".DS_Store"):
        (root / "train" / name).write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(root) == PLAIN


def test_a_class_of_unsupported_images_alone_is_reported(root):
    image(root / "train/emu/a.tif")
    with pytest.raises(TPPError, match="emu holds no images, but 1 of"):
        read(root)


def test_what_is_no_file_is_named(root):
    """To open a pipe would wait for ever."""
    pipe = root / "train/cat/pipe.jpg"
    os.mkfifo(pipe)
    with pytest.raises(TPPError, match=r"cat/pipe.jpg is named like an image, but is"):
        read(root)
    pipe.unlink()
    os.mkfifo(root / "train/cat/pipe")  # not read, so no matter
    assert read(root) == PLAIN
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(root / "train/cat")  # a socket's path must be short
        try:
            server.bind("s.png")
        finally:
            os.chdir(here)
        with pytest.raises(TPPError, match=r"s.png is named like an image, but is"):
            read(root)


def test_a_device_is_named(root):
    (root / "train/cat/null.png").symlink_to("/dev/zero")
    with pytest.raises(TPPError, match=r"null.png is named like an image, but is"):
        read(root)


@pytest.mark.skipif(not os.getuid(), reason="root may read everything")
def test_what_may_not_be_read_is_named(root):
    (root / "train/cat").chmod(0)
    with pytest.raises(TPPError, match=r"train/cat cannot be read .Permission"):
        read(root)
    (root / "train/cat").chmod(0o700)
    (root / "train/cat/0.png").chmod(0)
    stream = open_stream("folder", str(root), image_size=4, resize=4)
    with pytest.raises(TPPError, match=r"cat/0.png cannot be read .Permission"):
        list(stream.train_batches(4, seed=0))


def test_a_folder_that_cannot_be_listed_is_named(root, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(TPPError, match=r"train/cat cannot be read .Permission denied"):
        read(root)


@pytest.mark.parametrize("other", ["Dog", "DOG", "dog", "do\u0308g"])
def test_classes_that_differ_only_in_how_they_are_written_are_told(root, other):
    (root / "train/dog").rename(root / "train/d\u00f6g")
    (root / "val/dog").rename(root / "val" / other)
    with pytest.raises(TPPError, match="do not have the same classes") as caught:
        open_stream("folder", str(root))
    alike = "differ only in case or in the encoding of an accent" in str(caught.value)
    assert alike == (other == "do\u0308g")


def test_classes_that_differ_only_in_capitals_are_told(root):
    (root / "val/dog").rename(root / "val/Dog")
    with pytest.raises(TPPError, match="only one of them has Dog, dog; some differ"):
        open_stream("folder", str(root))
