"""PyTorch's files as it writes them, as others damage them and as nobody should."""

import contextlib
import io
import json
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tests.interop.tensors import FILES, tiny_weights
from tpp_jax.errors import TPPError
from tpp_jax.interop.torch_files import read_torch, tensors_in

BOTH = ("", "_legacy")


def assert_tiny(tensors, prefix=""):
    counted = f"{prefix}bn1.num_batches_tracked"
    expected = {prefix + name: x for name, x in tiny_weights().items()}
    assert tensors.keys() == {*expected, counted}
    for name, array in expected.items():
        assert tensors[name].dtype == np.float32
        np.testing.assert_array_equal(tensors[name], array)


@pytest.mark.parametrize("kind", BOTH)
def test_a_state_dict_is_read(kind):
    assert_tiny(read_torch(FILES / f"state_dict{kind}.pth"))


def test_a_file_of_safetensors_is_read():
    assert_tiny(read_torch(FILES / "state_dict.safetensors"))


@pytest.mark.parametrize("kind", BOTH)
def test_a_whole_module_gives_its_state_dict(kind):
    """So without the buffers that are not saved and the parameters that are None."""
    assert_tiny(read_torch(FILES / f"whole_module{kind}.pth"))


@pytest.mark.parametrize("kind", BOTH)
def test_a_checkpoint_gives_its_state_dict(kind):
    assert_tiny(read_torch(FILES / f"checkpoint{kind}.pth"), "module.")


def test_a_checkpoint_with_a_module_alone_gives_the_modules():
    assert_tiny(read_torch(FILES / "wrapped_module.pth"), "module.")


@pytest.mark.parametrize("name", ["shared.pth", "shared_legacy.pth"])
def test_views_of_a_storage_and_all_types_are_read(name):
    found = read_torch(FILES / name)
    base = np.arange(24, dtype=np.float32)
    expected = {
        "whole": base,
        "part": base[5:9],
        "transposed": base.reshape(4, 6).T,
        "every_second": base.reshape(4, 6)[1::2, ::2],
        "broadcast": np.full((2, 5), 3, np.float32),
        "channels_last": base.reshape(1, 2, 3, 4),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float32(2.5),
        "parameter": base[:6].reshape(2, 3),
        "double": np.array([1 / 3]),
        "half": np.array([1 / 3], np.float16),
        "bfloat16": np.array([1 / 3, -2], ml_dtypes.bfloat16),
        "int64": np.array([-(2**40)]),
        "uint8": np.array([255], np.uint8),
        "bool": np.array([True, False]),
    }
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
        np.testing.assert_array_equal(found[key], array)


def test_safetensors_has_all_types_too():
    found = read_torch(FILES / "shared.safetensors")
    for key, array in read_torch(FILES / "shared.pth").items():
        assert found[key].dtype == array.dtype
        np.testing.assert_array_equal(found[key], array)


def test_new_types_and_parameters_with_attributes_are_read():
    found = read_torch(FILES / "special.pth")
    expected = np.array([0.5, -3], ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(found["float8"], expected)
    np.testing.assert_array_equal(found["uint16"], np.array([65535], np.uint16))
    np.testing.assert_array_equal(found["named"], tiny_weights()["conv1.weight"])


# What others wrote: files put together by hand


class Call:
    def __init__(self, name, *args):
        self.name, self.args = name, args


class Reference:
    def __init__(self, *identity):
        self.identity = identity


class Pickler(pickle._Pickler):
    """Writes calls of functions that need not exist."""

    def persistent_id(self, value):
        if isinstance(value, Reference):
            kind, *rest = value.identity
            return "storage", Call(kind), *rest
        return None

    def save(self, value, **more):
        if isinstance(value, Call):
            self.write(b"c" + value.name.replace("/", "\n").encode() + b"\n")
            if value.args:
                super().save(value.args)
                self.write(b"R")
        else:
            super().save(value, **more)


def pickled(value):
    stream = io.BytesIO()
    Pickler(stream, 2).dump(value)
    return stream.getvalue()


FLOATS = Reference("torch/FloatStorage", "0", "cpu", 4)
REBUILD = "torch._utils/_rebuild_tensor_v2"


def tensor(size=(4,), stride=(1,), offset=0, storage=FLOATS, rebuild=REBUILD):
    return Call(rebuild, storage, offset, size, stride, False, {})


def write_zip(path, value, **entries):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(value))
        archive.writestr("archive/data/0", np.arange(4, dtype="<f4").tobytes())
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return path


