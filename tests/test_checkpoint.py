import contextlib
import json
import os
import pickle
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.functional import mse_loss

from minirl_edu.run import checkpoint
from minirl_edu.run.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    flatten_optimizer,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    unflatten_optimizer,
)
from minirl_edu.streaming import local_part

TENSORS = {"model": {"w": torch.arange(6.0).view(2, 3), "b": torch.tensor([0.1, float("nan")], dtype=torch.bfloat16)}}


def save(directory, step, keep_last=2, **state):
    return save_checkpoint(directory, step, tensors=TENSORS, state=state, keep_last=keep_last)


def steps(directory):
    return sorted(path.name for path in directory.iterdir())


def as_bytes(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8)  # NaN and −0.0 compare as what they are


def train(model, optimizer, seeds):
    for seed in seeds:
        x, y = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()


def model_and_optimizer():
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 1 / 3, "betas": (0.8, 0.9)}]
    return model, torch.optim.AdamW(groups, lr=0.1, weight_decay=0.01)


def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(tmp_path):
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(5))
    flat, rest = flatten_optimizer(optimizer.state_dict())
    path = save_checkpoint(
        tmp_path,
        5,
        tensors={"model": model.state_dict(), "optimizer": flat},
        state={"optimizer": rest, "lr": 0.1 + 0.2},
        keep_last=1,
    )

    resumed, resumed_optimizer = model_and_optimizer()
    tensors, state = load_checkpoint(path)
    loaded = unflatten_optimizer(tensors["optimizer"], state["optimizer"])
    assert loaded["param_groups"] == optimizer.state_dict()["param_groups"]
    assert isinstance(loaded["param_groups"][1]["betas"], tuple)
    assert state["lr"] == 0.1 + 0.2
    resumed.load_state_dict(tensors["model"])
    resumed_optimizer.load_state_dict(loaded)

    train(model, optimizer, range(5, 10))
    train(resumed, resumed_optimizer, range(5, 10))
    assert torch.equal(model.weight, resumed.weight)
    assert torch.equal(model.bias, resumed.bias)
    for a, b in zip(optimizer.state.values(), resumed_optimizer.state.values(), strict=True):
        assert a["step"] == b["step"] == 10
        assert torch.equal(a["exp_avg"], b["exp_avg"])
        assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])
    load_checkpoint(path)  # training in place on what was loaded did not write through to the file


def test_optimizer_state_with_tensors_in_its_groups_and_before_the_first_step():
    parameter = nn.Parameter(torch.zeros(2))
    state_dict = torch.optim.AdamW([parameter], lr=torch.tensor(0.1), capturable=False).state_dict()
    tensors, rest = flatten_optimizer(state_dict)
    assert unflatten_optimizer(tensors, json.loads(json.dumps(rest))) == state_dict
    assert len(tensors) == 1  # the learning rate


def test_optimizer_state_that_json_cannot_hold_is_refused_by_name():
    with pytest.raises(TypeError, match=r"state\.0\.hook is a function: expected a tensor or plain data"):
        flatten_optimizer({"state": {0: {"hook": lambda: None}}})


def test_tensors_keep_their_bits_types_and_shapes(tmp_path):
    group = {
        "bf16": torch.tensor([0.1, float("nan"), -0.0], dtype=torch.bfloat16),
        "fp64": torch.tensor(1 / 3, dtype=torch.float64),
        "rng": torch.Generator().manual_seed(1).get_state(),
        "transposed": torch.arange(6).view(2, 3).T,
        "parameter": nn.Parameter(torch.ones(2)),
        "empty": torch.empty(0, 3),
        "also_empty": torch.empty(0, 3),
    }
    tensors, _ = load_checkpoint(
        save_checkpoint(tmp_path, 1, tensors={"a": group, "b": {}}, state={}, keep_last=1),
    )
    assert tensors["b"] == {}
    assert tensors["a"].keys() == group.keys()
    for name, tensor in group.items():
        loaded = tensors["a"][name]
        assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(as_bytes(loaded), as_bytes(tensor))


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    embedding = nn.Embedding(50, 8)
    head = nn.Linear(8, 50, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    path = save_checkpoint(tmp_path, 1, tensors={"model": model.state_dict()}, state={}, keep_last=1)
    assert (path / "model.safetensors").stat().st_size < 2 * embedding.weight.nbytes

    loaded = load_checkpoint(path)[0]["model"]
    assert loaded.keys() == model.state_dict().keys()
    assert loaded["head.weight"] is loaded["embedding.weight"]
    assert torch.equal(loaded["head.weight"], head.weight)


def test_overlapping_views_are_stored_apart(tmp_path):
    whole = torch.arange(6.0)
    group = {"whole": whole, "matrix": whole.view(2, 3), "tail": whole[2:]}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, tensors={"m": group}, state={}, keep_last=1))[0]["m"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in group.items())


