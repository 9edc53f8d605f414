"""--mode=profile: the networks that are timed, and the results."""

import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import tpp_jax as tpp
from configs import digits_resnet8_tpp
from tests.end_to_end.starts import start
from tests.experiment.test_errors import small_config
from tpp_jax.analysis import latency
from tpp_jax.commands.export import export_run
from tpp_jax.commands.profile import BATCH_SIZES, profile, table
from tpp_jax.errors import TPPError
from tpp_jax.experiment.run import train

NETWORKS = [f"batch {size}" for size in BATCH_SIZES]

# launch.py, but for the times, which do not matter here.
HASTY = """
import runpy
from tpp_jax.analysis import latency
latency._SECONDS = 0.0
runpy.run_path("launch.py", run_name="__main__")
"""


@pytest.fixture(autouse=True)
def few_calls(monkeypatch):
    """Shortens the timing, since times do not matter here."""
    monkeypatch.setattr(latency, "_SECONDS", 0.0)


def assert_ratios_follow(pairs):
    """Checks that ratios follow from the times and FLOPs."""
    for pair in pairs.values():
        assert pair["dense_seconds"] > 0 and pair["pruned_seconds"] > 0
        faster = pair["dense_seconds"] / pair["pruned_seconds"]
        fewer = pair["dense_flops"] / pair["pruned_flops"]
        assert pair["speedup"] == pytest.approx(faster)
        assert pair["flops_speedup"] == pytest.approx(fewer)
        if fewer == 1:
            assert pair["realised"] is None
        else:
            expected = (1 - 1 / faster) / (1 - 1 / fewer)
            assert pair["realised"] == pytest.approx(expected)


def test_before_any_run_it_times_the_cut_that_the_config_asks_for(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    found = profile(digits_resnet8_tpp.get_config())
    assert list(tmp_path.iterdir()) == []
    assert (found["model"], found["dtype"]) == ("cifar_resnet8", "float32")
    assert list(found["networks"]) == NETWORKS
    for pair in found["networks"].values():  # values in the demo's summary
        assert pair["dense_flops"] == pytest.approx(1.49e6, rel=0.005)
        assert pair["pruned_flops"] == pytest.approx(0.757e6, rel=0.005)
    convs = [f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2)]
    assert list(found["layers"]) == ["conv1", *convs, "linear"]
    for name, pair in found["layers"].items():
        halved = 2 if name in convs else 1
        assert pair["dense_flops"] == halved * pair["pruned_flops"], name
    assert_ratios_follow(found["networks"] | found["layers"])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("cifar_resnet8, images 8×8×1, float32, on ")
    assert [row.split()[1] for row in rows if "2.00×" in row] == convs


@pytest.mark.parametrize(
    ("pruned_seconds", "pruned_flops", "realised", "shown"),
    [
        (2.0, 50, 0.0, "0%"),  # no gain
        (1.0, 50, 1.0, "100%"),
        (1.5, 25, 1 / 3, "33%"),
        (2.5, 50, -0.5, "-50%"),
        (1.0, 100, None, "–"),
    ],
)
def test_realised_is_the_time_saved_by_the_flops_saved(
    pruned_seconds, pruned_flops, realised, shown
):
    pair = latency.Pair(2.0, pruned_seconds, 100, pruned_flops)
    expected = realised if realised is None else pytest.approx(realised)
    assert pair.realised == expected
    [*_, column] = table({"one": pair}, "network").columns
    assert (column.header, list(column.cells)) == ("realised", [shown])


@pytest.mark.usefixtures("no_pictures")
def test_of_a_finished_run_its_own_networks_are_timed(tmp_path):
    shortest = {"prune.method": "oneshot", "pretrain.epochs": 1}
    train(small_config(**shortest), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    before = {file.name for file in tmp_path.iterdir()}
    program = tmp_path.with_suffix(".py")
    program.write_text(HASTY)
    flags = "--mode=profile", f"--workdir={tmp_path}"  # config: another network
    process = start(*flags, program=str(program), XLA_FLAGS="")
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    added = {file.name for file in tmp_path.iterdir()} - before
    assert {"profile.json", "report.html"} <= added
    assert "Speed by the clock" in (tmp_path / "report.html").read_text()
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["model"] == "mlp7_linear"
    assert list(found["networks"]) == NETWORKS
    for pair in found["networks"].values():
        assert pair["dense_flops"] == summary["dense"]["flops"]
        assert pair["pruned_flops"] == summary["pruned"]["flops"]
    assert_ratios_follow(found["networks"] | found["layers"])
    shares = [pair["flops_speedup"] for pair in found["layers"].values()]
    assert shares == [2, 4, 4, 4, 4, 4, 2]
    assert "net.2 and 4 equal" in said
    export_run(tmp_path, ["stablehlo", "onnx"])
    again = profile(small_config(), tmp_path)
    files = [f"{n}, {suffix}" for suffix in ("stablehlo", "onnx") for n in NETWORKS]
    assert list(again["networks"]) == NETWORKS + files
    assert_ratios_follow(again["networks"])


def test_a_network_that_was_never_trained_dense_is_timed_beside_its_whole(tmp_path):
    dense = tpp.models.create("mlp7_linear", image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    images = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    plan = tpp.make_plan(tpp.channel_groups(dense, images), dense, {"net.0": 0.5})
    config = small_config(**{"prune.method": "scratch"}).to_dict()
    pruned = tpp.prune(dense, plan)
    tpp.save_model(tmp_path / "model", pruned, plan, config=config)
    found = profile(small_config(), tmp_path)
    for pair in found["networks"].values():
        assert pair["dense_flops"] == tpp.count(dense, images).flops
        assert pair["pruned_flops"] == tpp.count(pruned, images).flops


def test_mistakes_are_told_and_leave_no_file(tmp_path):
    with pytest.raises(TPPError, match=r"'\*xyz\*' matches no layer"):
        profile(small_config(**{"prune.ratios": "*xyz*:0.5"}), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "model").mkdir()
    with pytest.raises(TPPError, match="cannot be read"):
        profile(small_config(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
