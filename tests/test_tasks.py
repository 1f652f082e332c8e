"""Tasks: what is asked, what is held out, what is rewarded, and what a model's answer cannot do."""

import dataclasses
import importlib.util
import json
import operator
import random
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer

from minirl_edu.tasks import ChainTask, Demonstrable, MathTask, Problem, ReasoningGymTask, Task, make_task
from minirl_edu.tasks.base import encode_chat, held_out
from minirl_edu.tasks.chain import HELD_OUT_FRACTION, STYLES, VOCABULARY, chain_tokenizer
from minirl_edu.tasks.reasoning_gym import extract_answer
from minirl_edu.tasks.verifiers import VerifierProcess, is_formula, reasoning_gym_score
from tests.conftest import byte_tokenizer


def expression(problem: Problem) -> str:
    """`3+4+9` of the prompt `3+4+9   =`."""
    return problem.prompt.rstrip("= ")


# --- make_task, held_out, encode_chat ---------------------------------------------------------------------------------


def test_make_task_names_the_choices():
    with pytest.raises(ValueError, match=r"'sudoku'.*chain, reasoning_gym, math_jsonl"):
        make_task("sudoku")
    with pytest.raises(ValueError, match=r"no option modulus; it has .*hard_fraction"):
        make_task("chain", modulus=7)
    with pytest.raises(ValueError, match="needs dataset, tokenizer"):
        make_task("reasoning_gym")
    with pytest.raises(ValueError, match="needs path"):
        make_task("math_jsonl", tokenizer=byte_tokenizer())


def test_chain_is_a_task_with_demonstrations():
    task: Task = make_task("chain", max_operands=4)
    assert isinstance(task, Task) and isinstance(task, Demonstrable)
    assert task.max_new_tokens == 7


def test_held_out_share():
    # 20,000 draws: four standard errors of a share of 1/8 are 0.0094.
    assert abs(sum(held_out(f"problem {i}", 1 / 8) for i in range(20_000)) / 20_000 - 1 / 8) < 0.0094
    assert not held_out("x", 0.0) and held_out("x", 1.0)


def test_encode_chat_with_and_without_a_template():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(encode_chat(tokenizer, "1 + 1?")) == "1 + 1?\n"
    assert tokenizer.decode(encode_chat(tokenizer, "1 + 1?", "Be brief.")) == "Be brief.\n1 + 1?\n"
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert tokenizer.decode(encode_chat(tokenizer, "1 + 1?")) == "[user]1 + 1?[assistant]"
    assert tokenizer.decode(encode_chat(tokenizer, "1 + 1?", "Be brief.")) == "[system]Be brief.[user]1 + 1?[assistant]"


# --- chain ------------------------------------------------------------------------------------------------------------


def test_chain_tokenizer_round_trip(tmp_path: Path):
    tokenizer = chain_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(each) == 18 and each.padding_side == "left"
        assert [each.pad_token, each.eos_token] == ["<pad>", "<eos>"] == list(VOCABULARY[16:])
        for text in ("3+4*9-1       =", ",7,6", " , , =", "+4=7", ""):
            ids = each.encode(text)
            assert len(ids) == len(text) and each.decode(ids) == text
        assert each.decode([*each.encode(",7"), 17, 16], skip_special_tokens=True) == ",7"
        batch = each(["1+2=", "1="], padding=True)["input_ids"]
        assert batch[1][:2] == [each.pad_token_id] * 2
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode("a")
    assert ChainTask(tokenizer=AutoTokenizer.from_pretrained(tmp_path)).tokenizer.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match="chain_tokenizer"):
        ChainTask(tokenizer=byte_tokenizer())


def test_chain_prompts_have_one_width():
    for task in (ChainTask(), ChainTask(hard_fraction=0.5), ChainTask(operators="+-*")):
        for problem in task.sample(50, seed=1) + task.evaluation(50):
            assert len(task.encode(problem)) == task.prompt_width == 16
            assert problem.prompt[-1] == "=" and problem.prompt[0].isdigit()


