"""The parameters that no group runs through, and why: nothing is left unsaid."""

import numpy as np

from tpp_jax.graph.records import Groups
from tpp_jax.graph.tracing import source_line


def ungrouped(groups: Groups) -> dict[str, str]:
    """Lists the trained parameters that are in no group.

    Args:
      groups: from :func:`tpp_jax.channel_groups`.

    Returns:
      Leaf name → why it is in none: it is not used, or a single number; its axes cannot
      be pruned, and nothing produces channels along them.

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
        return dict.fromkeys(left, "a pickle of groups does not say why")
    traced = groups.traced
    used = {n for eqn in traced.equations for n in eqn.inputs} | {*traced.outputs}
    reading = groups.reading
    labels, axes, solution = reading.labels, reading.axes, reading.solution
    found = {}
    for leaf in left:
        value = traced.leaves[leaf]
        why: dict[str, list[int]] = {}
        for axis, own in enumerate(axes[value]):
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
        if value not in used:
            found[leaf] = "not used"
        elif not why:
            found[leaf] = "a single number"
        else:
            found[leaf] = "; ".join(
                f"{reason} ({'axes' if len(on) > 1 else 'axis'} "
                f"{', '.join(map(str, on))})"
                for reason, on in why.items()
            )
    return found
