"""Proves the equations of lesson 08, MiniRL end to end, by enumeration, by autograd and with the library's trainer."""

import math
import tempfile

import numpy as np
import torch
from torch import Tensor

from minirl_edu.config import load_config
from minirl_edu.diagnostics import entropy_from_logits
from minirl_edu.exact import TabularPolicy, sequence_gradient
from minirl_edu.models import load_model
from minirl_edu.objectives import minirl_loss
from minirl_edu.rollout import HFEngine
from minirl_edu.trainer import MiniRLTrainer


def policies(scale: float = 0.3) -> tuple[TabularPolicy, TabularPolicy, TabularPolicy]:
    """μ_old, π_old near it, and a target policy π_θ that has moved on: 3 tokens, responses of up to 3."""
    mu_old = TabularPolicy.random(3, 3, seed=0)
    pi_old = mu_old.moved(TabularPolicy.random(3, 3, seed=1).logits, scale)
    return mu_old, pi_old, pi_old.moved(TabularPolicy.random(3, 3, seed=2).logits, scale)


def rewards_of(policy: TabularPolicy) -> Tensor:
    """0 or 1 for each response, drawn once."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 2, (len(policy.tokens),), generator=generator).double()


class CountingEngine(HFEngine):
    """An engine that keeps a record of what it was asked for."""

    generated: list[int]
    synced: list[int]

    def generate(self, prompts, *, group_size, sampling, seed):
        """As the engine's, with a note of the number of responses."""
        rollout = super().generate(prompts, group_size=group_size, sampling=sampling, seed=seed)
        self.generated = [*getattr(self, "generated", []), len(rollout.tokens)]
        return rollout

    def sync(self, model, *, version):
        """As the engine's, with a note of the version."""
        super().sync(model, version=version)
        self.synced = [*getattr(self, "synced", []), version]