def test_chain_answers_are_evaluated_left_to_right():
    apply = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    for problem in ChainTask(operators="+-*").sample(500, seed=2):
        text = expression(problem)
        value = int(text[0])
        for i in range(1, len(text), 2):
            value = apply[text[i]](value, int(text[i + 1]))
        assert problem.answer == str(value % 10)


def test_chain_training_and_held_out_problems_partition_the_space():
    task = ChainTask(min_operands=2, max_operands=2, operators="+-*", hard_operands=4)
    space = {f"{a}{o}{b}" for a, b, o in product(range(10), range(10), "+-*")}
    expected = {text for text in space if held_out(text, HELD_OUT_FRACTION)}
    evaluation = [expression(p) for p in task.evaluation(len(expected))]
    assert len(set(evaluation)) == len(evaluation)
    # 20,000 draws from about 260 expressions: each one is missed with probability e^-76.
    training = {expression(p) for p in task.sample(20_000, seed=0)}
    assert set(evaluation) == expected and training == space - expected
    with pytest.raises(ValueError, match=f"found only {len(expected)} held-out"):
        task.evaluation(len(expected) + 1)
    # Other options do not move an expression across the split.
    wide = ChainTask(min_operands=2, max_operands=3, operators="+-*", hard_operands=9, hard_fraction=0.5)
    assert not expected & {expression(p) for p in wide.sample(5_000, seed=1)}


def test_chain_is_deterministic():
    first, again = ChainTask(hard_fraction=0.3), ChainTask(hard_fraction=0.3)
    assert first.sample(32, seed=5) == again.sample(32, seed=5) != first.sample(32, seed=6)
    assert first.evaluation(20) == again.evaluation(64)[:20]
    # The same on every machine: shipped cold starts and reported scores rely on it.
    assert [expression(p) for p in ChainTask().evaluation(3)] == ["6+3+6+1+0+6", "0+3+4+6", "7+0+6+2+6"]
    assert [expression(p) for p in ChainTask().sample(3, seed=0)] == ["4+2+5+4+7+3", "2+9+9+8+9", "8+5+0+7"]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.29, 0.5, 1.0])
