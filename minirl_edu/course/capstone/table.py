"""Checks of steps 01 to 05: the task, sampling, the loss and the updates, on a policy that is a table."""

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minirl_edu.advantages import group_mean_advantages, leave_one_out_advantages
from minirl_edu.course.capstone.parts import (
    END,
    LIMIT,
    PAD,
    VOCABULARY,
    WIDTH,
    Finding,
    every_response,
    few_words,
    named,
    of_table,
    rollout,
    seeded,
    step,
    table,
    table_forward,
    watched,
)
from minirl_edu.course.variants import batch_advantages, dropped
from minirl_edu.tasks.base import held_out
from minirl_edu.tasks.chain import HELD_OUT_FRACTION

# ------------------------------------------------------------------------------------------------------- 01 · REINFORCE


def _problems(mine: Any) -> Iterator[Finding]:
    for wanted in (False, True):
        found = mine.problems(200, random.Random(1), held_out=wanted)
        if found != mine.problems(200, random.Random(1), held_out=wanted):
            yield Finding("problems without the seed")
        if any(held_out(text, HELD_OUT_FRACTION) != wanted for text in found):
            yield Finding("held-out problems")
        lengths = {len(text.split("+")) for text in found}
        if len(found) != 200 or lengths != {3, 4, 5, 6} or set("".join(found)) != set("0123456789+"):
            yield Finding("", f"`problems` gave {len(found)} texts of {sorted(lengths)} digits, the first {found[0]!r}")


def _rewards(mine: Any) -> Iterator[Finding]:
    def of(text: str, problem: str = "3+4+9") -> float:
        return float(mine.reward(problem, [VOCABULARY.index(c) for c in text]))

    if of(",16") == 1 and of(",6") != 1:
        yield Finding("the whole sum")
    cases = [
        ("PAD and END in the text", [(",7,6.", 1), (",7,6.___", 1)]),
        ("only one separator", [(",6", 1), ("=6", 1)]),
        ("a digit without a separator", [("6", 0), ("16", 0), (",16", 0)]),
        ("the answer anywhere", [(",6,7", 0), (",7,6,", 0)]),
    ]
    for mistake, answers in cases:
        if any(of(text) != right for text, right in answers):
            yield Finding(mistake)
    for text, right in [("", 0.0), (",5", 0.0), (",7,6", 1.0), ("9=6.", 1.0)]:
        yield from named(f"`reward` of {text!r} as an answer to 3+4+9", of(text), right)


def _own_table(mine: Any) -> Iterator[Finding]:
    if not hasattr(mine, "moe"):  # since step 06 it is no table
        logits, tokens = table(0), torch.tensor([[3, 10, 4, 13], [17, 0, 1, 2]])
        answer = mine.forward({"next_proj": logits}, tokens)
        if not isinstance(answer, tuple) or len(answer) != 2:
            yield Finding("", "`forward` should return a pair: the logits, and None")
        yield from named(
            "what `forward` returns", answer[0], logits[tokens], {"a column of the table": logits.T[tokens]}
        )
    mine.forward = table_forward  # a policy that the checks know takes its place


