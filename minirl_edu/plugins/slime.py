"""MiniRL in slime: `minirl_loss_function`, for --custom-loss-function-path.

Read at commit 624b824a (after 0.3.1), whose `slime.backends.megatron_utils.loss.loss_function` calls a custom loss with
(args, batch, logits, sum_of_sample_mean). Equation (7) exactly with these arguments:

    --loss-type custom_loss
    --custom-loss-function-path minirl_edu.plugins.slime.minirl_loss_function
    --advantage-estimator grpo --disable-grpo-std-normalization           Â = R − mean
    --rollout-temperature 1.0 --rollout-top-p 1.0
    --use-routing-replay                                                  R2, slime's own, for mixtures of experts
    --use-rollout-routing-replay                                          R3

What would change the objective is refused (`OFF`). --use-tis, --eps-clip and --eps-clip-high are not read. With a
custom loss slime always runs a forward of its own for log π_old (`batch["log_probs"]`); log μ_old is SGLang's
(`batch["rollout_log_probs"]`).

Layout. One tensor a response, and logits packed as [1, T, V]; slime's own `get_log_probs_and_entropy` takes log π_θ out
of them. With context parallelism each rank holds a part of every response, and loss masks are cut the same way here; a
correction that needs the whole response is then refused.

Aggregation. slime multiplies a loss by num_microbatches · ranks / step_global_batch_size, and Megatron divides by
num_microbatches and averages over ranks. So the loss is the plain sum over responses, and `sum_of_sample_mean`, which
divides by lengths, is not called. One rollout must be one sample, as it is unless a custom rollout splits it:
step_global_batch_size counts rollouts.

Other choices, in a file of your own, whose path you give instead:

    minirl_loss_function = functools.partial(minirl_edu.plugins.slime.minirl_loss_function, choices=Choices(is_cap=2.0))
"""

from typing import Any

from torch import Tensor

from minirl_edu.plugins import PAPER, Choices, summed_loss

OFF = {
    "grpo_std_normalization": "pass --disable-grpo-std-normalization",
    "normalize_advantages": "leave --normalize-advantages out",
    "use_rollout_logprobs": "leave --use-rollout-logprobs out: log π_old is the trainer's",
    "calculate_per_token_loss": "leave --calculate-per-token-loss out: it divides by tokens",
    "use_kl_loss": "leave --use-kl-loss out",
    "kl_coef": "leave --kl-coef out",
    "entropy_coef": "leave --entropy-coef out",
    "use_opd": "leave --use-opd out",
}
"""Arguments under which the objective would not be MiniRL's, and what to do about each."""


def minirl_loss_function(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any, choices: Choices = PAPER
) -> tuple[Tensor, dict[str, Tensor]]:
    """Equation (7)'s sum over the micro-batch's responses, and its metrics times the number of responses.

    Raises:
        ImportError: slime is not installed.
        ValueError: an argument that changes the objective; log-probabilities are missing; a correction over whole
            responses with context parallelism.
    """
    try:
        from slime.backends.megatron_utils.cp_utils import (  # pyright: ignore[reportMissingImports]
            slice_log_prob_with_cp,
        )
        from slime.backends.megatron_utils.loss import (  # pyright: ignore[reportMissingImports]
            get_log_probs_and_entropy,
        )
    except ModuleNotFoundError as error:
        remedy = "install github.com/THUDM/slime, with Megatron-LM"
        raise ImportError(f"minirl_loss_function needs slime: {remedy} ({error})", name=error.name) from error
    for name, remedy in OFF.items():
        if getattr(args, name, None):
            raise ValueError(f"{name} is {getattr(args, name)!r}, and the objective would not be MiniRL's: {remedy}")
    if getattr(args, "rollout_top_p", 1.0) != 1.0:
        raise ValueError(f"rollout_top_p is {args.rollout_top_p}: no weight brings back what it cuts off; set 1.0")
    old, rollout = batch.get("log_probs"), batch.get("rollout_log_probs")
    if not old or (not rollout and choices.correction != "none"):
        missing = "log_probs" if not old else "rollout_log_probs"
        raise ValueError(f"the batch has no {missing}: keep advantages computed, and rollouts with log-probabilities")

    lengths = {name: batch[name] for name in ("total_lengths", "response_lengths")}
    _, found = get_log_probs_and_entropy(logits, args=args, unconcat_tokens=batch["unconcat_tokens"], **lengths)
    cuts = zip(batch["loss_masks"], *lengths.values(), strict=True)
    masks = [slice_log_prob_with_cp(mask, total, response) for mask, total, response in cuts]
    whole = [len(mask) for mask in masks] == [len(mask) for mask in batch["loss_masks"]]
    if not whole and not choices.by_token:
        raise ValueError(f"{choices} needs whole responses, and context parallelism cuts them; set its size to 1")
    loss, metrics = summed_loss(found["log_probs"], old, rollout or None, batch["advantages"], masks, choices)
    loss = loss + 0 * logits.sum() if not any(map(len, masks)) else loss  # a gradient path on ranks without tokens
    reported = {name: value * len(masks) for name, value in metrics.items() if name != "is_weight_max"}
    return loss, {"loss": loss.detach(), **reported}