def test_chain_hard_fraction(fraction: float):
    task = ChainTask(hard_fraction=fraction)
    problems = task.evaluation(100)
    for n in (10, 37, 100):
        assert sum(p.data["hard"] for p in problems[:n]) == round(n * fraction)
    sampled = task.sample(4_000, seed=0)
    share = sum(p.data["hard"] for p in sampled) / 4_000
    assert abs(share - fraction) <= 4 * (fraction * (1 - fraction) / 4_000) ** 0.5  # four standard errors
    lengths = {hard: {len(expression(p)) // 2 + 1 for p in sampled if p.data["hard"] == hard} for hard in (False, True)}
    assert lengths[False] == ({3, 4, 5, 6} if fraction < 1 else set())
    assert lengths[True] == ({7, 8} if fraction > 0 else set())


def test_chain_styles_by_hand():
    task, rng = ChainTask(operators="+-*"), random.Random(0)
    for text, expected in {
        "3+4+9": {"steps": ",7,6", "operands": "4=79=6", "copy": "+4=7+9=6"},
        "3+4+9+1": {"steps": ",7,6,7", "operands": "4=79=61=7", "copy": "+4=7+9=6+1=7"},
        "3-5*4": {"steps": ",8,2", "operands": "5=84=2", "copy": "-5=8*4=2"},
        "1+1+1+1+1+1": {"steps": ",2,3,4,5,6", "operands": "1=21=31=41=51=6", "copy": "+1=2+1=3+1=4+1=5+1=6"},
    }.items():
        problem = Problem(text.ljust(15) + "=", "")
        assert {style: task.demonstration(problem, rng=rng, style=style) for style in STYLES} == expected
    with pytest.raises(ValueError, match="'jumps' must be one of steps, operands, copy"):
        task.demonstration(problem, rng=rng, style="jumps")


@pytest.mark.parametrize("style", STYLES)
def test_chain_demonstrations_are_rewarded_and_fit(style: str):
    rng = random.Random(0)
    for hard_fraction in (0.0, 0.5):
        task = ChainTask(operators="+-*", hard_fraction=hard_fraction, style=style)
        problems = task.sample(1_000, seed=3)
        responses = [task.demonstration(p, rng=rng) for p in problems]
        assert all(task.reward(p, r) == 1.0 for p, r in zip(problems, responses, strict=True))
        assert max(len(task.tokenizer.encode(r)) for r in responses) + 1 == task.max_new_tokens


def test_chain_errors_are_as_frequent_as_asked_and_carry_on():
    task, rate = ChainTask(), 0.25
    offsets: Counter[int] = Counter()
    for problem in task.sample(2_000, seed=4):
        response = task.demonstration(problem, rng=random.Random(problem.prompt), error_rate=rate)
        written = [int(text[0]), *map(int, response[1::2])] if (text := expression(problem)) else []
        offsets.update(
            (after - before - int(d)) % 10 for before, d, after in zip(written, text[2::2], written[1:], strict=False)
        )
    steps = offsets.total()
    # Four standard errors; each step is judged against the one written before it, so an error that did not carry on
    # would show as a second error.
    assert abs(1 - offsets[0] / steps - rate) < 4 * (rate * (1 - rate) / steps) ** 0.5
    wrong = rate / 9
    assert all(abs(offsets[d] / steps - wrong) < 4 * (wrong * (1 - wrong) / steps) ** 0.5 for d in range(1, 10))


def test_chain_styles_are_equally_often_right():
    task = ChainTask()
    for i, problem in enumerate(task.sample(200, seed=5)):
        finals = {task.demonstration(problem, rng=random.Random(i), style=s, error_rate=0.3)[-1] for s in STYLES}
        assert len(finals) == 1


def test_chain_error_rate_one_makes_every_step_wrong():
    task = ChainTask(min_operands=2, max_operands=2)
    for problem in task.sample(100, seed=0):
        assert task.reward(problem, task.demonstration(problem, rng=random.Random(0), error_rate=1.0)) == 0.0


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (",7,6", 1.0),
        (",6", 1.0),
        ("=6", 1.0),
        ("+4=7+9=6", 1.0),
        (",1,1,1,6", 1.0),  # only the end counts
        ("", 0.0),
        ("6", 0.0),  # no separator
        (",7", 0.0),
        (",7,", 0.0),  # cut off
        (",6,", 0.0),
        (",16", 0.0),
        (",6 ", 0.0),
        (",6\n", 0.0),
        (",6,7", 0.0),  # went on
        (" 6", 0.0),
        (",٦", 0.0),  # a digit, but not one of ours
    ],
)
def test_chain_reward(response: str, reward: float):
    assert ChainTask().reward(Problem("3+4+9          =", "6"), response) == reward


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_operands": 1}, "min_operands=1"),
        ({"min_operands": 7}, "ascending"),
        ({"max_operands": 9}, "max_operands=9, hard_operands=8"),
        ({"hard_fraction": 1.5}, r"hard_fraction=1.5 must lie in \[0, 1\]"),
        ({"hard_fraction": 0.1, "max_operands": 8}, "hard_operands above max_operands=8"),
        ({"operators": "/"}, "operators='/'"),
        ({"operators": ""}, "operators=''"),
        ({"style": "jumps"}, "steps, operands, copy"),
    ],
)
def test_chain_refuses_bad_options(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_task("chain", **options)


# --- VerifierProcess --------------------------------------------------------------------------------------------------

ODD_VERIFIER = """
import os, time

def make(imports=0.0):
    time.sleep(imports)
    def verify(response, answer):
        if response == "hang":
            while True: pass
        if response == "big": 9 ** 9 ** 9        # one operation in C: no Python code runs until it is done
        if response == "memory": bytearray(2**40)
        if response == "raise": raise KeyError("oops")
        if response == "crash": os._exit(3)
        print("not a score")
        return response == answer
    return verify

def broken():
    raise ImportError("no such solver")
"""


@pytest.fixture
def odd_verifier(tmp_path: Path):
    file = tmp_path / "odd.py"
    file.write_text(ODD_VERIFIER)
    verifier = VerifierProcess(f"{file}:make", time_limit=0.5)
    yield verifier
    verifier.close()


@pytest.mark.parametrize("answer", ["hang", "big"])
def test_an_answer_that_overruns_is_ended_and_the_next_is_scored(odd_verifier: VerifierProcess, answer: str):
    assert odd_verifier("7", "7") == 1.0 and odd_verifier("8", "7") == 0.0 and odd_verifier.failures == 0
    before = process_of(odd_verifier)
    start = time.monotonic()
    with pytest.warns(RuntimeWarning, match=r"took longer than 0.5 s"):
        assert odd_verifier(answer, "7") == 0.0
    assert 0.4 < time.monotonic() - start < 5.0
    assert not before.is_running()
    assert odd_verifier("7", "7") == 1.0 and odd_verifier.failures == 1
    assert process_of(odd_verifier) != before


def test_a_verifier_that_raises_or_dies_scores_zero_and_warns_once(odd_verifier: VerifierProcess):
    with pytest.warns(RuntimeWarning, match="KeyError.*oops"):
        assert odd_verifier("raise", "7") == 0.0
    # Warnings are errors in this test suite, so these would raise if they warned again.
    assert [odd_verifier(each, "7") for each in ("crash", "memory", "raise", "7")] == [0.0, 0.0, 0.0, 1.0]
    assert odd_verifier.failures == 4


def test_slow_imports_are_not_on_the_clock(odd_verifier: VerifierProcess):
    assert VerifierProcess(odd_verifier._setup[0], 0.8, time_limit=0.5)("7", "7") == 1.0


def test_an_interrupted_call_does_not_leave_its_score_to_the_next(
    odd_verifier: VerifierProcess, monkeypatch: pytest.MonkeyPatch
):
    assert odd_verifier("7", "7") == 1.0
    process = odd_verifier._process
    assert process is not None and process.stdout is not None

    class Interrupted:
        close = process.stdout.close

        def readline(self):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(process, "stdout", Interrupted())
        odd_verifier("7", "7")
    assert odd_verifier("8", "7") == 0.0


def test_threads_share_a_verifier(odd_verifier: VerifierProcess):
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: odd_verifier(str(i % 3), "0"), range(60))) == [1.0, 0.0, 0.0] * 20


