"""A task of your own: the last digit of a sum. `minirl train --set task.name=own_task:Sums` trains on it."""

import random

from minirl_edu.tasks import Problem

PROBLEMS = [Problem(f"{a}+{b}=", answer=str((a + b) % 10)) for a in range(10) for b in range(10)]
random.Random(0).shuffle(PROBLEMS)


class Sums:
    name, max_new_tokens, prompt_width = "sums", 3, 4

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def sample(self, n, *, seed):
        return random.Random(seed).choices(PROBLEMS[:80], k=n)

    def evaluation(self, n):
        return PROBLEMS[80:][:n]

    def encode(self, problem):
        return self.tokenizer.encode(problem.prompt)

    def reward(self, problem, response):
        return float(response[-1:] == problem.answer)
