"""What a run will need, before anything is started: memory of each GPU, time and traffic of a global step.

    weights, gradients, Adam   counted on the model itself, built on the meta device: right for any architecture
    activations, logits        the training engine's own forward and backward, run on tensors without data
    everything else            arithmetic; each line of the table says which

The plan is for the fullest GPU (rank 0's), for the memory of its machine, where the rollout is, and for the dearest
case: every response as long as it may be, every group with a gradient. Times are lower bounds: no product is faster
than the chip's peak, no read than its memory. Real steps take a multiple.
"""

from minirl_edu.plan.planning import Plan, Remedy, plan, remedies
from minirl_edu.plan.setting import HARDWARE, Cluster, Hardware, this_machine
from minirl_edu.plan.sizes import parse_bytes
from minirl_edu.plan.table import draw_memory, table

__all__ = [
    "HARDWARE",
    "Cluster",
    "Hardware",
    "Plan",
    "Remedy",
    "draw_memory",
    "parse_bytes",
    "plan",
    "remedies",
    "table",
    "this_machine",
]
