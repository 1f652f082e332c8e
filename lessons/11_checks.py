"""Proves the equations of lesson 11, scaling up: sums over ranks; counts against those of torch and transformers."""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from minirl_edu.models import tiny_dense, tiny_moe
from minirl_edu.objectives import minirl_loss

QWEN3_30B_A3B = dict(
    vocab_size=151_936,
    hidden_size=2048,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    tie_word_embeddings=False,
)


def mini_batch() -> tuple[Tensor, ...]:
    """logp, logp_old, logp_rollout, advantages and mask of six responses, one of them without a signal."""
    generator = torch.Generator().manual_seed(0)
    logp, old, mu = (-torch.rand(6, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    advantages = torch.tensor([0.5, -0.5, 0.0, 0.7, -0.2, -0.5], dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 1])[:, None]
    return logp.requires_grad_(), old, mu, advantages, mask


RANKS = (slice(0, 3), slice(3, 4), slice(4, 6))


def check_11_invariant() -> None:
    """MiniRL's loss of six responses, on one rank and on three with the global divisor: value and gradient agree, and
    both are the sum written out."""
    logp, *others = mini_batch()
    whole = minirl_loss(logp, *others).loss
    ranks = [minirl_loss(logp[s], *(x[s] for x in others), num_responses=6).loss for s in RANKS]
    together = torch.stack(ranks).sum()
    torch.testing.assert_close(together, whole, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, logp, retain_graph=True)[0] for loss in (whole, together)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)
    old, mu, advantages, mask = others
    written_out = 0.0
    for b, t in mask.nonzero().tolist():
        now, a = logp[b, t].item(), advantages[b].item()
        r, weight = math.exp(now - old[b, t].item()), min(math.exp(now - mu[b, t].item()), 5.0)
        if not ((a > 0 and r > 1.27) or (a < 0 and r < 0.8)):
            written_out -= weight * a * now / 6
    assert math.isclose(whole.item(), written_out, rel_tol=1e-12)


def check_11_bias() -> None:
    """Both forms of the error of a mean of local means, for responses and for tokens; zero for equal ranks."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(12, generator=generator, dtype=torch.float64)
    for sizes in ((7, 2, 3), (1, 1, 10), (4, 4, 4)):
        parts, count, total = values.split(sizes), len(sizes), sum(sizes)
        means = torch.stack([part.mean() for part in parts])
        error = means.mean() - values.mean()
        n = torch.tensor(sizes, dtype=torch.float64)
        torch.testing.assert_close(((1 / count - n / total) * means).sum(), error, rtol=1e-10, atol=1e-12)
        covariance = (n * means).mean() - n.mean() * means.mean()
        torch.testing.assert_close(-count / total * covariance, error, rtol=1e-10, atol=1e-12)
        assert (error.abs() < 1e-12) == (len(set(sizes)) == 1)
    # Long responses on one rank, and losses that grow with the length: the covariance is positive, the error negative.
    lengths = torch.tensor([1.0, 2.0, 3.0, 8.0, 9.0, 10.0], dtype=torch.float64)
    parts = (lengths[:2], lengths[2:])
    assert sum(part.mean() for part in parts) / 2 < lengths.mean()


def check_11_allreduce() -> None:
    """Gradients averaged over ranks, as DDP and FSDP do, of the loss times the world size; without it, K times less."""
    logp, *others = mini_batch()
    (whole,) = torch.autograd.grad(minirl_loss(logp, *others).loss, logp)

    def averaged(factor: float) -> Tensor:
        gradients = []
        for s in RANKS:
            loss = factor * minirl_loss(logp[s], *(x[s] for x in others), num_responses=6).loss
            gradients.append(torch.autograd.grad(loss, logp)[0])
        return torch.stack(gradients).mean(0)

    torch.testing.assert_close(averaged(len(RANKS)), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(averaged(1) * len(RANKS), whole, rtol=1e-12, atol=0)
    assert (averaged(1) - whole).norm() > 0.5 * whole.norm()


def layer_parameters(c: dict) -> tuple[int, int]:
    """All and active parameters of one layer by (11.6)."""
    d, h, e, k = c["hidden_size"], c["head_dim"], c["num_experts"], c["num_experts_per_tok"]
    attention = 2 * d * h * (c["num_attention_heads"] + c["num_key_value_heads"])
    shared = attention + d * e + 2 * d + 2 * h
    expert = 3 * d * c["moe_intermediate_size"]
    return shared + e * expert, shared + k * expert


def check_11_params() -> None:
    """(11.6) against transformers' own count of Qwen3-30B-A3B, on the meta device, and of the tiny model; and against
    the published 30.5 and 3.3 billion."""
    c = QWEN3_30B_A3B
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**c))
    embeddings = 2 * c["vocab_size"] * c["hidden_size"]
    total, active = (c["num_hidden_layers"] * n + embeddings + c["hidden_size"] for n in layer_parameters(c))
    assert total == sum(p.numel() for p in model.parameters())
    assert round(total / 1e9, 1) == 30.5
    assert 3.3 <= active / 1e9 < 3.4
    tiny = tiny_moe(18, seed=0)
    shape = {name: getattr(tiny.config, name) for name in c}
    own = shape["num_hidden_layers"] * layer_parameters(shape)[0] + (18 + 1) * shape["hidden_size"]  # tied
    assert own == sum(p.numel() for p in tiny.parameters())


def check_11_states() -> None:
    """Bytes of weights, gradients and AdamW's states after a step in fp32; and the same 16 in mixed precision."""
    model = tiny_dense(18, seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(12)[None]).logits.sum().backward()
    optimizer.step()
    parameters = sum(p.numel() for p in model.parameters())
    held = sum(p.nbytes + p.grad.nbytes for p in model.parameters())
    held += sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.dim() > 0)
    assert held == 16 * parameters
    sizes = {
        "weights": torch.bfloat16,
        "gradients": torch.bfloat16,
        "master": torch.float32,
        "m": torch.float32,
        "v": torch.float32,
    }
    assert sum(dtype.itemsize for dtype in sizes.values()) == 16


