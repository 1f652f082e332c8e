"""MiniRL inside other frameworks: on fixed tensors, laid out and averaged as each framework does, value and gradient
are `minirl_loss`'s in float64. Where a framework is not installed, a module with its documented names stands in."""

import math
import re
import subprocess
import sys
import tomllib
from dataclasses import asdict, dataclass, fields
from enum import Enum
from importlib import import_module, reload
from importlib.util import find_spec
from inspect import signature
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import Tensor

from minirl_edu.objectives import CORRECTIONS, minirl_loss
from minirl_edu.plugins import PAPER, Choices, summed_loss
from tests.conftest import ROOT

LENGTHS = (6, 2, 5, 3, 1, 4, 6, 3)
PROMPTS = (2, 4, 1, 3, 3, 2, 1, 4)
B, T, V = len(LENGTHS), max(LENGTHS), 5
HALVES = ([0, 1, 2, 3], [4, 5, 6, 7])
UNEVEN = (([0, 1, 2], [3]), ([4, 5], [6, 7]))  # two ranks, two micro-batches each
EVEN = (([0, 1], [2, 3]), ([4, 5], [6, 7]))
CHOICES = [
    PAPER,
    Choices(eps_low=0.1, eps_high=0.1, is_cap=2.0),
    Choices(clip=False),
    Choices(length_norm=True),
    *(Choices(correction=name) for name in CORRECTIONS if name != PAPER.correction),
]
by_choices = pytest.mark.parametrize("choices", CHOICES, ids=lambda c: f"{c.correction}-{CHOICES.index(c)}")


class Batch(NamedTuple):
    """Eight responses: logits [B, T, V] (the leaf), tokens, log π_old, log μ_old, mask [B, T] and Â [B]."""

    logits: Tensor
    tokens: Tensor
    logp_old: Tensor
    logp_rollout: Tensor
    mask: Tensor
    advantages: Tensor

    @property
    def logp(self) -> Tensor:
        return self.logits.log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0]

    def expected(self, choices: Choices = PAPER, logp_old: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss of all responses at once, and its gradient."""
        old = self.logp_old if logp_old is None else logp_old
        loss = minirl_loss(self.logp, old, self.logp_rollout, self.advantages, self.mask, **asdict(choices)).loss
        return loss.detach(), torch.autograd.grad(loss, self.logits)[0]


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = normal(B, T, V).requires_grad_()
    tokens = torch.randint(V, (B, T), generator=generator)
    logp = logits.detach().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    old = (logp + 0.3 * normal(B, T)).clamp(max=-1e-3)
    rollout = (old + 0.4 * normal(B, T)).clamp(max=-1e-3)
    rollout[0, 2] = rollout[2, 1] = -9.0  # far too rare: the cap acts
    rewards = torch.tensor([1, 0, 1, 0, 0, 1, 1, 0], dtype=torch.float64)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    return Batch(logits, tokens, old, rollout, mask, rewards - rewards.view(-1, 4).mean(1).repeat_interleave(4))


@pytest.fixture
def batch() -> Batch:
    return make_batch()


def agree(batch: Batch, total: Tensor, expected: tuple[Tensor, Tensor], **tolerance: float) -> None:
    """Sums in another order: 1e-12 is a thousand roundings of float64."""
    bounds: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14, **tolerance}
    torch.testing.assert_close(total.detach(), expected[0], **bounds)
    torch.testing.assert_close(torch.autograd.grad(total, batch.logits)[0], expected[1], **bounds)


INSTALLED = {name for name in ("verl", "nemo_rl", "prime_rl") if find_spec(name)}


def framework(monkeypatch: pytest.MonkeyPatch, path: str, **names: Any) -> Any:
    """The framework's module where it is installed; else one that has these names, as its sources document them."""
    parts = path.split(".")
    if parts[0] in INSTALLED:
        return import_module(path)
    for end in range(1, len(parts) + 1):
        if (name := ".".join(parts[:end])) not in sys.modules:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[path]).update(names)
    return sys.modules[path]


