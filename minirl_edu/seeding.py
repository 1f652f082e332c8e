"""One seed from several numbers: every random stream of a run is a function of (run seed, what for, step)."""

import numpy as np

STREAMS = ("problems", "rollout", "activations", "weights", "evaluation", "demonstrations", "router_noise", "turns")


def derive_seed(seed: int, stream: str, step: int = 0) -> int:
    """A 63-bit seed for `stream` (one of `STREAMS`) at `step`; neighbouring numbers give unrelated streams.

    No generator's state outlives a step, so a resumed run needs none to continue bit for bit.
    """
    entropy = (seed, STREAMS.index(stream), step)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
