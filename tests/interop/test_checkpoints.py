"""Checkpoints in several files, with several sets of weights, or of another kind."""

import json
import struct
import warnings

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from tests.interop.test_torch_files import Call, Reference, pickled, tensor, write_zip
from tpp_jax.errors import TPPError
from tpp_jax.interop.names import shown
from tpp_jax.interop.torch_files import read_torch, tensors_in
from tpp_jax.interop.torch_weights import load_torch

WEIGHTS = {
    "first.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "first.bias": np.ones(2, np.float32),
    "last.weight": np.arange(4, dtype=np.float32).reshape(2, 2),
    "last.bias": np.zeros(2, np.float32),
}


def net():
    rngs = nnx.Rngs(0)
    return nnx.Dict(first=nnx.Linear(3, 2, rngs=rngs), last=nnx.Linear(2, 2, rngs=rngs))


def sharded(folder, change=lambda index: None):
    """Two shards and their index."""
    names = {
        name: f"model-0000{1 + (i > 1)}-of-00002.safetensors"
        for i, name in enumerate(WEIGHTS)
    }
    for shard in set(names.values()):
        part = {n: x for n, x in WEIGHTS.items() if names[n] == shard}
        save_file(part, folder / shard)
    index = {"metadata": {"total_size": 64}, "weight_map": names}
    change(index)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2))
    return path


def test_an_index_gives_the_tensors_of_all_its_files(tmp_path):
    found = read_torch(sharded(tmp_path))
    assert found.keys() == WEIGHTS.keys()
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(found[name], array)
    loaded = load_torch(sharded(tmp_path), net())
    np.testing.assert_array_equal(loaded.last.kernel[...], WEIGHTS["last.weight"].T)


def test_shards_may_be_pickles_and_links(tmp_path):
    write_zip(tmp_path / "blob", {"w": tensor()})
    (tmp_path / "pytorch_model-1.bin").symlink_to(tmp_path / "blob")
    index = {"weight_map": {"w": "pytorch_model-1.bin"}}
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text(json.dumps(index))
    np.testing.assert_array_equal(read_torch(path)["w"], np.arange(4))


def test_of_a_tensor_in_two_shards_the_index_says_which(tmp_path):
    def swap(index):
        names = index["weight_map"]
        names["first.bias"] = names["last.bias"]

    path = sharded(tmp_path, swap)
    other = WEIGHTS["first.bias"] + 5
    last = {n: x for n, x in WEIGHTS.items() if n.startswith("last")}
    save_file(
        last | {"first.bias": other}, tmp_path / "model-00002-of-00002.safetensors"
    )
    np.testing.assert_array_equal(read_torch(path)["first.bias"], other)


