"""Record and replay around a Mixture-of-Experts of your own, in plain torch: what R3 does to the engine's gap."""

import copy

import torch
from torch import Tensor, nn

from minirl_edu import RoutingReplay, policy_metrics

VOCABULARY, HIDDEN, EXPERTS, TOP_K, LAYERS = 32, 64, 8, 2, 3


class MyTopKRouter(nn.Module):
    """What `RoutingReplay` looks for: a name in …TopKRouter, the two counts, one torch.topk over [tokens, E]."""

    num_experts, top_k = EXPERTS, TOP_K

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN) / HIDDEN**0.5)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores, chosen = torch.topk((hidden @ self.weight.T).softmax(-1), self.top_k, dim=-1)
        return scores / scores.sum(-1, keepdim=True), chosen


class Layer(nn.Module):
    """Each token goes through the experts that the router chose; a causal mean stands for attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(HIDDEN), MyTopKRouter()
        self.experts = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN) / HIDDEN**0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        count = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None]
        x = self.norm(hidden + hidden.cumsum(1) / count).flatten(0, 1)
        gates, chosen = self.router(x)
        out = torch.einsum("nh,nkhi->nki", x, self.experts[chosen]).relu()
        return hidden + (gates[..., None] * out).sum(1).view_as(hidden)


class MyModel(nn.Module):
    """The decoder: `layers` is a list, and its forward takes the tokens [B, S] first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    """log π of every token after the first, [B, S−1]."""
    logits = model(tokens[:, :-1]).float()
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]


torch.manual_seed(0)
trainer = MyModel()
engine = copy.deepcopy(trainer).to(torch.bfloat16)  # in the place of vLLM
tokens = torch.randint(VOCABULARY, (1, 1)).repeat(64, 1)
with torch.no_grad():
    for _ in range(32):
        tokens = torch.cat([tokens, torch.multinomial(engine(tokens)[:, -1].float().softmax(-1), 1)], dim=1)
    with RoutingReplay(engine).record() as tape:
        logp_rollout = log_probabilities(engine, tokens)
    replay = RoutingReplay(trainer)
    with replay.record() as own:
        logp_old = log_probabilities(trainer, tokens)
mask = torch.ones_like(logp_old, dtype=torch.bool)
flips = tape.routes.flip_rate(own.routes, mask).mean()

with replay.replay(tape.routes):  # R3: the experts are the engine's, the gates the trainer's own
    replayed = log_probabilities(trainer, tokens)
    replayed.mean().backward()
routers = [weight for name, weight in trainer.named_parameters() if "router" in name]
learns = all(weight.grad is not None and weight.grad.any() for weight in routers)

for name, logp in (("live", logp_old), ("replayed", replayed.detach())):
    gap = policy_metrics(logp, logp, logp_rollout, mask)["k3_rollout_old"]
    print(f"{name}: training-inference KL (k3) {gap:.1e} nats per token")
print(f"tokens that go to other experts in the engine: {flips:.1%} per layer; every router has a gradient: {learns}")
