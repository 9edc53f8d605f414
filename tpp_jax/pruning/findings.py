"""What a probe of a model keeps: values with their origin, and what it finds out."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from tpp_jax.pruning.consumers import Tag, Weights

# Before the key of a consumer, these are keys of sums over what its outputs are
# multiplied by, squared, over what they are added to, and over the inverse mean square
# of each row of that.
GAIN, STREAM, INVERSE = "gain|", "stream|", "inverse|"


class Value(NamedTuple):
    """An array and what is known of it.

    Attributes:
      array: The array.
      tag: Origin of its entries.
      varies: Whether it depends on the inputs.
      factor: Square of what each output of a kernel was multiplied by since, float
        ``[outputs]`` of all stacks; None for ones.
    """

    array: Any
    tag: Tag | None
    varies: bool
    factor: Any = None


@dataclasses.dataclass
class Findings:
    """What a probe learns of a model while it is traced.

    Attributes:
      weights: Key of a consumer → its weights.
      spent: Kinds and names of tags that were read in a way that is not understood.
      steps: Key of a consumer → number of steps of loops that its stacks are those of.
      uses: Key of a consumer → number of products that were traced; inside of loops and
        branches at least two.
      added: Key of a consumer → what is added to its outputs: the parameter, 1 or -1,
        and its entry for each output.
    """

    weights: dict[str, Weights] = dataclasses.field(default_factory=dict)
    spent: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    steps: dict[str, int] = dataclasses.field(default_factory=dict)
    uses: dict[str, int] = dataclasses.field(default_factory=dict)
    added: dict[str, list[tuple[str, int, np.ndarray]]] = dataclasses.field(
        default_factory=dict
    )
