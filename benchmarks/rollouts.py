"""Rollouts of a pretrained model: vLLM against transformers' forward in `HFEngine`, tokens per second in one run."""

from time import perf_counter

from minirl_edu.models import SMOLLM2, load_model, load_tokenizer
from minirl_edu.rollout import HFEngine, RolloutEngine, Sampling
from minirl_edu.rollout.vllm import VLLMEngine
from minirl_edu.seeding import derive_seed
from minirl_edu.tasks import make_task

PROMPTS, GROUP_SIZE, LIMIT = 16, 8, 16
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def rollouts(rounds: int, *, seed: int = 0) -> dict[str, dict[str, list[float]]]:
    """Rollouts of SmolLM2-135M: vLLM in fp32 and bf16 against transformers in fp32, tokens per second.

    16 chat prompts of about 50 tokens × 8 responses of at most 16, temperature 1, as in recipes/smollm2.yaml. Only one
    vLLM engine can live in a process, so the two formats follow each other; within each, transformers and vLLM take
    turns, once per 10 `rounds`.
    """
    model, tokenizer = load_model(SMOLLM2), load_tokenizer(SMOLLM2)
    sums = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    task = make_task("reasoning_gym", tokenizer=tokenizer, dataset="chain_sum", config=sums, evaluation_size=1)
    prompts = [task.encode(problem) for problem in task.sample(PROMPTS, seed=seed)]

    def rate(engine: RolloutEngine, turn: int) -> float:
        started = perf_counter()
        rollout = engine.generate(
            prompts, group_size=GROUP_SIZE, sampling=Sampling(LIMIT), seed=derive_seed(seed, "rollout", turn)
        )
        return int(rollout.response_mask.sum()) / (perf_counter() - started)

    transformers = HFEngine(model)
    result: dict[str, dict[str, list[float]]] = {"facts": {}, "ratios": {}}
    for name, dtype in DTYPES.items():
        start = perf_counter()
        vllm = VLLMEngine(model, dtype=dtype, max_model_len=128)
        result["facts"][f"seconds to start, vLLM {name}"] = [perf_counter() - start]
        turns = [(rate(transformers, turn), rate(vllm, turn)) for turn in range(1 + max(1, rounds // 10))]
        vllm.close()
        ours, theirs = zip(*turns[1:], strict=True)  # the first warmed up
        result["facts"][f"tokens per second, vLLM {name}"] = list(theirs)
        result["facts"][f"tokens per second, transformers fp32 (beside {name})"] = list(ours)
        result["ratios"][f"vLLM {name} / transformers fp32"] = [b / a for a, b in turns[1:]]
    return result
