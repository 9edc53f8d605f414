"""Effects of the fields of a config, and values that are refused."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.reference import filled
from tpp_jax import data
from tpp_jax.errors import TPPError
from tpp_jax.experiment import planning
from tpp_jax.experiment.config import check_values, default_config
from tpp_jax.experiment.run import train
from tpp_jax.experiment.setup import make_setup
from tpp_jax.training import parallel
from tpp_jax.training.classification import ImageClassification


def small_config(**fields):
    config = default_config()
    config.model.name = "mlp7_relu"
    config.data.name = "digits"
    config.data.batch_size = 16
    config.prune.ratios = "net*:0.5"
    config.prune.update(fields)
    return config


@functools.cache
def digits(name="mlp7_relu"):
    """Data, a network with random weights and its groups."""
    dataset = data.load("digits")
    shape = dataset.train_images.shape[1:]
    model = filled(
        lambda: tpp.models.create(
            name, num_classes=10, image_shape=shape, rngs=nnx.Rngs(0)
        )
    )
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return dataset, model, tpp.channel_groups(model, x)


def plan_for(config, groups, model, dataset=None):
    """Returns the plan of a config, which may depend on a data set."""
    size = config.data.batch_size
    task = dataset and ImageClassification(dataset, batch_size=size)
    return planning.plan_for(config.prune, groups, model, config.seed, task)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"ratios": "", "flops": 0.5}, {"flops": 0.5}),
        ({"ratios": "", "params": 0.3}, {"params": 0.3}),
        (
            {"ratios": "*conv1:0.5", "flops": 0.7, "params": 0.9},
            {"ratios": "*conv1:0.5", "flops": 0.7, "params": 0.9},
        ),
        (
            {"ratios": "*:0.5", "reduce": "first"},
            {"ratios": "*:0.5", "reduce": "first"},
        ),
        (
            {"ratios": "*:0.9", "min_channels": 5, "round_to": 2},
            {"ratios": "*:0.9", "min_channels": 5, "round_to": 2},
        ),
        (
            {"ratios": "*:0.5", "scope": "isomorphic", "criterion": "lamp"},
            {"ratios": "*:0.5", "scope": "isomorphic", "criterion": "lamp"},
        ),
    ],
    ids=str,
)
def test_fields_are_handed_to_make_plan(fields, options):
    dataset, model, groups = digits("cifar_resnet8")
    plan = plan_for(small_config(**fields), groups, model, dataset)
    assert plan.to_dict() == tpp.make_plan(groups, model, **options).to_dict()


@pytest.mark.parametrize(
    "criterion", ["taylor", "taylor_fo", "hessian", "activation", "wanda", "obs"]
)
def test_criteria_that_need_data_see_the_first_training_batches(criterion):
    dataset, model, groups = digits()
    config = small_config(criterion=criterion, batches=2)
    plan = plan_for(config, groups, model, dataset)
    assert plan.to_dict() == plan_for(config, groups, model, dataset).to_dict()
    # Without data the counts are tried with the weights only.
    stand_in = plan_for(config, groups, model)
    assert stand_in.to_dict() == plan_for(small_config(), groups, model).to_dict()
    assert stand_in.to_dict() != plan.to_dict()
    widths = [len(kept) for kept in plan.kept.values()]
    assert widths == [len(kept) for kept in stand_in.kept.values()]


def test_replicated_weights_give_the_plan_of_one_device():
    dataset, model, groups = digits()
    graphdef, state = nnx.split(model)
    copies = parallel.replicate(state, jax.local_devices()[:2])
    config = small_config(criterion="taylor", batches=1)
    plans = [
        plan_for(config, groups, nnx.merge(graphdef, weights), dataset).to_dict()
        for weights in (state, copies)
    ]
    assert plans[0] == plans[1]


def test_fewer_batches_than_asked_for_will_do():
    dataset, model, groups = digits()
    dataset = dataset._replace(
        train_images=dataset.train_images[:20], train_labels=dataset.train_labels[:20]
    )
    config = small_config(criterion="activation", batches=100)
    assert plan_for(config, groups, model, dataset).pruned_groups


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("flops", -0.5, "config.prune.flops is -0.5, must be at least 0"),
        ("flops", 1.5, "config.prune.flops is 1.5, must be at most 1"),
        ("batches", 0, "config.prune.batches is 0"),
        ("min_channels", 0, "min_channels is 0"),
        ("min_channels", 1000, "prunes nothing.*lower config.prune.min_channels"),
        ("reduce", "median", "unknown config.prune.reduce 'median': choose 'mean' or"),
        ("criterion", "tailor", "unknown criterion 'tailor'"),
        ("params", 0.0005, "params=0.0005 is out of reach"),
    ],
)
def test_a_field_that_makes_no_sense_is_told_before_training(field, value, message):
    with pytest.raises(TPPError, match=message):
        make_setup(small_config(**{field: value}))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pretrain.ema", 1.0, "config.pretrain.ema is 1.0, must be below 1"),
        ("finetune.ema", -0.1, "config.finetune.ema is -0.1, must be at least 0"),
        ("finetune.label_smoothing", 1.0, "label_smoothing is 1.0, must be below 1"),
        ("finetune.momentum", 1.0, "config.finetune.momentum is 1.0, must be below 1"),
        ("pretrain.mixup", -1.0, "config.pretrain.mixup is -1.0, must be at least 0"),
        ("pretrain.cutmix", -0.5, "config.pretrain.cutmix is -0.5"),
        ("finetune.warmup_epochs", -1.0, "config.finetune.warmup_epochs is -1.0"),
        ("finetune.schedule", "sine", "config.finetune.schedule 'sine': choose 'step'"),
        ("pretrain.optimizer", "adam", "'adam': choose 'sgd' or 'adamw' or 'lamb'"),
        ("model.dtype", "float16", "'float16': choose 'float32' or 'bfloat16'"),
        ("prune.target", "norm", "unknown config.prune.target 'norm': choose"),
        ("accumulate", 0, "config.accumulate is 0, must be at least 1"),
        ("data.workers", -1, "config.data.workers is -1"),
        ("data.image_size", 0, "config.data.image_size is 0"),
        ("data.resize", 200, "config.data.resize is 200, too small for crops of"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_name(field, value, message):
    config = default_config()
    check_values(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(TPPError, match=message):
        check_values(config)


def test_a_run_starts_from_one_network_only():
    config = default_config()
    config.init.model, config.init.torch = "dense", "resnet50.pth"
    with pytest.raises(
        TPPError, match=r"init.model and config.init.torch are both set"
    ):
        check_values(config)


@pytest.mark.usefixtures("no_pictures")
def test_a_run_meets_its_target_with_channels_chosen_by_data(tmp_path):
    config = small_config(ratios="", flops=0.5, criterion="taylor", batches=1)
    config.data.batch_size = 512  # two steps per epoch
    config.num_devices = 1
    config.pretrain.epochs = config.finetune.epochs = 1
    config.prune.schedule.granularity = 0.5
    config.prune.schedule.every = 1
    config.prune.schedule.stabilize = 8
    config.prune.schedule.zero_out_every = 1
    summary = train(config, tmp_path / "run")
    assert summary["status"] == "done"
    dense, pruned = summary["dense"], summary["pruned"]
    assert 0.49 < pruned["flops"] / dense["flops"] <= 0.5
    info = tpp.load_model_info(tmp_path / "run" / "model")
    _, _, groups = digits()
    plan = tpp.Plan.from_dict(info["plan"], groups)
    assert {g.name for g in plan.pruned_groups} == {
        g.name for g in groups if g.reason is None
    }
