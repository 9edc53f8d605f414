"""The listing shows every group: its name, size, arrays and reason not to prune."""

import functools
import itertools
import re
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.analysis.groups_layout import place_groups
from tpp_jax.analysis.groups_svg import draw_groups
from tpp_jax.analysis.groups_text import describe_groups, fold_names, member_lines
from tpp_jax.commands.inspect import inspect
from tpp_jax.errors import TPPError
from tpp_jax.experiment.config import default_config
from tpp_jax.graph.naming import layer_name
from tpp_jax.models import CifarResNet

SVG = "{http://www.w3.org/2000/svg}"


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


class Block(nnx.Module):
    """Attention and an MLP around a residual stream of eight channels."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
        self.fc1 = nnx.Linear(8, 12, rngs=rngs)
        self.fc2 = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.fc2(jax.nn.gelu(self.fc1(x)))


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(5, 8, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@functools.cache
def resnet(blocks=(2, 2, 2)):
    model = nnx.eval_shape(lambda: CifarResNet(blocks, width=0.25, rngs=nnx.Rngs(0)))
    return tpp.channel_groups(model, shape(1, 8, 8, 3))


@functools.cache
def transformer():
    model = nnx.eval_shape(lambda: Transformer(nnx.Rngs(0)))
    return tpp.channel_groups(model, shape(1, 4, 5))


def depthwise(p, x):
    def conv(x, kernel, **more):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers, **more
        )

    y = conv(conv(x, p["first"]), p["middle"], feature_group_count=p["middle"].shape[3])
    return y.reshape(y.shape[0], -1) @ p["last"]


@functools.cache
def flattened():
    params = {"first": shape(1, 1, 3, 4), "middle": shape(3, 3, 1, 4)}
    params["last"] = shape(2 * 2 * 4, 2)
    return tpp.channel_groups(depthwise, shape(1, 2, 2, 3), params=params)


def recurrent(p, x):
    hidden = jnp.tanh(x @ p["in"])
    for _ in range(2):
        hidden = jnp.tanh(hidden @ p["again"] + p["bias"])
    return jnp.abs(jnp.fft.fft(hidden @ p["<b> & \"c'"])) @ p["out"]


@functools.cache
def odd():
    """A recurrent layer, an operation without a rule and a name that needs escaping."""
    params = {"in": shape(3, 6), "again": shape(6, 6), "bias": shape(6)}
    params |= {"<b> & \"c'": shape(6, 5), "out": shape(5, 2)}
    return tpp.channel_groups(recurrent, shape(1, 3), params=params)


EXAMPLES = {
    "resnet": resnet,
    "transformer": transformer,
    "flattened": flattened,
    "odd": odd,
}
every_example = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)


def plan_of(groups, ratios=None):
    """Returns a plan by number of channels; without ratios it halves every group."""
    ones = {leaf: np.ones(dims) for leaf, dims in groups.shapes.items()}
    half = {group.name: 0.5 for group in groups if group.reason is None}
    return tpp.make_plan(groups, ones, ratios or half)


def rows(text):
    """Returns the row of each group, with continued lines joined."""
    found, name = {}, None
    for line in itertools.takewhile(bool, text.splitlines()[3:]):
        if not line.startswith(" "):
            name = line.split()[0]
        found[name] = f"{found.get(name, '')} {' '.join(line.split())}".strip()
    return found


def test_a_block_is_one_line_and_names_all_that_its_channels_run_through():
    row = rows(describe_groups(resnet()))["layer1.0.conv1"]
    members = "from .conv1.kernel[3] over .bn1.*[0] into .conv2.kernel[2]"
    assert row == f"layer1.0.conv1 4 yes {members}"


def test_layers_that_differ_in_numbers_only_are_drawn_together():
    stream = rows(describe_groups(resnet()))["conv1"]
    assert "from conv1.kernel[3], layer1.{0,1}.conv2.kernel[3]" in stream
    # The middle ones of 8 channels belong to the stream; the others are padding.
    assert "layer2.{0,1}.conv2.kernel[3]@2..5" in stream


def test_channels_beside_a_padded_shortcut_are_said_to_stay_and_why():
    row = rows(describe_groups(resnet()))["layer3.0.conv2"]
    assert row.startswith("layer3.0.conv2 8 no from layer3.{0,1}.conv2.kernel[3]")
    assert "kept: padding of a fixed width (4 before, 4 after)" in row
    assert row.count(resnet()["layer3.0.conv2"].reason) == 1


def test_an_operation_that_is_not_understood_is_named():
    row = rows(describe_groups(odd()))["<b>"]
    assert " no " in row and "'fft'" in row


def test_heads_and_the_dimensions_within_them_are_two_groups():
    found = rows(describe_groups(transformer()))
    heads, within = found["blocks.0.attn.query"], found["blocks.0.attn.query#2"]
    assert ".query.kernel[1], .key.kernel[1], .value.kernel[1]" in heads
    assert ".query.kernel[2], .key.kernel[2]" in within
    assert "name#2: runs through the same kernels" in describe_groups(transformer())


def test_groups_that_a_sum_runs_over_are_marked_where_there_are_any():
    groups = transformer()
    found = rows(describe_groups(groups))
    assert any(group.reduced for group in groups)
    for group in groups:
        assert found[group.name].split()[3:4] == (["Σ"] if group.reduced else ["from"])
    assert "Σ" not in describe_groups(resnet())


def test_positions_that_make_one_channel_are_counted():
    row = rows(describe_groups(flattened()))["first"]
    assert row.endswith("from first[3] through middle[3] into last[0]×4")


def test_a_plan_shows_what_it_leaves():
    groups = transformer()
    plan = plan_of(groups, {"blocks.0.fc1": 0.25})
    found = rows(describe_groups(groups, plan))
    assert found["blocks.0.fc1"].startswith("blocks.0.fc1 12 → 9 yes")
    assert found["blocks.1.fc1"].startswith("blocks.1.fc1 12 yes")


@every_example
@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_text_is_as_wide_as_asked_for(example, width):
    lines = describe_groups(example(), plan_of(example()), width).splitlines()
    assert max(map(len, lines)) <= width
    assert not any(line.endswith(" ") for line in lines)


def test_a_long_name_goes_on_in_the_next_line():
    name = "encoder.layers.11.self_attention.feed_forward"
    params = {f"{name}.kernel": shape(3, 6), "out": shape(6, 2)}
    groups = tpp.channel_groups(
        lambda p, x: x @ p[f"{name}.kernel"] @ p["out"], shape(1, 3), params=params
    )
    first, second = describe_groups(groups, width=90).splitlines()[3:5]
    assert first.split()[0] + second.split()[0] == name


def unfolded(name):
    """Returns every name in ``a{0..2}.b{1,4}``, the reverse of `fold_names`."""
    match = re.search(r"\{([^{}]*)\}", name)
    if match is None:
        return {name}
    inside = []
    for part in match[1].split(","):
        first, _, last = part.partition("..")
        inside += map(str, range(int(first), int(last) + 1)) if last else [part]
    start, end = name[: match.start()], name[match.end() :]
    return set().union(*(unfolded(start + one + end) for one in inside))


@every_example
def test_no_member_is_lost_where_names_are_drawn_together(example):
    groups = example()
    words = {"from": "produced", "over": "along", "through": "depthwise"}
    for group in groups:
        told = set()
        for word, text in member_lines(group, groups):
            for entry in re.split(r", (?![^{]*\})", text):
                folded, axis = re.fullmatch(r"(.*)\[(\d)\].*", entry).groups()
                for name in unfolded(folded):
                    if name.startswith("."):
                        name = layer_name(group.name) + name
                    leaves = [name]
                    if name.endswith(".*"):
                        layer = name.removesuffix(".*")
                        leaves = [x for x in groups.shapes if layer_name(x) == layer]
                    role = words.get(word, "contracted")
                    told |= {(leaf, int(axis), role) for leaf in leaves}
        assert told == {(m.leaf, m.axis, m.role) for m in group.members}


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["a.0", "a.1", "a.3"], ["a.{0,1,3}"]),
        (["a.2", "a.0", "a.1", "b"], ["a.{0..2}", "b"]),
        (["x1.0", "x1.1", "x2.0", "x2.1"], ["x{1,2}.{0,1}"]),
        (["x1.0", "x1.1", "x2.0"], ["x1.{0,1}", "x2.0"]),
        (["a01", "a02"], ["a01", "a02"]),  # as numbers these would be a1 and a2
        (["7", "8"], ["{7,8}"]),
    ],
)
def test_names_are_folded_and_mean_the_same(names, folded):
    assert fold_names(names) == folded
    assert set().union(*map(unfolded, folded)) == set(names)


def drawn(groups, folder, plan=None):
    draw_groups(groups, folder / "groups.svg", plan)
    return ElementTree.parse(folder / "groups.svg").getroot()


@every_example
def test_the_picture_names_every_group_with_its_size_and_why_it_stays(
    example, tmp_path
):
    groups, plan = example(), plan_of(example())
    root = drawn(groups, tmp_path, plan)
    parts = {g.get("data-group"): g for g in root.iter(f"{SVG}g") if g.attrib}
    parts.pop(None, None)
    assert list(parts) and parts.keys() == {group.name for group in groups}
    for group in groups:
        said = " ".join(text.text for text in parts[group.name].iter(f"{SVG}text"))
        kept = plan.kept_count(group)
        size = f"{group.size}" if kept == group.size else f"{group.size} → {kept}"
        assert said.startswith(f"{group.name}  {size}")
        if group.reason is not None:
            assert group.reason in said
        tooltip = parts[group.name].find(f"{SVG}title").text
        assert all(names in tooltip for _, names in member_lines(group, groups))


def places_of_texts(element, x=0.0, y=0.0):
    """Returns left, right, top and bottom of every text, with some margin."""
    for child in element:
        moved = re.fullmatch(r"translate\((\S+) (\S+)\)", child.get("transform", ""))
        dx, dy = map(float, moved.groups()) if moved else (0, 0)
        yield from places_of_texts(child, x + dx, y + dy)
        if child.tag == f"{SVG}text":
            left, base = x + float(child.get("x")), y + float(child.get("y"))
            size = float(child.get("font-size", element.get("font-size", 11)))
            yield left, left + 0.61 * size * len(child.text), base - size, base + 3


@every_example
def test_no_text_of_the_picture_overlaps_or_runs_over_the_edge(example, tmp_path):
    root = drawn(example(), tmp_path, plan_of(example()))
    width, height = float(root.get("width")), float(root.get("height"))
    places = list(places_of_texts(root))
    assert len(places) > 2 * len(example())
    for left, right, top, bottom in places:
        assert left > 0 and right < width and top > 0 and bottom < height
    for one, other in itertools.combinations(places, 2):
        beside = one[1] < other[0] or other[1] < one[0]
        assert beside or one[3] < other[2] or other[3] < one[2]


@every_example
def test_groups_that_run_beside_each_other_have_columns_of_their_own(example):
    rows, lanes = place_groups(example(), None)
    assert {lane.group.name for lane in lanes} == {group.name for group in example()}
    for one, other in itertools.combinations(lanes, 2):
        if one.column == other.column:
            assert one.last < other.first or other.last < one.first
    assert all(lane.last < len(rows) for lane in lanes)


def test_a_norm_stands_below_the_layer_that_ran_last_and_a_bias_with_its_own():
    names = [row.name for row in place_groups(resnet(), None)[0]]
    at = names.index("layer2.1.conv1")
    assert names[at : at + 3] == ["layer2.1.conv1", "layer2.1.bn1", "layer2.1.conv2"]
    assert "linear.bias" not in names and names[-1] == "linear"


def test_the_shapes_of_kernels_are_shown_as_the_plan_leaves_them():
    rows, _ = place_groups(flattened(), plan_of(flattened()))
    shapes = {row.name: row.shape for row in rows}
    assert shapes == {
        "first": "1×1×3×4 → 1×1×3×2",
        "middle": "3×3×1×4 → 3×3×1×2",
        "last": "16×2 → 8×2",
    }


def config_of(**fields):
    config = default_config()
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in fields.items()}
    )
    return config


def test_data_that_is_not_prepared_can_be_inspected(tmp_path, capsys):
    config = config_of(data__name="mnist", data__pad_to=32, data__dir=str(tmp_path))
    config.model.name = "lenet5"
    config.prune.ratios = "fc4:0.5"
    inspect(config)
    shown = capsys.readouterr().out
    assert shown.startswith("lenet5, images 32×32×1, 10 classes\n5 groups")
    assert "fc4     84 → 42  yes" in shown
    assert "params 61,706 → 56,204" in shown
    assert not list(tmp_path.iterdir())


def test_a_saved_network_is_inspected_as_it_is(tmp_path, capsys):
    model = nnx.eval_shape(
        lambda: tpp.models.create("lenet5", num_classes=3, rngs=nnx.Rngs(0))
    )
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, jax.tree.map(lambda x: jnp.zeros(x.shape), state))
    tpp.save_model(tmp_path / "dense", model)
    config = config_of(init__model=str(tmp_path / "dense"), prune__scope="global")
    config.prune.ratios = "conv*:0.5"
    inspect(config)
    shown = capsys.readouterr().out
    assert shown.startswith("lenet5, images 32×32×1, 3 classes\n5 groups")
    assert "untrained" not in shown


def test_ratios_may_still_be_missing(capsys):
    inspect(config_of(data__name="digits", model__name="mlp7_relu", prune__ratios=""))
    shown = capsys.readouterr().out
    assert "with no ratio and no target" in shown and "0.0% gone" in shown


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__name": "digit"}, "Did you mean digits"),
        ({"data__name": "mnist", "data__pad_to": 20}, "pad_to is 20, but the images"),
        ({"model__name": "cifar_resnet9"}, "no network named 'cifar_resnet9'"),
        ({"prune__ratios": "layer9*:0.5"}, "'layer9\\*' matches no layer"),
        ({"prune__ratios": "linear:0.5"}, "which cannot be pruned"),
        ({"seed": -1}, "config.seed is -1"),
    ],
)
def test_what_is_wrong_with_a_config_is_told_as_in_training(fields, message):
    fields = {"model__name": "cifar_resnet8", "data__name": "digits"} | fields
    with pytest.raises(TPPError, match=message):
        inspect(config_of(**fields))


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    config = config_of(model__name="mlp7_relu", data__name="digits")
    config.prune.ratios = "net.0:0.5"
    with pytest.raises(TPPError, match="cannot be written"):
        inspect(config, tmp_path / "file" / "run")
