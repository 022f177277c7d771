"""T5X may not silently initialise parameters of our models."""

import numpy as np
import pytest

from diffusion_t5x.interop.t5x_restore import require_parameters


def test_an_optimiser_may_start_fresh_but_no_parameter():
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": "target.a"}}
    checkpoint = {"target": {"decoder": {"a": spec, "extra": np.ones(2)}}}
    model = {"target": {"decoder": {"a": np.ones(2)}}, "state": {"param_states": {}}}
    assert require_parameters(checkpoint, model) is checkpoint
    assert require_parameters(checkpoint, model, is_resuming=True) is checkpoint
    model["target"]["decoder"]["norm"] = {"scale": np.ones(2)}
    with pytest.raises(ValueError, match="convert --format=t5x") as error:
        require_parameters(checkpoint, model)
    assert str(error.value).endswith("\n  decoder/norm/scale")
