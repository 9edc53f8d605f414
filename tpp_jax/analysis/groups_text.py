"""What the groups of a model are, as text: a line for each, and its members."""

import io
import re
from collections.abc import Iterable, Sequence

import rich.box
import rich.console
import rich.table
import rich.text

from tpp_jax.graph.groups import Group, Groups, Member
from tpp_jax.graph.naming import layer_name
from tpp_jax.graph.ungrouped import ungrouped
from tpp_jax.pruning.plan import Plan

# A group comes from the kernels that produce it, lies over biases and norms, runs
# through depthwise kernels and goes into the kernels that contract it.
_WORDS = {
    "produced": "from",
    "along": "over",
    "depthwise": "through",
    "contracted": "into",
}
# What is in the text of a table → what it means.
_LEGEND = {
    "from ": "from: kernels that produce the channels",
    "over ": "over: what acts on each of them",
    "through ": "through: depthwise kernels",
    "into ": "into: kernels that contract them",
    "[": "[3]: the axis",
    "@": "@8..23: the positions there, if not all",
    "×": "×4: so many positions are one channel",
    "*": "*: all arrays of a layer",
    "{": "{0..2}: each of these",
    " .": "a name that begins with a dot is in the same module as its group",
    "#": "name#2: runs through the same kernels as name, at a finer grain",
    "Σ": "Σ: a sum or maximum runs over the channels (a layer norm, a softmax, queries "
    "times keys): zeros in their place are not the same as their absence",
}
# A number without leading zeros: "01" is text, lest it be written as 1.
_NUMBER = re.compile(r"(?<!\d)(?:0|[1-9]\d*)(?!\d)")
_INDENT = 2  # columns between cells


def describe_groups(groups: Groups, plan: Plan | None = None, width: int = 100) -> str:
    """Returns the groups of a model as a plain text table, for people.

    Args:
      groups: From :func:`tpp_jax.channel_groups`.
      plan: If given, the table tells how many channels it leaves.
      width: Of the text, in characters.

    Returns:
      A row for each group, in order of execution: its name, how many channels it has,
      whether they can be pruned (if not, why), and every array that they run through.
      Names that differ in numbers only are drawn together, ``layer1.{0..2}.conv2``.
      Last come the parameters that no group runs through, and why.

    Example:
      >>> import jax.numpy as jnp
      >>> from tpp_jax import channel_groups
      >>> def mlp(p, x):
      ...     return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]
      >>> p = {"w1": jnp.ones((4, 8)), "b1": jnp.ones(8), "w2": jnp.ones((8, 2))}
      >>> text = describe_groups(channel_groups(mlp, jnp.ones((1, 4)), params=p))
      >>> print("\\n".join(text.splitlines()[:5]))
      2 groups of channels that live and die together, 1 can be pruned
      <BLANKLINE>
      group  channels  prunable  members
      w1            8  yes       from w1[1] over b1[0] into w2[0]
      w2            2  no        from w2[1]; stays: an output of the model
    """
    console = rich.console.Console(file=io.StringIO(), width=width, color_system=None)
    console.print(group_report(groups, plan, width))
    lines = console.file.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines)


def group_report(groups: Groups, plan: Plan | None, width: int) -> rich.console.Group:
    """Returns what :func:`describe_groups` says, with colours for a terminal."""
    reduced = any(group.reduced for group in groups)
    table = rich.table.Table(box=None, padding=(0, _INDENT, 0, 0), pad_edge=False)
    longest = width // 3  # of a name, in one line
    table.add_column("group", max_width=longest, overflow="fold")
    table.add_column("channels", justify="right", no_wrap=True)
    table.add_column("prunable", no_wrap=True)
    if reduced:
        table.add_column("Σ", no_wrap=True)
    table.add_column("members", overflow="fold")
    changes = {group.name: size_change(group, plan) for group in groups}
    used = min(max([len("group"), *map(len, changes)]), longest)
    used += max([len("channels"), *map(len, changes.values())])
    used += len("prunable") + reduced + _INDENT * (3 + reduced)
    shown = "Σ" if reduced else ""
    for group in groups:
        fixed = group.reason is not None
        members = _members_cell(group, groups, width - used)
        shown += f"{group.name} {members.plain} "
        cells = [
            rich.text.Text(group.name, style="bold"),
            rich.text.Text(
                changes[group.name], style="green" * ("→" in changes[group.name])
            ),
            rich.text.Text("no" if fixed else "yes", style="yellow" * fixed),
            *([rich.text.Text("Σ" * group.reduced)] if reduced else []),
            members,
        ]
        table.add_row(*cells, style="dim" if fixed else "")
    legend = "; ".join(text for mark, text in _LEGEND.items() if mark in shown)
    parts = [rich.text.Text(headline(groups) + "\n"), table]
    parts += [rich.text.Text(f"\n{legend}.", style="dim")] if legend else []
    left = _left_out(groups)
    parts += [rich.text.Text("\n" + "\n".join(left))] if left else []
    return rich.console.Group(*parts)


def _left_out(groups: Groups) -> list[str]:
    """Lists the parameters that no group runs through, those alike in one line."""
    names: dict[str, list[str]] = {}
    for leaf, why in ungrouped(groups).items():
        names.setdefault(why, []).append(leaf)
    lines = [
        f"  {', '.join(fold_names(leaves))}: {why}" for why, leaves in names.items()
    ]
    return ["Parameters that no group runs through:", *lines] if lines else []