def check_08_global_step() -> None:
    """A real global step at N = 3: from one rollout of gbs responses, three gradient steps on mbs responses each."""
    updates, prompts, group_size = 3, 2, 4
    config = load_config(
        overrides=[
            f"train.mini_batches={updates}",
            f"train.mini_batch_prompts={prompts}",
            f"train.group_size={group_size}",
            "eval.every=0",
        ]
    )
    model = load_model("chain-steps")
    engine = CountingEngine(model, record_routes=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = MiniRLTrainer(config, folder, model=model, engine=engine, progress=False)
        engine.synced.clear()
        sizes = []
        count = trainer._update
        trainer._update = lambda batch: (sizes.append(batch.responses), count(batch))[1]
        lines = trainer.global_step()
    assert len(lines) == updates and trainer.grad_step == updates
    assert sizes == [prompts * group_size] * updates  # mbs
    assert engine.generated == [updates * prompts * group_size]  # one rollout, gbs = N · mbs
    assert engine.synced == [1]  # one sync, at the end


def check_08_minirl() -> None:
    """(7) as an expectation over all responses, its gradient by hand, against autograd through the library's loss."""
    mu_old, pi_old, target = policies(1.2)
    advantages = rewards_of(mu_old) - 0.4
    logits = target.logits.clone().requires_grad_()
    pi = TabularPolicy(logits, 3)
    by_hand = torch.zeros_like(logits)
    dropped = capped = 0
    for i, probability in enumerate(mu_old.response_probs().tolist()):
        for t in mu_old.mask[i].nonzero()[:, 0].tolist():
            row, word, a = int(pi.prefix[i, t]), int(pi.tokens[i, t]), advantages[i].item()
            now, old, mu = (p.log_probs()[i, t].item() for p in (target, pi_old, mu_old))
            r, w = math.exp(now - old), math.exp(now - mu)
            keeps = not ((a > 0 and r > 1.27) or (a < 0 and r < 0.8))
            dropped, capped = dropped + (not keeps), capped + (w > 5)
            score = -target.logits[row].softmax(-1)
            score[word] += 1  # ∇ log π with respect to the logits of the row
            by_hand[row] += probability * keeps * min(w, 5.0) * a * score
    assert dropped > 0 and capped > 0  # both rules took part
    # The loss is a mean over responses: with Â·μ(y)·B in place of Â the mean is the expectation (the sign stays).
    weighted = advantages * mu_old.response_probs() * len(advantages)
    loss = minirl_loss(pi.log_probs(), pi_old.log_probs(), mu_old.log_probs(), weighted, mu_old.mask).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(-gradient, by_hand, rtol=1e-10, atol=1e-12)


def check_08_start() -> None:
    """At θ = θ_old and μ_old = π_old the gradient of (7) is that of J_seq, whatever constant the baseline is."""
    mu_old, _, _ = policies()
    rewards = rewards_of(mu_old)
    exact = sequence_gradient(mu_old, mu_old, rewards)
    for baseline in (0.0, 0.37, -2.0):
        logits = mu_old.logits.clone().requires_grad_()
        logp = TabularPolicy(logits, 3).log_probs()
        weighted = (rewards - baseline) * mu_old.response_probs() * len(rewards)
        loss = minirl_loss(logp, logp.detach(), mu_old.log_probs(), weighted, mu_old.mask).loss
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(-gradient, exact, rtol=1e-10, atol=1e-12)
    assert exact.abs().max() > 1e-2


def check_08_parts() -> None:
    """Uneven parts with the global divisor add up to the whole in value and gradient; a mean of means does not."""
    generator = torch.Generator().manual_seed(0)
    logp, old, mu = (-torch.rand(6, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.arange(4) < torch.tensor([4, 1, 3, 2, 4, 1])[:, None]
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    logp.requires_grad_()
    whole = minirl_loss(logp, old, mu, advantages, mask, clip=False).loss
    written_out = 0.0
    for b, t in mask.nonzero().tolist():
        weight = min(math.exp(logp[b, t].item() - mu[b, t].item()), 5.0)
        written_out -= weight * advantages[b].item() * logp[b, t].item() / 6
    assert math.isclose(whole.item(), written_out, rel_tol=1e-12)
    rows = [slice(0, 3), slice(3, 4), slice(4, 6)]
    parts = [minirl_loss(logp[s], old[s], mu[s], advantages[s], mask[s], clip=False, num_responses=6) for s in rows]
    together = torch.stack([part.loss for part in parts]).sum()
    torch.testing.assert_close(together, whole, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, logp, retain_graph=True)[0] for loss in (together, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)
    means = [minirl_loss(logp[s], old[s], mu[s], advantages[s], mask[s], clip=False).loss for s in rows]
    assert abs((sum(means) / 3 - whole).item()) > 0.05


def check_08_entropy() -> None:
    """The library's entropy is the sum over words, and the mean surprisal −log π(w) of words drawn from π."""
    logits = TabularPolicy.random(5, 2, seed=4).logits[0]
    pi = logits.softmax(-1)
    by_hand = -sum(p * math.log(p) for p in pi.tolist())
    assert math.isclose(entropy_from_logits(logits[None])[0].item(), by_hand, rel_tol=1e-12)
    assert math.isclose((pi * -pi.log()).sum().item(), by_hand, rel_tol=1e-12)
    assert math.isclose(entropy_from_logits(torch.zeros(1, 5))[0].item(), math.log(5), rel_tol=1e-6)


def check_08_entropy_slope() -> None:
    """dH along any direction of the logits: autograd against minus the covariance of log π with the direction."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        z, direction = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(entropy_from_logits(z[None])[0], z)
        slope = (gradient @ direction).item()
        pi = z.detach().softmax(-1)
        log_pi = pi.log()
        covariance = (pi * log_pi * direction).sum() - (pi * log_pi).sum() * (pi * direction).sum()
        assert math.isclose(slope, -covariance.item(), rel_tol=1e-9)
        assert abs(slope) > 1e-3


def check_08_entropy_step() -> None:
    """The policy gradient moves logit a by π_a·A_a, so the first step changes H by −Cov(log π, π A): the remainder
    shrinks with the square of the step, and the sign goes with which words are rewarded."""
    z = torch.tensor([2.0, 0.5, 0.0, -1.0], dtype=torch.float64)
    pi = z.softmax(-1)

    def rise(reward: Tensor, step: float) -> tuple[float, float]:
        free = z.clone().requires_grad_()
        advantage = reward - pi @ reward  # E_π[A] = 0
        expected = (pi * advantage * free.log_softmax(-1)).sum()  # E_{a~π}[A log π], as (7) has it on-policy
        (gradient,) = torch.autograd.grad(expected, free)
        torch.testing.assert_close(gradient, pi * advantage)
        change = entropy_from_logits((z + step * gradient)[None]) - entropy_from_logits(z[None])
        x, y = pi.log(), pi * advantage
        return change.item(), -step * ((pi * x * y).sum() - (pi * x).sum() * (pi * y).sum()).item()

    likely, unlikely = torch.eye(4, dtype=torch.float64)[0], torch.eye(4, dtype=torch.float64)[3]
    for reward, sign in ((likely, -1), (unlikely, 1)):
        exact, predicted = rise(reward, 1e-3)
        assert math.copysign(1, exact) == math.copysign(1, predicted) == sign
        remainders = [abs(np.subtract(*rise(reward, step))) for step in (0.02, 0.01)]
        assert 3.7 < remainders[0] / remainders[1] < 4.3  # quadratic
