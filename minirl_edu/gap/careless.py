"""Mistakes that people make, committed with `transformers.generate`'s own options, measured and diagnosed."""

import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from minirl_edu.gap.diagnosis import examine
from minirl_edu.gap.engines import random_prompts
from minirl_edu.gap.measurement import metrics, score
from minirl_edu.rollout import Rollout
from minirl_edu.rollout.hf import end_tokens, evaluating
from minirl_edu.seeding import derive_seed


class Accident(NamedTuple):
    """A mistake to commit: what it is, how the tokens are sampled (`flags` of `transformers.generate`, or what
    `careless_rollout` takes), and the temperature at which the trainer scores."""

    text: str
    flags: dict[str, Any]
    trainer_temperature: float = 1.0


ACCIDENTS: dict[str, Accident] = {
    "healthy": Accident("nothing: temperature 1, every token possible", {}),
    "healthy at 0.7": Accident("nothing: both engines at temperature 0.7", {"temperature": 0.7}, 0.7),
    "temperature": Accident("sampled at 0.7; the trainer's logits are not divided by it", {"temperature": 0.7}),
    "raw_logprobs": Accident(
        "sampled at 0.7, the engine reports raw log-probs; the trainer divides by 0.7",
        {"temperature": 0.7, "raw": True},
        0.7,
    ),
    "raw_logprobs, unseen": Accident(
        "sampled at 0.7, raw log-probs, and the trainer forgets it too", {"temperature": 0.7, "raw": True}
    ),
    "top_p": Accident("top-p 0.95", {"top_p": 0.95}),
    "top_p, unseen": Accident("top-p 0.95, raw log-probs", {"top_p": 0.95, "raw": True}),
    "top_k": Accident("top-k 50, the default of transformers", {"top_k": 50}),
    "stale_weights": Accident("the engine was not synchronised", {"stale": "weights"}),
    "stale_prefix_cache": Accident("synchronised, but the prompts' keys and values kept", {"stale": "prefix"}),
    "end_token_missing": Accident("the end token is cut off the responses", {"drop_end": True}),
    "end_token_ignored": Accident("the sampler does not know the model's end token", {"stop": False}),
    "end_token_suppressed": Accident("min_new_tokens: no response may end early", {"min_new_tokens": 10**6}),
}
"""The mistakes by the name of the finding they should lead to (before a comma)."""


@torch.no_grad()
def careless_rollout(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    max_new_tokens: int,
    seed: int,
    raw: bool = False,
    drop_end: bool = False,
    stop: bool = True,
    stale: str = "",
    previous: PreTrainedModel | None = None,
    **flags: Any,
) -> Rollout:
    """Sample through `transformers.generate` with any of its `flags`, as people do: the mistakes of `ACCIDENTS`.

    `raw` reports log-probabilities from before temperature, top-p and the rest; `drop_end` cuts the end token off;
    `stop=False` samples past it; `stale` samples with the `previous` weights ("weights") or with their keys and values
    for the prompt ("prefix"). Prompts must have one length; raises ValueError if not.
    """
    if len({len(prompt) for prompt in prompts}) != 1:
        raise ValueError("prompts: give prompts of one length; generate's padding is not what is tested here")
    sampler = previous if stale == "weights" and previous is not None else model
    inputs = torch.tensor(list(map(list, prompts)), device=model.device).repeat_interleave(group_size, 0)
    ends = end_tokens(model)
    vocabulary = model.config.get_text_config().vocab_size
    flags = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | flags
    if "min_new_tokens" in flags:
        flags["min_new_tokens"] = min(flags["min_new_tokens"], max_new_tokens)
    config = GenerationConfig(
        do_sample=True,
        max_new_tokens=max_new_tokens,
        # Without any, generate takes the model's own: an id that cannot come stands for none.
        eos_token_id=ends if stop and ends else [vocabulary],
        pad_token_id=model.config.pad_token_id or 0,
        return_dict_in_generate=True,
        output_scores=not raw,
        output_logits=raw,
        **flags,
    )
    more = {}
    if stale == "prefix" and previous is not None:
        more["past_key_values"] = cache = DynamicCache(config=model.config)
        previous(input_ids=inputs[:, :-1], past_key_values=cache, use_cache=True)
    with torch.random.fork_rng(devices=[]), evaluating(sampler):
        torch.manual_seed(seed)  # generate draws from the global generator
        output: Any = sampler.generate(  # pyright: ignore[reportCallIssue]
            inputs, attention_mask=torch.ones_like(inputs), generation_config=config, **more
        )
    width = inputs.shape[1]
    drawn = output.sequences[:, width:]
    steps = torch.stack(output.logits if raw else output.scores, 1)
    logp = steps.float().log_softmax(-1).gather(2, drawn[..., None])[..., 0]
    ended = torch.isin(drawn, torch.tensor(ends, device=drawn.device)) & stop
    mask = ended.cumsum(1) - ended.long() == 0
    if drop_end:
        mask &= ~ended
        mask[:, 0] = True  # an empty response is none
    length = int(mask.sum(1).max())
    mask = mask[:, :length]
    return Rollout(
        tokens=output.sequences[:, : width + length],
        attention_mask=torch.cat([torch.ones_like(inputs, dtype=torch.bool), mask], 1),
        prompt_length=width,
        response_mask=mask,
        logp_rollout=logp[:, :length].where(mask, 0.0),
        routes=None,
        prompts=prompts,
        weight_version=0,
    ).validate()


def nudged(model: PreTrainedModel, seed: int, size: float = 0.02) -> PreTrainedModel:
    """The model with every matrix moved by `size` of its own length in a random direction: weights of before an
    update."""
    generator = torch.Generator().manual_seed(seed)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(noise, alpha=size * float(parameter.std()))
    return moved


def with_end_token(model: PreTrainedModel) -> PreTrainedModel:
    """Give a random model an end token, in place: the token that it is most likely to say."""
    tokens = torch.tensor(random_prompts(0))
    with torch.no_grad():
        token = int(model(tokens).logits.softmax(-1).mean((0, 1)).argmax())
    assert model.generation_config is not None
    model.config.eos_token_id = model.generation_config.eos_token_id = token
    return model


def accidents(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, seed: int = 0) -> list[dict[str, Any]]:
    """Commit every mistake of `ACCIDENTS` with this model, measure it and diagnose it.

    Rows in JSON types: `name`, `text`, `metrics` (see `metrics`), `found` (names), `findings`, `k3_explained`,
    `log_odds`. Stale weights are the model's, `nudged`.
    """
    previous = nudged(model, derive_seed(seed, "weights"))
    rows, expected = [], None
    for name, accident in tqdm(ACCIDENTS.items(), desc="accidents", unit="case"):
        rollout = careless_rollout(
            model, prompts, group_size=4, max_new_tokens=32, seed=seed, previous=previous, **accident.flags
        )
        temperature = accident.trainer_temperature
        scores = score(model, rollout, temperature=temperature)
        row = metrics(scores.logp, rollout.logp_rollout, rollout.response_mask)
        expected = expected or row["k3"]
        found = examine(model, rollout, temperature=temperature, previous=previous, expected_k3=max(expected, 1e-7))
        rows.append(
            {
                "name": name,
                "text": accident.text,
                "tokens": int(rollout.response_mask.sum()),
                "metrics": row,
                "found": list(found.names),
                "findings": [asdict(finding) for finding in found.findings],
                "k3_explained": found.k3_explained,
                "log_odds": found.log_odds,
                "diagnosis": str(found),
            }
        )
    return rows
