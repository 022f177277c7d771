"""Which rows of a global batch are whose."""

import numpy as np
import pytest

from diffusion_t5x.data.data_shards import DataLayout


def test_a_process_takes_the_rows_of_its_shards():
    layout = DataLayout(12, 4, (1, 3), (1,))
    assert layout.shard_size == 3
    rows = layout.local_rows({"x": np.arange(24).reshape(12, 2)})
    np.testing.assert_array_equal(rows["x"][:, 0], [6, 8, 10, 18, 20, 22])


@pytest.mark.parametrize("batch_size,shards,nearest", [(10, 4, 8), (1, 8, 8), (7, 2, 8)])
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest(batch_size, shards, nearest):
    message = rf"BATCH_SIZE = {batch_size} .* the {shards} data shards.* does: {nearest}\."
    with pytest.raises(ValueError, match=message):
        DataLayout(batch_size, shards)
    assert DataLayout(nearest, shards).shard_size == nearest // shards
