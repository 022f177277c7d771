"""The training loop and everything that belongs to it.

Holds the trainer's step, the loop and its hooks, optimisers, the initial state, the run's record
and logs, and dry runs. Commands, experiments and benchmarks may import it; the rooms that compute
(objectives, networks, decoding) and `runtime`, `data` and `checkpointing`, on which it rests, never
do. It knows a model by `interfaces.Model` alone: how text is made noisy or generated never enters.
"""