def test_a_shard_that_is_missing_or_lacks_a_tensor_is_named(tmp_path):
    path = sharded(tmp_path, lambda index: index["weight_map"].update(gone="x.bin"))
    message = r"index of a checkpoint in 3 files, but x.bin is not in its folder"
    with pytest.raises(TPPError, match=message):
        read_torch(path)
    shard = "model-00001-of-00002.safetensors"
    path = sharded(tmp_path, lambda index: index["weight_map"].update(gone=shard))
    with pytest.raises(TPPError, match=f"says that gone is in {shard}, which does not"):
        read_torch(path)
    (tmp_path / shard).write_bytes(b"garbage")
    with pytest.raises(TPPError, match=f"{shard} is damaged"):
        read_torch(path)


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.safetensors", "/etc/passwd", "sub/w.safetensors", "", "..", "."),
        *("..\\secret.bin", "C:w.bin", "w\0.bin", 3, None, ["w.bin"]),
    ],
)
def test_a_shard_outside_of_the_folder_is_refused(tmp_path, name):
    save_file({"w": np.ones(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    path = sharded(folder, lambda index: index["weight_map"].update(w=name))
    with pytest.raises(TPPError, match="which is not a file in its folder"):
        read_torch(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "llama"}', "is JSON, but neither weights nor an index"),
        ('{"weight_map": {}}', "is JSON, but neither weights nor an index"),
        ('{"weight_map": ', "is damaged JSON"),
    ],
)
def test_other_json_is_told(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TPPError, match=message):
        read_torch(tmp_path / "config.json")


# Several sets of weights


def scaled(factor):
    return {name: factor * array for name, array in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("keys", "taken"),
    [
        (("model_ema", "model"), "model"),
        (("state_dict_ema", "state_dict"), "state_dict"),
        (("model", "state_dict"), "state_dict"),
        (("net", "ema", "teacher"), "net"),
    ],
)
def test_of_several_sets_one_is_taken_and_said(keys, taken):
    saved = {key: scaled(i + 1) for i, key in enumerate(keys)} | {"epoch": 3}
    other = next(key for key in keys if key != taken)
    message = f"several sets of weights: {taken} is taken, and not {other}"
    with pytest.warns(UserWarning, match=message):
        found = tensors_in(saved)
    np.testing.assert_array_equal(found["first.bias"], saved[taken]["first.bias"])
    found = tensors_in(saved, other)
    np.testing.assert_array_equal(found["first.bias"], saved[other]["first.bias"])


def test_one_set_under_two_names_or_an_optimizer_is_no_matter():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors_in({"model": WEIGHTS, "best": WEIGHTS})
        state = {0: {"momentum_buffer": np.ones(3)}}
        tensors_in({"model": WEIGHTS, "optimizer": {"state": state, "groups": [1]}})


def test_a_file_says_so_too_and_the_other_can_be_picked(tmp_path):
    ema = tensor((2,), offset=2)
    path = write_zip(tmp_path / "c.pth", {"model": {"w": tensor()}, "ema": {"w": ema}})
    with pytest.warns(UserWarning, match=r"read_torch\(file, key='ema'\)"):
        np.testing.assert_array_equal(read_torch(path)["w"], np.arange(4))
    np.testing.assert_array_equal(read_torch(path, key="ema")["w"], [2, 3])
    with pytest.raises(TPPError, match=r"c.pth: .* no weights under the key 'x'"):
        read_torch(path, key="x")


def test_a_checkpoint_that_holds_itself_is_refused():
    saved = {}
    saved["model"] = saved
    with pytest.raises(TPPError, match="the checkpoint in it contains itself"):
        tensors_in(saved)


# What is not read


QUANTISED = Reference("torch/QInt8Storage", "0", "cpu", 4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"w": Call("torch._utils/_rebuild_qtensor", 1)}, "w is quantised: save the"),
        (
            {"w": tensor(storage=QUANTISED)},
            "numbers of type QInt8, so it is quantised: save",
        ),
        (
            {"fc._packed_params._packed_params": (tensor(), None)},
            "belongs to a quantised layer, whose numbers are packed",
        ),
        ({"w": Call("torch._utils/_rebuild_sparse_tensor", 1)}, "w is sparse: call"),
        (
            {"w": Call("torch._utils/_rebuild_meta_tensor_no_storage", 1)},
            "w is on PyTorch's meta device, without numbers",
        ),
        (
            {
                "w": Call(
                    "torch._utils/_rebuild_parameter",
                    Call("torch._utils/_rebuild_qtensor", 1),
                )
            },
            "a tensor is quantised",
        ),
    ],
)
def test_tensors_of_other_kinds_say_what_to_do(tmp_path, value, message):
    with pytest.raises(TPPError, match=f"w.pth: .*{message}"):
        read_torch(write_zip(tmp_path / "w.pth", value))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"constants.pkl": b"", "code/x.py": b""}, "TorchScript program: save its"),
        ({"archive_format": b"pt2"}, "a program that torch.export wrote"),
        ({"w.npy": b""}, "an archive of NumPy"),
        ({"model.weights.h5": b""}, "a model of Keras"),
    ],
)
def test_archives_of_other_kinds_are_told(tmp_path, entries, message):
    with pytest.raises(TPPError, match=message):
        read_torch(write_zip(tmp_path / "w.pt", {"w": tensor()}, **entries))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"GGUF\3", "a GGUF file"),
        (b"\x1f\x8b\x08", "compressed by gzip: unpack it"),
        (b"\x93NUMPY", "an array of NumPy"),
    ],
)
def test_files_of_other_kinds_are_told(tmp_path, start, message):
    (tmp_path / "w.pth").write_bytes(start + bytes(100))
    with pytest.raises(TPPError, match=message):
        read_torch(tmp_path / "w.pth")


# Names that nobody should print


ODD = "\x1b]0;title\x07\x1b[2J\u202e\x9b31m\r\nname\ud800"


def test_what_is_shown_is_one_line_of_bounded_length():
    assert shown("layer1.0.conv1.weight") == "layer1.0.conv1.weight"
    assert shown("ä ö 卷积") == "ä ö 卷积"
    assert shown(ODD).isprintable()
    assert shown(ODD).startswith(r"\x1b]0;title\x07\x1b[2J\u202e\x9b31m\r\nname\ud800")
    assert len(shown("a" * 10**7)) == len(shown("\0" * 10**7)) == 81
    assert shown(3) == "3"


def odd_safetensors(name, dtype="F32"):
    header = {name: {"dtype": dtype, "shape": [4], "data_offsets": [0, 16]}}
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(16)


def named(path, name):
    """Files in which a name is in all the places where one can be."""
    name = name.replace("\ud800", "")
    text = name.replace("\n", "")
    yield odd_safetensors(name)
    yield odd_safetensors("w", dtype=name)
    yield odd_safetensors(name, dtype="F4")
    for value in (
        {name: tensor()},
        {name: 3},
        {name: Call("torch._utils/_rebuild_qtensor", 1)},
        {"w": Call(f"{text}/call", 1)},
        {"w": tensor(storage=Reference(f"torch/{text}", "0", "cpu", 4))},
        {"w": tensor(storage=Reference("torch/FloatStorage", name, "cpu", 4))},
        Call(f"{text}/call", 1),
    ):
        write_zip(path, value)
        yield path.read_bytes()
    yield pickled({name: 3})
    yield b"F" + text.encode() + b"\n."
    yield json.dumps({"weight_map": {name: "w.bin"}}).encode()
    yield json.dumps({"weight_map": {"w": name}}).encode()


@pytest.mark.parametrize("name", [ODD, ODD * 10_000])
def test_no_name_of_a_file_reaches_the_terminal_as_it_is(tmp_path, name):
    path = tmp_path / "w.pth"
    for content in named(tmp_path / "other", name):
        path.write_bytes(content)
        with pytest.raises(TPPError) as caught:
            load_torch(path, net())
        assert str(caught.value).isprintable(), content[:200]
        assert len(str(caught.value)) < 1500
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
