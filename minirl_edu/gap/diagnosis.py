"""Which mistake makes an engine's numbers, or its tokens, differ from the trainer's.

`diagnose` knows nothing but logits, tokens and reported log-probabilities; `examine` gets them from a model and a
rollout.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from minirl_edu.diagnostics import (
    kl_k3,
)
from minirl_edu.gap.measurement import find_replay
from minirl_edu.logprobs import lay_out
from minirl_edu.rollout import Rollout
from minirl_edu.rollout.hf import end_tokens, evaluating, suppressed_mask

EVIDENCE = 40_000_000
"""Logits that `diagnose` looks at, at most: 160 MB in fp32."""


@dataclass(frozen=True)
class Hypothesis:
    """A distribution that tokens may have been drawn from, or reported log-probabilities may belong to.

    softmax(logits / `temperature`), then restricted to the `top_k` likeliest, or to the fewest that hold `top_p`, or to
    those that are no end token (`no_end`), and renormalised. `weights` names the logits: "current", or one of the
    `alternatives` of `diagnose`.
    """

    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    no_end: bool = False
    weights: str = "current"

    def __str__(self) -> str:
        parts = [f"temperature {self.temperature:.3g}"]
        parts += [f"top-p {self.top_p:g}"] if self.top_p else []
        parts += [f"top-k {self.top_k}"] if self.top_k else []
        parts += ["end tokens forbidden"] if self.no_end else []
        parts += [self.weights] if self.weights != "current" else []
        return ", ".join(parts)

    @property
    def untruncated(self) -> "Hypothesis":
        """The same without top-p, top-k and forbidden tokens."""
        return replace(self, top_p=None, top_k=None, no_end=False)


TOP_P = (0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
TOP_K = (5, 10, 20, 40, 50, 100)
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
"""The settings that people use and `diagnose` tries, alone and together; temperatures are also fitted."""


@dataclass(frozen=True)
class Finding:
    """Something wrong: `name` of the case, what was seen (`evidence`), what it means, and the `remedy`."""

    name: str
    evidence: str
    explanation: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` concludes. No finding: healthy.

    k3            nats per token between reported and trainer's log-probabilities, as they are
    k3_explained  the same under the hypothesis that the reported ones fit best, `numbers`
    log_odds      nats by which all tokens together are likelier under `drawn` than under the trainer's distribution
    """

    findings: tuple[Finding, ...]
    k3: float
    k3_explained: float
    numbers: Hypothesis
    drawn: Hypothesis
    log_odds: float

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what was found; ("healthy",) if nothing was."""
        return tuple(finding.name for finding in self.findings) or ("healthy",)

    def __str__(self) -> str:
        if not self.findings:
            return (
                f"healthy: no known mistake explains the gap (k3 {self.k3:.1e} nats per token), and the tokens are "
                "distributed as the trainer says. What is left is the engines' arithmetic."
                + (" A gap of this size can hide a mistake of its size: look again in fp32." if self.k3 > 0.05 else "")
            )
        return "\n".join(f"{f.name}: {f.explanation} Seen: {f.evidence}. Remedy: {f.remedy}" for f in self.findings)


# A truncation is taken to let one token in a thousand through: at its boundary an engine's rounding decides.
_OUTSIDE = math.log(1e-3)
_ODDS = 10.0  # nats: one in 22,000


@torch.no_grad()
def diagnose(
    logits: Float[Tensor, "n V"],
    responses: Sequence[Sequence[int]],
    logp_rollout: Float[Tensor, "n"],
    *,
    temperature: float = 1.0,
    ends: Sequence[int] = (),
    alternatives: Mapping[str, Float[Tensor, "n V"]] | None = None,
    expected_k3: float | None = None,
) -> Diagnosis:
    """Which known mistake, if any, separates an engine's reported log-probabilities and tokens from the trainer's.

    Two questions, each answered by trying hypotheses: *whose numbers are these* (the hypothesis whose log-probabilities
    have the smallest k3 to the reported ones) and *where do the tokens come from* (the one under which they are
    likeliest). The second finds what no ratio shows: top-p or a temperature whose log-probabilities were reported from
    before it. A hypothesis must halve k3, or beat the trainer's by 10 nats more than the numerical gap can account for.

    Args:
        logits: the training engine's, raw, one row for each response token in order.
        responses: the token ids of each response as the trainer's mask has them; n in all.
        logp_rollout: as the engine reported them.
        temperature: what the trainer divides its logits by.
        ends: the trainer's end tokens.
        alternatives: logits under other weights: "stale weights", "stale prefix cache".
        expected_k3: what these two engines show when all is well, if known: ten times that, unexplained, is a finding.

    Raises ValueError if the numbers of rows and tokens differ.
    """
    tokens = torch.tensor([token for response in responses for token in response], device=logits.device)
    if not len(tokens) == len(logits) == len(logp_rollout):
        raise ValueError(f"logits: {len(logits)} rows and {len(logp_rollout)} logp_rollout for {len(tokens)} tokens")
    misplaced = _end_findings(responses, ends)
    # Where end tokens are missing or passed over, that they seem forbidden says nothing new.
    under = _Hypotheses({"current": logits, **(alternatives or {})}, tokens, () if misplaced else ends)
    ones = torch.ones(1, len(tokens), dtype=torch.bool, device=logits.device)

    def k3(hypothesis: Hypothesis) -> float:
        logp = under(hypothesis)
        inside = logp.isfinite()
        if inside.float().mean() < 0.98:
            return math.inf
        return float(kl_k3(logp_rollout[None], logp[None], ones & inside[None]))

    def likelihood(hypothesis: Hypothesis) -> float:
        logp, full = under(hypothesis), under(hypothesis.untruncated)
        return float(logp.where(logp.isfinite(), full + _OUTSIDE).double().sum())

    trainer = Hypothesis(temperature)
    others = [Hypothesis(temperature, weights=name) for name in (alternatives or {})]
    as_is = k3(trainer)
    numbers, explained = trainer, as_is
    if as_is > 1e-6:  # else these are the trainer's numbers, to fp32
        fitted = _fit(lambda t: k3(Hypothesis(t)))
        candidates = [Hypothesis(fitted), *others, *under.truncated({temperature, 1.0, *TEMPERATURES})]
        best = min(candidates, key=k3)
        # Exact settings before a fitted temperature that is no better.
        best = min((h for h in candidates if k3(h) <= 1.1 * k3(best) + 1e-9), key=lambda h: h == candidates[0])
        if k3(best) < 0.5 * as_is and as_is - k3(best) > 1e-6:
            numbers, explained = best, k3(best)

    # Tokens from an engine with this gap may prefer another distribution by their number times the KL, not by more.
    margin = _ODDS + 2 * len(tokens) * explained
    fitted = _fit(lambda t: -likelihood(Hypothesis(t)))
    temperatures = {temperature, 1.0, numbers.temperature, *TEMPERATURES}
    candidates = [Hypothesis(fitted), *others, *under.truncated(temperatures)]
    best = max(candidates, key=likelihood)
    drawn = next((h for h in (numbers, trainer) if likelihood(h) > likelihood(best) - margin), best)
    odds = likelihood(drawn) - likelihood(trainer)

    findings = [*_numeric_findings(trainer, numbers, drawn, as_is, explained, odds), *misplaced]
    if not findings and expected_k3 is not None and as_is > 10 * expected_k3:
        findings.append(
            Finding(
                "unexplained",
                f"k3 {as_is:.1e} where {expected_k3:.1e} is usual",
                "The engines do not compute the same function, and none of the known mistakes explains it.",
                "Compare weights, rotary settings, chat template and dtype of both engines on one prompt in fp32; give "
                "the previous weights to test for a stale engine.",
            )
        )
    return Diagnosis(tuple(findings), as_is, explained, numbers, drawn, odds)


class _Hypotheses:
    """Log-probabilities of the tokens under a hypothesis, −inf where it excludes them; computed once each."""

    def __init__(self, logits: Mapping[str, Tensor], tokens: Tensor, ends: Sequence[int]) -> None:
        self.logits, self.tokens, self.ends = logits, tokens, list(ends)
        self.known: dict[Hypothesis, Tensor] = {}
        self.ordered: Tensor | None = None
        self.cumulative: tuple[float, Tensor] = (0.0, torch.empty(0))

    def truncated(self, temperatures: set[float]) -> Iterator[Hypothesis]:
        vocabulary = self.logits["current"].shape[1]
        for temperature in sorted(temperatures, key=lambda t: abs(math.log(t))):
            yield Hypothesis(temperature)
            yield from (Hypothesis(temperature, top_p=p) for p in TOP_P)
            yield from (Hypothesis(temperature, top_k=k) for k in TOP_K if k < vocabulary)
            if self.ends:
                yield Hypothesis(temperature, no_end=True)

    def __call__(self, hypothesis: Hypothesis) -> Tensor:
        if hypothesis not in self.known:
            self.known[hypothesis] = self._logp(hypothesis)
        return self.known[hypothesis]

    def _logp(self, h: Hypothesis) -> Tensor:
        if h != h.untruncated:
            return self._of_kept(h)
        logits = self.logits[h.weights].float() / h.temperature
        return logits.gather(1, self.tokens[:, None])[:, 0] - logits.logsumexp(1)

    def _of_kept(self, h: Hypothesis) -> Tensor:
        logp = self(h.untruncated)
        if h.no_end:
            shares = (self.logits[h.weights].float() / h.temperature).softmax(1)[:, self.ends].sum(1)
            ended = torch.isin(self.tokens, torch.tensor(self.ends, device=self.tokens.device))
            return (logp - torch.log1p(-shares)).masked_fill(ended, -math.inf)
        if self.ordered is None:
            self.ordered = self.logits["current"].float().sort(1, descending=True).values
        if self.cumulative[0] != h.temperature:  # hypotheses come in order of their temperature: the last one is enough
            self.cumulative = h.temperature, (self.ordered / h.temperature).softmax(1).cumsum(1)
        total = self.cumulative[1]
        # With top-p, the token that crosses p is kept.
        kept = torch.full_like(self.tokens, h.top_k) if h.top_k else (total < (h.top_p or 1.0)).sum(1) + 1
        last = (kept - 1).clamp(max=total.shape[1] - 1)[:, None]
        mass, threshold = total.gather(1, last)[:, 0], self.ordered.gather(1, last)[:, 0]
        own = self.logits["current"].float().gather(1, self.tokens[:, None])[:, 0]
        return (logp - mass.log()).masked_fill(own < threshold, -math.inf)


def _fit(loss: Callable[[float], float]) -> float:
    """The temperature in 0.1 … 5 with the least loss: a scan, then golden sections around its best."""
    scan = np.geomspace(0.1, 5.0, 14).tolist()
    at = int(np.argmin([loss(t) for t in scan]))
    low, high = math.log(scan[max(at - 1, 0)]), math.log(scan[min(at + 1, len(scan) - 1)])
    shrink = (math.sqrt(5) - 1) / 2
    left, right = high - shrink * (high - low), low + shrink * (high - low)
    loss_left, loss_right = loss(math.exp(left)), loss(math.exp(right))
    while high - low > 1e-4:
        if loss_left < loss_right:
            high, right, loss_right = right, left, loss_left
            left = high - shrink * (high - low)
            loss_left = loss(math.exp(left))
        else:
            low, left, loss_left = left, right, loss_right
            right = low + shrink * (high - low)
            loss_right = loss(math.exp(right))
    return math.exp((low + high) / 2)


def _numeric_findings(
    trainer: Hypothesis, numbers: Hypothesis, drawn: Hypothesis, as_is: float, explained: float, odds: float
) -> list[Finding]:
    """What the two answers of `diagnose` mean, if they are not both the trainer's own distribution."""
    falls = f"k3 falls from {as_is:.1e} to {explained:.1e} under {numbers}"
    likelier = f"the tokens are e^{odds:.0f} times likelier under {drawn}"
    seen = "; ".join(([falls] if numbers != trainer else []) + ([likelier] if drawn != trainer else []))
    findings = []
    if (weights := drawn.weights if drawn.weights != "current" else numbers.weights) != "current":
        findings.append(Finding(weights.replace(" ", "_"), seen, *_STALE[weights]))
    if drawn.no_end or numbers.no_end:
        findings.append(Finding("end_token_suppressed", seen, *_SUPPRESSED))
    if drawn.top_p or drawn.top_k or numbers.top_p or numbers.top_k:
        cut = drawn if drawn.top_p or drawn.top_k else numbers
        shown = (
            "k3 shows it" if numbers.top_p or numbers.top_k else "no ratio shows it: the log-probs are from before it"
        )
        findings.append(
            Finding(
                "top_p" if cut.top_p else "top_k",
                seen,
                f"The sampler draws only from the {_describe(cut)}; the trainer believes that every token can come. "
                f"That is a bias which no importance weight removes ({shown}).",
                "Sample with top_p=1 and without top-k (vLLM: top_k=-1; transformers: top_k=0, its default is 50).",
            )
        )
    apart = abs(math.log(drawn.temperature / numbers.temperature)) > 0.05
    if apart:
        blind = abs(math.log(numbers.temperature / trainer.temperature)) < 0.05
        findings.append(
            Finding(
                "raw_logprobs",
                seen,
                f"The tokens are drawn at temperature {drawn.temperature:.2g}, but the log-probs reported with them "
                f"are those of temperature {numbers.temperature:.2g}"
                + (
                    ", and the trainer computes the same: the ratio looks perfect while every gradient is off-policy."
                    if blind
                    else ": the raw model's, from before the sampler's settings."
                ),
                "Ask for the log-probs of the distribution that is sampled (vLLM: logprobs_mode='processed_logprobs'; "
                "transformers: `scores`, not `logits`)"
                + (f", and divide the trainer's logits by {drawn.temperature:.2g}." if blind else "."),
            )
        )
    elif abs(math.log(numbers.temperature / trainer.temperature)) > 0.01 and numbers == numbers.untruncated:
        findings.append(
            Finding(
                "temperature",
                seen,
                f"The engine samples at temperature {numbers.temperature:.3g} and says so in its log-probs; the "
                f"trainer scores at {trainer.temperature:g}.",
                f"Divide the trainer's logits by {numbers.temperature:.3g} before the log-softmax, in every forward.",
            )
        )
    return findings