def test_the_fixed_tensors_exercise_the_cap_and_both_clips(batch):
    _, metrics = minirl_loss(batch.logp, batch.logp_old, batch.logp_rollout, batch.advantages, batch.mask)
    assert min(metrics[name] for name in ("is_capped_frac", "clip_frac_pos", "clip_frac_neg")) > 0
    losses = [batch.expected(choices)[0].item() for choices in CHOICES]
    assert len({round(loss, 9) for loss in losses}) == len(CHOICES)  # every choice matters


def test_the_defaults_are_the_papers_and_a_wrong_correction_is_refused():
    ours, defaults = asdict(PAPER), signature(minirl_loss).parameters
    assert ours == {name: defaults[name].default for name in ours}
    assert [field.name for field in fields(Choices)] == list(ours)
    with pytest.raises(ValueError, match="correction is 'tis'; expected one of token_truncated, "):
        Choices(correction="tis")


@by_choices
def test_lists_and_padded_tensors_have_the_same_sum(batch, choices):
    loss, gradient = batch.expected(choices)
    expected = B * loss, B * gradient
    others = batch.logp_old, batch.logp_rollout, batch.advantages, batch.mask
    agree(batch, summed_loss(batch.logp, *others, choices=choices).loss, expected)
    streams = batch.logp, *others[:2], batch.advantages[:, None].expand(B, T), batch.mask
    lists = [[row[:n] for row, n in zip(values, LENGTHS, strict=True)] for values in streams]
    agree(batch, summed_loss(*lists, choices=choices).loss, expected)


# ------------------------------------------------------------------------------------------------------------- verl