def test_parameters_of_the_first_versions_are_read(tmp_path):
    inner = Call("torch._utils/_rebuild_tensor", FLOATS, 1, (3,), (1,))
    value = {"w": Call("torch.nn.parameter/Parameter", inner)}
    found = read_torch(write_zip(tmp_path / "old.pth", value))
    np.testing.assert_array_equal(found["w"], [1, 2, 3])


def write_stream(path, value, keys=("0",), magic=0x1950A86A20F9469CFC6C):
    header = [magic, 1001, {"little_endian": True}]
    numbers = struct.pack("<q", 4) + np.arange(4, dtype="<f4").tobytes()
    pickles = [*header, value, list(keys)]
    path.write_bytes(b"".join(map(pickled, pickles)) + numbers)
    return path


def test_a_view_of_a_storage_of_the_old_format_is_read(tmp_path):
    view = Reference("torch.cuda/FloatStorage", "0", "cuda:0", 4, ("1", 2, 2))
    value = {"w": tensor((2,), storage=view)}
    found = read_torch(write_stream(tmp_path / "old.pth", value))
    np.testing.assert_array_equal(found["w"], [2, 3])


BAD_TENSORS = {
    "larger than its storage": tensor((5,)),
    "behind its storage": tensor((2,), offset=3),
    "before its storage": tensor((2,), offset=-1),
    "with a negative stride": tensor((2,), (-1,), offset=3),
    "of strides too few": tensor((2, 2), (1,)),
    "of a negative size": tensor((-4,)),
    "of sizes that are text": tensor(("4",)),
    "of an unknown type": tensor(
        storage=Reference("torch/QInt8Storage", "0", "cpu", 4)
    ),
    "of a storage that is none": tensor(storage=None),
    "of a storage that is missing": tensor(
        storage=Reference("torch/FloatStorage", "../../secret", "cpu", 4)
    ),
    "quantised": tensor(rebuild="torch._utils/_rebuild_qtensor"),
    "made by os.system": Call("os/system", "exit"),
    "around os.system": Call("torch._utils/_rebuild_parameter", Call("os/system", "x")),
    "a subclass by eval": Call(
        "torch._tensor/_rebuild_from_type_v2", Call("builtins/eval"), None, ("1",), None
    ),
}


@pytest.mark.parametrize("bad", BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_a_tensor_that_cannot_be_is_refused(bad, tmp_path):
    with pytest.raises(TPPError, match=r"bad.pth"):
        read_torch(write_zip(tmp_path / "bad.pth", {"w": bad}))


def test_a_tensor_of_a_terabyte_in_four_numbers_takes_no_room(tmp_path):
    huge = tensor((10**6, 10**6), (0, 0))
    assert read_torch(write_zip(tmp_path / "w.pth", {"w": huge}))["w"].size == 10**12


def test_a_module_that_holds_itself_is_refused(tmp_path):
    # {"_modules": {"a": itself, "b": itself}} as the state of an object
    data = (
        b"\x80\x02cnn\nModule\n)\x81q\x00}(X\x08\x00\x00\x00_modules}"
        b"(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00uub."
    )
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        archive.writestr("archive/data.pkl", data)
    with pytest.raises(TPPError, match="contains itself"):
        read_torch(tmp_path / "m.pth")


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("beside", [{}, {"w": tensor()}])
def test_a_call_in_a_file_is_never_made(beside, tmp_path):
    """Where a tensor should be it is an error; beside a state dict it is left alone."""
    trace = tmp_path / "trace"
    evil = Call("posix/system", f"touch {trace}")
    value = {"state_dict": beside, "hook": evil} if beside else {"w": evil}
    path = write_zip(tmp_path / "evil.pth", value)
    if beside:
        np.testing.assert_array_equal(read_torch(path)["w"], np.arange(4))
    else:
        with pytest.raises(TPPError, match=r"posix.system"):
            read_torch(path)
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(Evil(f"touch {trace}")))
    with pytest.raises(TPPError, match=r"not one that torch.save wrote"):
        read_torch(plain)
    assert not trace.exists()


