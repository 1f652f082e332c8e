"""A model and an engine of your own, handed to the trainer: `python own_parts.py FOLDER`. About five seconds."""

import sys
from collections.abc import Sequence

from transformers import PreTrainedModel

from minirl_edu import MiniRLTrainer, load_config
from minirl_edu.models import load_tokenizer, tiny_moe
from minirl_edu.precision import Precision
from minirl_edu.rollout import HFEngine, Rollout, Sampling


class LateEngine:
    """An engine that takes new weights only at every second step, as an asynchronous one may."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.inner = HFEngine(model, Precision.parse("int8"), seed=0, record_routes=True)

    def generate(self, prompts: Sequence[Sequence[int]], *, group_size: int, sampling: Sampling, seed: int) -> Rollout:
        return self.inner.generate(prompts, group_size=group_size, sampling=sampling, seed=seed)

    def sync(self, model: PreTrainedModel, *, version: int) -> None:
        if version % 2 == 0:
            self.inner.sync(model, version=version)

    def close(self) -> None:
        self.inner.close()


tokenizer = load_tokenizer("chain-steps")  # one token a character; any transformers tokenizer will do
model = tiny_moe(len(tokenizer), seed=0, layers=3, hidden=64)  # any transformers model for causal language modelling
small = ("train.global_steps=4", "train.mini_batch_prompts=8", "eval.problems=16", "algorithm.replay=R3")
config = load_config(None, ("task.name=own_task:Sums", *small))
MiniRLTrainer(config, sys.argv[1], model=model, engine=LateEngine(model)).train()
