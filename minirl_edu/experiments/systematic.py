"""How much of an engine's error comes back at every sync, and how much averages out?

A policy is trained for K global steps. At each, the engine has just taken its weights, and both engines score the same
responses: d_s(t) = log μ_s(y_t|·) − log π_s(y_t|·), [K, n] over syncs and tokens. The mean square splits into

    mean d²  =  mean_t (mean_s d)²  +  mean_t var_s d
                systematic             random

A systematic error is the same again and again, so that training can learn to make up for it; a random one is not.
"""

import tempfile
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from minirl_edu.config import Config
from minirl_edu.logprobs import lay_out, response_logprobs
from minirl_edu.precision import round_activations
from minirl_edu.rollout import HFEngine, sample
from minirl_edu.seeding import derive_seed
from minirl_edu.trainer import MiniRLTrainer


def error_parts(errors: Float[Tensor, "K n"]) -> tuple[float, float]:
    """The systematic and the random part of the mean square of d [syncs, tokens], in nats². Both without bias: the mean
    over K syncs holds 1/K of the random part, which is taken off; the systematic part can thus be slightly negative.

    Raises ValueError for fewer than two syncs.
    """
    syncs = len(errors)
    if syncs < 2:
        raise ValueError(f"errors: {syncs} syncs; what comes back shows from two on")
    errors = errors.double()
    random = errors.var(0, correction=1).mean()
    return float(errors.mean(0).square().mean() - random / syncs), float(random)


def measure_parts(config: Config, *, syncs: int = 8, prompts: int = 32) -> tuple[float, float]:
    """`error_parts` over `syncs` global steps of the run that `config` describes, whose engine is transformers'.

    The responses are sampled once, by the training engine before training, one to each of `prompts` held-out problems.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = MiniRLTrainer(config, f"{folder}/run", progress=False)
        engine = trainer.engine
        assert isinstance(engine, HFEngine)
        problems = [trainer.task.encode(problem) for problem in trainer.task.evaluation(prompts)]
        seed = derive_seed(config.seed, "evaluation")
        model = trainer.unwrapped
        rollout = sample(model, problems, group_size=1, sampling=trainer.sampling, seed=seed)
        layout, errors = lay_out(rollout, share_prompts=False), []
        for step in range(syncs):
            trainer.global_step()
            assert engine.model is not None
            generator = torch.Generator().manual_seed(derive_seed(config.seed, "activations", step))
            with torch.no_grad(), round_activations(engine.model, engine.precision, generator):
                theirs = response_logprobs(engine.model, layout).logp
            with torch.no_grad():
                ours = response_logprobs(model, layout).logp
            errors.append((theirs - ours)[rollout.response_mask])
        return error_parts(torch.stack(errors))


def markdown(parts: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A Markdown table: per engine, over its seeds, the root mean square error and the share of the mean square that
    comes back, means with their range."""
    rows = [("engine", "error, nats per token", "systematic share", "seeds"), ("---",) * 4]
    for name, seeds in parts.items():
        sizes = [max(systematic + random, 0.0) ** 0.5 for systematic, random in seeds]
        shares = [systematic / (systematic + random) for systematic, random in seeds]
        size = f"{sum(sizes) / len(sizes):.2g} ({min(sizes):.2g} to {max(sizes):.2g})"
        share = f"{sum(shares) / len(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"
        rows.append((name, size, share, str(len(seeds))))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