def headline(groups: Groups) -> str:
    """Returns one line on all groups together."""
    prunable = sum(group.reason is None for group in groups)
    plural = "" if len(groups) == 1 else "s"
    return (
        f"{len(groups)} group{plural} of channels that live and die together, "
        f"{prunable} can be pruned"
    )


def size_change(group: Group, plan: Plan | None) -> str:
    """Returns the number of channels, ``16`` or ``16 → 8``."""
    kept = group.size if plan is None else plan.kept_count(group)
    return f"{group.size}" if kept == group.size else f"{group.size} → {kept}"


def member_lines(group: Group, groups: Groups) -> list[tuple[str, str]]:
    """Lists what a group runs through: ``("from", "conv1.kernel[3]")``, one per role.

    Args:
      group: One of the groups.
      groups: All of them; tells which arrays a layer has and how wide they are.
    """
    prefix = _common_module(group)
    lines = []
    for role, word in _WORDS.items():
        members = [member for member in group.members if member.role == role]
        if members:
            members.sort(key=lambda m: m.order)
            lines.append((word, ", ".join(_entries(members, groups, prefix))))
    return lines


def _members_cell(group: Group, groups: Groups, width: int) -> rich.text.Text:
    """All roles in one line if they fit, else a line for each; then the reason."""
    parts = [
        rich.text.Text.assemble((word, "italic"), " ", names)
        for word, names in member_lines(group, groups)
    ]
    reason = f"stays: {group.reason}" if group.reason is not None else ""
    fits = sum(len(part) + 1 for part in parts) + len(reason) < width
    cell = rich.text.Text(" " if fits else "\n").join(parts)
    return cell.append(("; " if fits else "\n") + reason, "yellow") if reason else cell


def _common_module(group: Group) -> str:
    """The module of all members with its dot, or "" where leaving it out would blur."""
    module = layer_name(group.name) + "."
    if module == group.name + ".":  # at the root of the model
        return ""
    names = [member.leaf for member in group.members]
    clear = all(n.startswith(module) and n[len(module)].isalpha() for n in names)
    return module if clear else ""


def _entries(members: Sequence[Member], groups: Groups, prefix: str) -> list[str]:
    """Draws members of one role together: ``layer1.{0..2}.bn2.*[0]``."""
    arrays: dict[str, set[str]] = {}
    for leaf in groups.shapes:
        arrays.setdefault(layer_name(leaf), set()).add(leaf)
    of_layer: dict[tuple[str, str], set[str]] = {}
    for member in members:
        place = f"[{member.axis}]{_places(member, groups.shapes[member.leaf])}"
        of_layer.setdefault((layer_name(member.leaf), place), set()).add(member.leaf)
    alike: dict[tuple[str, str], list[str]] = {}
    for (layer, place), leaves in of_layer.items():
        if leaves == {layer}:  # a leaf at the root of the tree
            last = ""
        elif len(leaves) > 1 and leaves == arrays[layer]:
            last = ".*"
        else:
            names = sorted(leaf.rpartition(".")[2] for leaf in leaves)
            last = "." + (names[0] if len(names) == 1 else f"{{{','.join(names)}}}")
        alike.setdefault((last, place), []).append(layer)
    return [
        ("." + name[len(prefix) :] if prefix else name) + last + place
        for (last, place), layers in alike.items()
        for name in fold_names(layers)
    ]


def _places(member: Member, shape: tuple[int, ...]) -> str:
    """Tells which positions of the axis are meant, if not all, and how many each."""
    flat = sorted(set(member.positions.ravel().tolist()))
    each = f"×{member.positions.shape[1]}" if member.positions.shape[1] > 1 else ""
    if len(flat) == shape[member.axis]:
        return each
    ranges = _ranges(flat)
    shown = ranges if len(ranges) <= 3 else [*ranges[:2], "…", ranges[-1]]
    return "@" + ",".join(shown) + each


def fold_names(names: Iterable[str]) -> list[str]:
    """Draws names together that differ in numbers only.

    Example:
      >>> fold_names(["conv1", "layer1.0.bn2", "layer1.1.bn2", "layer1.2.bn2"])
      ['conv1', 'layer1.{0..2}.bn2']
    """
    alike: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        text = tuple(_NUMBER.split(name))
        numbers = tuple(map(int, _NUMBER.findall(name)))
        alike.setdefault(text, []).append(numbers)
    folded = []
    for text, numbers in alike.items():
        for pattern in _patterns(numbers):
            pairs = zip(text, [*pattern, ""], strict=True)
            folded.append("".join(part + number for part, number in pairs))
    return folded


def _patterns(numbers: Sequence[tuple[int, ...]]) -> list[list[str]]:
    """Writes a set of equally long tuples as few products of sets of numbers."""
    if not numbers[0]:
        return [[]]
    rests: dict[int, set[tuple[int, ...]]] = {}
    for first, *rest in numbers:
        rests.setdefault(first, set()).add(tuple(rest))
    firsts: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for first, rest in rests.items():
        firsts.setdefault(frozenset(rest), []).append(first)
    patterns = []
    for rest, values in firsts.items():
        text = ",".join(_ranges(sorted(values)))
        text = text if len(values) == 1 else f"{{{text}}}"
        patterns += [[text, *tail] for tail in _patterns(sorted(rest))]
    return patterns


def _ranges(numbers: Sequence[int]) -> list[str]:
    """Writes ascending numbers as ranges: ``["0..8", "12", "14"]``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [
        part
        for run in runs
        for part in ([f"{run[0]}..{run[-1]}"] if len(run) > 2 else map(str, run))
    ]
