"""MiniRL inside other frameworks: one small file for each, which calls `minirl_loss` on that framework's tensors.

    trl        a `GRPOTrainer`, with R2                    verl      a policy loss for verl's registry
    nemo_rl    a loss function object                      slime     a function for --custom-loss-function-path
    prime_rl   a custom loss, where π_old is known

Importing this package loads torch and no framework. Each file's docstring lists the settings with which the framework
optimises equation (7) exactly, and the version that was read. What is particular to a framework is its layout, where
log μ_old comes from, and what it divides a loss by:

    gradient step = −(1/B) Σ_b Σ_t M_t · min(π_θ/μ_old, is_cap) · Â · ∇log π_θ        B: all responses of the step

`summed_loss` has no divisor. Each file multiplies it by what turns the framework's own average over micro-batches and
ranks into 1/B.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minirl_edu.objectives import CORRECTIONS, PolicyLoss, minirl_loss

__all__ = ["PAPER", "Choices", "summed_loss"]

_BY_RESPONSE = ("sequence_truncated", "sequence_masked", "geometric_mean")


@dataclass(frozen=True)
class Choices:
    """What can be chosen of MiniRL, as in `minirl_loss`; the defaults are the paper's.

    Raises:
        ValueError: no correction of that name.
    """

    correction: str = "token_truncated"
    eps_low: float = 0.2
    eps_high: float = 0.27
    is_cap: float = 5.0
    clip: bool = True
    length_norm: bool = False

    def __post_init__(self) -> None:
        if self.correction not in CORRECTIONS:
            raise ValueError(f"correction is {self.correction!r}; expected one of {', '.join(CORRECTIONS)}")

    @property
    def by_token(self) -> bool:
        """Whether each token's term needs no other token, so that parts of a response add up to the whole."""
        return not self.length_norm and self.correction not in _BY_RESPONSE


PAPER = Choices()
"""Equation (7)."""

Tensors = Tensor | Sequence[Tensor]


def summed_loss(
    logp: Tensors,
    logp_old: Tensors,
    logp_rollout: Tensors | None,
    advantages: Tensors,
    mask: Tensors,
    choices: Choices = PAPER,
) -> PolicyLoss:
    """The *sum* over responses of equation (7)'s terms: `minirl_loss` times the number of responses.

    Args:
        logp, logp_old, logp_rollout, advantages, mask: as in `minirl_loss`, `[B, T]`; or lists of B tensors `[T_b]`,
            one a response, which are padded.
        choices: the correction, the clip range and the cap.
    """
    found = [logp, logp_old, logp_rollout, advantages, mask]
    rows = [x if x is None or isinstance(x, Tensor) else pad_sequence(list(x), batch_first=True) for x in found]
    return minirl_loss(*rows, num_responses=1, **asdict(choices))  # type: ignore[arg-type]
