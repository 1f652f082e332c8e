"""MiniRL's loss in a loop of your own: a tiny transformers model learns to write even tokens. No download."""

import copy
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from minirl_edu import group_mean_advantages, minirl_loss, policy_metrics

STEPS, PROMPTS, GROUP, PROMPT_LENGTH, LENGTH, VOCABULARY, EOS = 20, 8, 8, 4, 12, 32, 1


def log_probabilities(model: Qwen3ForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """log π of each response token [B, T], in nats: the logits at a position are for the token after it."""
    logits = model(input_ids=tokens[:, :-1]).logits[:, PROMPT_LENGTH - 1 :].float()
    return logits.log_softmax(-1).gather(-1, tokens[:, PROMPT_LENGTH:, None])[..., 0]


def rollout(engine: Any, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sampled sequences, log μ_old of their response tokens, and a mask that ends with the end-of-sequence token."""
    settings = {"max_new_tokens": LENGTH, "do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": EOS}
    settings |= {"attention_mask": torch.ones_like(prompts), "return_dict_in_generate": True, "output_logits": True}
    found = engine.generate(prompts, **settings)
    response = found.sequences[:, PROMPT_LENGTH:]
    logp = torch.stack(found.logits, dim=1).float().log_softmax(-1).gather(-1, response[..., None])[..., 0]
    ended_before = (response == EOS).cumsum(1) - (response == EOS).int()
    return found.sequences, logp, ended_before == 0


torch.manual_seed(0)
config = Qwen3Config(vocab_size=VOCABULARY, eos_token_id=EOS, num_hidden_layers=2, hidden_size=64, head_dim=16)
config.update({"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4})
model = Qwen3ForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(1, STEPS + 1):
    engine = copy.deepcopy(model).bfloat16()  # in the place of vLLM: the same weights, other arithmetic
    prompts = torch.randint(2, VOCABULARY, (PROMPTS, PROMPT_LENGTH)).repeat_interleave(GROUP, dim=0)
    tokens, logp_rollout, mask = rollout(engine, prompts)
    even = tokens[:, PROMPT_LENGTH:] % 2 == 0
    rewards = (even & mask).sum(1) / mask.sum(1)
    advantages = group_mean_advantages(rewards, GROUP)
    with torch.no_grad():
        logp_old = log_probabilities(model, tokens)
    for rows in torch.arange(len(tokens)).chunk(2):  # two mini-batches: the second is one update behind
        logp = log_probabilities(model, tokens[rows])
        batch = logp_old[rows], logp_rollout[rows], advantages[rows], mask[rows]
        loss, metrics = minirl_loss(logp, *batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    metrics |= policy_metrics(logp.detach(), logp_old[rows], logp_rollout[rows], mask[rows])
    shown = ("kl_rollout_old", "log_ratio_staleness", "clip_frac_pos")
    print(f"step {step}: reward {rewards.mean():.3f}", *(f"{name} {metrics[name]:.2g}" for name in shown), sep=", ")
