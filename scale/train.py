"""Train with MiniRL on any number of processes, or try a recipe out in miniature.

    accelerate launch --config_file scale/accelerate/node_8gpu.yaml scale/train.py --config RECIPE --out FOLDER
    python scale/train.py --dry-run --config RECIPE

It takes the arguments of `minirl train` and runs the same trainer. `--dry-run` runs two global steps of what `shrink`
makes of the recipe; outside of `accelerate launch` it starts two CPU processes itself.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from minirl_edu import cli

with cli.quitting_at_once():
    from minirl_edu.config import Config, ConfigError, RolloutConfig, TaskConfig, config_file, load_config
    from minirl_edu.models import load_architecture
    from minirl_edu.precision import FORMATS
    from minirl_edu.ranks import RankFailed
    from minirl_edu.tasks import ChainTask, Problem
    from minirl_edu.tasks.chain import VOCABULARY

ACCELERATE = Path(__file__).parent / "accelerate"
SIZES = {
    **{"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 8},
    **{"num_experts": 4, "num_local_experts": 4, "vocab_size": len(VOCABULARY)},
}
"""The model of a dry run: those of these fields that its config has."""
SHOWN = ("reward", "entropy", "kl_rollout_old", "grad_norm")


class AnyDigit(ChainTask):
    """`chain`, content with any digit at the end: random weights hardly ever find the right one, and groups without a
    reward have no gradient."""

    def reward(self, problem: Problem, response: str) -> float:
        """1.0 if the response ends in a digit, else 0.0."""
        return float(response[-1:].isdigit())


def shrink(config: Config) -> Config:
    """The same run in miniature, for two CPU processes.

    Kept: algorithm, seed, temperature, N, the optimizer, dtype, gradient checkpointing, and the model's architecture.
    Small: its sizes, its weights are random, three prompts × four responses of `chain` per mini-batch, two global
    steps. The rollout engine is transformers' with the emulated number format nearest to the recipe's.

    Raises ConfigError for a model whose architecture is not known here.
    """
    settings = config.model
    try:
        model = load_architecture(settings.name, settings.overrides, trust_remote_code=settings.trust_remote_code)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    sizes = {name: size for name, size in SIZES.items() if getattr(model, name, None) is not None}
    if getattr(model, "num_experts_per_tok", None):
        sizes["num_experts_per_tok"] = min(2, model.num_experts_per_tok)
    tokens = {
        "bos_token_id": None,
        "eos_token_id": VOCABULARY.index("<eos>"),
        "pad_token_id": VOCABULARY.index("<pad>"),
    }
    return replace(
        config,
        task=TaskConfig(ChainTask.name),
        model=replace(
            settings,
            random=True,
            overrides={**settings.overrides, **sizes, **tokens},
            expert_parallel=min(2, settings.expert_parallel),
            attn_implementation="sdpa" if settings.attn_implementation == "sdpa" else "eager",
        ),
        rollout=replace(
            config.rollout, engine="hf", precision=_emulated(config.rollout), options={}, max_new_tokens=None
        ),
        train=replace(config.train, global_steps=2, mini_batch_prompts=3, group_size=4, tokens_per_micro_batch=64),
        eval=replace(config.eval, every=min(1, config.eval.every), problems=4, samples=min(2, config.eval.samples)),
        output=replace(config.output, save_every=1, keep_last=1, trackers=[]),
        ranks=replace(config.ranks, wait=min(120.0, config.ranks.wait)),
    )


def _emulated(rollout: RolloutConfig) -> str:
    """What the engine computes in. A server's command line says that, not the recipe: the coarsest in use, fp8."""
    if rollout.engine == "vllm_server" or "fp8" in str(rollout.options):
        return "fp8_e4m3"
    return rollout.precision if rollout.engine == "hf" or rollout.precision in FORMATS else "bf16"


