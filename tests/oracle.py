"""What the fast paths are held to: whole sequences one at a time, without cache, padding, masks or layouts."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minirl_edu.diagnostics import entropy_from_logits
from minirl_edu.models import tiny_dense, tiny_moe
from minirl_edu.rollout import Rollout
from minirl_edu.routing import Routes, RoutingReplay
from tests.conftest import EOS, PAD

CLOSE = 2e-5
"""Log-probabilities summed in another order in fp32: logits of size up to 30 carry rounding errors of 30 · 2⁻²³ = 4e-6,
over two layers a few times that. Seen: up to 5e-6. A wrong token, position or expert moves them by 0.1 or more."""


def lively(architecture: str, *, seed: int = 0, **sizes: int) -> PreTrainedModel:
    """A tiny model that depends on its whole context: about 2.2 nats of entropy, and 0.5 nats a changed early token.

    Weights as initialised, or large embeddings alone, leave attention without effect: wrong masks would go unnoticed.
    """
    make = {"moe": tiny_moe, "dense": tiny_dense}[architecture]
    model = make(18, seed=seed, eos_token_id=EOS, pad_token_id=PAD, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model.eval()


def written(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Rollout:
    """A rollout of given responses, the same number for each prompt in turn."""
    size = len(responses) // len(prompts)
    width, length = max(map(len, prompts)), max(map(len, responses))
    tokens = torch.full((len(responses), width + length), PAD)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, response in enumerate(responses):
        whole = [*prompts[row // size], *response]
        start = width - len(prompts[row // size])
        tokens[row, start : start + len(whole)] = torch.tensor(whole)
        mask[row, start : start + len(whole)] = True
    logp = torch.zeros(len(responses), length)
    return Rollout(tokens, mask, width, mask[:, width:], logp, None, prompts, 0).validate()


def naive(model: PreTrainedModel, rollout: Rollout, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log π and entropy [B, T] of the response tokens, 0 where masked, with gradient where it is enabled.

    The softmax is taken over the tokens that are not suppressed: the others' logits are thrown away.
    """
    logps, entropies = [], []
    generation = model.generation_config
    suppressed = set((generation.suppress_tokens if generation is not None else None) or ())
    known = [token for token in range(model.config.vocab_size) if token not in suppressed]
    for tokens, mask, response in zip(rollout.tokens, rollout.attention_mask, rollout.response_mask, strict=True):
        real, length = tokens[mask], int(response.sum())
        logits = model(input_ids=real[None], use_cache=False).logits[0, -length - 1 : -1].float() / temperature
        missing = (0, len(response) - length)
        if suppressed:
            logits = logits[:, known]
        logp = logits.log_softmax(-1)[range(length), [known.index(token) for token in real[-length:].tolist()]]
        logps.append(torch.nn.functional.pad(logp, missing))
        entropies.append(torch.nn.functional.pad(entropy_from_logits(logits), missing))
    return torch.stack(logps), torch.stack(entropies)


@torch.no_grad()
def naive_routes(model: PreTrainedModel, rollout: Rollout) -> Routes:
    """The routes [B, S] of each row's inputs."""
    replay = RoutingReplay(model)
    first = None
    for row, inputs in enumerate(rollout.inputs):
        with replay.record() as tape:
            model(input_ids=rollout.tokens[row][inputs][None], use_cache=False)
        if first is None:
            shape = (*rollout.tokens.shape, *tape.routes.experts.shape[2:])
            first = Routes(torch.zeros(shape, dtype=tape.routes.experts.dtype), rollout.inputs, replay.layers)
        first.experts[row, inputs] = tape.routes.experts[0]
    assert first is not None
    return first
