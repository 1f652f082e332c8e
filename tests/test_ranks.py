"""How work is shared among ranks, and what one process needs none of. Several processes: tests/scale."""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator

from minirl_edu.config import Config
from minirl_edu.ranks import RankedBatcher, Ranks, Watch, _Identity, make_accelerator
from minirl_edu.trainer import MiniRLTrainer
from tests.forked import Forked


def test_kinds_are_level_each_by_itself():
    """A rank waits for the others in each kind of forward: two ranks share both kinds, not one each."""
    settings: dict[str, Any] = {"group_size": 2, "mini_batches": 1, "tokens": 100, "share_prompts": False, "pack": True}
    settings |= {"attention": 0.0, "force_routes": False, "backward_all": False}
    ranks: Any = SimpleNamespace(size=2, rank=0)
    prompts, fed = torch.ones(8, dtype=torch.int64), torch.tensor([5, 5, 5, 5, 7, 3, 3, 7])
    advantages = torch.tensor([0.0, 0, 1, -1, 0, 0, 1, -1])
    dealt = RankedBatcher(ranks, (), **settings)._deal(prompts, fed, 1, advantages)
    assert [(has_gradient, [part.cost for part in parts]) for has_gradient, parts in dealt] == [
        (True, [12, 12]),
        (False, [12, 12]),
    ]
    assert sorted(row for part in dealt[0][1] for row in part.rows) == [2, 3, 6, 7]


def test_a_run_in_which_no_rank_gets_on_is_stopped_although_all_give_signs_of_life(monkeypatch):
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(Watch, "GRACE", 60.0)  # the test is the main thread, and in time
    watches = []
    for rank in range(2):
        monkeypatch.setattr(Watch, "_made", 0)
        watches.append(Watch(rank, 2, silent=60, stalled=2.0))
    try:
        watches[1].reached("waiting for the rollout")
        for answer in range(8):  # twice as long as a stall, while rank 1 does nothing but wait
            watches[0].reached(f"sampling, answer {answer}")
            assert not watches[0].lost_rank(0.5) and not watches[1].lost_rank(0)
        for watch in watches:
            said = watch.lost_rank(30)
            assert "no rank has got on for 2 s" in said
            assert "rank 0: sampling, answer 7; rank 1: waiting for the rollout" in said
    finally:
        for watch in watches:
            watch.stop()


def test_a_run_says_how_far_it_is(monkeypatch, tmp_path):
    places = []
    monkeypatch.setattr(Ranks, "reached", lambda self, where: places.append(where))
    small = {"mini_batch_prompts": 4, "group_size": 2, "mini_batches": 2, "global_steps": 1}
    config = Config.from_dict({"train": small, "eval": {"every": 0}})
    MiniRLTrainer(config, tmp_path / "run", progress=False).train()
    phases = [place.split(", ")[1] for place in places]
    order = ["sampling", "verifying", "log-probabilities of the old policy", "updating", "stepping"]
    assert [phases.index(phase) for phase in order] == sorted(phases.index(phase) for phase in order)
    assert "0 global and 1 gradient steps done, stepping" in places
    assert places[-1] == "1 global and 2 gradient steps done, saving"


def test_one_process_talks_to_nobody():
    ranks = Ranks(Accelerator(cpu=True))
    assert (ranks.rank, ranks.size, ranks.is_main, ranks.watch) == (0, 1, True, None)
    assert ranks.any(True) and not ranks.any(False)
    assert ranks.all_reduce([3, 1], "max") == [3, 1] and ranks.all_reduce([0.5], "sum") == [0.5]
    rows = [torch.tensor([2, 0, 1])]
    tensor = torch.arange(6).view(3, 2)
    taken = ranks.scatter(tensor, rows, (2,), torch.int64)
    assert torch.equal(taken, tensor[rows[0]])
    back = ranks.gather(taken, rows)
    assert back is not None and torch.equal(back, tensor)
    with pytest.raises(RuntimeError, match="as it was"), ranks.together():
        raise RuntimeError("as it was")
    ranks.close()


def test_another_trainer_that_stopped_while_it_accumulated_does_not_stop_this_ones_steps():
    """accelerate keeps one flag for the process; TRL's trainer leaves it off."""
    other = Accelerator(cpu=True)
    other.gradient_state.sync_gradients = False
    accelerator = make_accelerator(wait=60.0)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = accelerator.prepare(torch.optim.SGD([weight], lr=0.5))
    weight.sum().backward()
    optimizer.step()
    assert weight.item() == 0.5


def test_fsdp1_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        make_accelerator(wait=10.0)


def test_fsdp2_that_accelerate_does_not_give_is_refused(tmp_path, monkeypatch):
    """One process cannot shard: accelerate says nothing, we do."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    program = tmp_path / "program.py"
    program.write_text("from minirl_edu.ranks import make_accelerator; make_accelerator(wait=10.0)")
    process = Forked(program)
    assert process.wait(240) == 1 and "FSDP2 was asked for" in process.output, process.output


def test_a_process_that_is_gone_is_known_on_its_own_machine_alone():
    own = _Identity.own()
    assert own.host == socket.gethostname() and own.pid == os.getpid()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    there = _Identity(own.host, child.pid, own.space)
    assert not own.gone(there)
    child.kill()
    while child.poll() is None:
        pass
    assert own.gone(there)
    assert not own.gone(_Identity("elsewhere", child.pid, "another"))
    assert not _Identity(own.host, own.pid, "").gone(_Identity(own.host, child.pid, ""))


def test_a_zombie_counts_as_gone():
    own = _Identity.own()
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet collected
    assert own.gone(_Identity(own.host, child.pid, own.space))
    child.wait()
