"""What the gradient without the train–inference weight contains, exactly: a signal and a drift.

One prompt, a sampler μ apart from the trainer's policy π (both `exact.TabularPolicy`), a reward for every response, and
the baseline of a large group, b = E_μ[R]. Context c is visited with probability d(c); Q(c, a) = E_μ[R | c, a] and
V(c) = E_μ[R | c] = Σ_a μ(a|c) Q(c, a). Without the weight, the expected gradient with respect to the logits of c is

    E_μ[ Σ_t (R − b) ∇log π(y_t|·) ](c) = d(c) μ(·|c) ∘ (Q(c, ·) − V(c))  +  d(c) (V(c) − b) (μ(·|c) − π(·|c))
                                          ------------ signal ------------     ------------- drift -------------

A token of a response that does worse than b pushes π away from the sampler, one that does better pulls π towards it,
whatever the token's own merit. With the weight π/μ the drift is 0, since Σ_a π(a) (e_a − π) = 0, and the signal is
d π ∘ (Q − Σ_a π(a) Q(·, a)): the centre moves from V, which is the sampler's, to the trainer's mean of Q.

Any other weight w(y, t), a cap or a mask, leaves a part: split the advantage into R − V(c) and V(c) − b and put w on
both. A finite group, whose mean contains the response itself, scales signal and drift alike by 1 − 1/G.

How large. Σ_c d(c) (V(c) − b) = E_μ[Σ_t (R − b)] = Cov(|y|, R). So where μ − π is the same in all contexts, the drifts
add up to Cov(|y|, R) · (μ − π); elsewhere that holds for the mean of μ − π over contexts, plus the covariance of μ − π
with d (V − b). Divided by |y| the same sum is E[R − b] = 0: then the drifts of single contexts cancel in the total, but
need not vanish.

A noisy sampler. Its μ − π has a mean, `sampler_bias`, of second order in the noise. The drift's mean is that times
d (V − b), and a second term of the same order in contexts where the token matters, because V(c) moves with the noise
that also moves μ(·|c): σ² d (1 − d) π_a [π_a (Q_a − V) − Σ_j π_j² (Q_j − V)]. In a context where all is decided, Q = V,
and it vanishes.

Shapes: B = all responses, P = all prefixes, T = longest response, V = vocabulary. Everything is float64.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from minirl_edu.exact import TabularPolicy


def visits(mu: TabularPolicy) -> Float[Tensor, " P"]:
    """d(c), the probability that a response of μ passes through prefix c. They sum to E_μ[|y|]."""
    return _token_mass(mu, mu.response_probs()).sum(1)


def action_values(mu: TabularPolicy, rewards: Float[Tensor, " B"]) -> Float[Tensor, "P V"]:
    """Q(c, a) = E_μ[R | prefix c, then token a]."""
    probs = mu.response_probs()
    return _token_mass(mu, probs * rewards) / _token_mass(mu, probs)


def values(mu: TabularPolicy, rewards: Float[Tensor, " B"]) -> Float[Tensor, " P"]:
    """V(c) = E_μ[R | prefix c]. That of the empty prefix, row 0, is the baseline b = E_μ[R]."""
    probs = mu.response_probs()
    return _token_mass(mu, probs * rewards).sum(1) / _token_mass(mu, probs).sum(1)


def unweighted_gradient(pi: TabularPolicy, mu: TabularPolicy, rewards: Float[Tensor, " B"]) -> Float[Tensor, "P V"]:
    """E_μ[ Σ_t (R − b) ∇log π(y_t|·) ] with respect to π's logits: what is followed when the weight is left out."""
    advantages = mu.response_probs() * (rewards - values(mu, rewards)[0])
    return pi.score_sum(advantages[:, None].expand(pi.mask.shape))


def signal(
    pi: TabularPolicy,
    mu: TabularPolicy,
    rewards: Float[Tensor, " B"],
    weight: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, "P V"]:
    """E_μ[ Σ_t w_t (R − V(c_t)) ∇log π(y_t|c_t) ], the part of the gradient that knows which token was better.

    `weight` is w, 1 if None. Without it this is d(c) · μ(·|c) ∘ (Q(c, ·) − V(c)).
    """
    return _weighted(pi, mu, rewards[:, None] - values(mu, rewards)[mu.prefix], weight)