def test_the_newest_are_kept(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    for step in (1, 2, 999_999, 1_000_000):
        path = save(tmp_path, step, loss=step / 3)
        assert latest_checkpoint(tmp_path) == path
    assert steps(tmp_path) == ["step-1000000", "step-999999"]
    assert load_checkpoint(path)[1] == {"loss": 1_000_000 / 3}


def test_pruning_never_deletes_what_was_just_written(tmp_path):
    save(tmp_path, 40)
    save(tmp_path, 20, keep_last=1)  # a run that went back
    assert steps(tmp_path) == ["step-000020", "step-000040"]
    with pytest.raises(ValueError, match="keep_last = 0"):
        save(tmp_path, 60, keep_last=0)


def test_an_intact_step_is_not_overwritten_and_a_damaged_one_is(tmp_path):
    path = save(tmp_path, 1, attempt=1)
    with pytest.raises(CheckpointError, match="already saved"):
        save(tmp_path, 1, attempt=2)
    assert load_checkpoint(path)[1] == {"attempt": 1}
    (path / "state.json").write_text("{}")
    save(tmp_path, 1, attempt=3)
    assert load_checkpoint(path)[1] == {"attempt": 3}
    assert steps(tmp_path) == ["step-000001"]


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_every_flipped_byte_and_every_truncation_is_noticed(tmp_path, name):
    save(tmp_path, 1)
    good = save(tmp_path, 2)
    file = good / name
    original = file.read_bytes()
    for position in range(len(original)):
        damaged = bytearray(original)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=str(good)):
            load_checkpoint(good)
    for length in (0, 1, len(original) // 2, len(original) - 1):
        file.write_bytes(original[:length])
        with pytest.raises(CheckpointError, match=str(good)):
            load_checkpoint(good)
    with pytest.warns(UserWarning, match=str(file)):
        assert latest_checkpoint(tmp_path) == tmp_path / "step-000001"
    file.unlink()
    with pytest.warns(UserWarning, match=f"{file}: missing"):
        assert latest_checkpoint(tmp_path) == tmp_path / "step-000001"
    file.write_bytes(original)
    assert latest_checkpoint(tmp_path) == good


PRIMITIVES = [(os, "fsync"), (os, "rename"), (Path, "mkdir"), (Path, "write_text"), (os, "unlink"), (os, "rmdir")]
PRIMITIVES += [(checkpoint, "write_safetensors")]


def fail_at(monkeypatch, moment, failure):
    """Let `failure()` happen at the `moment`-th call to the file system, in place of the call."""
    calls = iter(range(1000))

    def wrapped(original):
        def primitive(*args, **kwargs):
            if next(calls) == moment:
                failure()
            return original(*args, **kwargs)

        return primitive

    for module, name in PRIMITIVES:
        monkeypatch.setattr(module, name, wrapped(getattr(module, name)))


def exit_at_once():
    os._exit(9)  # no cleanup runs, as when killed


def run_out_of_space():
    raise OSError(28, "No space left on device")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", ["killed", "disk full"])
def test_a_failure_at_any_moment_leaves_a_good_checkpoint_and_a_clean_next_save(tmp_path, monkeypatch, how):
    for moment in range(1000):
        directory = tmp_path / str(moment)
        save(directory, 1, which="old")
        save(directory, 2, which="newer")
        if how == "killed":
            process = os.fork()
            if process == 0:
                fail_at(monkeypatch, moment, exit_at_once)
                save(directory, 3, which="new")
                os._exit(0)
            failed = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
        else:
            failed = False
            with monkeypatch.context() as patch:
                fail_at(patch, moment, run_out_of_space)
                try:
                    save(directory, 3, which="new")
                except OSError:
                    failed = True

        # warnings are errors in these tests: nothing half-written was even looked at
        latest = latest_checkpoint(directory)
        assert latest is not None
        which = load_checkpoint(latest)[1]["which"]
        assert which in (("newer", "new") if failed else ("new",))
        if not failed:
            break
        save(directory, 4, which="next")
        newest = ["step-000003", "step-000004"] if which == "new" else ["step-000002", "step-000004"]
        assert steps(directory) == newest
    assert moment >= len(PRIMITIVES)  # several moments were tried, and the last save went through


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file is meant")
def test_the_name_appears_only_when_everything_is_on_the_disk(tmp_path, monkeypatch):
    events = []
    rename, fsync = os.rename, os.fsync

    def recorded_rename(source, target):
        events.append("rename")
        rename(source, target)

    def recorded_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "rename", recorded_rename)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    save(tmp_path, 1)
    files = ["model.safetensors", "state.json", "manifest.json", ".step-000001.tmp"]
    assert events == [*files, "rename", tmp_path.name]


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
def test_a_file_system_that_refuses_the_bytes(tmp_path):
    import resource

    path = save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"model": {"w": torch.zeros(100_000)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path, 2, tensors=big, state={}, keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps(tmp_path) == ["step-000001"]
    assert latest_checkpoint(tmp_path) == path


def test_a_group_name_cannot_leave_the_folder(tmp_path):
    with pytest.raises(ValueError, match=r"group '\.\./evil'"):
        save_checkpoint(tmp_path / "run", 1, tensors={"../evil": {}}, state={}, keep_last=1)
    assert steps(tmp_path) == ["run"]
    assert steps(tmp_path / "run") == []


class Planted:
    def __reduce__(self):
        return (os.mkdir, (os.environ["PLANTED"],))


def test_a_planted_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED", str(tmp_path / "ran"))
    path = save(tmp_path / "run", 1)
    for name in ("model.bin", "optimizer.pt", "state.pkl"):  # beside the real files: not even opened
        (path / name).write_bytes(pickle.dumps(Planted()))
    load_checkpoint(path)

    payload = pickle.dumps(Planted())  # in place of the real file, with a manifest that agrees
    (path / "model.safetensors").write_bytes(payload)
    manifest = json.loads((path / "manifest.json").read_text())
    entry = {"bytes": len(payload), "sha256": checkpoint.hashlib.sha256(payload).hexdigest()}
    manifest["files"]["model.safetensors"] = entry
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="not written by save_checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError):  # the payload does work: unpickled, it acts
        monkeypatch.setenv("PLANTED", str(tmp_path / "no" / "folder"))
        pickle.loads(pickle.dumps(Planted()))


def forged(path, name, payload):
    """Replace a file, under a manifest that agrees."""
    (path / name).write_bytes(payload)
    manifest = json.loads((path / "manifest.json").read_text())
    entry = {"bytes": len(payload), "sha256": checkpoint.hashlib.sha256(payload).hexdigest()}
    manifest["files"][name] = entry
    (path / "manifest.json").write_text(json.dumps(manifest))


def header(**tensors):
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def state(tied):
    return json.dumps({"state": {}, "tied": tied}).encode()


FORGED = {
    "a tensor larger than any memory": (
        "model.safetensors",
        header(w={"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}),
    ),
    "a header larger than any memory": ("model.safetensors", (10**15).to_bytes(8, "little") + b"{}"),
    "tensors that overlap": (
        "model.safetensors",
        header(**{name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}) + bytes(4),
    ),
    "a name for a tensor that is not there": ("state.json", state({"model": {"alias": "nowhere"}})),
    "a group outside of the folder": ("state.json", state({"../step-000001/model": {}})),
    "a list in the place of an object": ("state.json", b"[]"),
    "lists in lists, without end": ("state.json", b"[" * 100_000),
}


@pytest.mark.parametrize("how", FORGED)
def test_a_forged_checkpoint_is_refused(tmp_path, how):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    forged(path, *FORGED[how])
    with pytest.raises(CheckpointError, match=f"{path}: not written by save_checkpoint"):
        load_checkpoint(path)


def test_a_manifest_of_lists_in_lists_is_passed_over(tmp_path):
    good = save(tmp_path, 1)
    (save(tmp_path, 2) / "manifest.json").write_text("[" * 100_000)
    with pytest.warns(UserWarning, match="manifest.json: damaged"):
        assert latest_checkpoint(tmp_path) == good


@pytest.mark.parametrize("name", ["../secret", "../../../etc/hostname", "/etc/hostname", "folder/../secret", ".."])
def test_a_manifest_cannot_have_files_read_outside_of_its_folder(tmp_path, name, monkeypatch):
    (tmp_path / "secret").write_text("precious")
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    digest = checkpoint.hashlib.sha256(b"precious").hexdigest()
    manifest["files"] = {name: {"bytes": 8, "sha256": digest}, **manifest["files"]}
    (path / "manifest.json").write_text(json.dumps(manifest))
    read = []
    monkeypatch.setattr(checkpoint, "_sha256", lambda file: read.append(file) or digest)
    with pytest.raises(CheckpointError, match="missing"):
        load_checkpoint(path)
    assert read == []


# -------------------------------------------------------------------------------------- in the background, and in parts


@pytest.fixture
def slowly(monkeypatch):
    """Files are only written after `slowly.set()`."""
    go, write = threading.Event(), checkpoint.write_safetensors

    def when_told(*arguments):
        assert go.wait(30)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write_safetensors", when_told)
    return go


def test_a_run_goes_on_while_its_checkpoint_is_written(tmp_path, slowly):
    writer = CheckpointWriter(tmp_path, keep_last=1)
    model, optimizer = model_and_optimizer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = writer.save(1, tensors={"model": model.state_dict()}, state={})
    train(model, optimizer, range(3))
    writer.check()  # nothing to say yet
    assert latest_checkpoint(tmp_path) is None
    slowly.set()
    writer.wait()
    assert latest_checkpoint(tmp_path) == path
    loaded = load_checkpoint(path)[0]["model"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in before.items())
    assert not torch.equal(loaded["weight"], model.weight)
    writer.close()


def test_checkpoints_are_written_one_at_a_time(tmp_path, slowly):
    writer = CheckpointWriter(tmp_path, keep_last=5)
    writer.save(1, tensors=TENSORS, state={})
    threading.Timer(0.2, slowly.set).start()
    writer.save(2, tensors=TENSORS, state={})
    assert (tmp_path / "step-000001").exists()  # the second save has waited for it
    writer.close()
    assert steps(tmp_path) == ["step-000001", "step-000002"]


def test_a_failure_in_the_background_is_told_by_the_next_call_and_harms_nothing(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, keep_last=1)
    path = writer.save(1, tensors=TENSORS, state={}, wait=True)
    for tell in (writer.wait, lambda: writer.save(3, tensors=TENSORS, state={})):
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", lambda *_: run_out_of_space())
            writer.save(2, tensors=TENSORS, state={})
            writer.settle()
        with pytest.raises(OSError, match="No space left"):
            tell()
        writer.check()  # told once
        assert steps(tmp_path) == ["step-000001"] and latest_checkpoint(tmp_path) == path
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: run_out_of_space())
        writer.save(2, tensors=TENSORS, state={})
        with pytest.warns(UserWarning, match="a checkpoint was not written: .*No space left"):
            writer.close()


def laid_out(whole, placements, rank, ranks):
    """A rank's part of a tensor, under a process group that only pretends."""
    from torch.distributed.device_mesh import init_device_mesh

    size = ranks if len(placements) == 1 else (2, ranks // 2)
    mesh = init_device_mesh("cpu", (size,) if isinstance(size, int) else size)
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


@contextlib.contextmanager
def pretend(rank, ranks):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


WHOLE = {
    "even": (torch.arange(48.0).view(8, 6), [Shard(0)]),
    "uneven": (torch.arange(15.0).view(5, 3), [Shard(0)]),  # four ranks: 2, 2, 1 and 0 rows
    "columns": (torch.arange(28, dtype=torch.int32).view(4, 7), [Shard(1)]),
    "twice": (torch.arange(54.0).view(9, 6), [Shard(0), Shard(0)]),
    "strided": (torch.arange(64.0).view(16, 4), [_StridedShard(0, split_factor=2), Shard(0)]),
    "both": (torch.arange(40.0).view(5, 8).bfloat16(), [Shard(0), Shard(1)]),
    "copied": (torch.arange(12.0).view(6, 2), [Replicate(), Shard(0)]),
    "whole": (torch.arange(6.0).view(2, 3), None),
    "number": (torch.tensor(7.0), None),
}


def part(name, rank, ranks):
    whole, placements = WHOLE[name]
    return whole.clone() if placements is None else laid_out(whole, placements, rank, ranks)


@pytest.mark.filterwarnings("ignore")  # torch's, about the pretended process group
def test_parts_of_several_processes_are_read_by_any_number(tmp_path):
    """Every process writes what it has, each number once; another number of them reads it, and so does one alone."""
    path, writers = tmp_path / "step-000003", []
    for rank in range(4):
        with pretend(rank, 4):
            writer = CheckpointWriter(tmp_path, keep_last=1, rank=rank, size=4)
            group = {name: part(name, rank, 4) for name in WHOLE}
            tensors = {"model": group, "empty": {}}
            assert writer.save(3, tensors=tensors, state={"x": 1}, aliases={"model": {"alias": "even"}}) == path
            writers.append(writer)
    for writer in reversed(writers):
        writer.wait()
        writer.close()
    names = {f"{group}-{rank:05d}.safetensors" for group in ("model", "empty") for rank in range(4)}
    assert {file.name for file in path.iterdir()} == names | {"state.json", "manifest.json"}
    stored = sum(load_file(path / name)[key].numel() for name in names for key in load_file(path / name))
    assert stored == sum(whole.numel() for whole, _ in WHOLE.values())

    tensors, state = load_checkpoint(path)
    assert state == {"x": 1} and dict(tensors["empty"]) == {} and latest_checkpoint(tmp_path) == path
    assert tensors["model"].keys() == WHOLE.keys() | {"alias"}
    for name, (whole, _) in WHOLE.items():
        assert torch.equal(tensors["model"][name], whole) and tensors["model"][name].dtype == whole.dtype
    assert torch.equal(tensors["model"]["alias"], WHOLE["even"][0])
    for ranks in (2, 4, 6):
        for rank in range(ranks):
            with pretend(rank, ranks):
                for name in WHOLE:
                    expected = part(name, rank, ranks)
                    read = checkpoint._own(tensors["model"], name, expected)
                    assert type(read) is type(expected) and read.shape == expected.shape
                    assert torch.equal(local_part(read), local_part(expected)), (name, rank, ranks)

    forged(path, "model-00002.safetensors", b"")
    with pytest.raises(CheckpointError, match="not written by save_checkpoint"):
        load_checkpoint(path)
    (path / "model-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001\.safetensors: missing"):
        load_checkpoint(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["fails", "is gone"])
def test_without_the_part_of_each_process_there_is_no_checkpoint(tmp_path, how, monkeypatch):
    first, second = (CheckpointWriter(tmp_path, keep_last=1, rank=rank, size=2) for rank in range(2))
    monkeypatch.setattr(CheckpointWriter, "GRACE", 0.2)
    with pretend(0, 2):
        first.save(1, tensors={"model": {"even": part("even", 0, 2)}}, state={})
    if how == "fails":
        with pretend(1, 2), monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write_safetensors", lambda *_: run_out_of_space())
            second.save(1, tensors={"model": {"even": part("even", 1, 2)}}, state={})
            with pytest.raises(OSError, match="No space left"):
                second.wait()
        with pytest.raises(CheckpointError, match=r"rank 1 could not write its part: OSError.*No space left"):
            first.wait()
    else:
        with pytest.warns(UserWarning, match="given up, because rank 1 has not written its part"):
            first.close()
    assert steps(tmp_path) == []
