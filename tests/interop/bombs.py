"""Files of a mebibyte that are written to exhaust memory or time, each in one way.

    python -m tests.interop.bombs FOLDER     # reads each; prints what that took

The pickles are put together instruction by instruction: ``h`` and a byte take a thing
from the memo again, so that two bytes stand for whatever it is.
"""

import functools
import gc
import io
import json
import pathlib
import pickle
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterator

MIB = 2**20
START = b"\x80\x04"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def kept(place: int) -> bytes:
    """Keeps what is on the stack under a number, and takes it off."""
    return b"q" + bytes([place]) + b"0"


def again(place: int) -> bytes:
    return b"h" + bytes([place])


def filled(start: bytes, part: bytes, end: bytes) -> bytes:
    """A pickle with as many parts as fit."""
    room = MIB - 2000 - len(start) - len(end)
    return START + start + room // len(part) * part + end


def called(name: str) -> bytes:
    module, _, what = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + what.encode() + b"\n"


def ones(count: int) -> bytes:
    return b"](" + count * b"K\x01" + b"e"


STORAGE = (
    b"(" + text("storage") + called("torch.FloatStorage") + text("0") + text("cpu")
) + b"K\x04tQ"
REBUILD = called("torch._utils._rebuild_tensor_v2")


def tensor(size: bytes, stride: bytes) -> bytes:
    return REBUILD + b"(" + STORAGE + b"K\x00" + size + stride + b"\x89}tR"


def module(children: bytes, buffers: bytes = b"}", unsaved: bytes = b"]") -> bytes:
    """A module of torch.nn whose state is given in instructions."""
    return (
        called("torch.nn.Module")
        + b")\x81}("
        + (text("_modules") + children)
        + (text("_buffers") + buffers)
        + (text("_non_persistent_buffers_set") + unsaved)
        + b"ub"
    )


def nested_modules(name: str) -> bytes:
    """Modules that hold another one twice, fifty times over."""
    body = module(b"}") + kept(1)
    for _ in range(50):
        children = b"}(" + text(name + "a") + again(1) + text(name + "b") + again(1)
        body += module(children + b"u") + kept(1)
    return START + body + again(1) + b"."


def wide_modules() -> bytes:
    """A hundred thousand children that are one module with many buffers."""
    names = b"".join(text(f"b{i}") + b"N" for i in range(30_000))
    body = module(b"}", b"}(" + names + b"u") + kept(1)
    children = b"".join(text(f"{i}") + again(1) for i in range(50_000))
    return START + body + module(b"}(" + children + b"u") + b"."


def unsaved_buffers() -> bytes:
    names = b"".join(text(f"{i}") for i in range(60_000))
    buffers = b"".join(text(f"b{i}") + b"N" for i in range(40_000))
    return START + module(b"}", b"}(" + buffers + b"u", b"](" + names + b"e") + b"."


def doubled(times: int) -> bytes:
    """A tuple of twice the tuple before, many times over, under number 1."""
    return b")" + kept(1) + times * (again(1) + again(1) + b"\x86" + kept(1))


def colliding() -> bytes:
    """Numbers that all have one hash, as keys."""
    prime, pairs = 2**61 - 1, []
    for i in range(1, 60_000):
        number = (i * prime).to_bytes(11, "little")
        pairs.append(b"\x8a" + bytes([len(number)]) + number + b"N")
    return START + b"}(" + b"".join(pairs) + b"u."


def nested_checkpoints() -> bytes:
    """Each with other weights next to those that are taken."""
    names = b"".join(text(f"{i}") + again(3) for i in range(40_000))
    tensors = b"}(" + names + b"u" + kept(1)
    body = tensor(b")", b")") + kept(3) + tensors + again(1) + kept(2)
    for _ in range(90):
        body += b"}(" + text("model") + again(2) + text("ema") + again(1) + b"u"
        body += kept(2)
    return START + body + again(2) + b"."


