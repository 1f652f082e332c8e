"""MiniRL in TRL: `MiniRLGRPOTrainer`, a `GRPOTrainer` with equation (7) in the place of GRPO's loss, and with R2.

Written and run with TRL 1.16.0, whose private methods it overrides. Everything else is TRL's. Equation (7) exactly with

    GRPOConfig(scale_rewards="none", ...)       Â = R − mean; other settings that change the objective are refused
    use_vllm=True                               log μ_old comes from vLLM; or rollout_func=..., which returns "logprobs"
    steps_per_generation = N · gradient_accumulation_steps                N mini-batches for each rollout
    MiniRLGRPOTrainer(..., replay="R2")         for mixtures of experts that `RoutingReplay` knows

loss_type, epsilon, epsilon_high, delta and vllm_importance_sampling_* are not read: `choices` has the clip range, the
correction and the cap, which is on the product π_θ/μ_old. Without an engine's log-probabilities (transformers samples
from the trained model itself) μ_old is taken to be π_old; so is that of a token to which vLLM gave none.

R2. TRL computes log π_old after sampling, unless π_old is the update's own forward: then θ = θ_old, and live routing
is R2. Else the experts of that forward are recorded, and replayed in the update until its backward has ended. R3 needs
the engine's experts, which TRL 1.16 doesn't collect.

Aggregation. Every micro-batch has the same number of responses, accumulation adds micro-batches up, and gradients are
averaged over ranks. So the sum is divided by the micro-batch's responses and by the number of micro-batches.
"""

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from minirl_edu.plugins import PAPER, Choices, summed_loss
from minirl_edu.routing import Routes, RoutingReplay

try:
    from trl.trainer.grpo_trainer import GRPOTrainer
except ModuleNotFoundError as error:
    remedy = 'python -m pip install "minirl-edu[trl]"'
    raise ImportError(f"minirl_edu.plugins.trl needs TRL: {remedy} ({error})", name=error.name) from error

OVERRIDDEN = ("_compute_loss", "_generate_and_score_completions", "_get_per_token_logps_and_entropies", "training_step")
"""Methods of `GRPOTrainer` that must exist, or GRPO's loss would be trained in silence."""
if missing := [name for name in OVERRIDDEN if name not in vars(GRPOTrainer)]:
    raise ImportError(f"this TRL has no GRPOTrainer.{missing[0]}, which MiniRL overrides: install trl==1.16.0")

EXACT = {
    **{"scale_rewards": "none", "multi_objective_aggregation": "sum_then_normalize", "beta": 0.0, "entropy_coef": 0.0},
    **{"importance_sampling_level": "token", "off_policy_mask_threshold": None, "mask_truncated_completions": False},
    **{"use_adaptive_entropy": False, "top_entropy_quantile": 1.0},
    **{"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0},
}
"""Settings of `GRPOConfig` that would change the objective, with the one value that each must have."""


class MiniRLGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` with MiniRL's loss; arguments as there, and two more by keyword.

    Args:
        choices: the correction, the clip range and the cap.
        replay: "R2", or None for live routing.

    Raises:
        ValueError: a setting under which the objective would not be MiniRL's; the message names it.
        UnsupportedRouter: with R2, the model is dense or of an unknown kind.
    """

    def __init__(self, *args: Any, choices: Choices = PAPER, replay: str | None = None, **kwargs: Any) -> None:
        if replay not in (None, "R2"):
            raise ValueError(f"replay is {replay!r}; expected 'R2' or None")
        super().__init__(*args, **kwargs)
        for name, needed in EXACT.items():
            if (found := getattr(self.args, name)) != needed:
                raise ValueError(f"GRPOConfig.{name} is {found!r}; with MiniRL it must be {needed!r}")
        if self.aux_loss_enabled:
            raise ValueError("GRPOConfig.router_aux_loss_coef adds a load-balancing loss; with MiniRL it must be 0.0")
        self.choices = choices
        policy: Any = self.model
        self.replay = RoutingReplay(policy) if replay else None
        self._recorded: list[Routes] | None = None
        self._until_backward = ExitStack()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in TRL; experts are replayed until the backward has ended."""
        with ExitStack() as self._until_backward:
            return super().training_step(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._recorded = [] if self.replay else None
        output = super()._generate_and_score_completions(inputs)
        if self._recorded:
            routes = Routes.cat(self._recorded, dim=0)
            output |= {"experts_old": routes.experts, "experts_valid": routes.valid}  # shuffled and split with the rest
        self._recorded = None
        return output

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        forward = super()._get_per_token_logps_and_entropies
        if self._recorded is None:
            return forward(model, input_ids, attention_mask, *args, **kwargs)
        if kwargs.get("num_images") is not None:
            raise ValueError("replay='R2' is for text: with images, TRL's forward cannot be cut here; set replay=None")
        assert self.replay is not None
        rows, logps = kwargs.pop("batch_size", None) or len(input_ids), []
        for ids, mask in zip(input_ids.split(rows), attention_mask.split(rows), strict=True):
            with self.replay.record() as tape:
                logps.append(forward(model, ids, mask, *args, **kwargs)[0])
            self._recorded.append(tape.routes.to("cpu"))
        return torch.cat(logps), None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        policy: Any = self.model
        training, completion = policy.training, inputs["completion_ids"]
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        if training and self.replay and "experts_old" in inputs:
            routes = Routes(inputs["experts_old"], inputs["experts_valid"], self.replay.layers)
            self._until_backward.enter_context(self.replay.replay(routes))
        ids = torch.cat([inputs["prompt_ids"], completion], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        images = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters.keys() & inputs.keys()
        logp, entropy, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention, completion.size(1), compute_entropy=True, **{name: inputs[name] for name in images}
        )
        logp_old = inputs.get("old_per_token_logps")
        logp_old = logp.detach() if logp_old is None else logp_old
        logp_rollout = inputs.get("sampling_per_token_logps")
        logp_rollout = logp_old if logp_rollout is None else torch.where(logp_rollout.isnan(), logp_old, logp_rollout)
        loss, metrics = summed_loss(logp, logp_old, logp_rollout, inputs["advantages"], mask, self.choices)
        metrics |= {"entropy": (entropy * mask).sum() / mask.sum().clamp(min=1)}
        for name, value in metrics.items():
            values: Any = self.accelerator.gather(value)
            logged = self._metrics["train" if training else "eval"][name]
            logged.append((values.max() if name == "is_weight_max" else values.mean()).item())
        return loss / (len(logp) * (self.current_gradient_accumulation_steps if training else 1))
