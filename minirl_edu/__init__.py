"""minirl_edu: learn, test and scale stable reinforcement learning for language models.

Implements *Stabilizing Reinforcement Learning with LLMs: Formulation and Practices* (arXiv 2512.01374).

Shapes in annotations and comments:

    B  responses in a batch          L  Mixture-of-Experts layers
    T  response tokens               E  experts per layer
    S  whole-sequence tokens         k  experts selected per token
    V  vocabulary                    G  responses per prompt (a group)
    N  mini-batches per global step

Three policies, one token: `logp_rollout` is log μ_old (the inference engine that sampled), `logp_old` is log π_old (the
same weights in the training engine), `logp` is log π_θ (the target policy, which alone carries gradient), all in nats.
"""

__version__ = "0.1.0"