def pickles() -> Iterator[tuple[str, bytes]]:
    """Yields what stands in data.pkl of each archive."""
    yield from _repeated()
    yield from _nested()
    yield from _numerous()
    yield from _weights()


def _repeated() -> Iterator[tuple[str, bytes]]:
    """Yields pickles in which something large is used many times."""
    count = 3000
    yield (
        "a set of one list many times",
        filled(
            b"(" + ones(count) + b"q\x01" + b"0" + called("builtins.set") + b"(",
            again(1),
            b"tR.",
        ),
    )
    big = ones(100_000) + b"q\x01\x85" + kept(2)
    for name in ("builtins.set", "builtins.frozenset"):
        start = big + called(name) + kept(3)
        yield (
            f"{name} of one list, many times",
            filled(start, again(3) + again(2) + b"R", b"."),
        )
    pairs = b"K\x01K\x02\x86" + kept(4) + b"](" + 100_000 * again(4) + b"e"
    yield (
        "dicts of one list, many times",
        filled(
            pairs + b"\x85" + kept(2) + called("collections.OrderedDict") + kept(3),
            again(3) + again(2) + b"R",
            b".",
        ),
    )
    yield (
        "objects of one tuple, many times",
        filled(
            b"(" + 100_000 * b"K\x01" + b"t" + kept(2) + called("a.b") + kept(3),
            again(3) + again(2) + b"}\x92",
            b".",
        ),
    )
    yield (
        "references by one tuple, many times",
        filled(b"(" + 100_000 * b"K\x01" + b"t" + kept(2), again(2) + b"Q", b"."),
    )
    yield (
        "a reference by a text that is long, many times",
        filled(
            b"("
            + (text("storage") + called("torch.FloatStorage") + text("0" * 200_000))
            + (text("cpu") + b"K\x04t" + kept(2)),
            again(2) + b"Q",
            b".",
        ),
    )
    yield (
        "a global of a long name, many times",
        filled(text("a" * 90) + kept(1), again(1) + again(1) + b"\x93", b"."),
    )
    yield (
        "a global of a very long name, many times",
        filled(text("a" * 300_000) + kept(1), again(1) + again(1) + b"\x93", b"."),
    )


def _nested() -> Iterator[tuple[str, bytes]]:
    """Yields pickles of deep structures."""
    yield (
        "a storage whose name is a tuple of tuples",
        (START + doubled(60) + b"(" + text("storage") + called("torch.FloatStorage"))
        + again(1)
        + text("cpu")
        + b"K\x04tQ.",
    )
    yield (
        "a key that is a tuple of tuples",
        (START + doubled(60) + b"}" + again(1) + b"Ns."),
    )
    yield (
        "a name that is a tuple of tuples",
        (START + doubled(60) + b"}" + text("state_dict") + again(1) + b"s."),
    )
    yield "lists in lists", filled(b"", b"(]", b"l" + 200_000 * b"l" + b".")
    yield "tuples in tuples", filled(b"N", b"\x85", b".")
    yield (
        "tuples in tuples as weights",
        (START + b"}" + text("w") + b"N" + 900_000 * b"\x85" + b"s."),
    )
    yield (
        "objects in objects",
        filled(
            called("a.b") + kept(3) + b"N",
            (b"\x85" + kept(1) + again(3) + again(1) + b"R"),
            b".",
        ),
    )
    yield (
        "states in states",
        filled(
            called("a.b") + kept(3) + b"N",
            (kept(1) + again(3) + b")\x81" + again(1) + b"b"),
            b".",
        ),
    )
    rebuild = called("torch._utils._rebuild_parameter") + kept(3)
    yield (
        "parameters in parameters",
        filled(
            rebuild + b"}" + text("w") + b"N",
            b"\x85" + kept(1) + again(3) + again(1) + b"R",
            b"s.",
        ),
    )


