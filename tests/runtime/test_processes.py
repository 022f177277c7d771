"""A pod gives what one process gives; `python -m tests.tools.topologies` shows it in full."""

import pytest

from tests.tools.topologies import GROUPS, Topology, compare, outcome


# Faster tests hold the parts of it: shardings over eight devices (test_partitioning.py), data
# shards of several processes (data/test_datasets.py), two processes (commands/test_launch.py).
@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "mesh", "topology"),
    [
        ("diffusion", "8 data", Topology(2, 4)),
        ("diffusion", "8 data", Topology(4, 2)),
        ("autoregressive", "8 data", Topology(4, 2)),
        # Two processes hold each data shard.
        ("diffusion", "2 data x 4 model", GROUPS["2 data x 4 model"][2]),
    ],
    ids=str,
)
def test_losses_and_predictions_do_not_depend_on_how_many_processes_there_are(
    objective, mesh, topology, tmp_path
):
    expected = outcome(GROUPS[mesh][0], objective, tmp_path / "one")
    assert len(expected["losses"]) == 6
    assert expected["losses"][-1] < expected["losses"][0]
    # 11 and 50 examples in batches of 8: the last are not full.
    assert (len(expected["eval"]), len(expected["infer"])) == (11, 50)
    differences = compare(outcome(topology, objective, tmp_path / "several"), expected)
    assert differences["same"], differences
