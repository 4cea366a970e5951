"""Cases of encodings files that several modules share."""

import pytest

from tests.helpers.encodings_files import BY_LAYER, make_case
from tests.helpers.networks import three_layer_network
from tests.helpers.simulations import small_network


@pytest.fixture(scope="session")
def small_case(tmp_path_factory):
    """All files that AIMET writes of the small network."""
    return make_case(small_network(), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def three_layer_case(tmp_path_factory):
    """The file by torch module of the three-layer network."""
    return make_case(three_layer_network(), tmp_path_factory.mktemp("three_layers"), [BY_LAYER])
