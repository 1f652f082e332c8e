"""A real pretrained model, end to end, as a user of a larger one would run it: chat template, text, vLLM, a report."""

import json
from pathlib import Path

import pytest

from minirl_edu.cli import main
from minirl_edu.config import load_config
from minirl_edu.models import SMOLLM2, load_tokenizer
from minirl_edu.recipes import RECIPES
from minirl_edu.tasks import make_task

RECIPE = RECIPES / "smollm2.yaml"


def test_the_recipe_asks_in_the_models_chat_template_and_reads_what_it_says():
    config = load_config(RECIPE)
    tokenizer = load_tokenizer(config.model.name)
    task = make_task(config.task.name, tokenizer=tokenizer, **config.task.options)
    problem = task.evaluation(1)[0]
    text = str(tokenizer.decode(task.encode(problem)))
    assert text.count("<|im_start|>") == 3  # system, user, and the reply that is to come
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert problem.prompt in text
    assert task.reward(problem, f"The final answer is {problem.answer}.") == 1
    assert task.reward(problem, f"The final answer is {problem.answer}0.") == 0
    lengths = {len(task.encode(p)) for p in task.sample(32, seed=0)}
    assert len(lengths) > 1 and max(lengths) + 16 <= config.rollout.options["max_model_len"]


# Every day its parts: the prompts above, the model in test_models.py, a trainer on vLLM in test_vllm.py.
@pytest.mark.slow
@pytest.mark.nightly
def test_two_steps_of_the_recipe_with_vllm_rollouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = ["global_steps=2", "mini_batch_prompts=2", "group_size=4", "lr=1e-5", "warmup_steps=1"]
    overrides = [*(f"train.{setting}" for setting in small), "eval={every: 2, problems: 4}", "output.save_every=0"]
    out = tmp_path / "run"
    status = main(["train", "--config", str(RECIPE), "--out", str(out), *(f"--set={setting}" for setting in overrides)])
    assert status == 0
    start, *steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"score", "score_rollout"} <= start.keys() and {"score", "score_rollout"} <= steps[-1].keys()
    assert all(1 <= line["response_length"] <= 16 for line in steps)
    # bf16 against fp32, on the same weights after each sync: small, never zero. A wrong temperature or a stale weight
    # would show as 0.1 and more.
    assert all(1e-4 < line["log_ratio_mismatch"] < 0.1 for line in steps)
    assert all(0 <= line["k3_rollout_old"] < 0.02 for line in steps)
    page = (out / "report.html").read_text()
    assert SMOLLM2 in page and str(tmp_path) not in page
    assert "report:" in capsys.readouterr().out
