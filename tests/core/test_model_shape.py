"""Shapes count what specs count."""

import pytest

from shoal.core.model_config import spec_from_config
from shoal.core.model_shape import shape_of
from tests.core.test_model_spec import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shape_counts_what_its_spec_counts(name):
    spec = spec_from_config(CONFIGS[name])
    shape = shape_of(spec, name)
    assert shape.num_layers == spec.num_layers
    assert shape.num_parameters() == spec.num_parameters()
    assert shape.num_parameters(active=True) == spec.num_active_parameters()
    assert shape.kv_bytes_per_token(2) == spec.kv_bytes_per_token(2)
    assert shape.is_mixture == (spec.moe is not None)