def drift(
    pi: TabularPolicy,
    mu: TabularPolicy,
    rewards: Float[Tensor, " B"],
    weight: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, "P V"]:
    """E_μ[ Σ_t w_t (V(c_t) − b) ∇log π(y_t|c_t) ], the part that only knows how the whole prefix does.

    Without a weight it is d(c) (V(c) − b) (μ(·|c) − π(·|c)); with w = π/μ, of the token or of the whole response, it
    is 0. For a weight that depends on token and context alone, ν = w ∘ μ, it is d(c) (V(c) − b) (ν − π Σ_a ν_a).
    """
    ahead = values(mu, rewards) - values(mu, rewards)[0]
    return _weighted(pi, mu, ahead[mu.prefix], weight)


def gradient_variance(
    pi: TabularPolicy,
    mu: TabularPolicy,
    rewards: Float[Tensor, " B"],
    weight: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """Variance of one response's gradient g(y) = Σ_t w_t (R − b) ∇log π(y_t|·): E‖g‖² − ‖E[g]‖², summed over logits.

    A response visits each prefix at most once, so ‖g(y)‖² = Σ_t (w_t (R − b))² (1 − 2 π(y_t) + Σ_a π(a)²).
    """
    advantages = (rewards - values(mu, rewards)[0])[:, None].expand(mu.mask.shape)
    collision = pi.logits.softmax(-1).square().sum(-1)[pi.prefix]
    weighted = advantages if weight is None else advantages * weight
    squares = torch.where(pi.mask, weighted.square() * (1 - 2 * pi.log_probs().exp() + collision), 0.0)
    mean = _weighted(pi, mu, advantages, weight)
    return (mu.response_probs() * squares.sum(1)).sum() - mean.square().sum()


def sampler_bias(probs: Float[Tensor, "*contexts V"], sigma: float) -> Float[Tensor, "*contexts V"]:
    """E[μ] − π to second order, where μ's logits are those of π plus independent noise of mean 0 and variance σ².

        E[μ_a] − π_a = σ² π_a (S − π_a) = −(σ²/2) ∂S/∂z_a,    S = Σ_a π_a²

    The error is O(σ⁴) for noise that is symmetric, O(σ³) for other noise. So a noisy sampler is flatter than π. A drift
    with Cov(|y|, R) < 0 climbs S, and the entropy never grows on the way: along ∇S it changes by

        ⟨∇S, ∇H⟩ = −2 Σ_a π_a² (π_a − S)(log π_a + H) ≤ 0

    (with weights π_a²/S: two increasing functions of π_a have a covariance ≥ 0, and means Σπ³/S − S ≥ 0 and
    Σπ² log π/S + H ≥ 0). It is 0 only where π is uniform on the tokens it can draw.
    """
    return sigma**2 * probs * (probs.square().sum(-1, keepdim=True) - probs)


def entropy_gradient(logits: Float[Tensor, "*contexts V"]) -> Float[Tensor, "*contexts V"]:
    """∂H/∂z_a = −π_a (log π_a + H): how a context's entropy H (nats) follows its logits z."""
    logp = logits.log_softmax(-1)
    probs = logp.exp()
    return -probs * (logp - (probs * logp).sum(-1, keepdim=True))


def _token_mass(mu: TabularPolicy, mass: Float[Tensor, " B"]) -> Float[Tensor, "P V"]:
    """`mass` of the responses, added up over those that draw token a at prefix c."""
    spread = torch.where(mu.mask, mass[:, None], 0.0)
    return torch.zeros_like(mu.logits).index_put((mu.prefix, mu.tokens), spread, accumulate=True)


def _weighted(
    pi: TabularPolicy, mu: TabularPolicy, coefficient: Float[Tensor, "B T"], weight: Float[Tensor, "B T"] | None
) -> Float[Tensor, "P V"]:
    return pi.score_sum(mu.response_probs()[:, None] * coefficient * (1.0 if weight is None else weight))
