"""Checks of steps 06 to 08: a Mixture of Experts, routing replay and the whole training, on the cold start."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from minirl_edu.course.capstone.parts import END, VOCABULARY, WIDTH, Finding, named, seeded, step, watched
from minirl_edu.course.variants import gates, zeroed_gates
from minirl_edu.models import load_model
from minirl_edu.tasks.base import held_out
from minirl_edu.tasks.chain import HELD_OUT_FRACTION

COLD_START = Path(__file__).parents[2] / "cold_starts" / "chain-steps" / "model.safetensors"
LAYERS, EXPERTS, TOP_K = 2, 8, 2
TEXTS = ["3+4+9", "1+2+3+4+5+6", "9+9+9+9", "5+0+5", "7+3+8+1+6+2", "2+6+4+4"]

# -------------------------------------------------------------------------------------------- 06 · a Mixture of Experts


def _loading(mine: Any) -> Iterator[Finding]:
    found, right = mine.load(COLD_START), load_file(COLD_START)
    if set(found) == set(right) or any(name.startswith("model.") for name in found):
        yield Finding("the file's names")
    names = {name.removeprefix("model.").removesuffix(".weight"): name for name in right}
    if set(found) != set(names):
        yield Finding("", f"`load` gave the names {sorted(set(found) ^ set(names))[:3]} … too many or too few")
    for name, weight in found.items():
        yield from named(f"the weight `{name}`", weight, right[names[name]], atol=0.0, rtol=0.0)
    if not all(weight.requires_grad and weight.is_leaf for weight in found.values()):
        yield Finding("weights that cannot learn")


def _layer() -> tuple[dict[str, Tensor], Tensor]:
    """A layer of experts with random weights, and its inputs [20, 6]."""
    sizes = {"gate_proj": (4, 6), "up_proj": (4, 6), "down_proj": (6, 4)}
    w = {f"m.experts.{e}.{kind}": torch.randn(size) for e in range(EXPERTS) for kind, size in sizes.items()}
    w["m.gate"] = torch.empty(EXPERTS, 6)
    for i, weight in enumerate(w.values()):
        weight.copy_(torch.randn(weight.shape, generator=seeded(i)))
    return {name: weight.requires_grad_() for name, weight in w.items()}, torch.randn(20, 6, generator=seeded(99))


def _mixed(w: dict[str, Tensor], x: Tensor, routes: Tensor, weights: Tensor, *, exchanged: bool = False) -> Tensor:
    """The outputs of these experts with these weights [n, k], by computing all experts for all tokens."""
    outputs = []
    for e in range(EXPERTS):
        gate, up, down = (w[f"m.experts.{e}.{kind}_proj"] for kind in ("gate", "up", "down"))
        gate, up = (up, gate) if exchanged else (gate, up)
        outputs.append((F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    return (weights[..., None] * torch.stack(outputs, 1).gather(1, routes[..., None].expand(-1, -1, 6))).sum(1)


def _experts(mine: Any) -> Iterator[Finding]:
    w, x = _layer()
    logits = x @ w["m.gate"].T
    scores = logits.softmax(-1)
    routes = scores.topk(TOP_K).indices
    kept, weights = scores.gather(-1, routes), gates(logits, routes)
    output, used = mine.moe(w, "m", x, None)
    yield from named("the routes, sorted,", used.sort(-1)[0], routes.sort(-1)[0])
    best = scores == scores.amax(-1, keepdim=True)
    known = {
        "gates that are not divided": _mixed(w, x, routes, kept),
        "no gates": _mixed(w, x, routes, torch.ones(20, TOP_K)),
        "equal gates": _mixed(w, x, routes, torch.full((20, TOP_K), 0.5)),
        "only the best expert": _mixed(w, x, routes, best.gather(-1, routes).float()),
        "the two halves of an expert exchanged": _mixed(w, x, routes, weights, exchanged=True),
        "logits as gates": _mixed(w, x, routes, logits.gather(-1, routes)),
    }
    yield from named("the output of `moe`", output, _mixed(w, x, routes, weights), known)


def _some_tokens() -> Tensor:
    """Prompts and responses such as `,7,6.`, [48, 22]."""
    rng = random.Random(0)
    prompts = ["+".join(rng.choices("0123456789", k=rng.randint(3, 6))).ljust(WIDTH - 1) + "=" for _ in range(48)]
    responses = ["".join(f",{rng.randrange(10)}" for _ in range(3)) for _ in prompts]
    return torch.tensor([[VOCABULARY.index(c) for c in a + b] for a, b in zip(prompts, responses, strict=True)])


def _model(mine: Any) -> Iterator[Finding]:
    w, tokens = mine.load(COLD_START), _some_tokens()
    logits, routes = mine.forward(w, tokens)
    if routes is None or list(routes.shape) != [*tokens.shape, LAYERS, TOP_K]:
        yield Finding("", f"the routes should be [B, S, L, k], {[*tokens.shape, LAYERS, TOP_K]} here")
    later = tokens.clone()
    later[:, -1] = END
    if not torch.allclose(mine.forward(w, later)[0][:, :-1], logits[:, :-1], atol=1e-3):
        yield Finding("a look into the future")
    probe = torch.randn(logits.shape, generator=seeded(0))
    moved = torch.autograd.grad((probe * logits).sum(), list(w.values()), allow_unused=True)
    idle = [name for name, slope in zip(w, moved, strict=True) if slope is None or not slope.any()]
    if idle:
        yield Finding("a weight without effect", f"It is `{idle[0]}`.")
    with torch.no_grad():
        right = load_model("chain-steps")(tokens).logits
    if (seen := float((logits.detach() - right).abs().max())) > 1e-2:
        yield Finding("other logits", f"The largest difference is {seen:.2g}.")


def _exact_engine(mine: Any) -> Iterator[Finding]:
    if "routes" not in mine.Rollout._fields:
        yield Finding("", "`Rollout` has no field `routes` yet")
    w = mine.load(COLD_START)
    drawn = mine.sample(w, TEXTS, 4, seeded(0))
    with torch.no_grad():
        logp, _, used = mine.logprobs(w, drawn)
    wrong = ((drawn.logp - logp).abs() > 1e-3) & drawn.mask
    # A token or two may differ: rounding in another order can move a token to another expert.
    if wrong.sum() > 0.05 * drawn.mask.sum():
        first = "" if wrong[:, 0].any() else "The first token of each response is right."
        yield Finding("an exact engine that differs", first)
    shape = [len(drawn.tokens), drawn.tokens.shape[1] - 1, LAYERS, TOP_K]
    if list(drawn.routes.shape) != shape:
        yield Finding("routes of other tokens", f"They are {list(drawn.routes.shape)}; here {shape} was expected.")
    read = torch.cat((torch.ones(len(drawn.tokens), WIDTH - 1, dtype=torch.bool), drawn.mask), 1)
    if (drawn.routes.sort(-1)[0] != used.sort(-1)[0])[read].float().mean() > 0.05:
        yield Finding("routes in other places")


EXPERTS_STEP = step(
    "06",
    "load moe forward sample logprobs rounded minirl_loss",
    """
