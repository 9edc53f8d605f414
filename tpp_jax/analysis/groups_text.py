"""The groups of a model as text: a row for each, with its members."""

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

# Prepositions for the roles: channels come from kernels that produce them, extend over
# biases and norms, run through depthwise kernels and lead into kernels that contract
# them.
_WORDS = {
    "produced": "from",
    "along": "over",
    "depthwise": "through",
    "contracted": "into",
}
# Explanations by the text in a table that they explain.
_LEGEND = {
    "from ": "from: kernels that produce the channels",
    "over ": "over: arrays that act on each of them",
    "through ": "through: depthwise kernels",
    "into ": "into: kernels that contract them",
    "[": "[3]: the axis",
    "@": "@8..23: the positions along it, if not all",
    "×": "×4: number of positions in one channel",
    "*": "*: all arrays of a layer",
    "{": "{0..2}: each of these",
    " .": "a name that begins with a dot is in the same module as its group",
    "#": "name#2: runs through the same kernels as name, at a finer granularity",
    "Σ": "Σ: a sum or maximum runs over the channels (a layer norm, a softmax, queries "
    "times keys): setting them to zero is not the same as removing them",
}
# A number without leading zeros: "01" is text, so that it is not written as 1.
_NUMBER = re.compile(r"(?<!\d)(?:0|[1-9]\d*)(?!\d)")
_INDENT = 2  # number of spaces between cells


def describe_groups(groups: Groups, plan: Plan | None = None, width: int = 100) -> str:
    r"""Returns the groups of a model as a plain-text table.

    Args:
      groups: Groups from :func:`tpp_jax.channel_groups`.
      plan: Plan whose numbers of kept channels are shown, if any.
      width: Width of the text in characters.

    Returns:
      A row for each group, in order of execution: its name, its number of channels,
      whether they can be pruned (if not, why), and every array that they run through.
      Names that differ only in numbers are combined, ``layer1.{0..2}.conv2``. The
      parameters that no group runs through come last, with the reasons.

    Example:
      >>> import jax.numpy as jnp
      >>> from tpp_jax import channel_groups
      >>> def mlp(p, x):
      ...     return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]
      >>> p = {"w1": jnp.ones((4, 8)), "b1": jnp.ones(8), "w2": jnp.ones((8, 2))}
      >>> text = describe_groups(channel_groups(mlp, jnp.ones((1, 4)), params=p))
      >>> print("\n".join(text.splitlines()[:5]))
      2 groups of coupled channels, 1 can be pruned
      <BLANKLINE>
      group  channels  prunable  members
      w1            8  yes       from w1[1] over b1[0] into w2[0]
      w2            2  no        from w2[1]; kept: an output of the model
    """
    text = io.StringIO()
    console = rich.console.Console(file=text, width=width, color_system=None)
    console.print(group_report(groups, plan, width))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def group_report(groups: Groups, plan: Plan | None, width: int) -> rich.console.Group:
    """Returns the table of :func:`describe_groups`, with colours for a terminal.

    Args:
      groups: Groups from :func:`tpp_jax.channel_groups`.
      plan: Plan whose numbers of kept channels are shown, if any.
      width: Width of the terminal in characters.
    """
    reduced = any(group.reduced for group in groups)
    table = rich.table.Table(box=None, padding=(0, _INDENT, 0, 0), pad_edge=False)
    longest = width // 3  # longest part of a name in one line
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
    blocks = [rich.text.Text(headline(groups) + "\n"), table]
    blocks += [rich.text.Text(f"\n{legend}.", style="dim")] if legend else []
    others = _ungrouped_lines(groups)
    blocks += [rich.text.Text("\n" + "\n".join(others))] if others else []
    return rich.console.Group(*blocks)


def _ungrouped_lines(groups: Groups) -> list[str]:
    """Lists the parameters that no group runs through, one line for each reason."""
    names: dict[str, list[str]] = {}
    for leaf, reason in ungrouped(groups).items():
        names.setdefault(reason, []).append(leaf)
    lines = [
        f"  {', '.join(fold_names(leaves))}: {reason}"
        for reason, leaves in names.items()
    ]
    return ["Parameters that no group runs through:", *lines] if lines else []


def headline(groups: Groups) -> str:
    """Returns a line with the number of groups.

    Args:
      groups: Groups from :func:`tpp_jax.channel_groups`.
    """
    prunable = sum(group.reason is None for group in groups)
    plural = "" if len(groups) == 1 else "s"
    return f"{len(groups)} group{plural} of coupled channels, {prunable} can be pruned"


def size_change(group: Group, plan: Plan | None) -> str:
    """Returns the number of channels, ``16`` or ``16 → 8``; ``12×16`` in 12 layers.

    Args:
      group: Group of channels.
      plan: Plan whose number of kept channels is shown, if any.
    """
    kept = group.size if plan is None else plan.kept_count(group)
    each = f"{group.steps}×" if group.steps else ""
    before, after = f"{each}{group.size}", f"{each}{kept}"
    return before if kept == group.size else f"{before} → {after}"


def member_lines(group: Group, groups: Groups) -> list[tuple[str, str]]:
    """Lists the arrays that a group runs through, by role.

    Args:
      group: Group of channels.
      groups: All groups of the model, with the arrays of each layer and their shapes.

    Returns:
      Pairs such as ``("from", "conv1.kernel[3]")``, one for each role.
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
    """Returns all roles in one line if they fit, else a line for each; then the reason.

    The reason is that of a group which cannot be pruned.
    """
    roles = [
        rich.text.Text.assemble((word, "italic"), " ", names)
        for word, names in member_lines(group, groups)
    ]
    reason = f"kept: {group.reason}" if group.reason is not None else ""
    fits = sum(len(role) + 1 for role in roles) + len(reason) < width
    cell = rich.text.Text(" " if fits else "\n").join(roles)
    return cell.append(("; " if fits else "\n") + reason, "yellow") if reason else cell


def _common_module(group: Group) -> str:
    """Returns the module of all members with its dot; "" if names were ambiguous."""
    module = layer_name(group.name) + "."
    if module == group.name + ".":  # at the root of the model
        return ""
    names = [member.leaf for member in group.members]
    clear = all(n.startswith(module) and n[len(module)].isalpha() for n in names)
    return module if clear else ""


def _entries(members: Sequence[Member], groups: Groups, prefix: str) -> list[str]:
    """Combines the names of members of one role: ``layer1.{0..2}.bn2.*[0]``."""
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
    """Returns the positions along the axis, if not all, and the number per channel."""
    flat = sorted(set(member.positions.ravel().tolist()))
    each = f"×{member.positions.shape[1]}" if member.positions.shape[1] > 1 else ""
    if len(flat) == shape[member.axis]:
        return each
    ranges = _ranges(flat)
    shown = ranges if len(ranges) <= 3 else [*ranges[:2], "…", ranges[-1]]
    return "@" + ",".join(shown) + each


def fold_names(names: Iterable[str]) -> list[str]:
    """Combines names that differ only in numbers.

    Args:
      names: Names to combine.

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
            folded.append("".join(words + number for words, number in pairs))
    return folded


def _patterns(numbers: Sequence[tuple[int, ...]]) -> list[list[str]]:
    """Writes a set of tuples of the same length as few products of sets of numbers."""
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
        text
        for run in runs
        for text in ([f"{run[0]}..{run[-1]}"] if len(run) > 2 else map(str, run))
    ]