def verl_weights(log_ratio: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """As verl.trainer.ppo.rollout_corr_helper.compute_rollout_correction_weights computes them, rollout_is "token"."""
    return (log_ratio.clamp(-20, 20).exp() * mask).clamp(max=threshold)


@pytest.fixture
def verl_registry(monkeypatch) -> dict[str, Any]:
    registry: dict[str, Any] = {}
    core = framework(
        monkeypatch,
        "verl.trainer.ppo.core_algos",
        POLICY_LOSS_REGISTRY=registry,
        register_policy_loss=lambda name: lambda loss: registry.setdefault(name, loss),
    )
    import minirl_edu.plugins.verl as plugin

    reload(plugin)  # registers again: another test had another registry
    for i, choices in enumerate(CHOICES):
        plugin.register(f"minirl_{i}", choices)
    return core.POLICY_LOSS_REGISTRY


def verl_arguments(batch: Batch, rows: list[int], ranks: int) -> dict[str, Any]:
    weights = verl_weights(batch.logp_old - batch.logp_rollout, batch.mask, 1e9)
    return {
        "old_log_prob": batch.logp_old[rows],
        "log_prob": batch.logp[rows],
        "advantages": (batch.advantages[:, None] * batch.mask)[rows],
        "response_mask": batch.mask[rows],
        "loss_agg_mode": "token-mean",  # the default, which is not read
        "config": SimpleNamespace(global_batch_info={"dp_size": ranks, "batch_num_tokens": 30, "global_batch_size": B}),
        "rollout_is_weights": weights[rows],
    }


@by_choices
def test_verl(batch, verl_registry, choices):
    loss = verl_registry[f"minirl_{CHOICES.index(choices)}"]
    # verl sums the micro-batches of a rank and averages the gradients of ranks.
    losses = [loss(**verl_arguments(batch, rows, 2))[0] for rank in UNEVEN for rows in rank]
    # log(exp(x)) is not x to the last bit.
    agree(batch, torch.stack(losses).sum() / 2, batch.expected(choices), rtol=1e-11)


def test_verl_alone_on_one_rank_and_its_metrics(batch, verl_registry):
    arguments = verl_arguments(batch, list(range(B)), 1)
    loss, metrics = verl_registry["minirl"](**arguments)
    agree(batch, loss, batch.expected(), rtol=1e-11)
    assert metrics["actor/is_weight_max"] == 5.0 and all(isinstance(value, float) for value in metrics.values())


def test_verl_without_weights_is_refused(batch, verl_registry):
    arguments = verl_arguments(batch, [0, 1], 1) | {"rollout_is_weights": None}
    with pytest.raises(ValueError, match=r"rollout_is_weights is None.*rollout_correction\.rollout_is: token"):
        verl_registry["minirl"](**arguments)


# ---------------------------------------------------------------------------------------------------------- NeMo-RL


@pytest.fixture
def nemo_rl(monkeypatch) -> Any:
    return framework(
        monkeypatch,
        "nemo_rl.algorithms.loss.interfaces",
        LossType=Enum("LossType", {"TOKEN_LEVEL": "token_level", "SEQUENCE_LEVEL": "sequence_level"}),
        LossInputType=Enum("LossInputType", {"LOGIT": "logit", "LOGPROB": "logprob"}),
        MetricNormalizer=Enum("MetricNormalizer", {"TOKENS": "tokens", "SEQUENCES": "sequences", "NONE": "none"}),
    )


def nemo_rl_data(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Whole sequences [B, S], prompts first, and log-probabilities [B, S−1] from the second token on. A ninth sample is
    not valid: its numbers are garbage."""
    longest = max(map(sum, zip(PROMPTS, LENGTHS, strict=True)))
    rows: dict[str, list[Tensor]] = {}
    wide = batch.advantages[:, None].expand(B, T)
    streams = {"logp": batch.logp, "advantages": wide, "prev_logprobs": batch.logp_old, "token_mask": batch.mask}
    for name, values in {**streams, "generation_logprobs": batch.logp_rollout}.items():
        placed = [
            torch.nn.functional.pad(row[:n].double(), (p, longest - p - n))
            for row, n, p in zip(values, LENGTHS, PROMPTS, strict=True)
        ]
        rows[name] = [*placed, torch.full((longest,), 1.0 if name == "token_mask" else math.nan, dtype=torch.float64)]
    data = {name: torch.stack(values) for name, values in rows.items()}
    data["sample_mask"] = torch.tensor([1.0] * B + [0.0])
    return data.pop("logp")[:, 1:], data


@by_choices
def test_nemo_rl(batch, nemo_rl, choices):
    from minirl_edu.plugins.nemo_rl import MiniRLLossFn

    loss_fn = MiniRLLossFn(choices)
    assert (loss_fn.loss_type, loss_fn.input_type) == (nemo_rl.LossType.SEQUENCE_LEVEL, nemo_rl.LossInputType.LOGPROB)
    logp, data = nemo_rl_data(batch)
    valid, tokens = torch.tensor(float(B)), torch.tensor(float(sum(LENGTHS)))
    parts = [
        loss_fn(
            data={name: values[rows] for name, values in data.items()},
            next_token_logprobs=logp[rows],
            global_valid_seqs=valid,
            global_valid_toks=tokens,
        )
        for rows in ([0, 1, 2], [3], [4, 5], [6, 7, 8])  # on any ranks: NeMo-RL sums over both
    ]
    agree(batch, torch.stack([loss for loss, _ in parts]).sum(), batch.expected(choices))

    summed = {name: sum(metrics[name] for _, metrics in parts) for name in parts[0][1]}
    assert summed.keys() == loss_fn.metric_normalizations.keys()
    whole = minirl_loss(
        batch.logp, batch.logp_old, batch.logp_rollout, batch.advantages, batch.mask, **asdict(choices)
    ).metrics
    for name in summed.keys() & whole.keys():
        assert summed[name] == pytest.approx(whole[name].item())
    gap = (batch.logp_old - batch.logp_rollout)[batch.mask]
    assert summed["num_valid_samples"] == B and summed["loss"] == pytest.approx(batch.expected(choices)[0].item())
    assert summed["token_mult_prob_error"] == pytest.approx(gap.abs().exp().mean().item())
    assert summed["gen_kl_error"] == pytest.approx((gap.exp() - gap - 1).mean().item())


def test_nemo_rl_bears_a_batch_without_a_valid_sample(batch, nemo_rl):
    from minirl_edu.plugins.nemo_rl import MiniRLLossFn

    logp, data = nemo_rl_data(batch)
    none = torch.tensor(0.0)
    loss, metrics = MiniRLLossFn()(logp[8:], {name: x[8:] for name, x in data.items()}, none, none)
    assert loss.item() == 0 and set(metrics.values()) == {0.0}


# ------------------------------------------------------------------------------------------------------------ slime


def slime_log_probs(logits: Tensor, *, args: Any, unconcat_tokens: list[Tensor], **lengths: list[int]) -> Any:
    """As slime's `get_log_probs_and_entropy` without parallelism: the responses of packed sequences."""
    found, start = [], 0
    for tokens, total, response in zip(
        unconcat_tokens, lengths["total_lengths"], lengths["response_lengths"], strict=True
    ):
        end = start + total
        rows = logits[0, end - response - 1 : end - 1].log_softmax(-1)
        found.append(rows.gather(-1, tokens[-response:, None])[:, 0])
        start = end
    return torch.empty(0), {"log_probs": found}


@pytest.fixture
def slime(monkeypatch) -> None:
    path = "slime.backends.megatron_utils"
    framework(monkeypatch, f"{path}.cp_utils", slice_log_prob_with_cp=lambda values, total, response: values)
    framework(monkeypatch, f"{path}.loss", get_log_probs_and_entropy=slime_log_probs)


def slime_batch(batch: Batch, rows: list[int]) -> tuple[dict[str, Any], Tensor]:
    """One tensor a response, and the logits of whole sequences in a row, [1, tokens, V]."""
    lengths, prompts = [LENGTHS[r] for r in rows], [PROMPTS[r] for r in rows]

    def cut(values: Tensor) -> list[Tensor]:
        return [values[r, :n] for r, n in zip(rows, lengths, strict=True)]

    # A sequence's logits at p − 1 … p + n − 2 are those of its n response tokens; what stands elsewhere is not read.
    packed = [
        torch.nn.functional.pad(batch.logits[r, :n], (0, 0, p - 1, 1), value=0.5)
        for r, n, p in zip(rows, lengths, prompts, strict=True)
    ]
    return {
        "unconcat_tokens": [
            torch.cat([torch.zeros(p, dtype=torch.int64), batch.tokens[r, :n]])
            for r, n, p in zip(rows, lengths, prompts, strict=True)
        ],
        "total_lengths": [p + n for p, n in zip(prompts, lengths, strict=True)],
        "response_lengths": lengths,
        "loss_masks": cut(batch.mask.int()),
        "log_probs": cut(batch.logp_old),
        "rollout_log_probs": cut(batch.logp_rollout),
        "advantages": cut(batch.advantages[:, None].expand(B, T)),
    }, torch.cat(packed)[None]


def slime_args(**others: Any) -> SimpleNamespace:
    off = ("normalize_advantages", "use_rollout_logprobs", "calculate_per_token_loss", "use_kl_loss", "use_opd")
    known = {**dict.fromkeys(off, False), "kl_coef": 0.0, "entropy_coef": 0.0, "rollout_top_p": 1.0}
    return SimpleNamespace(**{**known, "grpo_std_normalization": False, **others})


def slime_and_megatron(losses: list[list[Tensor]]) -> Tensor:
    """slime's factor, num_microbatches · ranks / B; then Megatron's means over micro-batches and over ranks."""
    scaled = [torch.stack(rank) * len(rank) * len(losses) / B for rank in losses]
    return torch.stack([rank.mean() for rank in scaled]).mean()


@by_choices
def test_slime(batch, slime, choices):
    from minirl_edu.plugins.slime import minirl_loss_function

    def part(rows: list[int]) -> Tensor:
        return minirl_loss_function(slime_args(), *slime_batch(batch, rows), None, choices=choices)[0]

    agree(batch, slime_and_megatron([[part(rows) for rows in rank] for rank in UNEVEN]), batch.expected(choices))


def test_slime_metrics_add_up_over_responses(batch, slime):
    from minirl_edu.plugins.slime import minirl_loss_function

    parts = [minirl_loss_function(slime_args(), *slime_batch(batch, rows), None) for rows in HALVES]
    assert sum(log["loss"] for _, log in parts) / B == pytest.approx(batch.expected()[0].item())
    each = [
        minirl_loss(*(x[rows] for x in (batch.logp, *batch[2:4], batch.advantages, batch.mask))).metrics
        for rows in HALVES
    ]
    shares = sum(log["is_weight_mean"] for _, log in parts) / B
    assert shares == pytest.approx(sum(m["is_weight_mean"].item() for m in each) / 2)


def test_slime_with_context_parallelism(batch, slime, monkeypatch):
    """Two context ranks hold the two halves of every response, some of them empty; their sums add up."""
    from minirl_edu.plugins.slime import minirl_loss_function

    def part(keep: slice, choices: Choices = PAPER) -> Tensor:
        data, logits = slime_batch(batch, list(range(B)))

        def cut(values: Any, *_: Any) -> Any:
            half = (len(values) + 1) // 2
            return values[:half] if keep.start is None else values[half:]

        for name in ("log_probs", "rollout_log_probs", "advantages"):
            data[name] = [cut(values) for values in data[name]]

        def local(*args: Any, **kwargs: Any) -> Any:
            return None, {"log_probs": [cut(row) for row in slime_log_probs(*args, **kwargs)[1]["log_probs"]]}

        modules = (
            sys.modules["slime.backends.megatron_utils.cp_utils"],
            sys.modules["slime.backends.megatron_utils.loss"],
        )
        monkeypatch.setattr(modules[0], "slice_log_prob_with_cp", cut)
        monkeypatch.setattr(modules[1], "get_log_probs_and_entropy", local)
        return minirl_loss_function(slime_args(), data, logits, None, choices=choices)[0]

    first, second = slice(None, 1), slice(1, None)
    agree(batch, slime_and_megatron([[part(first)], [part(second)]]), batch.expected())
    with pytest.raises(ValueError, match=r"sequence_truncated.* needs whole responses, and context parallelism"):
        part(first, Choices(correction="sequence_truncated"))


@pytest.mark.parametrize(
    ("changed", "missing", "message"),
    [
        (
            {"grpo_std_normalization": True},
            None,
            "grpo_std_normalization is True.*pass --disable-grpo-std-normalization",
        ),
        ({"entropy_coef": 0.01}, None, "entropy_coef is 0.01.*leave --entropy-coef out"),
        ({"use_rollout_logprobs": True}, None, "log π_old is the trainer's"),
        ({"rollout_top_p": 0.9}, None, "rollout_top_p is 0.9"),
        ({}, "log_probs", "the batch has no log_probs"),
        ({}, "rollout_log_probs", "the batch has no rollout_log_probs"),
    ],
)
def test_slime_refuses_what_would_change_the_objective(batch, slime, changed, missing, message):
    from minirl_edu.plugins.slime import minirl_loss_function

    data, logits = slime_batch(batch, [0, 1])
    data.pop(missing, None)
    with pytest.raises(ValueError, match=message):
        minirl_loss_function(slime_args(**changed), data, logits, None)


# --------------------------------------------------------------------------------------------------------- prime-rl


@dataclass
class LossInputs:
    """The fields of prime-rl's dataclass of that name."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


class LossOutputs(NamedTuple):
    loss: Tensor
    metrics: dict[str, Tensor]


@pytest.fixture
def prime_rl(monkeypatch) -> Any:
    return framework(monkeypatch, "prime_rl.trainer.rl.loss", LossInputs=LossInputs, LossOutputs=LossOutputs)


def prime_rl_inputs(prime_rl: Any, batch: Batch, row: int, weight: float | None = None) -> Any:
    """One whole sequence, prompt first, as prime-rl cuts it out of a packed micro-batch."""
    n, p = LENGTHS[row], PROMPTS[row]

    def placed(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values[row, :n], (p, 0), value=math.log(1 / V))

    mask = torch.arange(p + n) >= p
    return prime_rl.LossInputs(
        trainer_logprobs=placed(batch.logp),
        inference_logprobs=placed(batch.logp_rollout),
        ref_logprobs=None,
        advantages=batch.advantages[row].expand(p + n) / (weight or 1),
        loss_mask=mask,
        loss_weights=None if weight is None else mask * weight,
    )


@by_choices
@pytest.mark.parametrize("weight", [None, 0.5])
def test_prime_rl(batch, prime_rl, choices, weight):
    from minirl_edu.plugins.prime_rl import minirl_loss_fn

    tokens = sum(LENGTHS)
    kwargs = {"on_policy": True, "tokens_per_response": tokens / B, **asdict(choices)}
    losses = [minirl_loss_fn(prime_rl_inputs(prime_rl, batch, row, weight), **kwargs).loss for row in range(B)]
    # prime-rl sums over responses, micro-batches and ranks, and divides by the tokens of all of them.
    agree(batch, torch.stack(losses).sum() / tokens, batch.expected(choices, logp_old=batch.logp.detach()))


def test_prime_rl_refuses_unless_pi_old_is_known(batch, prime_rl):
    from minirl_edu.plugins.prime_rl import minirl_loss_fn

    with pytest.raises(ValueError, match=r"no log π_old.*max_off_policy_steps = 0.*on_policy = true"):
        minirl_loss_fn(prime_rl_inputs(prime_rl, batch, 0))
    with pytest.raises(TypeError, match="max_ratio"):
        minirl_loss_fn(prime_rl_inputs(prime_rl, batch, 0), on_policy=True, max_ratio=5)


# ----------------------------------------------------------------------------------------------- the page of the site


def blocks(language: str) -> list[str]:
    """The code of the page in that language."""
    text = (ROOT / "lessons" / "site" / "plugins.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_page_has_the_code_that_these_tests_and_those_of_trl_run():
    assert [len(blocks(language)) for language in ("python", "sh", "toml")] == [2, 3, 1]


def test_the_pages_settings_of_verl_register_the_loss_and_are_those_of_the_docstring(verl_registry):
    import minirl_edu.plugins.verl as plugin

    settings = dict(re.findall(r"(\S+)=(\S+)", blocks("sh")[1]))
    assert settings.pop("actor_rollout_ref.model.external_lib") == plugin.__name__
    assert settings.pop("actor_rollout_ref.actor.policy_loss.loss_mode") in verl_registry
    said = dict(re.findall(r"^ {4}([\w.]+): (\S+)", plugin.__doc__ or "", re.MULTILINE))
    assert len(settings) == 4 and all(yaml.safe_load(said[name]) == yaml.safe_load(value.replace("1e9", "1.0e+9"))
                                      for name, value in settings.items())  # fmt: skip


def test_the_pages_lines_for_nemo_rl_run(nemo_rl):
    names: dict[str, Any] = {}
    exec(compile(blocks("python")[1], "plugins.md", "exec"), names)
    assert names["loss_fn"].choices == PAPER


def test_the_pages_arguments_for_slime_are_those_of_the_docstring():
    import minirl_edu.plugins.slime as plugin

    words = blocks("sh")[2].split()
    module, _, name = words[words.index("--custom-loss-function-path") + 1].rpartition(".")
    assert getattr(import_module(module), name) is plugin.minirl_loss_function
    flags = {word for word in words if word.startswith("--")}
    assert len(flags) == 5 and all(f"{flag}" in (plugin.__doc__ or "") for flag in flags)


def test_the_pages_config_of_prime_rl_runs(batch, prime_rl):
    config = tomllib.loads(blocks("toml")[0])
    module, _, name = config["trainer"]["loss"]["import_path"].rpartition(".")
    loss_fn = getattr(import_module(module), name)
    loss = loss_fn(prime_rl_inputs(prime_rl, batch, 0), **config["trainer"]["loss"]["kwargs"]).loss
    assert loss.isfinite() and config["orchestrator"]["max_off_policy_steps"] == 0


# ------------------------------------------------------------------------------------------------- without frameworks


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(("trl", "verl", "nemo_rl", "slime", "prime_rl")))  # as if not installed
import minirl_edu.plugins
from types import SimpleNamespace
from minirl_edu.plugins.nemo_rl import MiniRLLossFn
from minirl_edu.plugins.prime_rl import minirl_loss_fn
from minirl_edu.plugins.slime import minirl_loss_function
def load(name):
    return lambda: __import__(f"minirl_edu.plugins.{name}")
for use in (load("trl"), load("verl"), MiniRLLossFn, lambda: minirl_loss_function(None, {}, None, None),
            lambda: minirl_loss_fn(None, on_policy=True)):
    try:
        use()
    except ImportError as error:
        print(error.name.partition(".")[0], "|", error)
"""


def test_without_its_framework_a_plug_in_says_what_to_install():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" | ") for line in done.stdout.splitlines())
    assert list(said) == ["trl", "verl", "nemo_rl", "slime", "prime_rl"]
    for name, words in {
        "trl": 'python -m pip install "minirl-edu[trl]"',
        "verl": "pip install verl",
        "nemo_rl": "github.com/NVIDIA-NeMo/RL",
        "slime": "github.com/THUDM/slime",
        "prime_rl": "github.com/PrimeIntellect-ai/prime-rl",
    }.items():
        assert words in said[name]