def counted_flops(model: torch.nn.Module, tokens: Tensor) -> int:
    """FLOPs of a forward and a backward, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens).logits.sum().backward()
    return counter.get_total_flops()


def check_11_flops() -> None:
    """torch's count of forward and backward, dense and MoE, against 6·N + 12·L·n_q·h·c. The eager attention that it
    counts computes the whole square, so there c = S; the mean over a causal triangle is (S + 1)/2."""
    rows, length = 2, 9
    tokens = torch.arange(rows * length).view(rows, length) % 16
    for model in (tiny_dense(18, seed=0), tiny_moe(18, seed=0)):
        model.set_attn_implementation("eager")
        c = model.config
        active = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2)  # the tied head is a product
        if (experts := getattr(c, "num_experts", None)) is not None:
            model.set_experts_implementation("eager")
            active += c.num_hidden_layers * c.num_experts_per_tok * 3 * c.hidden_size * c.moe_intermediate_size
            assert experts == 8
        attention = 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * length
        expected = rows * length * (6 * active + attention)
        counted = counted_flops(model, tokens)
        # Rotary angles are a small product of their own, without a backward.
        assert abs(counted - expected) < 0.01 * expected, (counted, expected)
        assert abs(counted - rows * length * (4 * active + attention)) > 0.1 * expected
    seen = [t + 1 for t in range(length)]
    assert sum(seen) / length == (length + 1) / 2


def check_11_intensity() -> None:
    """Where memory and arithmetic of a decoding step take equally long: found by walking through batch sizes."""
    rate, bandwidth, itemsize = 989e12, 3.35e12, 2
    parameters = 30e9
    for experts, top_k in ((1, 1), (128, 8)):  # dense, and MoE with nearly all parameters in experts

        def seconds(batch: int, experts: int = experts, top_k: int = top_k) -> tuple[float, float]:
            touched = 1 - (1 - top_k / experts) ** batch
            return itemsize * parameters * touched / bandwidth, 2 * parameters * top_k / experts * batch / rate

        crossing = next(b for b in range(1, 10_000) if seconds(b)[1] >= seconds(b)[0])
        predicted = rate * itemsize / (2 * bandwidth) * experts / top_k
        assert abs(crossing - predicted) <= 1
    assert round(989e12 / 3.35e12) == 295
