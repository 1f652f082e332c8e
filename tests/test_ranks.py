"""How work is shared among ranks, and what one process needs none of. Several processes: tests/scale."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator

from minirl_edu.ranks import Ranks, _Identity, make_accelerator, share_rows
from tests.forked import Forked


def test_every_group_goes_to_one_rank_and_costs_are_level():
    costs = [9, 1, 7, 3, 8, 2, 6, 4]
    for size in (1, 2, 3, 8, 11):
        shares = share_rows(costs, [0] * 8, size)
        assert sorted(group for share in shares for group in share) == list(range(8))
        assert all(share == sorted(share) for share in shares)
        load = [sum(costs[group] for group in share) for share in shares]
        assert max(load) - min(load) <= max(costs)
    assert [sum(costs[g] for g in share) for share in share_rows(costs, [0] * 8, 2)] == [20, 20]


def test_kinds_are_level_each_by_itself():
    """A rank waits for the others in each kind of forward: two ranks share both kinds, not one each."""
    shares = share_rows([5, 5, 5, 5], [0, 0, 1, 1], 2)
    assert [sorted(kind // 2 for kind in share) for share in shares] == [[0, 1], [0, 1]]


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
