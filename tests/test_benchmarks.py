"""The benchmarks: that they count the arithmetic right and compare equal work. How fast anything is, is not tested."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from benchmarks.__main__ import main, table
from benchmarks.arithmetic import forward_flops, matmul_rate, step_flops
from benchmarks.measure import GROUP_SIZE, _Clock, _trainer, step
from benchmarks.memory import FORMS, at_once, memory
from minirl_edu.logprobs import lay_out
from minirl_edu.models import load_model, tiny_dense
from tests.forked import Forked
from tests.oracle import written


@pytest.fixture
def short(monkeypatch):
    """Fewer prompts, and one round to warm up."""
    monkeypatch.setattr(measure, "PROMPTS", 16)
    monkeypatch.setattr(measure, "WARMUP", 1)


def test_flops_of_forward_and_backward_are_those_that_torch_counts():
    # Eager attention and experts: torch counts neither its fused CPU attention nor grouped_mm.
    model = load_model("chain-steps", attn_implementation="eager")
    model.set_experts_implementation("eager")
    rows, width = 4, 23
    tokens = torch.arange(rows * width).view(rows, width) % 16
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=tokens, use_cache=False).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    # Eager attention multiplies the pairs above the diagonal too.
    ours = forward_flops(model.config, tokens=rows * width, pairs=rows * width**2, logits=rows * width)
    # The rest are the angles of the rotary embedding, an outer product.
    assert ours == pytest.approx(forward.get_total_flops(), rel=1e-3)
    assert 2 * ours == pytest.approx(backward.get_total_flops(), rel=1e-3)


def test_a_step_counts_every_token_that_is_read_once():
    config = load_model("chain-steps").config

    def forward(visible: list[int], logits: int) -> int:
        return forward_flops(config, tokens=len(visible), pairs=sum(visible), logits=logits)

    # Two prompts of 2 tokens with two responses each, of 3 and 1, 2 and 2 tokens; how many tokens each one sees:
    prompts = [1, 2, 1, 2]
    responses = [3, 4, 3, 3]
    sampling = forward(prompts + responses, logits=2 + 4)
    plain = forward(4 * [1, 2, 3, 4], logits=16)
    assert step_flops(config, prompt_length=2, lengths=torch.tensor([3, 1, 2, 2]), group_size=2) == {
        "plain": sampling + 3 * plain,
        "executed": sampling + 3 * forward(prompts + responses, logits=8),
    }


def test_the_clock_sees_all_parts_of_a_step_and_its_rollout(tmp_path):
    trainer = _trainer(tmp_path, 0, "train.mini_batch_prompts=2")
    clock = _Clock(trainer)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    total, parts = clock.time(trainer.global_step)
    assert set(parts) == {"sample", "update", "sync"} and all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) < total
    assert len(clock.rollout.tokens) == 2 * GROUP_SIZE and clock.rollout.routes is not None
    # Learning rate 0: the lengths of the responses stay comparable from round to round.
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_the_rate_is_plausible():
    assert 1e8 < matmul_rate(0)() < 1e13  # a unit mistaken by 1,000 would fall outside


def test_the_table_says_whether_a_goal_was_met():
    text = table({"ratios": {"TRL / minirl_edu": [1.0, 2.0, 2.1], "replaying / native": [1.2]}, "shares": {"a": [0.5]}})
    assert [line.split() for line in text.splitlines()] == [
        ["TRL", "/", "minirl_edu", "2", "×", "(1–2.1)", "goal", "≥", "1.5:", "met"],
        ["replaying", "/", "native", "1.2", "×", "goal", "≤", "1.05:", "MISSED"],
        ["a", "50", "%"],
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["replay", "own_pi_old"])
def test_the_command_writes_what_it_measured(name, tmp_path, capsys):
    file = tmp_path / "numbers.json"
    assert main(["--only", name, "--steps", "2", "--json", str(file)]) == 0
    record = json.loads(file.read_text(encoding="utf-8"))
    assert set(record) == {"settings", "environment", name}
    assert record["settings"]["rounds"] == 2 and record["settings"]["threads"] == 1
    result, printed = record[name], capsys.readouterr().out
    for ratio, values in result["ratios"].items():
        assert len(values) == 2 and ratio in printed
    assert all(len(values) == 2 and min(values) > 0 for values in result["seconds"].values())
    for path in (Path.home(), Path.cwd(), tmp_path):
        assert str(path) not in file.read_text(encoding="utf-8")
    if name == "replay":
        assert result["facts"] == {"bytes of routes per token, L·k": [4]}


def test_both_forms_of_the_memory_benchmark_compute_the_same():
    model = tiny_dense(50, seed=0)
    rollout = written([[1, 2, 3]], [[4, 5, 6, 7], [8, 9, 10, 11]])
    layout = lay_out(rollout, share_prompts=False)
    expected, entropy = at_once(model, layout)
    for form in FORMS.values():
        output = [values.flatten() for values in form(model, layout)]
        torch.testing.assert_close(output, [expected, entropy])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_all_logits_at_once_take_the_memory_that_chunks_save(monkeypatch):
    def forked(command: list[str], **_: object) -> SimpleNamespace:
        process = Forked(f"-m {command[2]}", command[3:])
        return SimpleNamespace(returncode=process.wait(300), stdout=process.output, stderr=process.output)

    monkeypatch.setattr("benchmarks.memory.subprocess", SimpleNamespace(run=forked))
    result = memory(1, vocabularies=[60_000], hidden=32, tokens=512)
    facts = {name.removesuffix(", V = 60,000"): value for name, (value,) in result["facts"].items()}
    logits = 512 * 60_000 * 4 / 2**20
    assert facts["MiB of fp32 logits"] == pytest.approx(logits)
    # At once: those of every token, those of the responses, their log-probabilities, and two more for the entropy.
    assert facts["MiB, at once"] > 3 * logits
    assert facts["MiB, chunked"] < facts["MiB, at once"] - 2 * logits
    assert result["ratios"]["MiB, at once / chunked, V = 60,000"] == [facts["MiB, at once"] / facts["MiB, chunked"]]
    assert all(len(values) == 1 and min(values) > 0 for values in result["seconds"].values())


@pytest.mark.slow
@pytest.mark.usefixtures("short")
@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_both_sides_do_the_same_work():
    pytest.importorskip("trl")
    result = step(2)
    facts = result["facts"]
    assert facts["responses, minirl_edu"] == facts["responses, TRL"] == 2 * [measure.PROMPTS * GROUP_SIZE]
    for ours, theirs in zip(facts["mean response length, minirl_edu"], facts["mean response length, TRL"], strict=True):
        # The same prompts, each with other samples: the standard error of these means is about 3 %.
        assert ours == pytest.approx(theirs, rel=0.15)
    shares = result["shares"]
    parts = zip(*(shares[part] for part in ("sample", "update", "sync", "rewards, bookkeeping")), strict=True)
    assert [sum(round_) for round_ in parts] == pytest.approx([1, 1])
    assert all(len(values) == 2 and min(values) > 0 for kind in result.values() for values in kind.values())
