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

The names in `__all__` can be imported from here. Each is looked up when it is first used: importing this package loads
no other module, and importing a loss loads torch but neither transformers nor matplotlib.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minirl_edu.advantages import group_mean_advantages
    from minirl_edu.config import load_config
    from minirl_edu.diagnostics import CollapseDetector, policy_metrics
    from minirl_edu.live import watch
    from minirl_edu.objectives import cispo_loss, grpo_loss, minirl_loss
    from minirl_edu.routing import RoutingReplay
    from minirl_edu.trainer import MiniRLTrainer

__version__ = "0.1.0"
__all__ = [
    "CollapseDetector",
    "MiniRLTrainer",
    "RoutingReplay",
    "cispo_loss",
    "group_mean_advantages",
    "grpo_loss",
    "load_config",
    "minirl_loss",
    "policy_metrics",
    "watch",
]

_MODULES = {
    "advantages": ("group_mean_advantages",),
    "config": ("load_config",),
    "diagnostics": ("CollapseDetector", "policy_metrics"),
    "live": ("watch",),
    "objectives": ("cispo_loss", "grpo_loss", "minirl_loss"),
    "routing": ("RoutingReplay",),
    "trainer": ("MiniRLTrainer",),
}
_MODULE = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
    except ModuleNotFoundError as error:
        from minirl_edu.doctor import how_to_install

        raise ImportError(f"{name}: {how_to_install(error)}", name=error.name) from error
    globals()[name] = value  # from now on an ordinary attribute
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
