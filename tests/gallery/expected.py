"""Descriptions of expected groups, for the tests of the gallery."""

import numpy as np

OUTPUT = "an output of the model"


def free(name, *others, size):
    """Describes a group that can be pruned, by its name, other producers and size."""
    return name, (name, *others), size, False, None


def within(name, *others, size, why=None):
    """Describes an inner group; ``why`` is the reason why it cannot be pruned."""
    return name, (name.partition("#")[0], *others), size, True, why


def whole(name, *others, size, why=OUTPUT):
    """Describes a group that cannot be pruned."""
    return name, (name, *others), size, False, why


def slots(group, role):
    """Returns the parameter axes that a group runs through in one role."""
    return {(m.leaf, m.axis) for m in group.members if m.role == role}


def positions(group, leaf, axis=None):
    """Returns the positions of each channel of a group in an array, ascending."""
    [member] = [m for m in group.members if m.leaf == leaf and axis in (None, m.axis)]
    return np.sort(member.positions, axis=1).tolist()