# Damage


WHOLE = (
    "state_dict.pth",
    "state_dict_legacy.pth",
    "whole_module_legacy.pth",
    "state_dict.safetensors",
)


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_ends_too_early_is_an_error_wherever_it_ends(name, tmp_path):
    content = (FILES / name).read_bytes()
    path = tmp_path / name
    for size in range(0, len(content), 37):
        path.write_bytes(content[:size])
        with pytest.raises(TPPError, match=r"fetch it again|it is"):
            read_torch(path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in texts of protocol 0
@pytest.mark.parametrize("name", WHOLE)
def test_a_damaged_file_is_read_or_an_error(name, tmp_path):
    """Whatever becomes of it, no error is of another kind."""
    content = (FILES / name).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / name
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(len(content), size=3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(TPPError):
            read_torch(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>404</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "run git lfs pull"),
        (b"garbage" * 99, "is damaged, or not a file of weights"),
        (b"PK\x03\x04" + b"\0" * 99, "is damaged, or not a file of weights"),
        (pickle.dumps([1]), "not one that torch.save wrote"),
    ],
)
def test_what_is_no_file_of_weights_is_told(content, message, tmp_path):
    path = tmp_path / "resnet18.pth"
    path.write_bytes(content)
    with pytest.raises(TPPError, match=rf"resnet18.pth.*{message}"):
        read_torch(path)


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(TPPError, match="there is no file of weights at"):
            read_torch(path)


def test_other_zip_archives_are_told(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(TPPError, match=r"not one that torch.save wrote"):
        read_torch(path)
    write_zip(path, {"w": tensor()}, **{"constants.pkl": b"", "code/x.py": b""})
    with pytest.raises(TPPError, match="TorchScript"):
        read_torch(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled({}))
    with pytest.raises(TPPError, match="compressed"):
        read_torch(path)
    write_zip(path, {"w": tensor()}, byteorder=b"big")
    with pytest.raises(TPPError, match="big-endian"):
        read_torch(path)
    write_zip(path, {"w": tensor()}, byteorder=b"little")
    np.testing.assert_array_equal(read_torch(path)["w"], np.arange(4))


def test_safetensors_of_an_unknown_type_are_an_error(tmp_path):
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}})
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<q", len(header)) + header.encode() + b"x")
    with pytest.raises(TPPError, match="w is of type F4, which is not supported"):
        read_torch(path)


# State dicts


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "is empty"),
        (
            {"epoch": 3, "weights": {"w": np.ones(2)}},
            "epoch, weights.*epoch is of type int",
        ),
        ([np.ones(2)], "it is of type list instead of a state dict"),
        (3, "it is of type int instead of a state dict"),
        ({1: np.ones(2)}, "a dict of 1 instead of a state dict"),
    ],
)
def test_what_is_no_state_dict_is_told(value, message):
    with pytest.raises(TPPError, match=message):
        tensors_in(value)


def test_a_model_in_memory_inside_a_checkpoint_is_found():
    inner = {"w": np.ones(2)}
    for key in ("state_dict", "model_state_dict", "model", "net"):
        assert tensors_in({key: inner, "epoch": 3}).keys() == {"w"}
    assert tensors_in({"model": np.ones(2)}).keys() == {"model"}
