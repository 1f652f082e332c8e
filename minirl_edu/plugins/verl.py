"""MiniRL in verl: importing this file registers the policy loss "minirl".

Read at verl 0.9.1 and commit 1dda039b (0.10.0.dev), where a policy loss is called by
`verl.workers.utils.losses.ppo_loss` with old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config and
rollout_is_weights. Equation (7) exactly with these settings:

    actor_rollout_ref.model.external_lib: minirl_edu.plugins.verl         imports this file in every worker
    actor_rollout_ref.actor.policy_loss.loss_mode: minirl
    algorithm.adv_estimator: grpo
    algorithm.norm_adv_by_std_in_grpo: false                              Â = R − mean
    algorithm.use_kl_in_reward: false
    algorithm.rollout_correction.rollout_is: token                        ships π_old/μ_old of every token
    algorithm.rollout_correction.rollout_is_threshold: 1.0e+9             not capped there: the cap is on the product
    algorithm.rollout_correction.rollout_is_batch_normalize: false
    algorithm.rollout_correction.rollout_rs: null
    algorithm.rollout_correction.bypass_mode: false                       π_old comes from a forward of the trainer
    actor_rollout_ref.actor.use_kl_loss: false
    actor_rollout_ref.actor.entropy_coeff: 0
    actor_rollout_ref.rollout.calculate_log_probs: true
    actor_rollout_ref.rollout: {temperature: 1.0, top_p: 1.0, top_k: -1}
    actor_rollout_ref.actor.megatron.router_replay.mode: R2               verl's own, for Megatron; or R3

verl gives a policy loss no log μ_old, but its weights w = π_old/μ_old: log μ_old = log π_old − log w. verl clamps log w
at ±20, as `minirl_loss` does. Sequence corrections take their products over tokens from the same w.

Aggregation. verl sums the losses of micro-batches and averages gradients over the dp_size ranks. The loss is therefore

    dp_size / global_batch_size · Σ_b Σ_t …          both from config.global_batch_info

which is what loss_agg_mode "seq-mean-token-sum" does. The config's loss_agg_mode, clip_ratio_low and clip_ratio_high
are not read. Other choices come from a file of your own, which is then the external_lib:

    from minirl_edu.plugins import Choices
    from minirl_edu.plugins.verl import register
    register("minirl_masked", Choices(correction="token_masked"))
"""

from typing import Any

from torch import Tensor

from minirl_edu.plugins import PAPER, Choices, summed_loss

try:
    from verl.trainer.ppo.core_algos import register_policy_loss  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise ImportError(f"minirl_edu.plugins.verl needs verl: pip install verl ({error})", name=error.name) from error


def register(name: str, choices: Choices = PAPER) -> None:
    """Make MiniRL with these choices the policy loss of that name: `policy_loss.loss_mode: NAME`."""

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "seq-mean-token-sum",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if rollout_is_weights is None and choices.correction != "none":
            raise ValueError(
                f"{name}: rollout_is_weights is None, so log μ_old is unknown; set "
                "algorithm.rollout_correction.rollout_is: token, with rollout_is_threshold: 1.0e+9"
            )
        logp_rollout = None if rollout_is_weights is None else old_log_prob - rollout_is_weights.log()
        loss, metrics = summed_loss(log_prob, old_log_prob, logp_rollout, advantages, response_mask, choices)
        whole = config.global_batch_info
        responses = whole.get("global_batch_size") or len(log_prob)
        return loss * (whole.get("dp_size", 1) / responses), {f"actor/{k}": v.item() for k, v in metrics.items()}

    register_policy_loss(name)(policy_loss)


register("minirl")
