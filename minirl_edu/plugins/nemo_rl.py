"""MiniRL in NeMo-RL: `MiniRLLossFn`, a loss function in the place of `ClippedPGLossFn`.

Read at commit 7ea279ab (after 0.7.0), where `nemo_rl.algorithms.loss.interfaces.LossFunction` is the contract. The
config of NeMo-RL names no loss: write `loss_fn = MiniRLLossFn()` after `setup(...)` in a copy of examples/run_grpo.py.
Equation (7) exactly with these settings:

    grpo.adv_estimator: {name: grpo, normalize_rewards: false, use_leave_one_out_baseline: false}     Â = R − mean
    grpo.advantage_clip_low, grpo.advantage_clip_high, grpo.seq_logprob_error_threshold: null
    grpo.overlong_filtering, grpo.use_dynamic_sampling: false
    loss_fn.reference_policy_kl_penalty: 0          no KL term: this loss has none
    loss_fn.force_on_policy_ratio: false            so that prev_logprobs, log π_old, are computed
    policy.generation: {temperature: 1.0, top_p: 1.0, top_k: null}
    policy.router_replay: {enabled: true}           R3, NeMo-RL's own, for mixtures of experts

Layout. `next_token_logprobs` is [B, S−1] and starts at the second token, so the tensors of `data`, [B, S], lose their
first column. log μ_old is `generation_logprobs`. A sample whose sample_mask is 0 does not count in B.

Aggregation. NeMo-RL sums the losses of micro-batches and ranks, each divided by a global count that it passes in. This
loss is sequence-level, so it divides by `global_valid_seqs`, the valid responses of the whole training batch. Metrics
are sums too, so token means are weighted by the micro-batch's share of `global_valid_toks`.
"""

from typing import Any

import torch
from torch import Tensor

from minirl_edu.plugins import PAPER, Choices, summed_loss


class MiniRLLossFn:
    """Equation (7) as a NeMo-RL loss function.

    `use_fused_linear_logprobs` has to be the value that the field of this name in the policy's `megatron_cfg` has.

    Raises:
        ImportError: NeMo-RL is not installed.
        KeyError: `data` has no prev_logprobs or no generation_logprobs.
    """

    def __init__(self, choices: Choices = PAPER, *, use_fused_linear_logprobs: bool = False) -> None:
        try:
            from nemo_rl.algorithms.loss.interfaces import (  # pyright: ignore[reportMissingImports]
                LossInputType,
                LossType,
                MetricNormalizer,
            )
        except ModuleNotFoundError as error:
            remedy = "run inside a checkout of github.com/NVIDIA-NeMo/RL, with `uv run`"
            raise ImportError(f"MiniRLLossFn needs nemo_rl: {remedy} ({error})", name=error.name) from error
        self.choices, self.use_fused_linear_logprobs = choices, use_fused_linear_logprobs
        self.loss_type, self.input_type = LossType.SEQUENCE_LEVEL, LossInputType.LOGPROB
        tokens = "token_mult_prob_error gen_kl_error is_weight_mean is_capped_frac clip_frac_pos clip_frac_neg"
        self.metric_normalizations = {
            **dict.fromkeys(tokens.split(), MetricNormalizer.TOKENS),
            "loss": MetricNormalizer.SEQUENCES,
            "num_valid_samples": MetricNormalizer.NONE,
        }

    def __call__(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """The micro-batch's part of the loss, and its parts of the metrics."""
        sequences, tokens = global_valid_seqs.clamp(min=1), global_valid_toks.clamp(min=1)
        names = ("token_mask", "advantages", "prev_logprobs", "generation_logprobs")
        mask, advantages, logp_old, logp_rollout = (data[name][:, 1:] for name in names)
        mask = (mask * data["sample_mask"][:, None]).bool()
        summed, metrics = summed_loss(next_token_logprobs, logp_old, logp_rollout, advantages, mask, self.choices)
        loss = summed / sequences
        gap = torch.where(mask, logp_old - logp_rollout, 0.0)
        share = mask.sum() / tokens
        parts = {
            "loss": loss.detach(),
            "num_valid_samples": data["sample_mask"].sum(),
            # The two that NeMo-RL's loop reads: E[exp|log π_old − log μ_old|], and k3 of KL(μ_old ‖ π_old).
            "token_mult_prob_error": (gap.abs().exp() * mask).sum() / tokens,
            "gen_kl_error": (gap.expm1() - gap).sum() / tokens,
            **{name: metrics[name] * share for name in self.metric_normalizations.keys() & metrics.keys()},
        }
        return loss, {name: value.item() for name, value in parts.items()}