_STALE = {
    "stale weights": (
        "The engine still samples with the previous weights.",
        "Synchronise the engine after every update, and check the weight version that comes with each rollout.",
    ),
    "stale prefix cache": (
        "The engine samples with the new weights on top of keys and values that it cached for the prompt under the old "
        "ones: its numbers match neither model.",
        "Drop the prefix cache at every synchronisation (vLLM: reset_prefix_cache()).",
    ),
}
_SUPPRESSED = (
    "The engine forbids the end token where the trainer expects it to come now and then: the policy is trained on "
    "endings that it never chose, and never on choosing to end.",
    "Take out min_tokens / min_new_tokens, and any logit bias on the end token.",
)


def _describe(h: Hypothesis) -> str:
    return f"{h.top_k} likeliest tokens" if h.top_k else f"likeliest tokens that hold {h.top_p:g} of the probability"


def _end_findings(responses: Sequence[Sequence[int]], ends: Sequence[int]) -> list[Finding]:
    """What the places of the end tokens say. Certain: a healthy rollout has one at the end of every response that stops
    before the limit, and none elsewhere."""
    findings = []
    if not ends:
        return findings
    through = sum(any(token in ends for token in response[:-1]) for response in responses)
    if through:
        findings.append(
            Finding(
                "end_token_ignored",
                f"{through} of {len(responses)} responses go on behind an end token",
                "The sampler does not stop where the trainer thinks that a response ends: it rewards and trains text "
                "that no user would see.",
                f"Give the engine the trainer's end tokens, {sorted(ends)} (generation_config.eos_token_id, "
                "stop_token_ids), or cut each response behind its first one.",
            )
        )
    limit = max(map(len, responses))
    cut = Counter(response[-1] for response in responses if len(response) < limit and response[-1] not in ends)
    if cut:
        last, count = cut.most_common(1)[0]
        stops = f"{cut.total()} of {len(responses)} responses stop before the limit without an end token"
        if count == cut.total() >= 3:
            findings.append(
                Finding(
                    "other_end_token",
                    f"{stops}, all of them at token {last}",
                    "The engine stops at a token that is no end token to the trainer.",
                    f"Add {last} to the model's generation_config.eos_token_id, or take it off the engine's stop list.",
                )
            )
        else:
            findings.append(
                Finding(
                    "end_token_missing",
                    f"{stops}, at {len(cut)} different tokens",
                    "The end token was dropped from the responses or masked out (with pad_token = eos_token, a padding "
                    "mask does that): the policy gets no gradient for ending, and the log-prob of ending is lost.",
                    "Keep the first end token in the tokens, the mask and the log-probs; build the mask from lengths, "
                    "not from `tokens != pad`.",
                )
            )
    return findings