def _sampling(mine: Any) -> Iterator[Finding]:
    logits, texts, size = table(1).requires_grad_(), ["3+4+9", "9+9+9"], 300
    if not hasattr(mine.Rollout, "_fields"):
        yield Finding("", "`Rollout` should be a `NamedTuple`")
    missing = {"tokens", "mask", "logp", "rewards", "advantages"} - set(mine.Rollout._fields)
    if missing:
        yield Finding("", f"`Rollout` has no field {min(missing)}")
    drawn = mine.sample({"next_proj": logits}, texts, size, seeded(0))
    if drawn.logp.requires_grad:
        yield Finding("sampling with gradient")
    prompts = torch.tensor([[VOCABULARY.index(c) for c in text.ljust(WIDTH - 1) + "="] for text in texts])
    yield from named(
        "the prompt in `tokens`",
        drawn.tokens[:, :WIDTH],
        prompts.repeat_interleave(size, 0),
        {"prompts take turns": prompts.repeat(size, 1)},
    )
    words = drawn.tokens[:, WIDTH:]
    if words.shape[1] > LIMIT:
        yield Finding("", f"a response has {words.shape[1]} tokens; at most {LIMIT} are allowed")
    ends = words == END
    mask = ends.cumsum(1) - ends.long() == 0
    if (words[~mask] != PAD).any():
        yield Finding("goes on after the end")
    yield from named(
        "`mask`",
        drawn.mask.float(),
        mask.float(),
        {"END is no token": (mask & ~ends).float(), "padding in the mask": torch.ones(mask.shape)},
    )
    logits = logits.detach()
    every, last = logits.log_softmax(-1), drawn.tokens[:, WIDTH - 1 : -1]
    right = of_table(logits, drawn.tokens, mask)
    known = {
        "probabilities": torch.where(mask, right.exp(), 0.0),
        "log-probabilities after the end": every[last, words],
        "one position late": torch.where(mask, every[words, words], 0.0),
    }
    yield from named("`logp`", drawn.logp, right, known)
    first = words[:size, 0].bincount(minlength=18) / size
    chance = every[VOCABULARY.index("=")].exp()
    if (first == 1).any():
        yield Finding("always the best token")
    if ((first - chance).abs() > 5 * (chance * (1 - chance) / size).sqrt() + 1 / size).any():
        yield Finding("", "the first tokens do not come as often as the softmax of the logits says")
    again = [mine.sample({"next_proj": logits}, texts, 20, seeded(seed)).tokens for seed in (0, 0, 1)]
    if not torch.equal(again[0], again[1]) or torch.equal(again[0], again[2]):
        yield Finding("drawn without the generator")
    rewards = [mine.reward(texts[i // size], text) for i, text in enumerate(words.tolist())]
    turns = [mine.reward(texts[i % 2], text) for i, text in enumerate(words.tolist())]
    yield from named("`rewards`", drawn.rewards, torch.tensor(rewards), {"rewards of another problem": turns})
    found = {
        "baseline of the batch": batch_advantages(drawn.rewards, size),
        "no baseline": drawn.rewards,
        "baseline without oneself": leave_one_out_advantages(drawn.rewards, size),
    }
    if _divided_by_std(drawn, size):
        yield Finding("divided by the standard deviation")
    yield from named("`advantages`", drawn.advantages, group_mean_advantages(drawn.rewards, size), found)


def _divided_by_std(drawn: Any, size: int) -> bool:
    """Whether the advantages are GRPO's, whatever its constant and its degrees of freedom."""
    right, spread = group_mean_advantages(drawn.rewards, size), drawn.rewards.view(-1, size).std(1)
    found = drawn.advantages * spread.repeat_interleave(size)
    return found.shape == right.shape and torch.allclose(found, right, rtol=0.02)


def _log_probabilities(mine: Any) -> Iterator[Finding]:
    drawn = mine.sample({"next_proj": table(1)}, ["3+4+9", "1+2+3"], 8, seeded(2))
    logits, mask, words = table(3).requires_grad_(), drawn.mask, drawn.tokens[:, WIDTH:]
    answer = mine.logprobs({"next_proj": logits}, drawn)
    if not isinstance(answer, tuple) or len(answer) != 3:
        yield Finding(
            "", "`logprobs` should return three things: log π, the entropy, and what `forward` gave beside it"
        )
    logp, entropy, _ = answer
    if not logp.requires_grad:
        yield Finding("log π without gradient")
    every, last = logits.log_softmax(-1), drawn.tokens[:, WIDTH - 1 : -1]
    known = {
        "the logits of the same position": torch.where(mask, every[words, words], 0.0),
        "log π of padding": every[last, words],
        "probabilities": torch.where(mask, every[last, words].exp(), 0.0),
    }
    yield from named("log π", logp, of_table(logits, drawn.tokens, mask), known)
    surprise = -(every.exp() * every).sum(-1)[last]
    known = {
        "entropy of one token": torch.where(mask, -every[last, words], 0.0),
        "negative entropy": torch.where(mask, -surprise, 0.0),
        "entropy of padding": surprise,
    }
    yield from named("the entropy", entropy, torch.where(mask, surprise, 0.0), known)


def _gradients(mine: Any, loss_of: Any, mu: Tensor, logits: Tensor, known: Any) -> Iterator[Finding]:
    """Whether −∇loss, over all responses weighted by how often μ draws them, is the gradient with the right weight.

    `known` makes, from log π, log μ, mask, the advantages and the rewards, the terms [B, T] of −loss: first the right
    ones, under "", then those of known mistakes.
    """
    logits = logits.clone().requires_grad_()
    tokens, mask = every_response()
    rewards = torch.randn(len(tokens), generator=seeded(5), dtype=torch.float64)
    sampled = of_table(mu, tokens, mask)
    often = sampled.sum(1).exp()
    part = rollout(mine, tokens=tokens, mask=mask, logp=sampled, rewards=rewards, advantages=often * (rewards - 0.3))
    logp = mine.logprobs({"next_proj": logits}, part)[0]
    loss = loss_of(logp, part)
    if not loss.requires_grad:
        yield Finding("a loss without gradient")
    if loss.shape != ():
        yield Finding("", f"the loss has shape {list(loss.shape)}; a number was expected")
    found = -torch.autograd.grad(loss, logits)[0]
    terms = known(of_table(logits, tokens, mask), sampled, mask, part.advantages[:, None], often[:, None])
    answers = {name: torch.autograd.grad(term.sum(), logits, retain_graph=True)[0] for name, term in terms.items()}
    yield from named("the gradient of the loss", found, answers.pop(""), answers, rtol=1e-4)


def _usual_mistakes(term: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Right terms, and what people divide them by."""
    lengths = mask.sum(1, keepdim=True)
    return {
        "": term,
        "the sign of the loss": -term,
        "divided by the length": term / lengths,
        "divided by all tokens": term / lengths.sum(),
        "divided by the places": term / mask.numel(),
        "divided by the rows": term / len(mask),
    }


def _reinforce(mine: Any) -> Iterator[Finding]:
    if not hasattr(mine, "reinforce_loss") and not hasattr(mine, "minirl_loss"):
        yield Finding("", "there is no `reinforce_loss` yet")

    def loss_of(logp: Tensor, part: Any) -> Tensor:
        if hasattr(mine, "reinforce_loss"):
            return mine.reinforce_loss(logp, part, 1)
        return mine.minirl_loss(logp, logp.detach(), part, 1)[0]

    def known(logp: Tensor, sampled: Tensor, mask: Tensor, a: Tensor, often: Tensor) -> dict[str, Tensor]:
        rewards = torch.randn(len(mask), generator=seeded(5), dtype=torch.float64)[:, None]
        return {
            **_usual_mistakes(a * logp, mask),
            "the reward for the advantage": rewards * logp,
            "the probability for its logarithm": torch.where(mask, a * logp.exp(), 0.0),
        }

    yield from _gradients(mine, loss_of, few_words(1), few_words(1), known)


REINFORCE = step(
    "01",
    "problems reward forward Rollout sample logprobs",
    """
- problems without the seed: `problems` gives other texts for the same generator. Only draws from `rng` can be
  repeated, and a run that cannot be repeated cannot be compared.
- held-out problems: a text is on the wrong side. If training draws held-out problems, the score measures memory and
  not skill.
- PAD and END in the text: `PAD` and `END` stay in the text, so no finished response ever ends in a digit. Every reward
  is 0, every advantage is 0, and nothing is learned.
- only one separator: the answer may follow `,` or `=`; one of the two gets no reward.
- a digit without a separator: a digit alone is rewarded, or one that ends a longer number. One answer in ten is then
  right by chance, and the policy learns to answer without calculating.
- the answer anywhere: the right digit is rewarded wherever it stands. A policy that lists all digits would get full
  marks. Only the end of the response counts.
- the whole sum: the answer is the last digit of the sum. For 3+4+9 that is 6, after the running sums 7 and 6.
- a column of the table: your logits are a column of the table. The last token chooses the row, and the row has one
  logit for each next token.
- sampling with gradient: the recorded log-probabilities carry a gradient. They are data about the past. With a
  gradient, memory grows with every token, and a later loss would also move the denominator.
- prompts take turns: the responses to one prompt are not neighbours, so a group mixes two problems. A mean over it is
  no baseline for either.
- goes on after the end: after `END` other tokens than `PAD` follow. They would be read, and judged, as a part of the
  response.
- END is no token: `END` is missing in the mask. To stop is a decision of the policy like any other. Without its
  gradient, the policy never learns when to stop.
- padding in the mask: the mask is True after the end. Padding was not drawn by the policy, so it has no
  log-probability.
- probabilities: these are probabilities. The gradient of the expected reward needs their logarithms.
- log-probabilities after the end: outside the mask a log-probability is not 0. A sum over a row would then count
  padding.
- one position late: you take the logits of the token's own position. These predict the token after it. The recorded
  numbers are not those that the token was drawn with.
- always the best token: every response begins with the same token. REINFORCE learns from differences between responses
  to one prompt; without any, all advantages are 0.
- drawn without the generator: the same generator gives different responses, or different ones give the same. Draw with
  the generator that is passed in.
- rewards of another problem: a response is judged by the answer to another prompt.
- divided by the standard deviation: the advantage is divided by the standard deviation of its group. Prompts that are
  nearly always or nearly never solved then get more weight than the objective gives them. Unit 05 returns to this.
- baseline of the batch: the baseline is the mean of all responses. It must be the mean of the responses to the same
  prompt: otherwise every response to an easy prompt looks good.
- no baseline: the advantage is the bare reward. The direction is right on average, but the noise is much larger.
- baseline without oneself: your baseline leaves the response itself out. This is unbiased and G/(G − 1) times as
  large. The file, like the paper, uses the mean of the whole group.
- log π without gradient: log π carries no gradient, so no loss made from it can move the policy.
- the logits of the same position: each token is judged by the logits at its own position. The model has already read
  it there. The logits one position earlier predict it.
- log π of padding: log π is not 0 outside the mask. Sums over a row would count padding.
- entropy of one token: this is minus the log-probability of the token that was drawn. The entropy is its mean over all
  words. It belongs to the whole distribution.
- negative entropy: the sign of the entropy is wrong. It is never negative.
- entropy of padding: the entropy is not 0 outside the mask.
- a loss without gradient: the loss carries no gradient. It must be made from the log π that is passed in, not
  detached.
- the sign of the loss: the sign of the gradient is wrong. An optimizer goes downhill, so this loss makes rewarded
  responses rarer.
- divided by the length: each response's sum is divided by its length. Each token of a long response then counts less
  than one of a short response, which is no longer the gradient of the expected reward.
- divided by all tokens: the loss is a mean over tokens. The divisor then depends on how long all the other responses
  are.
- divided by the places: the loss is a mean over all places, padding included. The longest response of the batch then
  sets the size of the step.
- divided by the rows: the loss is divided by the number of rows in `part`. Use the number that is passed in: in step
  05 a part is only a piece of the mini-batch.
- the reward for the advantage: the loss uses the reward. The advantage has the baseline taken off, which is what makes
  the noise bearable.
- the probability for its logarithm: the loss has the probability where its logarithm belongs. Likely tokens would get
  too large a part of the gradient, and unlikely ones almost none.

The gradient of your loss, averaged over all responses, is exactly the gradient of the expected reward.
""",
    _problems,
    _rewards,
    _own_table,
    _sampling,
    _log_probabilities,
    _reinforce,
)

# -------------------------------------------------------------------------------------------- 02 · one weight per token


def _use_table(mine: Any) -> Iterator[Finding]:
    mine.forward = table_forward
    yield from ()


def _token_weight(mine: Any) -> Iterator[Finding]:
    def loss_of(logp: Tensor, part: Any) -> Tensor:
        return mine.minirl_loss(logp, logp.detach() - 0.1, part, 1)[0]

    def known(logp: Tensor, sampled: Tensor, mask: Tensor, a: Tensor, often: Tensor) -> dict[str, Tensor]:
        ratio = logp - sampled
        weight = ratio.exp().detach()
        return {
            **_usual_mistakes(weight * a * logp, mask),
            "no weight": a * logp,
            "the weight of the whole response": ratio.sum(1, keepdim=True).exp().detach() * a * logp,
            "the product of the ratios so far": ratio.cumsum(1).exp().detach() * a * logp,
            "a weight with gradient": ratio.exp() * a * logp,
            "the weight upside down": (-ratio).exp().detach() * a * logp,
            "the trainer below the line": torch.where(mask, 0.1, 0.0).exp() * a * logp,
        }

    mu = few_words(1)
    pi = mu + 0.3 * (few_words(2) + 60 * (few_words(2) == -60))
    yield from _gradients(mine, loss_of, mu, pi, known)


def _three_things(mine: Any) -> Iterator[Finding]:
    tokens, mask = every_response()
    logp = of_table(few_words(1), tokens, mask).requires_grad_()
    part = rollout(mine, tokens=tokens, mask=mask, logp=logp.detach() - 0.2 * mask)
    answer = mine.minirl_loss(logp, logp.detach(), part, 4)
    if not isinstance(answer, tuple) or len(answer) != 3:
        yield Finding("", "`minirl_loss` should return three things: the loss, the weights and m")
    weight, m = answer[1:]
    yield from named("the weight", torch.where(mask, weight, 0.0), torch.where(mask, 0.2, -100.0).exp())
    yield from named("m", m, torch.ones(mask.shape))


ONE_WEIGHT = step(
    "02",
    "minirl_loss",
    """
- no weight: all weights are 1. Tokens that μ draws too often then count too much: the gradient is that of another
  objective.
- the weight of the whole response: each token has the weight of the whole response. That is the exact gradient, but
  its noise grows exponentially with the length. The token-level objective keeps only the token's own ratio.
- the product of the ratios so far: each token has the product of all ratios up to itself. The token-level objective
  keeps only its own. The product's noise grows with the length.
- a weight with gradient: the weight is a constant. Yours has a gradient, so a second term appears that depends on the
  size of log π itself.
- the weight upside down: the policy that drew the tokens stands below the line. Yours makes tokens that were drawn too
  often count even more.
- the trainer below the line: your weight is π_θ/π_old. The tokens were drawn by μ, whose log-probabilities are in the
  rollout. Two policies with nearly the same weights are still two policies.
- the sign of the loss: the sign of the gradient is wrong. An optimizer goes downhill, so this loss makes rewarded
  responses rarer.
- divided by the length: each response's sum is divided by its length. To first order the token-level objective is the
  sequence-level one only without that division. Unit 05 shows what it does.
- divided by all tokens: the loss is a mean over tokens. The divisor then depends on how long all the other responses
  are.
- divided by the places: the loss is a mean over all places, padding included. The longest response of the batch then
  sets the size of the step.
- divided by the rows: the loss is divided by the number of rows in `part`. Use the number that is passed in.
- a loss without gradient: the loss carries no gradient. Only the weight is a constant; log π is not.

To first order in the difference between π and μ, this is the gradient of the sequence's expected reward.
""",
    _use_table,
    _token_weight,
    _three_things,
)

# ------------------------------------------------------------------------------------ 03 · the engine is another policy


def _rounding(mine: Any) -> Iterator[Finding]:
    names = {"embed_tokens": (6, 4), "layers.0.self_attn.q_proj": (5, 4), "layers.0.mlp.gate": (3, 4), "norm": (4,)}
    policy = {name: torch.randn(size, generator=seeded(i)) for i, (name, size) in enumerate(names.items())}
    policy["layers.0.self_attn.q_proj"][1] *= 5  # rows of different sizes
    before = {name: weight.clone() for name, weight in policy.items()}
    engine = mine.rounded({name: weight.requires_grad_() for name, weight in policy.items()}, 3)
    if any(not torch.equal(policy[name], before[name]) for name in names):
        yield Finding("the trainer's weights rounded")
    if set(engine) != set(names):
        yield Finding("", f"the engine has the weights {sorted(engine)}; {sorted(names)} were expected")
    if any(weight.requires_grad for weight in engine.values()):
        yield Finding("an engine with gradient")
    weight = before["layers.0.self_attn.q_proj"]

    def grid(largest: Tensor, levels: int) -> Tensor:
        return (weight / (largest / levels)).round() * (largest / levels)

    rows = weight.abs().amax(-1, keepdim=True)
    known = {
        "nothing rounded": weight,
        "one step for the matrix": grid(weight.abs().max(), 3),
        "a step for each column": grid(weight.abs().amax(0), 3),
        "one level too many": grid(rows, 4),
        "the steps of both signs": grid(rows, 7),
    }
    yield from named("a rounded matrix", engine["layers.0.self_attn.q_proj"], grid(rows, 3), known)
    for name in ("embed_tokens", "layers.0.mlp.gate", "norm"):
        if not torch.equal(engine[name], before[name]):
            yield Finding("all weights rounded", f"`{name}` is not as it was.")
    engine["norm"].add_(1.0)
    if not torch.equal(policy["norm"], before["norm"]):
        yield Finding("shared weights")


def _cap(mine: Any) -> Iterator[Finding]:
    ratio = torch.tensor([[0.05, 0.9, 1.5, 4.9, 5.1, 200.0]])
    tokens, mask = torch.zeros(1, WIDTH + 6, dtype=torch.long), torch.ones(1, 6, dtype=torch.bool)
    logp = torch.full((1, 6), -0.5).requires_grad_()
    part = rollout(mine, tokens=tokens, mask=mask, logp=-0.5 - ratio.log(), advantages=torch.tensor([0.5]))
    loss, weight, _ = mine.minirl_loss(logp, logp.detach(), part, 1)
    known = {
        "no cap": ratio,
        "a floor as well": ratio.clamp(0.2, 5),
        "nothing left above the cap": ratio * (ratio <= 5),
        "a cap on the logarithm": ratio.log().clamp(max=5).exp(),
        "weights that add up to one": ratio / ratio.mean(),
        "capped weights that add up to one": ratio.clamp(max=5) / ratio.clamp(max=5).mean(),
    }
    yield from named("the weight", weight, ratio.clamp(max=5), known)
    found = -torch.autograd.grad(loss, logp)[0]
    yield from named(
        "the gradient of the loss", found, 0.5 * ratio.clamp(max=5), {"the cap is not in the loss": 0.5 * ratio}
    )
    # Σ_y μ(y) min(π(y)/μ(y), 5) ≤ 1 for any two distributions: the file's weights, over all words of one position.
    pi, mu = (torch.randn(1, 18, generator=seeded(seed)).mul(3).log_softmax(-1) for seed in (1, 2))
    every = rollout(mine, tokens=torch.zeros(1, WIDTH + 18).long(), mask=torch.ones(1, 18).bool(), logp=mu)
    mean = (mu.exp() * mine.minirl_loss(pi, pi, every, 1)[1]).sum()
    if mean > 1 + 1e-5:
        yield Finding("", f"the expected weight is {mean:.3f}; with a cap it is at most 1")


ENGINE = step(
    "03",
    "rounded",
    """
- the trainer's weights rounded: `rounded` has changed the policy itself. The engine gets a copy. The small updates of
  the optimizer would be rounded away in every global step.
- an engine with gradient: the engine's weights carry a gradient. They are copies for sampling, and nothing trains
  them.
- nothing rounded: the engine's matrices are the trainer's. Then both are one policy, and there is nothing to correct.
- one step for the matrix: the whole matrix has one step. A single large weight then makes all rows coarse. Each row
  has a step of its own.
- a step for each column: the steps belong to columns. Each row, the weights of one output, has a step of its own.
- one level too many: the largest weight of a row is 2^(bits − 1) steps. A signed integer of so many bits ends at one
  less.
- the steps of both signs: the largest weight of a row is 2^bits − 1 steps, so you have a bit more than you say: the
  bits hold both signs.
- all weights rounded: only matrices named `_proj` are rounded. Embeddings, norms and routers are a small part of the
  weights, and an error there costs more than it saves.
- shared weights: a weight that is not rounded is the same tensor in both. The optimizer's next update changes the
  engine too, in the middle of the use of its rollout.
- no cap: there is no cap. One token whose probability the engine has rounded almost to 0 can then outweigh a whole
  mini-batch.
- a floor as well: small weights are raised. A token that the trainer hardly ever draws must count little. With a
  floor, the expected weight can be above 1.
- nothing left above the cap: weights above the cap become 0. That is another method, masking. A cap keeps the token,
  with a weight of 5.
- a cap on the logarithm: the cap is on the log of the ratio, so weights up to e^5 pass.
- weights that add up to one: the weights are divided by their mean. Then a token's weight depends on all the others,
  and large weights are not bounded.
- capped weights that add up to one: the weights are divided by their mean. The cap makes the mean smaller than 1 on
  purpose; dividing it out brings the noise back.
- the cap is not in the loss: the weights that you return are capped. Those in the loss are not.

An exact engine has weights of 1. A rounded one has an expected weight of at most 1, and the cap takes the rest.
""",
    _use_table,
    _rounding,
    _cap,
)

# -------------------------------------------------------------------------------- 04 · several updates from one rollout


def _clip_mask(mine: Any) -> Iterator[Finding]:
    # As in exercise 04.2: between the bounds and their look-alikes.
    ratio = torch.tensor([[0.50, 0.79, 0.81, 1.00, 1.23, 1.29, 2.00]]).repeat(3, 1)
    old = torch.tensor([[-0.9, -1.1, -2.0, -0.7, -1.3, -1.6, -3.0]]).repeat(3, 1)
    # The engine differs from the trainer's old policy, so that another denominator drops other tokens.
    engine = old - torch.tensor([[0.5, 0.3, 0.2, 0.4, -0.3, -0.2, -0.9]])
    advantages, mask = torch.tensor([0.5, -0.5, 0.0]), torch.ones(3, 7, dtype=torch.bool)
    logp = (old + ratio.log()).requires_grad_()
    tokens = torch.zeros(3, WIDTH + 7, dtype=torch.long)
    part = rollout(mine, tokens=tokens, mask=mask, logp=engine, advantages=advantages)
    loss, weight, m = mine.minirl_loss(logp, old, part, 3)

    def kept(
        low: float = 0.2, high: float = 0.27, reference: Tensor = old, sign: float = 1.0, **options: bool
    ) -> Tensor:
        return ~dropped(logp, reference, sign * advantages, low, high, **options)

    log_ratio, a = ratio.log(), advantages[:, None]
    known = {
        "nothing clipped": torch.ones(3, 7),
        "both sides for both signs": kept(any_sign=True),
        "the other two quadrants": kept(sign=-1.0),
        "bounds exchanged": kept(0.27, 0.2),
        "True where dropped": ~kept(),
        "logarithm against the bound": ~((a > 0) & (log_ratio > 0.27) | (a < 0) & (log_ratio < -0.2)),
        "ratio upside down": ~((a > 0) & (1 / ratio > 1.27) | (a < 0) & (1 / ratio < 0.8)),
        "the engine below the line of the mask": kept(reference=engine),
    }
    yield from named("m", m.float(), kept().float(), {name: mask.float() for name, mask in known.items()})
    found = -torch.autograd.grad(loss, logp)[0]
    terms = weight * a / 3
    yield from named(
        "the gradient of the loss", found, terms * kept(), {"the mask is not in the loss": terms.expand(3, 7)}
    )


def _drawn_for_updates(mine: Any, scale: float) -> Any:
    """Twelve responses of an engine, of different lengths, whose advantages make large or small gradients."""
    drawn = mine.sample({"next_proj": table(1)}, ["3+4+9"], 12, seeded(4))
    advantages = scale * torch.randn(12, generator=seeded(6))
    return rollout(mine, tokens=drawn.tokens, mask=drawn.mask, logp=drawn.logp, advantages=advantages)


def _start() -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    policy = {"next_proj": (table(1) + 0.2 * table(7)).requires_grad_()}
    return policy, torch.optim.SGD(policy.values(), lr=3.0)


def _updated(mine: Any, drawn: Any, size: int, micro: int, *, norm: float = 1.0, change: str = "") -> Tensor:
    """The weights after the updates, by a loop that may do one thing wrong."""
    policy, optimizer = _start()
    with torch.no_grad():
        old = mine.logprobs(policy, drawn)[0]
    for i in range(0, len(drawn.tokens), micro):
        now = type(drawn)(*(x[i : i + micro] for x in drawn))
        if change == "only the last part":
            optimizer.zero_grad()
        divisor = {"divided by the part": micro, "divided by all responses": len(drawn.tokens)}.get(change, size)
        mine.minirl_loss(mine.logprobs(policy, now)[0], old[i : i + micro], now, divisor)[0].backward()
        if (i + micro) % (micro if change == "a step for each part" else size) == 0:
            torch.nn.utils.clip_grad_norm_(policy.values(), norm)
            optimizer.step()
            if change != "gradients pile up":
                optimizer.zero_grad()
    return policy["next_proj"].detach()


def _updates(mine: Any) -> Iterator[Finding]:
    drawn, size, calls = _drawn_for_updates(mine, 8.0), 4, []
    policy, optimizer = _start()
    first = policy["next_proj"].detach().clone()

    def watch(loss: Any, logp: Tensor, logp_old: Tensor, part: Any, responses: int) -> Any:
        calls.append((logp.detach(), logp_old, part, responses))
        return loss(logp, logp_old, part, responses)

    with watched(mine, "minirl_loss", watch):
        mine.update(policy, optimizer, drawn, size, size)
    if len(calls) != 3:
        yield Finding("", f"`update` called `minirl_loss` {len(calls)} times for 3 mini-batches")
    for i, (logp, logp_old, part, responses) in enumerate(calls):
        at = slice(i * size, (i + 1) * size)
        if not torch.equal(part.tokens, drawn.tokens[at]):
            yield Finding("", f"mini-batch {i + 1} has other responses than the rollout's {at.start + 1} to {at.stop}")
        if logp_old.requires_grad:
            yield Finding("π_old with gradient")
        right = of_table(first, part.tokens, part.mask)
        known = {"π_old from the engine": part.logp}
        if i > 0:
            known["π_old anew in each mini-batch"] = logp
        yield from named(f"log π_old of mini-batch {i + 1}", logp_old, right, known)
        if i > 0 and torch.equal(logp, logp_old):
            yield Finding("no step between mini-batches")
        if responses != size:
            yield Finding("divided by all responses" if responses == 12 else "", f"`responses` is {responses}.")
    known = {
        "gradients pile up": _updated(mine, drawn, size, size, change="gradients pile up"),
        "the gradient not clipped": _updated(mine, drawn, size, size, norm=1e9),
    }
    yield from named("a weight after `update`", policy["next_proj"], _updated(mine, drawn, size, size), known)


STALE = step(
    "04",
    "update",
    """
- nothing clipped: nothing is clipped. Nothing then stops a token from being pushed further and further by the same old
  sample.
- both sides for both signs: you drop every token whose ratio is outside the range, whatever the sign of its advantage.
  A token that drifted against its push needs its gradient most: it brings the token back.
- the other two quadrants: your mask drops the tokens that moved against their push and keeps those that went too far.
- bounds exchanged: the bounds are exchanged. The range is 0.27 up and 0.2 down.
- True where dropped: your mask is True for the tokens that are dropped. M multiplies the gradient.
- logarithm against the bound: you compare the log of the ratio with the bounds. They are for the ratio itself.
- ratio upside down: your ratio is π_old/π_θ. The policy that learns stands above the line.
- the engine below the line of the mask: your mask compares π_θ with μ. It then drops tokens that no update has moved,
  only because the engine rounds. The mask measures how far the trainer has moved since the rollout.
- the mask is not in the loss: `m` is right, and the loss does not use it.
- π_old with gradient: log π_old carries a gradient. Then its graph is kept for the whole rollout, and the ratio's own
  gradient may cancel.
- π_old from the engine: your π_old is the engine's μ_old. The engine's error then looks like staleness, and the mask
  drops tokens in the first mini-batch, where nothing has moved.
- π_old anew in each mini-batch: π_old is computed after an update has changed the policy. The ratio is then 1 in every
  mini-batch, nothing is ever clipped, and the staleness is invisible.
- no step between mini-batches: the policy does not move between the mini-batches. Each of them gets a step of its own.
- divided by all responses: the loss is divided by the responses of the whole rollout. Each mini-batch gets a step of
  its own, so its gradient is a mean over its own responses.
- gradients pile up: the second step contains the gradient of the first mini-batch once more. Gradients add up until
  they are set to zero.
- the gradient not clipped: the gradient of a mini-batch is not clipped to norm 1. One unlucky batch could then undo
  the work of many.

In the first mini-batch every ratio is exactly 1. Only what moves afterwards can be clipped.
""",
    _use_table,
    _clip_mask,
    _updates,
)

# ---------------------------------------------------------------------- 05 · micro-batches, nothing divided by a length


def _micro_batches(mine: Any) -> Iterator[Finding]:
    drawn, size, micro, steps = _drawn_for_updates(mine, 0.5), 6, 2, []
    policy, optimizer = _start()
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    rows = []

    def watch(loss: Any, logp: Tensor, logp_old: Tensor, part: Any, responses: int) -> Any:
        rows.append(len(logp))
        return loss(logp, logp_old, part, responses)

    with watched(mine, "minirl_loss", watch):
        mine.update(policy, optimizer, drawn, size, micro)
    if max(rows) > micro:
        yield Finding("the whole mini-batch at once", f"One call of `minirl_loss` had {max(rows)} responses.")
    if len(steps) > 2:
        yield Finding("a step for each part", f"There were {len(steps)} steps for 2 mini-batches.")
    changes = ("divided by the part", "only the last part", "gradients pile up")
    known = {change: _updated(mine, drawn, size, micro, change=change) for change in changes}
    yield from named("a weight after `update`", policy["next_proj"], _updated(mine, drawn, size, micro), known)


def _lengths(mine: Any) -> Iterator[Finding]:
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    tokens, advantages = torch.zeros(2, WIDTH + 4, dtype=torch.long), torch.tensor([0.5, -0.5])
    logp = torch.where(mask, -0.7, 0.0)
    part = rollout(mine, tokens=tokens, mask=mask, logp=logp, advantages=advantages)
    leaf = logp.clone().requires_grad_()
    found = -torch.autograd.grad(mine.minirl_loss(leaf, logp, part, 2)[0], leaf)[0][mask]
    right = torch.tensor([0.25, *[-0.25] * 4])
    known = {
        "divided by the length": torch.tensor([0.25, *[-0.25 / 4] * 4]),
        "divided by all tokens": right * 2 / 5,
        "divided by the longest": right / 4,
    }
    yield from named("the gradient of a token", found, right, known)
    drawn = mine.sample({"next_proj": table(1)}, ["3+4+9"], 64, seeded(0))
    if _divided_by_std(drawn, 64):
        yield Finding("divided by the standard deviation")


MICRO = step(
    "05",
    "update",
    """
- the whole mini-batch at once: a part has more responses than `micro_batch`. The parts exist because a mini-batch may
  not fit into memory.
- a step for each part: the optimizer makes a step after each part. The parts belong to one gradient: a smaller memory
  must not mean more and noisier steps.
- divided by the part: each part is divided by its own number of responses. The sum of the parts is then too large, by
  the number of parts. The clipping of the norm hides part of that, and Adam most of it.
- only the last part: the gradient is set to zero before each part, so only the last part counts.
- gradients pile up: the second step contains the gradient of the first mini-batch once more.
- divided by the length: each response's sum is divided by its length. Tokens of long wrong answers are then punished
  less than those of short ones, which rewards long wrong answers over short ones.
- divided by all tokens: the loss is a mean over the tokens of a part. In micro-batches of other lengths the same token
  gets another weight, so they no longer add up.
- divided by the longest: the loss is divided by the number of columns. The longest response of a part then sets the
  weight of all the others.
- divided by the standard deviation: the advantage is divided by the standard deviation of its group. The gradient then
  belongs to another objective, in which the hardest and the easiest prompts count most.

The gradient is the same for every size of the parts, to rounding.
""",
    _use_table,
    _micro_batches,
    _lengths,
)

STEPS = (REINFORCE, ONE_WEIGHT, ENGINE, STALE, MICRO)