def commands(recipe: str | Path) -> list[str]:
    """The commands in the comment at the top of a recipe: its lines that are indented by three spaces."""
    lines = []
    for line in Path(recipe).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if line.startswith("#   "):
            if lines and lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1] + line[4:].lstrip()
            else:
                lines.append(line[4:])
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the command line says; returns the exit status of `minirl train`. Only rank 0 reports."""
    arguments = _parse(argv)
    rank = int(os.environ.get("RANK", "0"))
    if not arguments.dry_run and rank == 0:
        return cli.main(["train", *_passed_on(arguments)])
    try:
        if not arguments.dry_run:
            return _follow(arguments)
        return _dry_run(arguments) if "RANK" in os.environ else _launch(arguments)
    except (ConfigError, FileExistsError, FileNotFoundError, RankFailed) as error:
        print(f"train.py{f', rank {rank}' if 'RANK' in os.environ else ''}: {error}", file=sys.stderr)
        return 1 if isinstance(error, RankFailed) else 2


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file or name, such as one of scale/recipes; without one, the defaults")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one field; repeatable")
    parser.add_argument("--out", help="folder of the run (a dry run may do without)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--dry-run", action="store_true", help="two global steps in miniature, on two CPU processes")
    arguments = parser.parse_args(argv)
    if arguments.out is None and not (arguments.dry_run and "RANK" not in os.environ):
        parser.error("--out is needed: the processes of a run share one folder")
    return arguments


def _passed_on(arguments: argparse.Namespace) -> list[str]:
    """The arguments as `minirl train` takes them."""
    settings = [part for setting in arguments.set for part in ("--set", setting)]
    config = ["--config", arguments.config] if arguments.config else []
    return [*config, *settings, "--out", arguments.out, *(["--resume"] if arguments.resume else [])]


def _follow(arguments: argparse.Namespace) -> int:
    """A rank other than the first: the same run, without a bar and a report."""
    from transformers.utils import logging

    from minirl_edu.trainer import MiniRLTrainer

    logging.disable_progress_bar()
    out = Path(arguments.out)
    config = load_config(arguments.config or (out / "config.yaml" if arguments.resume else None), arguments.set)
    MiniRLTrainer(config, out, resume=arguments.resume, progress=False).train()
    return 0


def _launch(arguments: argparse.Namespace) -> int:
    """Start two CPU processes that make the dry run."""
    config = shrink(load_config(arguments.config, arguments.set))  # a mistake is told before anything is started
    # Experts are shared by transformers, and accelerate wraps nothing then.
    kind = "cpu_ddp" if config.model.expert_parallel > 1 else "cpu_fsdp2"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"{ACCELERATE / kind}.yaml"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(prefix="minirl-dry-run-") as folder:
        arguments.out = arguments.out or folder
        line = [*launcher, __file__, "--dry-run", *_passed_on(arguments)]
        return subprocess.run(line, env=environment).returncode


def _dry_run(arguments: argparse.Namespace) -> int:
    """One process of the dry run; the first says in one line what ran, what came of it and how to run it in full."""
    from minirl_edu.records import read_records
    from minirl_edu.trainer import MiniRLTrainer

    config = shrink(load_config(arguments.config, arguments.set))
    trainer = MiniRLTrainer(config, arguments.out, task=AnyDigit(), resume=arguments.resume)
    trainer.train()
    if not trainer.accelerator.is_main_process:
        return 0
    last = read_records(Path(arguments.out) / "metrics.jsonl")[-1]
    numbers = ", ".join(f"{name} {last[name]:.3g}" for name in SHOWN)
    processes, family = trainer.accelerator.num_processes, trainer.model.config.model_type
    how = "FSDP2" if trainer.accelerator.is_fsdp2 else "DDP" if processes > 1 else "no sharding"
    how = f"expert parallelism over {n}" if (n := config.model.expert_parallel) > 1 else how
    lines = commands(config_file(arguments.config)) if arguments.config else []
    full = [line for line in lines if "scale/train.py" in line]
    print(
        f"dry run of {arguments.config or 'the defaults'}: {last['grad_step']} gradient steps of a miniature {family} "
        f"on {processes} processes ({how}); the last: {numbers}. In full: {full[0] if full else 'without --dry-run'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
