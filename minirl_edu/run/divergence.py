"""Numbers that are not finite: what to call it, and where they come from."""

import torch
from transformers import PreTrainedModel

from minirl_edu.rollout.hf import evaluating
from minirl_edu.streaming import is_sharded, local_part


class TrainingDiverged(RuntimeError):
    """A number that is not finite in a gradient step; the message names the step, the cause and the last checkpoint."""


@torch.no_grad()
def what_is_not_finite(model: PreTrainedModel, prompt: list[int]) -> str:
    """What is wrong with the policy, as far as one process can tell: its weights, or its logits for `prompt`; "" if
    nothing is."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(local_part(weight)).all():
            return f"weights of {name} that are not finite"
    if is_sharded(model):
        return ""  # a forward takes all processes
    with evaluating(model):
        logits = model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False).logits
    return "" if torch.isfinite(logits).all() else "logits of the target policy that are not finite"
