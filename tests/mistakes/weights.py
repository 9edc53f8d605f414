"""Mistakes in files of weights."""

import json
import pathlib
import pickle
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import load_file

import tpp_jax as tpp
from tests.interop.tensors import FILES
from tests.mistakes.runs import Cases
from tpp_jax.interop.trained_decoders import load, text

DECODER = pathlib.Path(__file__).parents[1] / "interop" / "decoders" / "qwen2"


class _Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def weights() -> Cases:

    def resnet() -> nnx.Module:
        return tpp.models.create("resnet18", rngs=nnx.Rngs(0))

    def file(folder: pathlib.Path, content: bytes, name: str = "weights.pth") -> Any:
        (folder / name).write_bytes(content)
        return tpp.load_torch(folder / name, resnet())

    def state(change: Callable[[dict[str, Any]], None]) -> Any:
        model = tpp.models.create("mlp7_relu", image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "weights.safetensors"
            tpp.save_torch(model, path)
            tensors = load_file(path)
        change(tensors)
        return tpp.load_torch(tensors, model)

    index = b'{"weight_map": {"w": "model-00001-of-00002.safetensors"}}'
    whole = (FILES / "state_dict.pth").read_bytes()
    tensors = (FILES / "state_dict.safetensors").read_bytes()
    transposed = lambda d: d.update({"net.0.weight": d["net.0.weight"].T[:3]})  # noqa: E731
    yield from (
        ("a file that does not exist", lambda f: tpp.load_torch(f / "w.pth", resnet())),
        ("a file cut short", lambda f: file(f, whole[:1000])),
        ("a file that is text", lambda f: file(f, b"hello, world")),
        ("a pickle that would run code", lambda f: file(f, pickle.dumps(_Malicious()))),
        (
            "safetensors cut short",
            lambda f: file(f, tensors[:300], "weights.safetensors"),
        ),
        (
            "an index whose files are not there",
            lambda f: file(f, index, "model.safetensors.index.json"),
        ),
        ("weights of another network", lambda f: file(f, whole)),
        ("a tensor is missing", lambda f: state(lambda d: d.pop("net.0.weight"))),
        ("a tensor too many", lambda f: state(lambda d: d.update(x=np.ones(3)))),
        ("a tensor of another shape", lambda f: state(transposed)),
    )
    yield from language_models()


def language_models() -> Cases:

    def folder(folder: pathlib.Path, **values: Any) -> Any:
        for file in DECODER.iterdir():
            shutil.copy(file, folder)
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | values))
        return tpp.load_hf(folder)

    def pruned_into_files(folder: pathlib.Path) -> Any:
        (folder / "mine.txt").touch()
        return tpp.prune_hf(DECODER, folder, {"*.mlp.gate_proj": 0.5})

    def pruned_checkpoint(folder: pathlib.Path, *given: Any) -> Any:
        params = {"up": np.ones((4, 8), np.float32), "down": np.ones((8, 2))}
        x = np.ones((1, 4), np.float32)
        groups = tpp.channel_groups(
            lambda p, x: x @ p["up"] @ p["down"], x, params=params
        )
        return tpp.prune_orbax(folder, folder / "small", groups, *given)

    yield from (
        ("a checkpoint that is not there", lambda f: pruned_checkpoint(f / "no", 0.5)),
        ("a folder without a checkpoint", lambda f: pruned_checkpoint(f, 0.5)),
        ("a folder without a language model", lambda f: tpp.load_hf(f)),
        ("an unknown language model", lambda f: folder(f, model_type="gpt2")),
        ("settings of another model", lambda f: folder(f, intermediate_size=12)),
        ("a folder pruned into one with files", pruned_into_files),
        ("a GGUF file that does not exist", lambda f: tpp.load_gguf(f / "m.gguf")),
        ("weights in a package that is not there", lambda _: load("llm_none")),
        ("text for weights without a tokenizer", lambda _: text(weights=str(DECODER))),
    )