def _numerous() -> Iterator[tuple[str, bytes]]:
    """Yields pickles of long numbers, and of very many small things."""
    yield (
        "a number of a million digits",
        (
            START
            + b"\x8b"
            + struct.pack("<I", MIB - 2000)
            + bytes(MIB - 2001)
            + b"\x01."
        ),
    )
    yield "a number of a million digits as text", b"L" + (MIB - 2000) * b"9" + b"L\n."
    yield "a fraction of a million digits", b"F" + (MIB - 2000) * b"9" + b"\n."
    yield "numbers of one hash as keys", colliding()
    yield "a memo of a million things", filled(b"N", b"\x94", b".")
    yield "a million times into one place of the memo", filled(b"N", b"q\x00", b".")
    yield "a place in the memo for each", filled(b"N", b"r\xff\xff\xff\x7f", b".")
    for name, instruction in {
        "dicts": b"}",
        "lists": b"]",
        "sets": b"\x8f",
        "marks": b"(",
        "objects": b"ca\nb\n)R",
        "references": b"(Nct\nFloatStorage\nU\x010tQ",
        "frames": b"\x95" + bytes(8),
    }.items():
        yield f"nothing but {name}", filled(b"", instruction, b".")
    yield "dicts of one entry each", filled(b"", b"}K\x01Ns", b".")
    yield (
        "one dict that holds itself",
        filled(b"}q\x01", text("a") + again(1) + b"s", b"."),
    )
    yield "one list that holds itself", filled(b"]q\x01(", again(1), b"e.")


def _weights() -> Iterator[tuple[str, bytes]]:
    """Yields pickles that look like weights."""
    size = b"(" + 100_000 * b"K\x00" + b"t" + kept(5)
    start = size + STORAGE + kept(6) + REBUILD + kept(7) + b"}("
    parts = b"".join(
        text(f"{i}")
        + again(7)
        + b"("
        + again(6)
        + b"K\x00"
        + again(5)
        + again(5)
        + b"\x89}tR"
        for i in range(20_000)
    )
    yield "tensors of a hundred thousand axes", START + start + parts + b"u."
    one = tensor(b")", b")") + kept(3)
    yield (
        "one tensor under all names",
        (START + one + b"}(")
        + b"".join(text(f"{i}") + again(3) for i in range(70_000))
        + b"u.",
    )
    wide = b"(" + 2 * b"J\xff\xff\xff\x7f" + b"t"
    zeros = b"(K\x00K\x00t"
    yield (
        "a tensor of 10¹⁸ numbers that are one",
        (START + b"}" + text("w") + tensor(wide, zeros) + b"s."),
    )
    none = b"(K\x00" + b"\x8a\x08" + b"\xff" * 7 + b"\x3ft"
    yield (
        "no numbers times 10¹⁸",
        START + b"}" + text("w") + tensor(none, zeros) + b"s.",
    )
    names = [f"layer{i}.weigh" for i in range(40_000)]
    yield (
        "names that are like those wanted",
        (START + one + b"}(" + b"".join(text(n) + again(3) for n in names) + b"u."),
    )
    yield (
        "a name of a mebibyte",
        (START + one + b"}" + text("\x1b[2J" * 250_000) + again(3) + b"s."),
    )
    yield "modules in modules", nested_modules("m")
    yield "modules in modules of long names", nested_modules("m" * 5000)
    yield "one module under many names", wide_modules()
    yield "many buffers, many of them unsaved", unsaved_buffers()
    yield (
        "a checkpoint that holds itself",
        START + b"}q\x01" + text("model") + again(1) + b"s.",
    )
    yield "checkpoints in checkpoints", nested_checkpoints()


