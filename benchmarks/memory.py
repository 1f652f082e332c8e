"""Peak memory of log-probabilities and their gradients: in chunks through the head, and from all logits at once.

Each peak has a process of its own, as one case leaves pages in the allocator that the next would find there.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minirl_edu.logprobs import Layout, lay_out, response_logprobs
from minirl_edu.models import tiny_dense
from minirl_edu.rollout import Rollout

VOCABULARIES = (49_152, 151_936)
"""Of SmolLM2 and of Qwen3."""
HIDDEN, TOKENS = 576, 1024
RESPONSES, PROMPT = 8, 32


def memory(
    rounds: int,
    *,
    seed: int = 0,
    vocabularies: Sequence[int] = VOCABULARIES,
    hidden: int = HIDDEN,
    tokens: int = TOKENS,
) -> dict[str, dict[str, list[float]]]:
    """Peak memory and time of log-probabilities, entropy and gradients: in chunks, and from all logits at once.

    1,024 response tokens (8 responses, prompts of 32), one layer of hidden size 576 with tied embeddings, in fp32.
    A peak is what the process held above its weights and batch, gradients of the weights included; it is taken once.
    For the seconds both take turns in one process, once per 20 `rounds`.
    """
    result: dict[str, dict[str, list[float]]] = {"seconds": {}, "ratios": {}, "facts": {}}
    for vocabulary in vocabularies:
        sizes, of = [vocabulary, hidden, tokens, seed], f"V = {vocabulary:,}"
        result["facts"][f"MiB of fp32 logits, {of}"] = [tokens * vocabulary * 4 / 2**20]
        peaks = {form: _in_a_process("peak", form, *sizes) for form in FORMS}
        seconds = _in_a_process("seconds", max(1, rounds // 20), *sizes)
        for form in FORMS:
            result["facts"][f"MiB, {form}, {of}"] = [peaks[form]]
            result["seconds"][f"{form}, {of}"] = seconds[form]
        result["ratios"][f"MiB, at once / chunked, {of}"] = [peaks["at once"] / peaks["chunked"]]
        turns = zip(seconds["chunked"], seconds["at once"], strict=True)
        result["ratios"][f"chunked / at once, {of}"] = [chunked / at_once for chunked, at_once in turns]
    return result


def at_once(model: PreTrainedModel, layout: Layout) -> tuple[Tensor, Tensor]:
    """log π and entropy [n] of the response tokens, by way of the logits [B, S, V] of every token."""
    logits = model(**layout.inputs, use_cache=False).logits.flatten(0, 1)
    log_probs = logits.index_select(0, layout.predictor).float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(1, layout.targets[:, None])[:, 0], entropy


FORMS: dict[str, Callable[[PreTrainedModel, Layout], tuple[Tensor, Tensor]]] = {
    "at once": at_once,
    "chunked": response_logprobs,
}


def _in_a_process(*arguments: object) -> Any:
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps([*arguments, torch.get_num_threads()])]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"benchmark 'memory', {arguments}: exit status {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(what: str, case: str | int, vocabulary: int, hidden: int, tokens: int, seed: int, threads: int) -> Any:
    """The peak [MiB] of one form, or the seconds of `case` turns of each."""
    torch.set_num_threads(threads)
    model = tiny_dense(vocabulary, seed=seed, layers=1, hidden=hidden)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(vocabulary, (RESPONSES, PROMPT + tokens // RESPONSES), generator=generator)
    mask = torch.ones_like(drawn, dtype=torch.bool)
    nothing = torch.zeros(RESPONSES, tokens // RESPONSES)
    rollout = Rollout(drawn, mask, PROMPT, mask[:, PROMPT:], nothing, None, drawn[:, :PROMPT].tolist(), 0)
    layout = lay_out(rollout, share_prompts=False)

    def run(form: str) -> float:
        started = time.perf_counter()
        logp, _ = FORMS[form](model, layout)
        logp.sum().backward()
        model.zero_grad()
        return time.perf_counter() - started

    if what == "peak":
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
        before = _resident_peak()
        run(str(case))
        return (_resident_peak() - before) / 2**10
    for form in FORMS:
        run(form)  # the first touches fresh pages
    turns = [{form: run(form) for form in (FORMS if turn % 2 else reversed(FORMS))} for turn in range(int(case))]
    return {form: [turn[form] for turn in turns] for form in FORMS}


def _resident_peak() -> int:
    """The most kibibytes that this process has had in memory."""
    return next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )


if __name__ == "__main__":
    print(json.dumps(_measure(*json.loads(sys.argv[1]))))