def response_logits(model: PreTrainedModel, rollout: Rollout, *, replayed: bool = False) -> Float[Tensor, "n V"]:
    """The training engine's raw logits for each response token, in order; `replayed` forces the rollout's experts. They
    are −inf at ids that the model never says."""
    layout = lay_out(rollout, share_prompts=False)
    replay = find_replay(model) if replayed else None
    context = replay.replay(layout.pack(rollout.routes)) if replay and rollout.routes else nullcontext()
    with torch.no_grad(), evaluating(model), context:
        logits = model(**layout.inputs, use_cache=False).logits
    return _without_suppressed(model, logits.flatten(0, 1).index_select(0, layout.predictor))


def _without_suppressed(model: PreTrainedModel, logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
    mask = suppressed_mask(model, logits.shape[1], logits.device)
    return logits.float() if mask is None else logits.float().masked_fill(mask, -math.inf)


@torch.no_grad()
def stale_prefix_logits(model: PreTrainedModel, previous: PreTrainedModel, rollout: Rollout) -> Float[Tensor, "n V"]:
    """As `response_logits`, with the keys and values of the prompt, but for its last token, from `previous`.

    That is what an engine computes whose prefix cache outlived a synchronisation: the last token of a prompt is never
    cached, because its logits are needed.
    """
    cut = rollout.prompt_length - 1
    columns = int(rollout.response_mask.sum(1).max()) + cut
    mask = rollout.attention_mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    with evaluating(previous), evaluating(model):
        for part, span in ((previous, slice(0, cut)), (model, slice(cut, columns))):
            output = part(
                input_ids=rollout.tokens[:, span],
                attention_mask=mask[:, : span.stop],
                position_ids=positions[:, span],
                past_key_values=cache,
                use_cache=True,
            )
    return _without_suppressed(model, output.logits[rollout.response_mask[:, : output.logits.shape[1]]])


def examine(
    model: PreTrainedModel,
    rollout: Rollout,
    *,
    temperature: float = 1.0,
    previous: PreTrainedModel | None = None,
    expected_k3: float | None = None,
) -> Diagnosis:
    """`diagnose` a rollout with a training engine: as many responses as `EVIDENCE` allows, replayed routes if it has
    them, and the hypotheses of stale weights if `previous` ones are given."""
    vocabulary = model.config.get_text_config().vocab_size
    whole = rollout.response_mask.sum(1).cumsum(0) * vocabulary <= EVIDENCE
    part = rollout.rows(0, max(1, int(whole.sum())))
    alternatives = {}
    if previous is not None:
        if previous.dtype != model.dtype:
            previous = copy.deepcopy(previous).to(model.dtype)  # pyright: ignore[reportArgumentType]
        alternatives["stale weights"] = response_logits(previous, part, replayed=True)
        if part.prompt_length > 1:
            alternatives["stale prefix cache"] = stale_prefix_logits(model, previous, part)
    return diagnose(
        response_logits(model, part, replayed=True),
        part.responses,
        part.logp_rollout[part.response_mask],
        temperature=temperature,
        ends=end_tokens(model),
        alternatives=alternatives,
        expected_k3=expected_k3,
    )
