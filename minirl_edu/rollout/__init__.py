"""Rollouts: the batch that flows through everything (`Rollout`), and the engines that sample it."""

from minirl_edu.rollout.base import Rollout, RolloutEngine, Sampling
from minirl_edu.rollout.hf import HFEngine, sample

__all__ = ["HFEngine", "Rollout", "RolloutEngine", "Sampling", "sample"]