- the file's names: the names are those of the file. Take `model.` off in front and `.weight` behind.
- weights that cannot learn: a weight does not require a gradient, or is not a leaf, so no optimizer can move it.
- gates that are not divided: the gates of a token do not add up to 1. The layer's output then shrinks where the router
  is unsure, and the cold start was not trained that way.
- no gates: the outputs of the experts are added without gates. The router then gets no gradient at all.
- equal gates: the experts count equally. The router then only chooses, and gets no gradient.
- only the best expert: only one of the two experts counts.
- the two halves of an expert exchanged: the nonlinearity is on `up_proj`. It belongs on `gate_proj`.
- logits as gates: the gates are logits. They must be positive and add up to 1.
- a look into the future: the logits at a position change with a later token. The log-probability of a token would then
  depend on the token itself and on what follows.
- a weight without effect: one of the weights never changes the logits, so a part of the model is missing.
- other logits: every weight has an effect, but the logits are not those of transformers. Frequent causes: no rotary
  embedding, its pairs or its base, it stands before the norms of queries and keys, a norm behind instead of in front
  of a part, a missing residual.
- an exact engine that differs: with the same unrounded weights, the log-probabilities recorded in sampling differ from
  the trainer's. In exact arithmetic both are one policy. Every later ratio would contain this difference. If only
  later tokens differ, look at the cache: positions, order, and whether it belongs to the right responses.
- routes of other tokens: the routes belong to every token that the engine reads: the prompt's too, and not the last,
  which nobody reads.
- routes in other places: the recorded routes are not those of their tokens. Replay would give a token the experts of
  another one.

