"""Files written tensor by tensor, and what is whole of a model that is not sharded. Sharded ones: tests/scale."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from minirl_edu.models import tiny_dense, tiny_moe
from minirl_edu.streaming import architecture_name, full_state, gather_full, is_sharded, like, write_safetensors

MIXED = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "transposed": torch.arange(6, dtype=torch.bfloat16).view(2, 3).T,
    "odd": torch.tensor([True, False, True]),
    "experts": torch.arange(5, dtype=torch.uint8),
    "ids": torch.tensor([-1, 2**40]),
}


def test_a_streamed_file_is_what_safetensors_reads(tmp_path):
    write_safetensors(tmp_path / "f.safetensors", MIXED, MIXED.items())
    read = load_file(tmp_path / "f.safetensors")
    assert read.keys() == MIXED.keys()
    for name, tensor in MIXED.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        assert file.get_slice("a")[1:].tolist() == [[3, 4, 5]]


def test_tensors_are_asked_for_one_by_one(tmp_path):
    asked = []

    def come():
        for name, tensor in MIXED.items():
            asked.append((name, (tmp_path / "f").stat().st_size if (tmp_path / "f").exists() else 0))
            yield name, tensor

    write_safetensors(tmp_path / "f", MIXED, come())
    assert [name for name, _ in asked] == list(MIXED)


@pytest.mark.parametrize(
    ("came", "message"),
    [
        ([("b", torch.zeros(2))], r"b: .* where a was announced"),
        ([("a", torch.zeros(3))], r"a: .*\[3\] where a"),
        ([("a", torch.zeros(2, dtype=torch.float64))], r"a: torch.float64"),
        ([], r"a: announced, but it never came"),
        ([("a", torch.zeros(2)), ("b", torch.zeros(1))], r"b: .* where nothing more was announced"),
    ],
)
def test_what_was_not_announced_is_refused(came, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "f", {"a": torch.zeros(2)}, came)


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"c: .*complex64"):
        write_safetensors(tmp_path / "f", {"c": torch.zeros(2, dtype=torch.complex64)}, [])


def test_a_plain_model_is_whole_already():
    model = tiny_moe(18, seed=0)
    state = dict(full_state(model))
    assert "lm_head.weight" not in state  # tied
    assert state.keys() | {"lm_head.weight"} == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items() if name in state)
    assert not is_sharded(model)
    weight = next(model.parameters())
    assert gather_full(weight).data_ptr() == weight.data_ptr() and not gather_full(weight).requires_grad
    assert like(weight, weight) is weight


def test_the_architecture_has_transformers_name_under_fsdp():
    model = tiny_dense(18, seed=0)
    assert architecture_name(model) == "Qwen3ForCausalLM"
    model.__class__ = type("FSDPQwen3ForCausalLM", (type("FSDPModule", (), {}), type(model)), {})
    assert architecture_name(model) == "Qwen3ForCausalLM"