def archive(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/data/0", bytes(16))
    return stream.getvalue()


def overlapping_archive() -> bytes:
    """Many entries that all are the same half of the file."""
    count = 5000
    references = b"".join(
        b"("
        + text("storage")
        + called("torch.FloatStorage")
        + text(str(i))
        + text("cpu")
        + b"K\x04tQ0"
        for i in range(count)
    )
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("a/data.pkl", START + references + b"}.")
        file.writestr("a/data/0", bytes(300_000))
        [shared] = [e for e in file.filelist if e.filename == "a/data/0"]
        for i in range(1, count):
            entry = zipfile.ZipInfo(f"a/data/{i}")
            for field in ("CRC", "compress_size", "file_size", "header_offset"):
                setattr(entry, field, getattr(shared, field))
            file.filelist.append(entry)
            file.NameToInfo[entry.filename] = entry
        file._didModify = True
    return stream.getvalue()


def compressed_archive() -> bytes:
    """Zeros, compressed once and repeated: compressing all of them takes seconds."""
    zeros, times = bytes(9 * MIB), 100
    deflate = zlib.compressobj(wbits=-15)
    part = deflate.compress(zeros) + deflate.flush(zlib.Z_FULL_FLUSH)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"\x80\x02}.")
        packed = times * part + deflate.flush()
        file.writestr("a/data/0", packed, zipfile.ZIP_STORED)
        info = file.getinfo("a/data/0")
        info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, times * len(zeros)
        info.CRC = functools.reduce(lambda c, _: zlib.crc32(zeros, c), range(times), 0)
        stream.seek(info.header_offset)
        stream.write(info.FileHeader())
    return stream.getvalue()


def stream_of_storages() -> bytes:
    """The form before PyTorch 1.6, with one storage named many times."""
    head = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {}))
    keys = filled(text("0") + kept(1) + b"](", again(1), b"e.")
    return head + START + STORAGE + b"0}." + keys + 100 * struct.pack("<q", 2**40)


def safetensors(header: dict[str, object], rest: int = 0) -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(rest)


def files() -> Iterator[tuple[str, str, bytes]]:
    """Yields what a file is, its name and its content."""
    for title, content in pickles():
        yield title, "net.pth", archive(content)
    yield "entries of an archive that overlap", "net.pth", overlapping_archive()
    yield "a compressed archive", "net.pth", compressed_archive()
    yield "one storage of a stream named many times", "net.pth", stream_of_storages()
    empty = {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}
    many = {f"layer{i}.weigh": empty for i in range(12_000)}
    yield "many tensors without numbers", "net.safetensors", safetensors(many)
    yield (
        "a header of four gigabytes",
        "net.safetensors",
        struct.pack("<Q", 2**32 - 1) + b"{" + bytes(MIB),
    )
    yield (
        "an index in brackets",
        "net.safetensors.index.json",
        b'{"weight_map":' + 500_000 * b"[" + 500_000 * b"]" + b"}",
    )
    names = {f"layer{i}": f"{i}.safetensors" for i in range(20_000)}
    index = json.dumps({"weight_map": names}).encode()
    yield "an index of many files", "net.safetensors.index.json", index


def most_memory() -> float:
    """Returns the most memory that this process has used so far, in MiB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) / 1024


def main(folder: pathlib.Path) -> None:
    """Reads every file; prints a line of JSON about each."""
    from flax import nnx

    import tpp_jax as tpp

    net = nnx.Dict(layer1=nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    warnings.simplefilter("ignore")
    gc.freeze()  # without JAX, what is read costs the search for garbage a fifth less
    before = most_memory()
    for title, name, content in files():
        (folder / name).write_bytes(content)
        size = len(content)
        del content
        start, said, error = time.process_time(), "", ""
        try:
            tpp.load_torch(folder / name, net)
        except Exception as caught:
            said, error = str(caught), type(caught).__name__
        seconds = time.process_time() - start
        (folder / name).unlink()
        line = {"title": title, "bytes": size, "error": error, "said": said}
        line |= {"seconds": seconds, "mebibytes": most_memory() - before}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