The engine with exact weights is the trainer: equal log-probabilities, equal experts.
""",
    _loading,
    _experts,
    _model,
    _exact_engine,
)

# -------------------------------------------------------------------------------------------------- 07 · routing replay


def _forced(mine: Any) -> Iterator[Finding]:
    w, x = _layer()
    routes = torch.stack([torch.randperm(EXPERTS, generator=seeded(i))[:TOP_K] for i in range(20)])
    logits = x @ w["m.gate"].T
    live = logits.topk(TOP_K).indices
    weights = gates(logits, routes)
    output, used = mine.moe(w, "m", x, routes)
    known = {
        "forced experts ignored": _mixed(w, x, live, gates(logits, live)),
        "the gates of other experts": _mixed(w, x, routes, gates(logits, live)),
        "gates of zero": _mixed(w, x, routes, zeroed_gates(logits, routes)),
        "equal gates": _mixed(w, x, routes, torch.full((20, TOP_K), 0.5)),
        "gates that are not divided": _mixed(w, x, routes, logits.softmax(-1).gather(-1, routes)),
    }
    right = _mixed(w, x, routes, weights)
    yield from named("the output of `moe` with forced experts", output, right, known)
    yield from named(
        "the routes, sorted,", used.sort(-1)[0], routes.sort(-1)[0], {"live routes returned": live.sort(-1)[0]}
    )
    probe = torch.randn(right.shape, generator=seeded(3))
    slopes = [torch.autograd.grad((probe * y).sum(), w["m.gate"], allow_unused=True)[0] for y in (output, right)]
    if slopes[0] is None or not slopes[0].any():
        yield Finding("a router that learns nothing")
    yield from named("the router's gradient", slopes[0], slopes[1])


def _drawn(mine: Any) -> tuple[dict[str, Tensor], Any]:
    """The policy, and 24 responses of an engine of three bits, whose advantages are random."""
    policy = mine.load(COLD_START)
    drawn = mine.sample(mine.rounded(policy, 3), TEXTS, 4, seeded(3))
    return policy, drawn._replace(advantages=torch.randn(24, generator=seeded(1)))


def _own_routes(mine: Any) -> Iterator[Finding]:
    policy, drawn = _drawn(mine)
    gate = policy["layers.0.mlp.gate"]
    logp, _, used = mine.logprobs(policy, drawn)
    again = mine.logprobs(policy, drawn, used)[0]
    slopes = [torch.autograd.grad(x.sum(), gate)[0] for x in (logp, again)]
    if not torch.equal(logp, again) or not torch.equal(*slopes):
        yield Finding("replay of its own routes changes something")
    replayed = mine.logprobs(policy, drawn, drawn.routes)[2]
    yield from named(
        "the routes under replay, sorted,",
        replayed.sort(-1)[0],
        drawn.routes.sort(-1)[0],
        {"the model ignores routes": used.sort(-1)[0]},
    )


def _replayed(mine: Any, replay: str) -> Iterator[Finding]:
    policy, drawn = _drawn(mine)
    optimizer, size, calls = torch.optim.SGD(policy.values(), lr=1.0), 8, []
    with torch.no_grad():
        live = mine.logprobs(policy, drawn)[2]

    def at(weights: dict[str, Tensor], part: Any, number: int) -> dict[str, Tensor]:
        """log π of a mini-batch with the experts of now, with those at θ_old, and with the engine's."""
        old = live[number * size : (number + 1) * size]
        routes = {"none": None, "R2": old, "R3": part.routes}
        with torch.no_grad():
            return {name: mine.logprobs(weights, part, experts)[0] for name, experts in routes.items()}

    start = {name: weight.detach().clone() for name, weight in policy.items()}

    def watch(loss: Any, logp: Tensor, logp_old: Tensor, part: Any, responses: int) -> Any:
        calls.append((logp.detach(), at(policy, part, len(calls)), logp_old.detach(), at(start, part, len(calls))))
        return loss(logp, logp_old, part, responses)

    with watched(mine, "minirl_loss", watch):
        mine.update(policy, optimizer, drawn, size, size, replay=replay)
    if len(calls) != 3:
        yield Finding("", f"`update` called `minirl_loss` {len(calls)} times for 3 mini-batches")
    for i in (1, 2, 0):  # at first, the experts of now are still those at θ_old
        logp, now, logp_old, then = calls[i]
        where = f"of mini-batch {i + 1} under {replay}"
        if replay == "R2":
            yield from named(f"log π_old {where}", logp_old, then["none"], {"R2 with the engine's experts": then["R3"]})
            known = {"R2 with the experts of now": now["none"], "R2 with the engine's experts": now["R3"]}
            yield from named(f"log π_θ {where}", logp, now["R2"], known, atol=1e-4)
        else:
            known = {"R3 without π_old": then["none"]}
            yield from named(f"log π_old {where}", logp_old, then["R3"], known, atol=1e-4)
            known = {"R3 without π_θ": now["none"], "R3 with the trainer's experts": now["R2"]}
            yield from named(f"log π_θ {where}", logp, now["R3"], known, atol=1e-4)


