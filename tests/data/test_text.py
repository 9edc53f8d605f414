"""Text becomes tokens, some of which are held out."""

import pathlib

import numpy as np
import pytest

from tpp_jax.data import text as texts
from tpp_jax.data.text import load_text

ROOT = pathlib.Path(__file__).parents[2]


def folder_of(folder, documents):
    """Writes a folder of text files, every other one in a folder below it."""
    for i, document in enumerate(documents):
        place = folder / (f"part/{i:02}.md" if i % 2 else f"{i:02}.txt")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(document.encode())
    return folder


def documents_in(tokens):
    *documents, end = tokens.tobytes().split(b"\0")
    assert not end
    return [document.decode() for document in documents]


LONG = [f"{i}: " + "äö\n" * (20 + i) for i in range(20)]


def test_whole_files_are_held_out_each_of_them_once(tmp_path):
    folder = folder_of(tmp_path, [*LONG, LONG[3], ""])
    (tmp_path / "picture.png").write_bytes(b"\xff\xff")
    (tmp_path / ".hidden.txt").write_text("secret")
    found = load_text(folder, held_out=0.2)
    train, rest = documents_in(found.train), documents_in(found.held_out)
    assert sorted(train + rest) == sorted(LONG)
    share = len(found.held_out) / (len(found.held_out) + len(found.train))
    assert 0.1 <= share <= 0.21
    assert found.train.dtype == np.uint8 and found.vocabulary == 256
    # Not the place of a file decides, but its content.
    (folder / "00.txt").rename(folder / "zz.rst")
    again = documents_in(load_text(folder, held_out=0.2).held_out)
    assert sorted(again) == sorted(rest)


@pytest.mark.parametrize("document", ["ab\n" * 100, "ä" * 100, "a" * 99 + "€"])
def test_of_a_single_file_the_end_is_held_out_after_a_line_or_a_character(
    tmp_path, document
):
    file = tmp_path / "text"
    file.write_bytes(document.encode())
    found = load_text(file, held_out=0.25)
    [train], [rest] = documents_in(found.train), documents_in(found.held_out)
    assert train + rest == document
    assert "\n" not in document or train.endswith("\n")
    share = len(rest.encode()) / len(document.encode())
    assert 0.2 < share <= 0.26
    assert found.bytes_per_token == pytest.approx(1, rel=0.05)


def test_a_tokenizer_encodes_everything_and_its_tokens_are_kept(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(LONG, tokenizers.trainers.BpeTrainer(vocab_size=300))
    made.enable_truncation(5)  # a setting for classifiers, which would lose text
    made.save(str(tmp_path / "tokenizer.json"))
    folder, cache = folder_of(tmp_path / "texts", LONG), tmp_path / "cache"

    def loaded():
        return load_text(folder, tmp_path / "tokenizer.json", cache=cache)

    first = loaded()
    by_bytes = load_text(folder)
    for ids, raw in zip(first[:2], by_bytes[:2], strict=True):
        assert made.decode(ids.tolist()) == "".join(documents_in(raw))
    assert first.vocabulary == made.get_vocab_size()
    assert first.train.dtype == (np.uint8 if first.vocabulary <= 256 else np.uint16)
    n_bytes = len("".join(documents_in(by_bytes.held_out)).encode())
    assert first.bytes_per_token == pytest.approx(n_bytes / len(first.held_out))
    with monkeypatch.context() as patch:
        patch.setattr(texts, "_ids", None)  # nothing is encoded the second time
        again = loaded()
    [kept] = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    for other in (again, loaded()):
        np.testing.assert_array_equal(other.train, first.train)
        np.testing.assert_array_equal(other.held_out, first.held_out)
    (folder / "00.txt").write_text("changed")
    assert len(loaded().train) + len(loaded().held_out) < len(first.train) + len(
        first.held_out
    )
    assert len(list(cache.iterdir())) == 2


def test_python_itself_is_a_text():
    found = load_text("python")
    train, rest = documents_in(found.train), documents_in(found.held_out)
    assert 1e6 < len(found.train) + len(found.held_out) < 4.1e6
    assert len(train) > 50 and len(rest) > 3
    assert any("class Fraction" in document for document in train + rest)
    assert 0.05 < len(found.held_out) / len(found.train) < 0.12


def test_python_may_lack_its_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(texts.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(texts.TPPError, match="name a file or a folder of text"):
        load_text("python")
