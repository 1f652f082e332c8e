"""`chain`: running sums of digits modulo 10, from left to right.

Small enough to learn on a laptop, long enough to go wrong in the middle.
"""

import random
import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minirl_edu.tasks.base import Problem, held_out

VOCABULARY = (*"0123456789+-*=, ", "<pad>", "<eos>")
"""The 18 tokens, in the order of their ids."""

STYLES = ("steps", "operands", "copy")
"""How a teacher works out `3+4+9+1`.

`steps`: every partial result, `,7,6,7`. `operands`: the operand restated before each, `4=79=61=7`. `copy`: operator and
operand, `+4=7+9=6+1=7`. So 2, 3 or 4 tokens a step.
"""

HELD_OUT_FRACTION = 1 / 8
"""Share of all expressions that only `ChainTask.evaluation` returns."""

_APPLY = {"+": lambda a, b: (a + b) % 10, "-": lambda a, b: (a - b) % 10, "*": lambda a, b: (a * b) % 10}
_FINAL_RESULT = re.compile(r"[,=]([0-9])\Z")


def chain_tokenizer() -> PreTrainedTokenizerFast:
    """The task's tokenizer: one token per character of `VOCABULARY`, padding on the left, exact round trips.

    Any other character raises.
    """
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


class ChainTask:
    """Evaluate a chain of digits and operators from left to right, without precedence, modulo 10.

    The prompt of `3+4+9` is `3+4+9` followed by spaces up to a closing `=` that always stands at the same place:
    without the fixed width, 2 × `hard_operands` tokens, a tiny model does not learn where to look. The width does not
    depend on `hard_fraction`, so one cold start serves easy and hard mixes. The reward is 1 if the response ends in `,`
    or `=` followed by the right final digit, else 0; whatever comes before is free.

    Problems have `min_operands` to `max_operands` digits; a share `hard_fraction` has more, up to `hard_operands`. An
    expression is held out by its own hash, whatever the options, so an expression held out from a cold start is held
    out from the run that follows. `style` is the default of `demonstration` and sets the default `max_new_tokens`: the
    longest problem in use, written in that style, and EOS.

    Raises ValueError for options out of range or a tokenizer with another vocabulary.
    """

    name = "chain"

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        min_operands: int = 3,
        max_operands: int = 6,
        hard_operands: int = 8,
        hard_fraction: float = 0.0,
        operators: str = "+",
        style: str = "steps",
        max_new_tokens: int | None = None,
    ):
        if not 2 <= min_operands <= max_operands <= hard_operands:
            raise ValueError(
                f"{min_operands=}, {max_operands=}, {hard_operands=} must be in ascending order, the first at least 2"
            )
        if not 0 <= hard_fraction <= 1:
            raise ValueError(f"hard_fraction={hard_fraction} must lie in [0, 1]")
        if hard_fraction > 0 and hard_operands == max_operands:
            raise ValueError(f"hard_fraction={hard_fraction} needs hard_operands above max_operands={max_operands}")
        if not operators or not set(operators) <= set(_APPLY):
            raise ValueError(f"operators={operators!r} must be some of '+-*'")
        _check_style(style)
        self.tokenizer: PreTrainedTokenizerBase = chain_tokenizer() if tokenizer is None else tokenizer
        if self.tokenizer.get_vocab() != {token: i for i, token in enumerate(VOCABULARY)}:
            raise ValueError(f"the tokenizer's vocabulary is not {''.join(VOCABULARY)!r}; use chain_tokenizer()")
        self.prompt_width: int | None = 2 * hard_operands
        self.style = style
        self._easy = range(min_operands, max_operands + 1)
        self._hard = range(max_operands + 1, hard_operands + 1)
        self._hard_fraction = hard_fraction
        self._hard_operands = hard_operands
        self._operators = operators
        if max_new_tokens is None:
            steps = (hard_operands if hard_fraction > 0 else max_operands) - 1
            max_new_tokens = {"steps": 2, "operands": 3, "copy": 4}[style] * steps + 1
        self.max_new_tokens = max_new_tokens

    def sample(self, n: int, *, seed: int) -> list[Problem]:
        """`n` training problems, each hard with probability `hard_fraction`; the same seed gives the same problems."""
        rng = random.Random(seed)
        problems: list[Problem] = []
        while len(problems) < n:
            hard = rng.random() < self._hard_fraction
            expression = self._expression(rng, hard)
            if not held_out(expression, HELD_OUT_FRACTION):
                problems.append(self._problem(expression, hard))
        return problems

    def evaluation(self, n: int) -> list[Problem]:
        """The first `n` of a fixed list of distinct held-out problems, of which `round(n * hard_fraction)` are hard.

        Raises ValueError when the options leave fewer than `n` held-out problems.
        """
        rng = random.Random("evaluation")
        expressions: dict[str, bool] = {}
        attempts = 0
        while len(expressions) < n:
            i = len(expressions)
            hard = round((i + 1) * self._hard_fraction) > round(i * self._hard_fraction)
            expression = self._expression(rng, hard)
            if held_out(expression, HELD_OUT_FRACTION) and expression not in expressions:
                expressions[expression] = hard
                attempts = 0
            elif (attempts := attempts + 1) > 20_000:
                raise ValueError(f"evaluation({n}): found only {i} held-out problems; allow more operands")
        return [self._problem(expression, hard) for expression, hard in expressions.items()]

    def encode(self, problem: Problem) -> list[int]:
        """The prompt's `prompt_width` token ids."""
        return self.tokenizer.encode(problem.prompt)

    def reward(self, problem: Problem, response: str) -> float:
        """1.0 if the response ends in `,` or `=` and the right digit (nothing after it, not even a space), else 0.0."""
        final = _FINAL_RESULT.search(response)
        return float(final is not None and final[1] == problem.answer)

    def demonstration(
        self, problem: Problem, *, rng: random.Random, style: str | None = None, error_rate: float = 0.0
    ) -> str:
        """A worked response without EOS, in one of `STYLES` (None: the task's own).

        Each step's digit is replaced by one of the nine wrong ones with probability `error_rate`, and later steps build
        on the error: teachers of every style are equally often right.
        """
        style = self.style if style is None else style
        _check_style(style)
        expression = problem.prompt.rstrip("= ")
        result = int(expression[0])
        steps: list[tuple[str, str, int]] = []
        for operator, operand in zip(expression[1::2], expression[2::2], strict=True):
            result = _APPLY[operator](result, int(operand))
            if rng.random() < error_rate:
                result = (result + rng.randrange(1, 10)) % 10
            steps.append((operator, operand, result))
        if style == "copy":
            return "".join(f"{operator}{operand}={result}" for operator, operand, result in steps)
        if style == "operands":
            return "".join(f"{operand}={result}" for _, operand, result in steps)
        return "".join(f",{result}" for _, _, result in steps)

    def _expression(self, rng: random.Random, hard: bool) -> str:
        """An expression such as `3+4*9`, uniform over its number of operands, its digits and its operators."""
        lengths = self._hard if hard else self._easy
        operands = lengths[int(rng.random() * len(lengths))]
        tokens = [""] * (2 * operands - 1)
        tokens[::2] = rng.choices("0123456789", k=operands)
        tokens[1::2] = rng.choices(self._operators, k=operands - 1)
        return "".join(tokens)

    def _problem(self, expression: str, hard: bool) -> Problem:
        result = int(expression[0])
        for operator, operand in zip(expression[1::2], expression[2::2], strict=True):
            result = _APPLY[operator](result, int(operand))
        prompt = expression.ljust(2 * self._hard_operands - 1) + "="
        return Problem(prompt, str(result), {"hard": hard})


def _check_style(style: str) -> None:
    if style not in STYLES:
        raise ValueError(f"style={style!r} must be one of {', '.join(STYLES)}")