def _r2(mine: Any) -> Iterator[Finding]:
    yield from _replayed(mine, "R2")


def _r3(mine: Any) -> Iterator[Finding]:
    yield from _replayed(mine, "R3")


REPLAY = step(
    "07",
    "load moe forward sample logprobs rounded minirl_loss update",
    """
- forced experts ignored: the layer chooses its experts itself although some are given. Replay then changes nothing.
- the gates of other experts: forced experts get the gates of those that the router would have chosen. Each expert's
  gate is its own score, divided by the sum over the forced ones.
- gates of zero: an expert outside the router's own choice has gate 0. It is replayed by name and contributes nothing,
  and a token with two such experts divides 0 by 0.
- equal gates: forced experts count equally. Replay fixes the choice, and not the gates: the router must keep learning.
- gates that are not divided: the gates of forced experts do not add up to 1.
- live routes returned: with forced experts, the layer returns those that it would have chosen.
- a router that learns nothing: under replay the router has no gradient. The gates must be computed anew from its
  scores. A frozen router stays with the experts of the cold start.
- replay of its own routes changes something: with the experts that it would have chosen anyway, the log-probabilities
  or the router's gradient change. Both ways must do the same arithmetic, or the first ratio under R2 is not exactly 1.
- the model ignores routes: `moe` takes forced experts, but the model does not give them to it.
- R2 with the engine's experts: under R2 you replay the engine's experts. R2 replays what the trainer itself chose at
  θ_old.
- R2 with the experts of now: under R2 an updated policy chooses its experts anew. Without replay a single flipped
  expert moves a ratio far from 1, which the clipping takes for a large update.
- R3 without π_old: under R3 the π_old is computed with the trainer's own experts. The first ratio is then not 1: it
  contains the difference of the routes, which R3 is meant to take out.
- R3 without π_θ: under R3 the policy that learns chooses its own experts. Then only π_old has been brought close to
  the engine.
- R3 with the trainer's experts: under R3 you replay what the trainer chose at θ_old. R3 replays the engine's choice,
  from the rollout.

Under R3 no token has another expert than in the engine, and the router learns all the same.
""",
    _forced,
    _own_routes,
    _r2,
    _r3,
)

# ---------------------------------------------------------------------------------------------------------- 08 · MiniRL


def _copies(w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in w.items()}


