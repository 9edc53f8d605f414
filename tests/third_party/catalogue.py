"""All networks: importing their files registers them."""

from tests.third_party import (  # noqa: F401
    function_networks,
    linen_networks,
    nnx_networks,
)
from tests.third_party.networks import NETWORKS

__all__ = ["NETWORKS"]