def test_a_factory_that_fails_is_an_error(odd_verifier: VerifierProcess):
    broken = VerifierProcess(odd_verifier._setup[0].replace(":make", ":broken"), time_limit=1.0)
    with pytest.raises(RuntimeError, match="could not start: ImportError: no such solver"):
        broken("7", "7")
    with pytest.raises(ValueError, match=r"time_limit=0\.0"):
        VerifierProcess("math_equivalence", time_limit=0.0)


def test_a_hanging_verifier_does_not_outlive_its_caller(odd_verifier: VerifierProcess):
    # The script has no `if __name__ == "__main__"`: were it imported again by the child, it would never end.
    script = f"""
import os, threading, time
from minirl_edu.tasks.verifiers import VerifierProcess
verifier = VerifierProcess({odd_verifier._setup[0]!r}, time_limit=1)
verifier("7", "7")
threading.Thread(target=verifier, args=("hang", "7"), daemon=True).start()
time.sleep(0.2)
print(verifier._process.pid, flush=True)
os._exit(0)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    pid = int(run.stdout)
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the verifier's process is still there"
        time.sleep(0.05)


def process_of(verifier: VerifierProcess) -> psutil.Process:
    assert verifier._process is not None
    return psutil.Process(verifier._process.pid)


# --- reasoning_gym ----------------------------------------------------------------------------------------------------

SMALL_SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # 162 questions


@pytest.fixture(scope="module")
def sums():
    pytest.importorskip("reasoning_gym")
    return ReasoningGymTask(tokenizer=byte_tokenizer(), dataset="chain_sum", config=SMALL_SUMS, evaluation_size=40)


def test_reasoning_gym_problems_are_disjoint_and_deterministic(sums: ReasoningGymTask):
    assert isinstance(sums, Task) and not isinstance(sums, Demonstrable)
    evaluation = sums.evaluation(40)
    questions = {p.prompt for p in evaluation}
    training = [p.prompt for seed in range(20) for p in sums.sample(100, seed=seed)]
    assert len(questions) == 40 and len(set(training)) > 80
    assert not questions & set(training)
    again = ReasoningGymTask(tokenizer=sums.tokenizer, dataset="chain_sum", config=SMALL_SUMS, evaluation_size=40)
    assert again.sample(16, seed=3) == sums.sample(16, seed=3) != sums.sample(16, seed=4)
    assert again.evaluation(10) == evaluation[:10]
    json.dumps([dataclasses.asdict(p) for p in evaluation])
    with pytest.raises(ValueError, match="evaluation_size=40"):
        sums.evaluation(41)


def test_reasoning_gym_says_when_questions_run_out(sums: ReasoningGymTask):
    greedy = ReasoningGymTask(tokenizer=sums.tokenizer, dataset="chain_sum", config=SMALL_SUMS, evaluation_size=2_000)
    with pytest.raises(ValueError, match=r"evaluation_size=2000 but only \d+ distinct questions"):
        greedy.sample(1, seed=0)


def test_reasoning_gym_rewards(sums: ReasoningGymTask):
    problem = sums.sample(1, seed=0)[0]
    right, wrong = problem.answer, str(int(problem.answer) + 1)
    for response, reward in {
        f"<answer>{right}</answer>": 1.0,
        f"<answer>{wrong}</answer> no:\n<answer>\n {right} </answer> done": 1.0,
        f"<answer>{right}</answer><answer>{wrong}</answer>": 0.0,
        f"Let me think.\n{right}\n": 1.0,
        f"{right}\nor so": 0.0,
        wrong: 0.0,
        "": 0.0,
        "<answer></answer>": 0.0,
    }.items():
        assert sums.reward(problem, response) == reward, response
    assert sums.verifier.failures == 0
    assert sums.tokenizer.decode(sums.encode(problem)) == problem.prompt + "\n"


def test_extract_answer():
    assert extract_answer("a <answer>1\n2</answer> b") == "1\n2"
    assert extract_answer("<answer>1") == "<answer>1"
    assert extract_answer("one\ntwo  \n\n") == "two"
    assert extract_answer("  ") == ""


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("The answer is 12.", "12"),
        ("3 + 4 = 7\n\nSo 3 and 4 make 7!", "7"),
        ("4 - 9 = -5", "-5"),
        ("It is 8-3", "3"),
        ("x = -1.50, say", "-1.50"),
        ("1,234,567 in all", "1234567"),
        ("1, 2", "2"),
        ("none", ""),
        ("", ""),
    ],
)
def test_the_last_number_of_a_response(response: str, number: str):
    assert extract_answer(response, "last_number") == number


def test_reasoning_gym_reads_the_answer_in_the_form_asked_for(sums: ReasoningGymTask):
    def build(answer: Any) -> ReasoningGymTask:
        return ReasoningGymTask(tokenizer=sums.tokenizer, dataset="chain_sum", evaluation_size=4, answer=answer)

    tagged, last = build("tagged"), build("last_number")
    problem = tagged.sample(1, seed=0)[0]
    response = f"I think it is {problem.answer}, of course."
    assert (tagged.reward(problem, response), last.reward(problem, response)) == (0.0, 1.0)
    with pytest.raises(ValueError, match="answer='boxed' must be one of tagged, last_number"):
        build("boxed")


def test_reasoning_gym_partial_scores_are_kept_only_on_request(sums: ReasoningGymTask):
    def build(**options: Any) -> ReasoningGymTask:
        return ReasoningGymTask(
            tokenizer=sums.tokenizer, dataset="spiral_matrix", config={"max_n": 3}, evaluation_size=4, **options
        )

    binary, partial = build(), build(binary=False)
    problem = binary.sample(1, seed=0)[0]
    as_list = str(problem.answer.split()).replace("'", "")  # right, but not in the form asked for
    assert (binary.reward(problem, problem.answer), binary.reward(problem, as_list)) == (1.0, 0.0)
    assert (partial.reward(problem, problem.answer), partial.reward(problem, as_list)) == (1.0, 0.1)


def test_reasoning_gym_verifier_that_raises_scores_zero(sums: ReasoningGymTask):
    task = ReasoningGymTask(tokenizer=sums.tokenizer, dataset="prime_factorization", evaluation_size=4)
    problem = task.sample(1, seed=0)[0]
    with pytest.warns(RuntimeWarning, match="reasoning_gym_score: ValueError"):
        assert task.reward(problem, "no idea") == 0.0
    assert task.reward(problem, problem.answer) == 1.0 and task.verifier.failures == 1


def test_reasoning_gym_answer_that_never_ends(sums: ReasoningGymTask):
    task = ReasoningGymTask(tokenizer=sums.tokenizer, dataset="countdown", evaluation_size=4, time_limit=1.0)
    problem = task.sample(1, seed=0)[0]
    with pytest.warns(RuntimeWarning, match="took longer than 1 s"):
        assert task.reward(problem, "9**9**9**9") == 0.0
    assert task.reward(problem, problem.data["metadata"]["expression"]) == 1.0


def attacks(marker: Path) -> list[str]:
    """Answers that create the file `marker` if anything evaluates them, as Python or as a formula."""
    touch = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    return [touch, f" {touch}", f"[{touch}]", f"(lambda: {touch})()", f"3! + ({touch} or 0)"]


def assert_answers_are_data(dataset: str, tmp_path: Path, **config: Any):
    import reasoning_gym

    entry = reasoning_gym.create_dataset(dataset, seed=1, size=4, **config)[0]
    score = reasoning_gym_score(dataset, config)
    for answer in attacks(tmp_path / "executed"):
        try:
            assert score(answer, entry) < 1
        except Exception:
            continue  # some verifiers raise on odd answers, which scores 0
    assert not (tmp_path / "executed").exists(), f"{dataset} executes answers"
    if isinstance(entry["answer"], str):
        assert score(entry["answer"], entry) == 1.0


@pytest.mark.parametrize(
    "dataset",
    [
        "binary_matrix",
        "n_queens",
        "spiral_matrix",
        "string_insertion",
        "countdown",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "intermediate_integration",
    ],
)
def test_reasoning_gym_never_executes_an_answer(sums: ReasoningGymTask, dataset: str, tmp_path: Path):
    assert_answers_are_data(dataset, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the generators' own
def test_no_generator_executes_an_answer(sums: ReasoningGymTask, tmp_path: Path):
    from reasoning_gym.factory import DATASETS

    for dataset in sorted(DATASETS.keys() - {"composite"}):
        assert_answers_are_data(dataset, tmp_path)


def test_the_attacks_would_work(tmp_path: Path):
    parse_expr = pytest.importorskip("sympy").parse_expr
    *python, formula = attacks(tmp_path / "executed")
    for attack in python:
        eval(attack)
        (tmp_path / "executed").unlink()
    parse_expr(formula)
    (tmp_path / "executed").unlink()


def test_is_formula():
    for text in ("3*(4 + 5) - -6/7", "x**2*exp(x) + C", " -log(2*x)/3 ", "1.5"):
        assert is_formula(text), text
    calls = ["exec('1')", "(x)(1)", "2(x)", "exp(x=1)", "exp(*x)", "sin(exec)(1)", "lambda: exp(1)"]
    for text in [*calls, "x.real", "x[0]", "[1]", "'a'*9", "True", "x<y", "x if x else x", "3!", "x(", ""]:
        assert not is_formula(text), text


def test_reasoning_gym_refuses_bad_options(sums: ReasoningGymTask, monkeypatch: pytest.MonkeyPatch):
    def build(dataset: str, **options: Any) -> Task:
        return make_task("reasoning_gym", tokenizer=sums.tokenizer, dataset=dataset, **options)

    with pytest.raises(ValueError, match=r"'chainsum' is not a generator; there are .*chain_sum"):
        build("chainsum")
    with pytest.raises(ValueError, match="min_term"):
        build("chain_sum", config={"min_term": 2})
    with pytest.raises(ValueError, match="does not fit generator 'chain_sum'"):
        build("chain_sum", config={"min_terms": 5, "max_terms": 2})
    with pytest.raises(ValueError, match="sets seed"):
        build("chain_sum", config={"seed": 2})
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ValueError, match="PYTHONHASHSEED=0"):
        build("ransom_note")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install \"minirl-edu\[tasks\]\""):
        build("chain_sum")


# --- math_jsonl -------------------------------------------------------------------------------------------------------


def write_rows(file: Path, rows: list[Any]) -> str:
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(file)


def problems(n: int) -> list[dict[str, str]]:
    return [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(n)]


@pytest.fixture(scope="module")
def maths(tmp_path_factory: pytest.TempPathFactory):
    pytest.importorskip("math_verify")
    path = write_rows(tmp_path_factory.mktemp("maths") / "sums.jsonl", problems(200))
    return MathTask(tokenizer=byte_tokenizer(), path=path)


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("1/2", r"so it is $\frac{1}{2}$", 1.0),
        ("1/2", r"\boxed{0.5}", 1.0),
        (r"\frac{1}{2}", "The answer is 1/2", 1.0),
        (r"$\frac12$", r"\boxed{\dfrac{2}{4}}", 1.0),
        ("1/2", r"\boxed{0.51}", 0.0),
        ("1/2", r"first $\frac{1}{2}$, no: \boxed{2}", 0.0),
        ("10", "10", 1.0),
        ("10", "", 0.0),
        ("10", "I do not know", 0.0),
        ("10", r"\boxed{", 0.0),
        (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", 1.0),
        ("(1, 2)", r"\boxed{(1,2)}", 1.0),
        ("(1, 2)", r"\boxed{(2,1)}", 0.0),
    ],
)
def test_math_equivalence(maths: MathTask, answer: str, response: str, reward: float):
    assert maths.reward(Problem("?", answer), response) == reward
    assert maths.verifier.failures == 0


def test_math_works_off_the_main_thread(maths: MathTask):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(maths.reward, Problem("?", "4"), r"\boxed{2+2}").result() == 1.0


def test_math_hanging_answer_is_zero_within_the_limit(tmp_path: Path, odd_verifier: VerifierProcess):
    path = write_rows(tmp_path / "sums.jsonl", problems(50))
    task = MathTask(tokenizer=byte_tokenizer(), path=path, verifier=odd_verifier._setup[0], time_limit=0.5)
    problem = task.sample(1, seed=0)[0]
    with pytest.warns(RuntimeWarning, match=r"took longer than 0.5 s"):
        assert task.reward(problem, "hang") == 0.0
    assert task.reward(problem, problem.answer) == 1.0 and task.verifier.failures == 1


def test_math_splits_by_the_text_alone(maths: MathTask, tmp_path: Path):
    held = {p.prompt for p in maths.evaluation(10)}
    everything = {row["problem"] for row in problems(200)}
    training = {p.prompt for seed in range(100) for p in maths.sample(32, seed=seed)}
    assert training <= everything and not training & held
    assert maths.sample(8, seed=1) == maths.sample(8, seed=1) != maths.sample(8, seed=2)
    size = len(everything) - len(held_out_of(everything))
    assert len({p.prompt for p in maths.sample(size, seed=0)}) == size  # no repetition
    assert len(maths.sample(size + 5, seed=0)) == size + 5
    shuffled = write_rows(tmp_path / "shuffled.jsonl", problems(200)[::-1] + problems(3))
    again = MathTask(tokenizer=maths.tokenizer, path=shuffled)
    n = len(held_out_of(everything))
    assert {p.prompt for p in again.evaluation(n)} == {p.prompt for p in maths.evaluation(n)} == held_out_of(everything)
    with pytest.raises(ValueError, match=f"only {n} problems are held out"):
        again.evaluation(n + 1)


def held_out_of(texts: set[str]) -> set[str]:
    return {text for text in texts if held_out(text, 0.1)}


def test_math_evaluation_file_and_field_names(tmp_path: Path):
    rename = [{"question": row["problem"], "final": row["answer"]} for row in problems(20)]
    train, test = (
        write_rows(tmp_path / "a.jsonl", rename),
        write_rows(tmp_path / "b.jsonl", [*rename[15:], "", rename[0]]),
    )
    with pytest.warns(UserWarning, match="6 problems .* training skips them"):
        task = MathTask(
            tokenizer=byte_tokenizer(), path=train, eval_path=test, problem_field="question", answer_field="final"
        )
    evaluation = task.evaluation(6)
    assert [p.prompt for p in evaluation] == [row["question"] for row in rename[15:] + rename[:1]]
    assert evaluation[5].data == {"source": f"{test}:7"}
    assert {p.prompt for p in task.sample(14, seed=0)} == {row["question"] for row in rename[1:15]}
    assert task.tokenizer.decode(task.encode(evaluation[5])) == "What is 0 + 0?\n"


def test_math_reads_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "train.jsonl", problems(9))
    write_rows(folder / "test.jsonl", [{"problem": "What is 7 * 7?", "answer": "49"}])
    task = MathTask(tokenizer=byte_tokenizer(), path=str(folder), eval_path=str(folder))
    assert [p.answer for p in task.evaluation(1)] == ["49"]
    assert sorted(int(p.answer) for p in task.sample(9, seed=0)) == list(range(0, 18, 2))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"problem": "x", "answer"', "not a line of JSON"),
        ("[1, 2]", "expected an object, found list"),
        ('{"problem": "x"}', "no field 'answer'; the row has problem"),
        ('{"problem": "x", "answer": 4}', "'answer' must be a text that is not empty, found 4"),
        ('{"problem": null, "answer": "4"}', "'problem' must be a text that is not empty, found None"),
        ('{"problem": " ", "answer": "4"}', "'problem' must be a text that is not empty"),
        ('{"problem": "\udcff", "answer": "4"}', "not a line of JSON .*utf-8"),
    ],
)
def test_math_poisoned_rows(tmp_path: Path, row: str, message: str):
    file = tmp_path / "bad.jsonl"
    lines = [json.dumps(problems(1)[0]), row, json.dumps(problems(2)[1])]
    file.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"bad\.jsonl:2: {message}"):
        MathTask(tokenizer=byte_tokenizer(), path=str(file))


def test_math_refuses_bad_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_rows(tmp_path / "one.jsonl", problems(1))
    with pytest.raises(ValueError, match="1 training and 0 held-out"):
        MathTask(tokenizer=byte_tokenizer(), path=path)
    with pytest.raises(ValueError, match="eval_fraction=1"):
        MathTask(tokenizer=byte_tokenizer(), path=path, eval_fraction=1.0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"minirl-edu\[tasks\]"):
        MathTask(tokenizer=byte_tokenizer(), path=path)