class _Watch:
    """A short training and what happened in it."""

    def __init__(self, mine: Any, seed: int) -> None:
        self.rollouts: list[tuple[dict[str, Tensor], list[str], Any]] = []
        self.exams: list[tuple[dict[str, Tensor], list[str], Any]] = []
        self.updates: list[tuple[dict[str, Tensor], Any, int, int, str]] = []
        self.last: dict[str, Tensor] = {}

        def sampling(sample: Any, w: Any, texts: Any, group_size: int, generator: Any) -> Any:
            drawn = sample(w, texts, group_size, generator)
            (self.exams if group_size == 1 else self.rollouts).append((_copies(w), list(texts), drawn))
            return drawn

        def updating(
            update: Any, policy: Any, optimizer: Any, rollout: Any, size: int, micro_batch: int, replay: str = "none"
        ) -> Any:
            self.updates.append((_copies(policy), optimizer, size, micro_batch, replay))
            answer = update(policy, optimizer, rollout, size, micro_batch, replay)
            self.last = _copies(policy)
            return answer

        with watched(mine, "sample", sampling), watched(mine, "update", updating):
            options = dict(N=2, steps=2, bits=3, prompts=2, group_size=2, micro_batch=2, lr=1e-2)
            self.score = mine.train("R2", seed, **options)


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def _loop(mine: Any) -> Iterator[Finding]:
    seen = _Watch(mine, 1)
    if len(seen.updates) != 2 or len(seen.rollouts) != 2:
        yield Finding("", f"{len(seen.rollouts)} rollouts and {len(seen.updates)} updates in 2 global steps")
    for (engine, texts, _), (policy, *_) in zip(seen.rollouts, seen.updates, strict=True):
        if any(held_out(text, HELD_OUT_FRACTION) for text in texts):
            yield Finding("trained on the examination")
        if len(texts) != 4:
            yield Finding("", f"a rollout has {len(texts)} problems; N · prompts is 4")
        if _same(engine, policy):
            yield Finding("an engine that is not rounded")
        if not _same(engine, mine.rounded(policy, 3)):
            stale = _same(engine, mine.rounded(seen.updates[0][0], 3))
            yield Finding("an engine with old weights" if stale else "", "It is not `rounded(policy, bits)`.")
    if seen.rollouts[0][1] == seen.rollouts[1][1]:
        yield Finding("the same problems again")
    for _, optimizer, size, micro_batch, replay in seen.updates:
        if size != 4:
            yield Finding("another mini-batch", f"It has {size}.")
        if (micro_batch, replay) != (2, "R2"):
            yield Finding("options that get lost", f"`update` got micro_batch={micro_batch} and replay={replay!r}.")
        options = {name: optimizer.param_groups[0][name] for name in ("lr", "betas", "weight_decay")}
        if options != dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0):
            yield Finding("another optimizer", f"It has {options}.")
    if seen.updates[0][1] is not seen.updates[1][1]:
        yield Finding("a new optimizer in each step")
    if not isinstance(seen.score, float):
        yield Finding("", f"`train` returned a {type(seen.score).__name__}; a float was expected")
    if seen.exams:
        weights, texts, drawn = seen.exams[-1]
        if len(texts) != 256 or not all(held_out(text, HELD_OUT_FRACTION) for text in texts):
            yield Finding("an examination of seen problems")
        if _same(weights, mine.rounded(seen.last, 3)):
            yield Finding("the engine is examined")
        if not _same(weights, seen.last):
            yield Finding("the score of an earlier policy")
        yield from named("the score", seen.score, float(drawn.rewards.mean()))
    again, other = _Watch(mine, 1), _Watch(mine, 2)
    if any(
        not torch.equal(one[2].tokens, two[2].tokens) for one, two in zip(seen.rollouts, again.rollouts, strict=True)
    ):
        yield Finding("a run that cannot be repeated")
    if seen.rollouts[0][1] == other.rollouts[0][1]:
        yield Finding("a seed without effect")


def _learns(mine: Any) -> Iterator[Finding]:
    started = time.process_time()
    score = mine.train("R3", 0)
    seconds = time.process_time() - started
    if score <= 0.9:
        yield Finding("it does not learn", f"The score is {score:.2f}.")
    if seconds > 180:
        yield Finding("too slow", f"The training took {seconds:.0f} s of a processor.")


MINIRL = step(
    "08",
    "load moe forward sample logprobs rounded minirl_loss update train",
    """
- trained on the examination: held-out problems are in the training. The score then measures memory.
- an engine that is not rounded: the rollout comes from the trainer's own weights. Then there is no discrepancy, and
  the run shows nothing about its correction.
- an engine with old weights: the engine has the weights of the first step. They grow staler in each global step, and
  all that bounds the staleness is that the engine is synchronised before each rollout.
- the same problems again: both global steps have the same problems.
- another mini-batch: `update` should get prompts · group_size = 4 responses for each mini-batch here. The number of
  updates from one rollout follows from it.
- options that get lost: an argument of `train` does not reach `update`. A comparison of two settings would compare a
  setting with itself.
- another optimizer: the optimizer's settings differ from those of the step's text.
- a new optimizer in each step: every global step has a new optimizer. It forgets the running means, and the first step
  of Adam moves every weight by the whole learning rate, whatever the gradient.
- an examination of seen problems: the score needs 256 held-out problems.
- the engine is examined: the score is that of the rounded engine. The result of the training is the policy itself.
- the score of an earlier policy: the last examination comes before the last update.
- a run that cannot be repeated: the same seed gives different runs. A difference between two settings could then be
  chance.
- a seed without effect: two seeds give the same problems. Several runs would then count as one.
- it does not learn: every part passes, and the whole stays at or below 0.9. A score that stays where it is points to
  the optimizer or its learning rate; one that rises slowly, to the number of updates or to problems that repeat.
- too slow: the run learns, but it takes more than 3 minutes of a core. Frequent causes: no cache in sampling, a loop
  over single responses or tokens.

That is MiniRL, equation (7), whole and yours.
""",
    _loop,
    _learns,
)

STEPS = (EXPERTS_STEP, REPLAY, MINIRL)
