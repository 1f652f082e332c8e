"""A policy small enough to enumerate: J_seq, J_token and their gradients without sampling, in float64.

A tabular autoregressive policy keeps one row of logits per prefix. With V tokens (the last, V − 1, ends the response)
and at most T tokens, every response can be written down, so the expectations of equations (1) to (4) are finite sums.
Rewards are a table too: one number for each enumerated response, for the one (implicit) prompt.

Shapes: B = all responses, P = all prefixes without an end token, T = longest response, V = vocabulary.
"""

from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class TabularPolicy:
    """Probabilities of the next token for every prefix: softmax of `logits[prefix]`.

    Two policies of one shape enumerate the same responses in the same order, so their tables line up row by row.

    Args:
        logits: `[P, V]` with P = Σ_{l<T} (V−1)^l; `TabularPolicy.random` makes them. Kept as float64 (a float64
            tensor is kept as it is, so that autograd can reach it).
        max_length: T. A response ends with the end token or, without one, after T tokens.

    Attributes:
        tokens: `[B, T]`, every response; 0 after the end.
        mask: `[B, T]`, true on response tokens, end token included.
        prefix: `[B, T]`, the row of `logits` that token t was drawn from; 0 after the end.

    Raises:
        ValueError: `logits` has the wrong number of rows for its vocabulary and `max_length`.
    """

    tokens: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    prefix: Int[Tensor, "B T"]

    def __init__(self, logits: Float[Tensor, "P V"], max_length: int):
        end = logits.shape[1] - 1
        prefixes = [p for length in range(max_length) for p in product(range(end), repeat=length)]
        if len(prefixes) != len(logits):
            raise ValueError(
                f"logits has {len(logits)} rows; vocabulary {end + 1} and max_length {max_length} need one for each of "
                f"{len(prefixes)} prefixes"
            )
        row = {p: i for i, p in enumerate(prefixes)}
        responses = [(*p, end) for p in prefixes] + list(product(range(end), repeat=max_length))

        def table(values: list[list[int]]) -> Tensor:
            return torch.tensor([v + [0] * (max_length - len(v)) for v in values])

        self.logits = logits.double()
        self.max_length = max_length
        self.tokens = table([list(y) for y in responses])
        self.mask = table([[1] * len(y) for y in responses]).bool()
        self.prefix = table([[row[y[:t]] for t in range(len(y))] for y in responses])

    @classmethod
    def random(cls, vocab_size: int, max_length: int, *, seed: int, scale: float = 1.0) -> "TabularPolicy":
        """A policy with normally distributed logits, standard deviation `scale`."""
        rows = sum((vocab_size - 1) ** length for length in range(max_length))
        generator = torch.Generator().manual_seed(seed)
        return cls(scale * torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64), max_length)

    def moved(self, direction: Float[Tensor, "P V"], step: float = 1.0) -> "TabularPolicy":
        """The policy with logits `logits + step · direction`: an updated θ, or an inference engine that rounds."""
        return TabularPolicy(self.logits + step * direction, self.max_length)

    def log_probs(self) -> Float[Tensor, "B T"]:
        """log π(y_t | y_<t) in nats for every token of every response; 0 after the end."""
        return torch.where(self.mask, self.logits.log_softmax(-1)[self.prefix, self.tokens], 0.0)

    def response_probs(self) -> Float[Tensor, " B"]:
        """π(y) = Π_t π(y_t | y_<t) of every response. They sum to 1."""
        return self.log_probs().sum(1).exp()

    def score_sum(self, coefficient: Float[Tensor, "B T"]) -> Float[Tensor, "P V"]:
        """Σ_y Σ_t coefficient(y, t) · ∇log π(y_t | y_<t), a gradient with respect to `logits`.

        Written out rather than left to autograd: ∇_{logits[y_<t]} log π(y_t | y_<t) = onehot(y_t) − π(· | y_<t).
        """
        drawn = torch.zeros_like(self.logits).index_put(
            (self.prefix, self.tokens), torch.where(self.mask, coefficient, 0.0), accumulate=True
        )
        return drawn - drawn.sum(1, keepdim=True) * self.logits.softmax(-1)


def token_ratios(pi: TabularPolicy, mu_old: TabularPolicy) -> Float[Tensor, "B T"]:
    """π_θ(y_t|y_<t) / μ_old(y_t|y_<t) = 1 + δ_t of every token of every response; 1 after the end."""
    return (pi.log_probs() - mu_old.log_probs()).exp()


def sequence_objective(pi: TabularPolicy, mu_old: TabularPolicy, rewards: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """(1)  J_seq(θ) = E_{y~μ_old}[ (π_θ(y)/μ_old(y)) · R(y) ], which is E_{y~π_θ}[R]."""
    ratio = token_ratios(pi, mu_old).prod(1)
    return (mu_old.response_probs() * ratio * rewards).sum()


def sequence_gradient(pi: TabularPolicy, mu_old: TabularPolicy, rewards: Float[Tensor, " B"]) -> Float[Tensor, "P V"]:
    """(2)  ∇J_seq = E_{y~μ_old}[ (π_θ(y)/μ_old(y)) · R(y) · Σ_t ∇log π_θ(y_t|·) ], with respect to π_θ's logits."""
    ratio = token_ratios(pi, mu_old).prod(1)
    return pi.score_sum((mu_old.response_probs() * ratio * rewards)[:, None].expand(pi.mask.shape))


def token_objective(pi: TabularPolicy, mu_old: TabularPolicy, rewards: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """(3)  J_token(θ) = E_{y~μ_old}[ Σ_t (π_θ(y_t|·)/μ_old(y_t|·)) · R(y) ]."""
    ratio_sum = (token_ratios(pi, mu_old) * pi.mask).sum(1)
    return (mu_old.response_probs() * ratio_sum * rewards).sum()


def token_gradient(pi: TabularPolicy, mu_old: TabularPolicy, rewards: Float[Tensor, " B"]) -> Float[Tensor, "P V"]:
    """(4)  ∇J_token = E_{y~μ_old}[ Σ_t (π_θ(y_t|·)/μ_old(y_t|·)) · R(y) · ∇log π_θ(y_t|·) ], w.r.t. π_θ's logits."""
    return pi.score_sum((mu_old.response_probs() * rewards)[:, None] * token_ratios(pi, mu_old))


def objective_remainder(pi: TabularPolicy, mu_old: TabularPolicy, rewards: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """What the first-order step drops: E_{y~μ_old}[ (Π_t(1 + δ_t) − 1 − Σ_t δ_t) · R(y) ], of second order in δ.

    Equally, how much further J_seq has moved from its value at μ_old than J_token has. (The values themselves differ
    at δ = 0: each token adds a 1 to the sum in (3).) The gradients of J_seq and J_token differ by the gradient of
    this, of first order in δ.
    """
    delta = token_ratios(pi, mu_old) - 1
    return (mu_old.response_probs() * ((1 + delta).prod(1) - 1 - delta.sum(1)) * rewards).sum()
