"""The sections of a run's config: the default, bounds and meaning of each field."""

import dataclasses
from typing import Any, Literal

from tpp_jax.experiment.fields import field
from tpp_jax.method.gram import Target
from tpp_jax.method.isometry import RECIPES
from tpp_jax.pruning.criteria import CRITERIA, REDUCTIONS
from tpp_jax.pruning.targets import SCOPES
from tpp_jax.training.optimizers import OPTIMIZERS, ORTHOGONALITY, SCHEDULES

METHOD_NAMES = (
    *("tpp", "oneshot", "extra", "scratch"),
    *("greg2", "group_lasso", "iterative", "compensated", "compensated_tpp", "none"),
)
"""Names of the methods, whose rows are in :mod:`tpp_jax.experiment.methods`. They are
here because the functions of a row take sections of the config."""

TASK_NAMES = ("image_classification", "language_modelling")
"""Names of the tasks of the package."""

_LARGEST_IMAGE = 2**14  # pixels on a side


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What the network learns."""

    name: str = field(
        "image_classification",
        "Name of the task; or the dotted path of your own, "
        "see [own_model.md](own_model.md).",
        choices=TASK_NAMES,
        dotted=True,
    )
    kwargs: dict[str, Any] = field(
        {}, "Keyword arguments of the object that a dotted path names."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and its arithmetic."""

    name: str = field(
        "cifar_resnet56",
        "Name of the network, one of `tpp_jax.models.names()` for images and "
        "`small_decoder` for text; or the dotted path of a function that makes your "
        "own.",
    )
    kwargs: dict[str, Any] = field(
        {},
        "Keyword arguments of `small_decoder`, or of the function that a dotted path "
        "names.",
    )
    dtype: Literal["float32", "bfloat16"] = field(
        "float32",
        "Type in which the network computes; parameters, batch statistics and the loss "
        "are always float32.",
    )
    remat: bool = field(
        False,
        "Whether the backward pass recomputes everything except convolutions and "
        "products, to save memory.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data set, its batches and its augmentation."""

    name: str = field(
        "cifar10",
        "Name of a data set of images, path of a `.npz` file, or the dotted path of a "
        "function that returns your own; for text, a file, a folder or `python`. See "
        "[data.md](data.md).",
    )
    kwargs: dict[str, Any] = field(
        {}, "Keyword arguments of the function that a dotted path names."
    )
    dir: str = field(
        "",
        "Folder of the prepared data or of class folders, by default that of "
        "TensorFlow Datasets; for text, a folder that keeps the tokens of a tokenizer.",
        is_path=True,
    )
    pad_to: int = field(
        0,
        "Height and width in pixels to which images in memory are zero-padded; 0 for "
        "no padding.",
        most=_LARGEST_IMAGE,
    )
    batch_size: int = field(
        128,
        "Number of examples in a training batch of all devices together.",
        least=1,
    )
    crop_padding: int = field(
        4,
        "Number of pixels of zero padding on each side of an image in memory before "
        "random crop; 0 for no crop.",
        most=_LARGEST_IMAGE,
    )
    flip: bool = field(True, "Whether training images are mirrored at random.")
    image_size: int = field(
        224,
        "Height and width in pixels of streamed images after their crop.",
        least=1,
        most=_LARGEST_IMAGE,
    )
    resize: int = field(
        256,
        "Shorter side in pixels of streamed test images before their centre crop; at "
        "least `image_size`.",
        least=1,
        most=_LARGEST_IMAGE,
    )
    workers: int = field(
        0,
        "Number of processes that decode streamed images; 0 to decode in threads of "
        "the main process.",
        most=1000,
    )

    length: int = field(
        128, "Number of tokens of a sequence, for text.", least=1, most=2**20
    )
    tokenizer: str = field(
        "",
        "File of a tokenizer (`tokenizer.json` of Hugging Face), for text; empty for "
        "bytes.",
        is_path=True,
    )
    held_out: float = field(
        0.1, "Share of a text on which networks are evaluated.", above=0, below=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Trained weights to start from."""

    model: str = field(
        "",
        "Folder of a network saved by `tpp_jax.save_model`, such as `dense/` of "
        "another run; empty for none.",
        is_path=True,
    )
    torch: str = field(
        "",
        "File of PyTorch weights (`.pth` or `.safetensors`); empty for none.",
        is_path=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A phase of plain training."""

    epochs: int = field(0, "Length of the phase in epochs; 0 skips it.")
    learning_rate: str | float = field(
        "0.1",
        "Learning rate: one number, or pairs of an epoch and the rate from that epoch "
        "on, as in `0:0.1,100:0.01`.",
    )
    schedule: str = field(
        "step",
        "Shape of the learning rate over time: constant between the given epochs, or "
        "one cosine from the given rate down to 0.",
        choices=SCHEDULES,
    )
    warmup_epochs: float = field(
        0.0, "Length in epochs of a linear rise of the rate from 0; 0 for none."
    )
    optimizer: str = field("sgd", "Name of the optimizer.", choices=OPTIMIZERS)
    momentum: float = field(0.9, "Momentum of SGD; β₁ of AdamW and LAMB.", below=1)
    nesterov: bool = field(False, "Whether SGD uses Nesterov momentum.")
    weight_decay: float = field(5e-4, "Weight decay.")
    decay_norms: bool = field(
        True, "Whether weight decay applies to biases and the scales of norms too."
    )
    label_smoothing: float = field(
        0.0, "Share of each label that is spread evenly over all classes.", below=1
    )
    mixup: float = field(
        0.0,
        "α of mixup's Beta(α, α); 0 for no mixup. If `cutmix` is set too, one of the "
        "two is chosen at random for each batch.",
        least_above_zero=1e-6,  # Beta(1e-38, 1e-38) cannot be sampled
    )
    cutmix: float = field(
        0.0, "α of cutmix's Beta(α, α); 0 for no cutmix.", least_above_zero=1e-6
    )
    ema: float = field(
        0.0,
        "Decay per step of an exponential moving average of the weights, which "
        "replaces them in evaluations and after the phase; 0 for none.",
        below=1,  # an average with a decay of 1 never changes
    )
    orthogonality: str = field(
        "",
        "Penalty on filters that are not orthogonal: KernOrth (`kernel`), OrthConv "
        "(`convolution`), or none.",
        choices=ORTHOGONALITY,
    )
    orthogonality_weight: float = field(0.1, "Weight of that penalty.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Distillation of the dense network into the pruned one."""

    weight: float = field(
        0.0,
        "Share w of the distillation in the loss, (1 - w) · loss of the labels + "
        "w · T² · KL divergence of the softened outputs; 0 for none, 1 for no labels.",
        most=1,
    )
    temperature: float = field(
        4.0,
        "Temperature T by which the outputs of both networks are divided.",
        least=0.01,
        most=1000,
    )
    activations: str = field(
        "",
        "Patterns of layers, separated by commas, whose outputs are distilled; layers "
        "whose outputs are pruned cannot be among them.",
    )
    activation_weight: float = field(
        1.0, "Factor of their mean relative squared distance in the loss."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Training of the pruned network, with or without the dense one as a teacher."""

    distillation: DistillationConfig = field(
        DistillationConfig(),
        "The dense network, as it was before pruning, teaches the pruned one.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowConfig:
    """The phase of `greg2` and `group_lasso` before the channels are chosen."""

    granularity: float = field(
        1e-5, "Increment of the L2 strength in each interval (`greg2`).", above=0
    )
    every: int = field(10, "Number of steps in an interval (`greg2`).", least=1)
    ceiling: float = field(1e-2, "Strength at which the phase ends (`greg2`).", above=0)
    weight: float = field(1e-3, "Weight of the group lasso (`group_lasso`).")
    steps: int = field(
        0,
        "Length in steps (`group_lasso`); 0 for the length of TPP's regularization and "
        "stabilization.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the strength λ of TPP's penalties grows."""

    kind: str = field(
        "linear",
        "Growth of λ: `linear`, or `poly` and a power (`poly2`, `poly3`, …).",
    )
    granularity: float = field(
        1e-4, "Increment of λ in each interval (`linear` only).", above=0
    )
    every: int = field(10, "Number of steps in an interval.", least=1)
    ceiling: float = field(1.0, "λ at the end of the growth.", above=0)
    stabilize: int = field(10_000, "Number of steps at full strength after the growth.")
    zero_out_every: int = field(
        100,
        "Number of steps at full strength between setting the pruned filters of one "
        "layer to zero and those of the next layer.",
        least=1,
    )
    regularize_steps: int = field(
        0,
        "Length of the growth in steps, a multiple of `every` (`poly` only; 0 with "
        "`linear`).",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Method and amount of pruning. The defaults are the paper's for CIFAR."""

    method: str = field(
        "tpp",
        "Method: TPP, one of its rivals ([tables.md](tables.md)), `none` to train only "
        "the dense network, or the dotted path of your own ([extend.md](extend.md)).",
        choices=METHOD_NAMES,
        dotted=True,
    )
    ratios: str = field(
        "*layer*.conv1:0.5",
        "Share of the channels to remove, as pattern:share pairs separated by commas; "
        "empty, with a target, for the same share in all groups. See "
        "[plans.md](plans.md).",
    )
    flops: float = field(
        0.0, "Target share of the FLOPs that remains; 0 for no target.", most=1
    )
    params: float = field(
        0.0, "Target share of the parameters that remains; 0 for no target.", most=1
    )
    skip: str = field(
        "", "Patterns of layers that are not pruned, separated by commas."
    )
    criterion: str = field(
        "l1",
        "Importance score of a channel: "
        f"{', '.join(f'`{name}`' for name in CRITERIA)}, `random`, or the dotted path "
        "of your own.",
    )
    batches: int = field(
        4,
        "Number of training batches on which `taylor`, `taylor_fo`, `hessian` and "
        "`activation` measure.",
        least=1,
    )
    compensate: bool = field(
        False,
        "Whether layers that read pruned channels are refit at the cut, see "
        "[recovery.md](recovery.md); `compensated` does it always.",
    )
    recalibrate: bool = field(
        False,
        "Whether the statistics of batch norms, if there are any, are measured again "
        "after the cut; `compensated` does it always.",
    )
    calibration_examples: int = field(
        1024,
        "Number of training examples, not augmented, on which `compensate`, "
        "`recalibrate` and the criteria `wanda`, `variance` and `obs` measure.",
        least=1,
    )
    scope: str = field(
        "local",
        "Where scores compete: within each group, among all groups, or among groups of "
        "the same shape.",
        choices=tuple(SCOPES),
    )
    reduce: str = field(
        "mean",
        "How the scores of a channel in the layers of its group are combined.",
        choices=tuple(REDUCTIONS),
    )
    round_to: int = field(
        1,
        "Multiple to which the number of kept channels of a group is rounded up.",
        least=1,
    )
    min_channels: int = field(
        1, "Smallest number of channels to keep in a group.", least=1
    )
    optimizer: str = field(
        "sgd",
        "Name of the optimizer in all phases except `pretrain` and `finetune`. AdamW "
        "and LAMB add the penalties after their moments.",
        choices=OPTIMIZERS,
    )
    learning_rate: float = field(
        1e-3,
        "Constant learning rate in all phases except `pretrain` and `finetune`.",
    )
    momentum: float = field(0.9, "Momentum in the same phases.", below=1)
    weight_decay: float = field(5e-4, "Weight decay in the same phases.")
    gram_weight: float = field(
        1000.0, "Weight of the Gram penalty; 0 for no decorrelation."
    )
    gram_every: int = field(
        1,
        "Number of steps from one with the Gram penalty to the next, whose gradient is "
        "as many times as large.",
        least=1,
    )
    bn: bool = field(
        True, "Whether the scales and biases of norms in pruned channels are shrunk."
    )
    l2: bool = field(True, "Whether pruned filters and their biases are shrunk.")
    target: Target = field(
        "decorrelate",
        "Goal of the Gram penalty: pruned filters decorrelated from all others, with a "
        "weight for convolutions or relative to the kept filters; or kept filters "
        "orthonormal (an ablation).",
    )
    strengths: str = field(
        "",
        "Factors on λ for some groups, as pattern:factor pairs separated by commas; "
        "empty for the same λ in all.",
    )
    kept_weight: float = field(
        0.0,
        "Weight of a penalty that makes kept filters orthonormal (an ablation, which "
        "uses 0.1); 0 for none.",
    )
    reinitialize: str = field(
        "",
        "Recipe for reinitializing kernels after the cut, see "
        "[trainability.md](trainability.md); empty for none.",
        choices=("", *RECIPES),
    )
    rounds: int = field(
        5, "Number of rounds of the method `iterative`.", least=1, most=1000
    )
    grow: GrowConfig = field(
        GrowConfig(),
        "The phase before channels are chosen: growing L2 (`greg2`) or the group lasso "
        "(`group_lasso`) on all filters. Other methods ignore it.",
    )
    schedule: ScheduleConfig = field(
        ScheduleConfig(),
        "How the strength λ of TPP's penalties grows and how long it then remains.",
    )
