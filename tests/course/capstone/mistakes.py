"""Wrong files: what to replace in a right one, by step and by the name of the mistake.

Steps 01 to 05 begin with that step's file in `table.py`, the others with lessons/nano_minirl.py. Where the old text
stands several times, the last one is replaced, which is that of the latest definition.
"""

_SUM = "-(part.advantages[:, None] * logp).sum() / responses"
_WEIGHTED = "-(weight * part.advantages[:, None] * logp).sum() / responses"
_LENGTHS = "part.mask.sum(1, keepdim=True)"
_BASELINE = "rewards - baseline)"
_CHOSEN = "torch.where(part.mask, chosen, 0.0)"
_ENTROPY = "torch.where(part.mask, entropy, 0.0)"
_MASK = "m = ~(((a > 0) & (r > 1.27)) | ((a < 0) & (r < 0.8)))"
_CLIPPED = "-(m * weight * a * logp).sum() / responses"
_STEP = "step = weight.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)"
_CAP = ".detach().clamp(max=5)"
_DEFINED = "weight = (logp - part.logp).exp().detach()"


def _by(old: str, new: str) -> tuple[tuple[str, str], ...]:
    return ((old, new),)


def _divided(loss: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """What people divide a loss by, and its sign."""
    terms = loss[1:].removesuffix(".sum() / responses")
    return {
        "the sign of the loss": _by(loss, loss[1:]),
        "divided by the length": _by(loss, f"-({terms} / {_LENGTHS}).sum() / responses"),
        "divided by all tokens": _by(loss, f"-{terms}.sum() / part.mask.sum()"),
        "divided by the places": _by(loss, f"-{terms}.mean()"),
        "divided by the rows": _by(loss, f"-{terms}.sum() / len(logp)"),
        "a loss without gradient": _by(loss, loss.replace("logp)", "logp.detach())")),
    }


VARIANTS: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    "01": {
        "problems without the seed": _by(
            'text = "+".join(rng.choices("0123456789", k=rng.randint(3, 6)))',
            'import random\n        text = "+".join(random.choices("0123456789", k=random.randint(3, 6)))',
        ),
        "held-out problems": _by(") == held_out:", ") >= held_out:"),
        "PAD and END in the text": _by(" if i not in (PAD, END))", ")"),
        "only one separator": _by('in (f",{answer}", f"={answer}")', 'in (f",{answer}",)'),
        "a digit without a separator": _by('text[-2:] in (f",{answer}", f"={answer}")', "text.endswith(str(answer))"),
        "the answer anywhere": _by(
            'text[-2:] in (f",{answer}", f"={answer}")', 'f",{answer}" in text or f"={answer}" in text'
        ),
        "the whole sum": _by(
            'sum(map(int, problem.split("+"))) % 10\n    return float(text[-2:] in (f",{answer}", f"={answer}"))',
            'sum(map(int, problem.split("+")))\n    return float(text.endswith((f",{answer}", f"={answer}")))',
        ),
        "a column of the table": _by('w["next_proj"][tokens]', 'w["next_proj"].T[tokens]'),
        "sampling with gradient": _by("@torch.no_grad()\n", ""),
        "prompts take turns": _by("prompts.repeat_interleave(group_size, 0)", "prompts.repeat(group_size, 1)"),
        "goes on after the end": _by("        y = torch.where(going, y, PAD)\n", ""),
        "END is no token": (
            ("        masks.append(going)\n", ""),
            ("going = going & (y != END)", "going = going & (y != END)\n        masks.append(going)"),
        ),
        "padding in the mask": _by("masks.append(going)", "masks.append(torch.ones_like(going))"),
        "probabilities": _by("every.gather(1, y), 0.0)", "every.gather(1, y).exp(), 0.0)"),
        "log-probabilities after the end": _by("torch.where(going, every.gather(1, y), 0.0)", "every.gather(1, y)"),
        "one position late": _by(
            "torch.where(going, every.gather(1, y), 0.0)",
            "torch.where(going, forward(w, y)[0][:, -1].log_softmax(-1).gather(1, y), 0.0)",
        ),
        "always the best token": _by(
            "torch.multinomial(every.exp(), 1, generator=generator)", "every.argmax(-1, keepdim=True)"
        ),
        "drawn without the generator": _by(", generator=generator)", ")"),
        "rewards of another problem": _by("texts[i // group_size], y)", "texts[i % len(texts)], y)"),
        "divided by the standard deviation": _by(
            _BASELINE,
            "(rewards - baseline) / (rewards.view(-1, group_size).std(1).repeat_interleave(group_size) + 1e-4))",
        ),
        "baseline of the batch": _by(_BASELINE, "rewards - rewards.mean())"),
        "no baseline": _by(_BASELINE, "rewards)"),
        "baseline without oneself": _by(_BASELINE, "(rewards - baseline) * group_size / (group_size - 1))"),
        "log π without gradient": _by("def logprobs(", "@torch.no_grad()\ndef logprobs("),
        "the logits of the same position": (
            ("part.tokens[:, :-1], routes)", "part.tokens, routes)"),
            ("logits[:, WIDTH - 1 :]", "logits[:, WIDTH:]"),
        ),
        "log π of padding": _by(_CHOSEN, "chosen"),
        "entropy of one token": _by(_ENTROPY, "torch.where(part.mask, -chosen, 0.0)"),
        "negative entropy": _by("entropy = -(", "entropy = ("),
        "entropy of padding": _by(_ENTROPY, "entropy"),
        **_divided(_SUM),
        "the reward for the advantage": _by(_SUM, _SUM.replace("advantages", "rewards")),
        "the probability for its logarithm": _by(
            _SUM, _SUM.replace("* logp)", "* torch.where(part.mask, logp.exp(), 0))")
        ),
    },
    "02": {
        "no weight": _by(_DEFINED, "weight = torch.ones_like(logp)"),
        "the weight of the whole response": _by(
            _DEFINED, "weight = (logp - part.logp).sum(1, keepdim=True).exp().detach().expand_as(logp)"
        ),
        "the product of the ratios so far": _by(_DEFINED, "weight = (logp - part.logp).cumsum(1).exp().detach()"),
        "a weight with gradient": _by(_DEFINED, "weight = (logp - part.logp).exp()"),
        "the weight upside down": _by(_DEFINED, "weight = (part.logp - logp).exp().detach()"),
        "the trainer below the line": _by(_DEFINED, "weight = (logp - logp_old).exp().detach()"),
        **_divided(_WEIGHTED),
    },
    "03": {
        "the trainer's weights rounded": _by(
            "engine[name] = (weight / step).round() * step",
            """policy[name].data.div_(step).round_().mul_(step)
            engine[name] = policy[name].detach().clone()""",
        ),
        "an engine with gradient": _by("weight.detach().clone()", "weight.clone()"),
        "nothing rounded": _by('if "_proj" in name', 'if "_proj.weight" in name'),
        "one step for the matrix": _by("weight.abs().amax(-1, keepdim=True)", "weight.abs().max()"),
        "a step for each column": _by("weight.abs().amax(-1, keepdim=True)", "weight.abs().amax(0)"),
        "one level too many": _by("(2 ** (bits - 1) - 1)", "2 ** (bits - 1)"),
        "the steps of both signs": _by("(2 ** (bits - 1) - 1)", "(2**bits - 1)"),
        "all weights rounded": _by('if "_proj" in name', "if weight.ndim == 2"),
        "shared weights": _by("weight.detach().clone()", "weight.detach()"),
        "no cap": _by(_CAP, ".detach()"),
        "a floor as well": _by(_CAP, ".detach().clamp(0.2, 5)"),
        "nothing left above the cap": _by(
            "weight = (logp - part.logp).exp().detach().clamp(max=5)",
            "weight = (logp - part.logp).exp().detach()\n    weight = weight * (weight <= 5)",
        ),
        "a cap on the logarithm": _by(
            "(logp - part.logp).exp().detach().clamp(max=5)", "(logp - part.logp).clamp(max=5).exp().detach()"
        ),
        "weights that add up to one": _by(_CAP, ".detach()\n    weight = weight / weight.mean()"),
        "capped weights that add up to one": _by(_CAP, f"{_CAP}\n    weight = weight / weight.mean()"),
        "the cap is not in the loss": _by(_WEIGHTED, _WEIGHTED.replace("weight", "(logp - part.logp).exp().detach()")),
    },
    "04": {
        "nothing clipped": _by(_MASK, "m = torch.ones_like(part.mask)"),
        "both sides for both signs": _by(_MASK, "m = (r <= 1.27) & (r >= 0.8)"),
        "the other two quadrants": _by(
            _MASK, _MASK.replace("a > 0", "a << 0").replace("a < 0", "a > 0").replace("<<", "<")
        ),
        "bounds exchanged": _by(_MASK, _MASK.replace("1.27", "1.2").replace("0.8", "0.73")),
        "True where dropped": _by(_MASK, _MASK.replace("~", "")),
        "logarithm against the bound": _by(
            _MASK, _MASK.replace("r > 1.27", "r.log() > 0.27").replace("r < 0.8", "r.log() < -0.2")
        ),
        "ratio upside down": _by("r = (logp - logp_old)", "r = (logp_old - logp)"),
        "the engine below the line of the mask": _by("r = (logp - logp_old)", "r = (logp - part.logp)"),
        "the mask is not in the loss": _by(_CLIPPED, _CLIPPED.replace("m * ", "")),
        "π_old with gradient": _by("    with torch.no_grad():\n        old = [", "    if True:\n        old = ["),
        "π_old from the engine": _by("old = [logprobs(policy, part)[0] for", "old = [part.logp for"),
        "π_old anew in each mini-batch": _by(
            "        loss, _, _ =", "        logp_old = logprobs(policy, part)[0].detach()\n        loss, _, _ ="
        ),
        "no step between mini-batches": _by("        optimizer.step()\n", "    optimizer.step()\n"),
        "divided by all responses": _by("logp_old, part, size)", "logp_old, part, len(rollout.tokens))"),
        "gradients pile up": _by("        optimizer.zero_grad()\n", ""),
        "the gradient not clipped": _by("        torch.nn.utils.clip_grad_norm_(policy.values(), 1.0)\n", ""),
    },
    "05": {
        "the whole mini-batch at once": _by(
            "start + size, micro_batch):", "start + size, size):\n            micro_batch = size"
        ),
        "a step for each part": _by(
            "            loss.backward()\n",
            "            loss.backward()\n            optimizer.step()\n            optimizer.zero_grad()\n",
        ),
        "divided by the part": _by("micro_batch], part, size)", "micro_batch], part, micro_batch)"),
        "only the last part": _by(
            "            loss.backward()\n", "            optimizer.zero_grad()\n            loss.backward()\n"
        ),
        "gradients pile up": _by("        optimizer.zero_grad()\n        for", "        for"),
        "divided by the length": _by(_CLIPPED, f"-(m * weight * a * logp / {_LENGTHS}).sum() / responses"),
        "divided by all tokens": _by(_CLIPPED, "-(m * weight * a * logp).sum() / part.mask.sum()"),
        "divided by the longest": _by(_CLIPPED, "-(m * weight * a * logp).mean(1).sum() / responses"),
        "divided by the standard deviation": _by(
            _BASELINE,
            "(rewards - baseline) / (rewards.view(-1, group_size).std(1).repeat_interleave(group_size) + 1e-4))",
        ),
    },
    "06": {
        "the file's names": _by("name[6:-7]:", "name:"),
        "weights that cannot learn": _by(".requires_grad_() for", " for"),
        "gates that are not divided": _by("gates / gates.sum(-1, keepdim=True), torch", "gates, torch"),
        "no gates": _by("gates[token, place, None] * (", "("),
        "equal gates": _by("gates / gates.sum(-1, keepdim=True), torch", "torch.full_like(gates, 1 / TOP_K), torch"),
        "only the best expert": _by(
            "gates / gates.sum(-1, keepdim=True), torch", "(gates == scores.amax(-1, keepdim=True)).float(), torch"
        ),
        "the two halves of an expert exchanged": _by(
            "F.silu(x[token] @ gate.T) * (x[token] @ up.T)", "F.silu(x[token] @ up.T) * (x[token] @ gate.T)"
        ),
        "logits as gates": _by(
            "gates / gates.sum(-1, keepdim=True), torch", '(x @ w[f"{at}.gate"].T).gather(-1, routes), torch'
        ),
        "a look into the future": _by("is_causal=not past", "is_causal=False"),
        "a weight without effect": _by('rotate(norm(q, w[f"{at}.q_norm"]), start)', "rotate(q, start)"),
        "other logits": _by(
            'q, k = rotate(norm(q, w[f"{at}.q_norm"]), start), rotate(norm(k, w[f"{at}.k_norm"]), start)',
            'q, k = norm(q, w[f"{at}.q_norm"]), norm(k, w[f"{at}.k_norm"])',
        ),
        "an exact engine that differs": _by("start = past[0].shape[2] if past else 0", "start = 0"),
        "routes of other tokens": _by(
            "torch.cat(logps, 1), routes, rewards", "torch.cat(logps, 1), routes[:, WIDTH:], rewards"
        ),
        "routes in other places": _by("torch.cat((routes, experts), 1)", "torch.cat((experts, routes), 1)"),
    },
    "07": {
        "forced experts ignored": _by("if routes is None else routes  # replay", "if True else routes  # replay"),
        "the gates of other experts": _by("scores.gather(-1, routes)  #", "scores.topk(TOP_K).values  #"),
        "gates of zero": _by(
            "gates = scores.gather(-1, routes)  #",
            "gates = scores.where(scores >= scores.topk(TOP_K).values[:, -1:], 0).gather(-1, routes)  #",
        ),
        "equal gates": _by("gates / gates.sum(-1, keepdim=True), torch", "torch.full_like(gates, 1 / TOP_K), torch"),
        "gates that are not divided": _by("gates / gates.sum(-1, keepdim=True), torch", "gates, torch"),
        "live routes returned": _by("    return y, routes\n", "    return y, scores.topk(TOP_K).indices\n"),
        "a router that learns nothing": _by(
            "gates = scores.gather(-1, routes)  #", "gates = scores.detach().gather(-1, routes)  #"
        ),
        "replay of its own routes changes something": (
            ("    routes = scores.topk", "    live = routes is None\n    routes = scores.topk"),
            (
                "    gates, y = gates /",
                '    if not live:\n        gates = (x @ w[f"{at}.gate"].T).gather(-1, routes).softmax(-1)\n'
                "    gates, y = gates /",
            ),
        ),
        "the model ignores routes": _by("forced = None if routes is None else", "forced = None if True else"),
        "R2 with the engine's experts": _by('"R2": used, "R3"', '"R2": part.routes, "R3"'),
        "R2 with the experts of now": _by('"R2": used, "R3"', '"R2": None, "R3"'),
        "R3 without π_old": _by('part.routes if replay == "R3" else None)', "None)"),
        "R3 without π_θ": _by('"R3": part.routes}', '"R3": None}'),
        "R3 with the trainer's experts": (
            (
                '"R3": part.routes}[replay])',
                '"R3": live[i - 1]}[replay])',
            ),
            (
                "    with torch.no_grad():  # π_old of",
                "    with torch.no_grad():\n        live = [logprobs(policy, part)[2] for part in parts]\n"
                "    with torch.no_grad():  # π_old of",
            ),
        ),
    },
    "08": {
        "trained on the examination": _by("problems(N * prompts, rng)", "problems(N * prompts, rng, held_out=True)"),
        "an engine that is not rounded": _by("sample(rounded(policy, bits), ", "sample(policy, "),
        "an engine with old weights": (
            ("    for step in range(steps):\n", "    engine = rounded(policy, bits)\n    for step in range(steps):\n"),
            ("sample(rounded(policy, bits), ", "sample(engine, "),
        ),
        "the same problems again": _by("problems(N * prompts, rng)", "problems(N * prompts, random.Random(seed))"),
        "another mini-batch": _by(
            "rollout, size, micro_batch, replay)\n        tokens",
            "rollout, 2 * size, micro_batch, replay)\n        tokens",
        ),
        "options that get lost": _by(
            "rollout, size, micro_batch, replay)\n        tokens", "rollout, size, micro_batch)\n        tokens"
        ),
        "another optimizer": _by("weight_decay=0)", "weight_decay=0.01)"),
        "a new optimizer in each step": _by(
            "        rollout = sample(",
            "        optimizer = torch.optim.AdamW(policy.values(), lr, betas=(0.9, 0.95), weight_decay=0)\n"
            "        rollout = sample(",
        ),
        "an examination of seen problems": _by(", held_out=True)\n    optimizer", ")\n    optimizer"),
        "the engine is examined": _by(
            "    return sample(policy, exam", "    return sample(rounded(policy, bits), exam"
        ),
        "the score of an earlier policy": _by(
            "    return sample(policy, exam, 1, torch.Generator().manual_seed(0)).rewards.mean().item()",
            "    return score.item()",
        ),
        "a run that cannot be repeated": _by(
            "torch.Generator().manual_seed(seed), prompts", "torch.default_generator, prompts"
        ),
        "a seed without effect": _by("random.Random(seed), torch", "random.Random(0), torch"),
    },
}
