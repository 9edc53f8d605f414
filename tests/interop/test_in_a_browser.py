"""An exported network in a browser, by the page that docs/export.md shows."""

import functools
import http.server
import mimetypes
import pathlib
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.browser import BROWSER, needs_browser
from tests.reference import filled

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "export.md"
PACKAGE = "onnxruntime-web@1.30.0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files of onnxruntime-web."""
    if shutil.which("npm") is None:
        pytest.skip("no npm here")
    folder = tmp_path_factory.mktemp("web")
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", PACKAGE]
    try:
        subprocess.run(command, cwd=folder, check=True, timeout=60)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip("npm does not provide onnxruntime-web here")
    files = folder / "node_modules" / "onnxruntime-web" / "dist"
    for file in (
        *files.glob("ort.wasm.min.*"),
        *files.glob("ort-wasm-simd-threaded.*"),
    ):
        shutil.move(file, folder)
    return folder


@pytest.fixture(scope="module")
def address(folder):
    mimetypes.add_type("text/javascript", ".mjs")
    mimetypes.add_type("application/wasm", ".wasm")
    handler = functools.partial(Silent, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@needs_browser
def test_the_page_of_the_guide_classifies_a_digit(folder, address, tmp_path):
    model = filled(
        lambda: tpp.models.create(
            "cifar_resnet8", image_shape=(8, 8, 1), rngs=nnx.Rngs(0)
        )
    )
    image = tpp.data.load("digits").test_images[:1] / np.float32(16)
    groups = tpp.channel_groups(model, image)
    small = tpp.prune(model, tpp.make_plan(groups, model, 0.5))
    tpp.export(small, folder / "small.onnx", image)
    [html] = re.findall(r"^```html\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    pixels = f"Float32Array.from([{','.join(map(str, image.ravel().tolist()))}])"
    assert "new Float32Array(64)" in html
    html = html.replace("new Float32Array(64)", pixels)
    (folder / "index.html").write_text(f"<body>{html}</body>")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000"]
    done = subprocess.run(
        [*command, f"{address}/index.html"], capture_output=True, text=True, timeout=120
    )
    [text] = re.findall(r"<body[^>]*>(.*?)</body>", done.stdout, re.S)
    small.eval()
    expected = np.asarray(small(image)).ravel()
    logits = np.array(text.split(), np.float32)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * expected.std())
