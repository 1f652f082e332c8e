"""Right answers to the exercises of unit 10, written differently from the solutions."""

import torch


def loop_with_a_version_count(engine, model, update, steps):
    version = 0
    engine.sync(model, version=version)
    while version < steps:
        rollout = engine.generate()
        update(model, rollout)
        version += 1
        engine.sync(model, version=version)


def loop_that_syncs_first(engine, model, update, steps):
    for step in range(steps + 1):
        engine.sync(model, version=step)
        if step < steps:
            update(model, engine.generate())


def logp_by_hand(logits, tokens, temperature):
    powers = (logits / temperature).exp()
    probs = powers / powers.sum(-1, keepdim=True)
    onehot = torch.nn.functional.one_hot(tokens, logits.shape[-1])
    return (probs * onehot).sum(-1).log()


def logp_by_cross_entropy(logits, tokens, temperature):
    flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1).div(temperature), tokens.flatten(), reduction="none")
    return -flat.view(tokens.shape)


def rewards_by_groups(answers, responses, group_size):
    rows = []
    for number, right in enumerate(answers):
        group = responses[number * group_size : (number + 1) * group_size]
        rows += [1.0 if response == right else 0.0 for response in group]
    return torch.tensor(rows)


def rewards_by_repeating(answers, responses, group_size):
    repeated = [answer for answer in answers for _ in range(group_size)]
    return torch.tensor([own == right for own, right in zip(responses, repeated, strict=True)]).float()


RIGHT = {
    "10.1": ("Rewards of the wrong group", " rewards of the  wrong group "),
    "10.2": ("Sampled at another temperature", "sampled-at-another-temperature"),
    "10.3": ("Learning rate ten times too high", "learning  rate ten times too high"),
    "10.4": ("Engine never synced", "engine never-synced"),
    "10.5": ("No baseline", "no-baseline"),
    "10.6": ("Routes of another response", "routes of another  response"),
    "10.7": (loop_with_a_version_count, loop_that_syncs_first),
    "10.8": (logp_by_hand, logp_by_cross_entropy),
    "10.9": (rewards_by_groups, rewards_by_repeating),
}
