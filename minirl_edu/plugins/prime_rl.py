"""MiniRL in prime-rl: `minirl_loss_fn`, a custom loss. It is MiniRL only where π_old is known.

Read at commit 559b4477 (0.8.1.dev67). A custom loss sees one response at a time, with log π_θ (`trainer_logprobs`) and
log μ_old (`inference_logprobs`), but no log π_old, which MiniRL's clip needs. In one case it is known: prime-rl makes
one gradient step per batch, so if no response is older than the weights, π_old is π_θ itself, r_t = 1 and nothing is
clipped. on_policy = true says that this is so; without it the function refuses. Equation (7) exactly with

    [orchestrator]                             [trainer.loss]
    max_off_policy_steps = 0                   type = "custom"
    batch_size = 1024                          import_path = "minirl_edu.plugins.prime_rl.minirl_loss_fn"
    [orchestrator.algo]                        [trainer.loss.kwargs]
    type = "grpo"         # Â = R − mean       on_policy = true
                                               tokens_per_response = 900.0

and temperature 1 without top-p and top-k. R3 is prime-rl's own: trainer.enable_router_replay = true.

Aggregation. prime-rl divides the sum of all losses by the number of trained tokens of the batch, over all ranks, where
equation (7) divides by the number of responses. A loss function learns neither number. `tokens_per_response` multiplies
the loss: the step is exact in a batch whose responses have that mean length. In others the whole step is scaled by
tokens_per_response / (the batch's mean length). With 1, the default, the loss is a token mean. Adam cancels a constant
factor, but not one that changes from batch to batch.

Other kwargs are those of `Choices`: correction = "token_masked", is_cap = 2.0, ...
"""

from typing import Any

import torch

from minirl_edu.plugins import Choices, summed_loss


def minirl_loss_fn(inputs: Any, *, on_policy: bool = False, tokens_per_response: float = 1.0, **choices: Any) -> Any:
    """Equation (7)'s sum over one response, as prime-rl's `LossOutputs`.

    Args:
        inputs: prime-rl's `LossInputs`, whose tensors are [S], the whole sequence.
        on_policy: promises that the weights that sampled are those that are trained, `max_off_policy_steps = 0`.
        tokens_per_response: multiplies the loss, against prime-rl's division by tokens.
        choices: the fields of `Choices`.

    Raises:
        ImportError: prime-rl is not installed.
        ValueError: `on_policy` is not set.
    """
    if not on_policy:
        raise ValueError(
            "on_policy is False: prime-rl gives a loss no log π_old, which MiniRL's clip needs. Set "
            "orchestrator.max_off_policy_steps = 0, where π_old is π_θ, and trainer.loss.kwargs.on_policy = true"
        )
    try:
        from prime_rl.trainer.rl.loss import LossOutputs  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        remedy = "install github.com/PrimeIntellect-ai/prime-rl"
        raise ImportError(f"minirl_loss_fn needs prime_rl: {remedy} ({error})", name=error.name) from error
    logp, logp_rollout, mask = inputs.trainer_logprobs, inputs.inference_logprobs, inputs.loss_mask
    weights = torch.ones_like(logp) if inputs.loss_weights is None else inputs.loss_weights
    loss, metrics = summed_loss(
        logp[None],
        logp.detach()[None],
        logp_rollout[None],
        (inputs.advantages * weights)[None],
        mask[None],
        Choices(**choices),
    )
    return LossOutputs(loss=loss * tokens_per_response, metrics=metrics)
