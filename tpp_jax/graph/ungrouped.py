"""The trained parameters that no group runs through, with the reasons."""

import numpy as np

from tpp_jax.graph.comparing import Reading
from tpp_jax.graph.records import Groups
from tpp_jax.graph.tracing import source_line


def ungrouped(groups: Groups) -> dict[str, str]:
    """Lists the trained parameters that are in no group.

    Args:
      groups: Groups from :func:`tpp_jax.channel_groups`.

    Returns:
      Leaf name → reason: the parameter is not used, or is a single number; its axes
      cannot be pruned, or no layer produces channels along them.

    Example:
      >>> import jax.numpy as jnp
      >>> from tpp_jax.pruning.channels import channel_groups
      >>> def scaled(p, x):
      ...     return (p["shift"] + x) @ p["w"]
      >>> p = {"shift": jnp.ones((1, 4)), "w": jnp.ones((4, 2))}
      >>> ungrouped(channel_groups(scaled, jnp.ones((1, 4)), params=p))
      {'shift': 'an input of the model (axis 1)'}
    """
    listed = {member.leaf for group in groups for member in group.members}
    trained = [leaf for leaf in groups.shapes if leaf in groups.trainable]
    left = [leaf for leaf in trained if leaf not in listed]
    if not left:
        return {}
    if groups.reading is None:
        return dict.fromkeys(left, "unknown: these groups were unpickled")
    traced = groups.traced
    used = {n for eqn in traced.equations for n in eqn.inputs} | {*traced.outputs}
    found = {}
    for leaf in left:
        if traced.leaves[leaf] not in used:
            found[leaf] = "not used"
        else:
            found[leaf] = _reasons(traced.leaves[leaf], groups.reading)
    return found


def _reasons(value: int, reading: Reading) -> str:
    """Returns the reasons why no group runs along any axis of a leaf."""
    labels, solution = reading.labels, reading.solution
    why: dict[str, list[int]] = {}
    for axis, own in enumerate(reading.axes[value]):
        if len(own) == 1:
            continue
        codes = np.unique(solution.stuck[solution.of(own)[1]])
        for code in codes.tolist():
            reason = "no layer produces its channels"
            if code >= 0:
                text, source = labels.reasons[code]
                line = source_line(source)
                reason = f"{text}, {line}" if line else str(text)
            why.setdefault(reason, []).append(axis)
    if not why:
        return "a single number"
    return "; ".join(
        f"{reason} ({'axes' if len(on) > 1 else 'axis'} {', '.join(map(str, on))})"
        for reason, on in why.items()
    )
