"""The `minirl` command; without arguments it prints what there is.

Completion in the shell, with the extra `completion`: eval "$(register-python-argcomplete minirl)".
"""

import argparse
import errno
import hashlib
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from minirl_edu import __version__
from minirl_edu.recipes import RECIPES, recipes

DEMO_VARIANTS = {"MiniRL + R3": [], "no replay, no clipping": ["algorithm.replay=none", "algorithm.clip=false"]}
"""The demo's runs: label and what differs from recipes/demo.yaml."""
DEMO_TITLE = "MiniRL on a laptop: what routing replay and the clip are for"
DEMO_ABOUT = (
    "A Mixture-of-Experts of 0.9 M parameters learns running sums modulo 10: after 3+4+6= it is to write ,7,3. The "
    "engine that samples its answers often picks another expert than the trainer would. MiniRL with R3 trains the "
    "experts that wrote the answer, and its clip leaves out tokens that have moved too far in the eight updates that "
    "each batch serves. The other run does neither."
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `minirl` command; returns the exit status. A user's error ends in one line, not a traceback.

    Exit status: 0 done, 1 the run failed (what to resume is printed), 2 a wrong argument, setting or file, 130 Ctrl-C.
    """
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what may come next
        with suppress(ModuleNotFoundError):
            import_module("argcomplete").autocomplete(parser)
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        # The doctor has to work where nothing else does.
        return _doctor() if arguments.run is _doctor else _run(arguments)
    except KeyboardInterrupt:
        print(f"minirl {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        from minirl_edu.doctor import how_to_install

        if (advice := how_to_install(error)) == str(error):  # a fault of ours
            raise
        print(f"minirl {arguments.command}: {advice}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    """Run the command; its own errors become a line and an exit status."""
    with quitting_at_once():
        import_module(f"minirl_edu.{arguments.loads}")
    try:
        return arguments.run(arguments) or 0
    except (FileExistsError, FileNotFoundError, *_own("config.ConfigError", "records.RecordsError")) as error:
        print(f"minirl {arguments.command}: {error}", file=sys.stderr)
        return 2
    except _own("trainer.TrainingDiverged", "run.checkpoint.CheckpointError") as error:
        print(f"minirl {arguments.command}: {error}", file=sys.stderr)
        return 1
    except (OSError, *_own("rollout.EngineError", "ranks.RankFailed", "tasks.RewardError")) as error:
        engine = isinstance(error, (ConnectionError, TimeoutError, *_own("rollout.EngineError")))
        print(f"minirl {arguments.command}: {'the rollout engine: ' if engine else ''}{error}", file=sys.stderr)
        if arguments.command == "train":
            room = "make room, " if isinstance(error, OSError) and error.errno in _NO_ROOM else ""
            out = shlex.quote(arguments.out)
            print(
                f"nothing that was saved is lost; {room}then go on with: minirl train --resume --out {out}",
                file=sys.stderr,
            )
        return 1


def _own(*names: str) -> tuple[type[Exception], ...]:
    """Exceptions of ours by module and name. A module that isn't loaded has raised none, and need not be loaded now."""
    parts = [f"minirl_edu.{name}".rpartition(".") for name in names]
    return tuple(getattr(sys.modules[module], name) for module, _, name in parts if module in sys.modules)


@contextmanager
def quitting_at_once() -> Iterator[None]:
    """Ctrl-C ends the process here and now. An exception would not do while modules are imported: C extensions turn it
    into errors of their own, and callbacks print and drop it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _train(arguments: argparse.Namespace) -> None:
    from minirl_edu.config import load_config
    from minirl_edu.trainer import MiniRLTrainer

    out = Path(arguments.out)
    source = arguments.config
    if source is None and arguments.resume:
        source = out / "config.yaml"  # go on with the settings that the run was started with
        if not source.exists():
            raise FileNotFoundError(f"--resume: {out} holds no run (no config.yaml)")
    config = load_config(source, arguments.set)
    _quiet()
    trainer = MiniRLTrainer(config, out, resume=arguments.resume)
    trainer.train()
    try:
        from minirl_edu.report import write_report
    except ModuleNotFoundError as error:  # the extra `plots` is for pictures, training needs none
        from minirl_edu.doctor import how_to_install

        print(f"no report: {how_to_install(error)}; then: {shlex.join(['minirl', 'report', str(out)])}")
    else:
        print(f"report: {write_report(out, out / 'report.html')}")


def demo_folder(name: str) -> str:
    """The folder of a demo's run."""
    return re.sub(r"\W+", "-", name)


def _demo(arguments: argparse.Namespace) -> int:
    import torch

    from minirl_edu.config import load_config
    from minirl_edu.records import read_records
    from minirl_edu.report import write_report
    from minirl_edu.trainer import MiniRLTrainer

    out, runs = Path(arguments.out or Path("runs/demo", _folder_name(arguments.set))), {}
    _quiet()
    torch.set_num_threads(1)  # so small a model gains nothing from a second thread, and loses much on a busy machine
    for name, overrides in DEMO_VARIANTS.items():
        folder = runs[name] = out / demo_folder(name)
        config = load_config(RECIPES / "demo.yaml", [*overrides, *arguments.set])
        resume = (folder / "config.yaml").exists()
        trainer = MiniRLTrainer(config, folder, resume=resume)
        if trainer.step < config.train.global_steps:
            print(f"{name}: {'going on' if resume else 'training'} in {folder}", flush=True)
            trainer.train()
        if trainer.step < config.train.global_steps:
            settings = [part for setting in arguments.set for part in ("--set", setting)]
            command = shlex.join(["minirl", "demo", *settings, "--out", str(out)])
            print(f"stopped; the same command goes on where it was: {command}")
            return 130
    report = write_report(runs, out / "report.html", title=DEMO_TITLE, about=DEMO_ABOUT)
    for name, folder in runs.items():
        records = read_records(folder / "metrics.jsonl")
        scores = [record["score"] for record in records if "score" in record]
        warnings = [warning for record in records for warning in record.get("warnings", [])]
        print(f"{name}: held-out score {scores[0]:.2f} → {scores[-1]:.2f} (best {max(scores):.2f})", end="; ")
        print(warnings[0] if warnings else "no collapse warning")
    print(f"report: {report}  (trained already? delete {out} to train again)")
    return 0


def _folder_name(overrides: Sequence[str]) -> str:
    """`seed=1,train.lr=1e-4`: a name for the folder of runs with these overrides, empty without any."""
    name = ",".join(overrides)
    plain = re.sub(r"[^\w.,=+-]", "_", name)[:80]
    # Where that says less than the overrides do, two sets of them still have two folders.
    return name if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _report(arguments: argparse.Namespace) -> None:
    """The report of one run, beside it, or of several, in the folder that holds them all."""
    from minirl_edu.report import write_report

    runs = _labelled(arguments.runs)
    folders = [folder for own in runs.values() for folder in own]
    if folders == [Path(arguments.runs[0])]:  # one run without a label: its method is its name
        print(write_report(folders[0], Path(arguments.out or folders[0] / "report.html")))
    else:
        together = Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
        print(write_report(runs, Path(arguments.out or together / "compare.html")))


def _labelled(words: Sequence[str]) -> dict[str, list[Path]]:
    """Runs by label: that of LABEL=RUN, or the name of RUN's folder. Runs with one label are seeds of one kind.

    Raises ConfigError for runs that share only the name of their folders: their settings differ in more than the seed.
    """
    from minirl_edu.config import ConfigError, load_config

    runs: dict[str, list[Path]] = {}
    for word in words:
        label, equals, name = word.partition("=")
        if equals and not Path(word).exists():  # a folder may have a = in its name
            runs.setdefault(label, []).append(Path(name))
            continue
        folder = Path(word)
        own = runs.setdefault(folder.resolve().name, [])
        configs = [path / "config.yaml" for path in (*own[:1], folder)]
        if own and all(config.is_file() for config in configs):
            first, other = (load_config(config, ["seed=0"]) for config in configs)
            if first != other:
                raise ConfigError(
                    f"{own[0]} and {folder} share a name and differ in more than the seed: give them labels, such as "
                    + shlex.join([f"first={own[0]}", f"second={folder}"])
                )
        own.append(folder)
    return runs


def _watch(arguments: argparse.Namespace) -> None:
    import shutil

    from minirl_edu.live import follow

    width = shutil.get_terminal_size().columns
    follow([Path(folder) for folder in arguments.runs], sys.stdout, every=arguments.every, width=width)


def _fields(arguments: argparse.Namespace) -> None:
    import shutil
    import textwrap

    from minirl_edu.config import describe

    width = min(100, shutil.get_terminal_size().columns)
    for field in describe(arguments.section or ""):
        if not field.default:  # a section
            print(f"\n{textwrap.fill(f'{field.name}: {field.meaning}', width, subsequent_indent='  ')}\n")
            continue
        print(f"  {field.name} = {field.default}")
        for text in (field.expected, field.meaning):
            print(textwrap.fill(text, width, initial_indent="      ", subsequent_indent="      "))
    if not arguments.section:
        print("\nOne section alone: minirl fields train. To set a field: --set train.lr=1e-4, or in a YAML file.")


def _export(arguments: argparse.Namespace) -> None:
    from minirl_edu.config import load_config
    from minirl_edu.models import load_model, load_tokenizer
    from minirl_edu.run.checkpoint import latest_checkpoint, load_checkpoint

    run, out = Path(arguments.run_folder), Path(arguments.out)
    checkpoint = latest_checkpoint(run / "checkpoints")
    if checkpoint is None or not (run / "config.yaml").exists():
        raise FileNotFoundError(f"{run}: no run with an intact checkpoint")
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"--out {out} is not empty; choose another folder")
    settings = load_config(run / "config.yaml").model
    _quiet()
    model = load_model(settings.name, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code)
    model.load_state_dict(load_checkpoint(checkpoint)[0]["model"])
    model.save_pretrained(out)
    load_tokenizer(settings.name, trust_remote_code=settings.trust_remote_code).save_pretrained(out)
    print(f"{out}: the model of {checkpoint}, for transformers, vLLM and model.name")


def _doctor() -> int:
    from minirl_edu.doctor import report

    with quitting_at_once(), suppress(ImportError, OSError):
        import torch  # noqa: F401  # here, because a report can be interrupted like any command, and an import cannot

    text, status = report()
    print(text)
    return status


def _gap(arguments: argparse.Namespace) -> None:
    import torch

    from minirl_edu import gap, plots
    from minirl_edu.config import ConfigError
    from minirl_edu.doctor import environment
    from minirl_edu.models import SMOLLM2

    alone = arguments.model is None and not (arguments.suite or arguments.accidents)
    single = ("dtype", "trainer_dtype", "precision", "task", "prompts", "group_size", "max_new_tokens", "temperature")
    given = [name for name in single if getattr(arguments, name) is not None] + ["option"] * bool(arguments.option)
    if given and (arguments.model is None or arguments.suite or arguments.accidents):
        raise ConfigError(
            f"--{given[0].replace('_', '-')} describes one engine: give --model as well (such as "
            f"{', '.join(gap.RANDOM)}, chain-steps), without --suite and --accidents, whose settings are fixed"
        )
    if arguments.seeds is not None and arguments.seeds < 1:
        raise ConfigError(f"--seeds = {arguments.seeds}: use 1 or more")
    _quiet()
    torch.set_num_threads(1)  # the models are small, and vLLM's own threads crawl on a busy machine
    missing = gap.vllm_missing()
    engine = arguments.engine or ("hf" if missing else "vllm")
    if missing and engine == "vllm":
        raise ConfigError(f"--engine vllm: {missing}")
    if missing and not arguments.accidents:
        print(f"vLLM is not used: {missing}\nThe rollouts are transformers', through other kernels than the trainer's.")
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.accidents:
            rows, figure, text = _gap_accidents(arguments.model or "tiny-moe")
        elif alone:
            rows = gap.mechanism(engine, arguments.seeds or 5)
            figure, text = plots.engine_gap(rows), gap.table(rows)
        elif arguments.suite:
            rows = []
            for name in [arguments.model] if arguments.model else ["tiny-moe", SMOLLM2]:
                rows += gap.suite(name, out, gap.usual_workload(name, arguments.seeds))
            figure, text = plots.engine_gap(rows), gap.table(rows)
        else:
            rows, figure, text = _gap_one(arguments, engine)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    gap.write_json(out / "gap.json", {"environment": environment(), "legend": gap.LEGEND, "rows": rows})
    for suffix in ("png", "svg"):
        figure.savefig(out / f"gap.{suffix}", dpi=200)
    print(f"\n{text}\n\n{gap.legend()}\n\n{out / 'gap.json'}, gap.png, gap.svg")


def _gap_one(arguments: argparse.Namespace, engine: str) -> tuple[list[dict[str, Any]], Any, str]:
    """One engine on one model: row, figure and text."""
    from tqdm import tqdm

    from minirl_edu import gap, plots
    from minirl_edu.rollout import Sampling

    options = {}
    for option in arguments.option:
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"--option {option}: expected KEY=VALUE, such as kv_cache_dtype=fp8")
        options[key] = value
    dtype = arguments.dtype or "float32"
    setting = gap.Setting(engine, dtype, arguments.precision or "fp32", arguments.trainer_dtype or "", options)
    usual = gap.usual_workload(arguments.model, arguments.seeds)
    workload = gap.Workload(
        gap.prompts_for(arguments.model, arguments.task, arguments.prompts or len(usual.prompts(0))),
        arguments.group_size or usual.group_size,
        Sampling(arguments.max_new_tokens or usual.sampling.max_new_tokens, arguments.temperature or 1.0),
        usual.seeds,
    )
    models = gap.models_for(arguments.model, workload.seeds)
    with tqdm(total=workload.seeds, desc=f"gap, {setting.label}", unit="rollout") as bar:
        row = gap.run_setting(setting, models, workload, tick=bar.update, examined=True)
    if row["skipped"]:
        raise ValueError(row["skipped"])
    rows = [{"model": arguments.model, **row}]
    return rows, plots.gap_profile(row), f"{gap.table(rows)}\n\n{gap.details(row)}\n\n{row['diagnosis']}"


def _gap_accidents(name: str) -> tuple[list[dict[str, Any]], Any, str]:
    """Every accident on one model: rows, figure and text."""
    from minirl_edu import gap, plots

    (model,) = gap.models_for(name, 1)
    if name in gap.RANDOM:
        gap.with_end_token(model)
    rows = gap.accidents(model, gap.prompts_for(name, None, 16)(0))
    texts = "\n\n".join(f"{row['text']}\n  " + row["diagnosis"].replace("\n", "\n  ") for row in rows)
    return rows, plots.gap_accidents(rows), f"{texts}\n\n{gap.accident_table(rows)}"


def _reproduce(arguments: argparse.Namespace) -> int:
    from minirl_edu.config import ConfigError
    from minirl_edu.experiments.reproduce import reproduce
    from minirl_edu.experiments.spec import load_spec

    if arguments.seeds is not None and arguments.seeds < 1:
        raise ConfigError(f"--seeds = {arguments.seeds}: use 1 or more")
    return reproduce(
        load_spec(arguments.spec),
        arguments.figures,
        arguments.out,
        tier=arguments.tier,
        seeds=arguments.seeds,
        workers=arguments.workers,
    )


def _plan(arguments: argparse.Namespace) -> int:
    import json

    from minirl_edu.config import load_config
    from minirl_edu.plan import HARDWARE, Cluster, draw_memory, parse_bytes, plan, remedies, table, this_machine

    _quiet()
    config = load_config(arguments.config, arguments.set)
    cluster = Cluster(
        HARDWARE[arguments.hardware] if arguments.hardware in HARDWARE else this_machine(config),
        arguments.gpus,
        arguments.gpu_memory and parse_bytes(arguments.gpu_memory),
        arguments.sharding,
        arguments.mixed_precision,
        arguments.placement,
        arguments.server_gpus,
    )
    lengths = {"prompt_tokens": arguments.prompt_tokens, "response_tokens": arguments.response_tokens}
    found = plan(config, cluster, **lengths, **({} if arguments.mfu is None else {"mfu": arguments.mfu}))
    suggested = remedies(config, cluster, **lengths)
    print(table(found, suggested))
    if arguments.json:
        data = {**found.to_dict(), "remedies": [remedy._asdict() for remedy in suggested]}
        Path(arguments.json).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    if arguments.out:
        draw_memory(found).savefig(arguments.out, dpi=200)
    return 0 if found.fits else 1


def _quiet() -> None:
    """Keep transformers' loading bars out of the way of the training bar."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _cold_start(arguments: argparse.Namespace) -> None:
    from minirl_edu.cold_start import cold_start, measure, new_model, save_cold_start
    from minirl_edu.tasks import make_task

    options = {} if arguments.task == "trail" else {"style": arguments.style, "operators": arguments.operators}
    task: Any = make_task(arguments.task, **options)
    model = new_model(task, arguments.architecture, seed=arguments.seed)
    started = time.perf_counter()
    training = ("error_rate", "steps", "batch_size", "lr", "seed")
    losses = cold_start(task, model, **{name: getattr(arguments, name) for name in training})
    settings = ("task", *options, "architecture", *training)
    flags = " ".join(f"--{name.replace('_', '-')} {shlex.quote(str(getattr(arguments, name)))}" for name in settings)
    record = {
        "command": f"minirl cold-start {flags} --out {Path(arguments.out).name}",
        **{name: getattr(arguments, name) for name in settings},
        "loss": sum(losses[-50:]) / len(losses[-50:]),
        "metrics": measure(task, model, problems=100 if arguments.task == "trail" else 1024, seed=arguments.seed),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - started),
    }
    out = save_cold_start(arguments.out, model, task, record)
    print(f"{out}: " + ", ".join(f"{name} {value:.3f}" for name, value in record["metrics"].items()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minirl", usage="minirl COMMAND …", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", prog="minirl", metavar="COMMAND", help=argparse.SUPPRESS)
    groups: dict[str, list[str]] = {}
    known = ", ".join(recipes())

    def add(group: str, name: str, run: Any, text: str, loads: str = "trainer") -> argparse.ArgumentParser:
        command = commands.add_parser(name, description=text)
        command.set_defaults(run=run, loads=loads)  # what it imports first
        groups.setdefault(group, []).append(f"  {name:<12}{text}")
        return command

    def add_config(command: argparse.ArgumentParser, which: str = "") -> None:
        if not which:
            text = f"YAML file, or a recipe: {known} (without one: the defaults)"
            chosen: Any = command.add_argument("--config", metavar="FILE|RECIPE", help=text)
            chosen.completer = _config_names
        text = f"override one field{which}, such as train.lr=1e-4; repeatable (`minirl fields` lists them)"
        field: Any = command.add_argument("--set", action="append", default=[], metavar="A.B=C", help=text)
        field.completer = _field_names

    start = "Start here"
    text = "Train the shipped tiny model with MiniRL and without its safeguards; write a report."
    command = add(start, "demo", _demo, text)
    command.add_argument(
        "--out",
        help="folder for both runs and the report (default: runs/demo; with --set, a folder of its own in it)",
    )
    add_config(command, " in both runs")

    command = add(start, "train", _train, "Train as a config says: minirl train --config demo --out runs/mine")
    add_config(command)
    command.add_argument("--out", required=True, help="folder of the run")
    command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")

    labels = "folders of runs, or LABEL=RUN; runs with the same label are seeds of one kind"
    text = "Write what happened in a run as one page: minirl report runs/mine"
    command = add(start, "report", _report, text, "report")
    command.add_argument("runs", nargs="+", metavar="RUN", help=labels)
    command.add_argument("--out", help="HTML file (default: report.html in the run's folder)")

    look = "Look closer"
    text = "Show a run's curves in the terminal while it goes on, from anywhere."
    command = add(look, "watch", _watch, text, "live")
    command.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    command.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two looks (default: 2)")
    text = "Write the report of several runs: minirl compare A=runs/a B=runs/b"
    command = add(look, "compare", _report, text, "report")
    command.add_argument("runs", nargs="+", metavar="RUN", help=labels)
    command.add_argument("--out", help="HTML file (default: compare.html in the folder that holds the runs)")
    text = "List every field of a config: its default, what it may be, what it means."
    command = add(look, "fields", _fields, text, "config")
    command.add_argument("section", nargs="?", metavar="SECTION", help="such as train, or train.lr (default: all)")

    command = add(
        "Models", "export", _export, "Write a run's newest checkpoint as a model that transformers and vLLM can load."
    )
    command.add_argument("run_folder", metavar="RUN", help="folder of the run")
    command.add_argument("--out", required=True, help="folder for the model and its tokenizer")

    text = "Measure how far a rollout engine is from the trainer, on the same weights and tokens."
    command = add("Engines and clusters", "gap", _gap, text)
    command.description = (
        text
        + " Without --model: the paper's mechanism, random Mixture-of-Experts models and their dense twins in fp32 "
        "and bf16, in about a minute. Writes gap.json and a figure to --out."
    )
    which = command.add_mutually_exclusive_group()
    which.add_argument("--suite", action="store_true", help="a list of engines, real and emulated; goes on if stopped")
    which.add_argument("--accidents", action="store_true", help="common mistakes beside healthy runs, and a diagnosis")
    command.add_argument(
        "--model", help="tiny-moe, tiny-dense, a shipped cold start, smollm2-135m-instruct, path, hub id"
    )
    command.add_argument("--engine", choices=("hf", "vllm"), help="default: vllm where it is installed")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the rollout engine (default: float32)")
    command.add_argument("--trainer-dtype", choices=("float32", "bfloat16"), help="default: as --dtype")
    command.add_argument(
        "--precision",
        help="emulated: weights and activations (hf) or experts (vllm), such as fp8_e4m3, int8, int3/int4",
    )
    command.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of vllm.LLM, such as kv_cache_dtype=fp8"
    )
    command.add_argument("--task", help="where the prompts come from: chain, reasoning_gym, …")
    command.add_argument("--prompts", type=int, help="how many")
    command.add_argument("--group-size", type=int, help="responses to each")
    command.add_argument("--max-new-tokens", type=int, help="longest response")
    command.add_argument("--temperature", type=float, help="of both engines (default: 1)")
    command.add_argument("--seeds", type=int, help="repetitions; another model each for the random ones")
    command.add_argument("--out", default="runs/gap", help="folder for gap.json, gap.png, gap.svg (default: runs/gap)")

    text = "Run the paper's figures over seeds and judge its claims; goes on where it was stopped."
    command = add("The paper", "reproduce", _reproduce, text)
    command.add_argument(
        "figures", nargs="+", metavar="FIGURE", help="fig1 … fig5, appendix, questions, atlas, …, or all"
    )
    command.add_argument(
        "--tier",
        default="fast",
        choices=("smoke", "fast", "full"),
        help="smoke: whether everything runs, its verdicts mean nothing; default: fast, within 10 minutes",
    )
    command.add_argument("--seeds", type=int, help="default: the tier's")
    command.add_argument("--out", default="runs/reproduce", help="folder for runs, figures and CLAIMS.md")
    command.add_argument("--workers", type=int, help="processes of one thread each (default: one per core)")
    command.add_argument("--spec", help="another spec file than the one that ships (experiments/paper.yaml)")

    text = "Predict memory and time of a run, and say whether it fits (exit status 0) or what to change (1)."
    command = add("Engines and clusters", "plan", _plan, text)
    add_config(command)
    command.add_argument("--hardware", choices=("h100", "h200", "a100", "cpu"), default="h100", help="default: h100")
    command.add_argument("--gpus", "--processes", type=int, default=1, help="the trainer's processes (default: 1)")
    command.add_argument("--gpu-memory", metavar="SIZE", help="such as 80GB or 80GiB (default: the hardware's)")
    command.add_argument("--sharding", choices=("fsdp2", "ddp", "none"), help="default: fsdp2 for several processes")
    command.add_argument("--mixed-precision", choices=("bf16", "no"), help="accelerate's (default: bf16, on CPUs no)")
    command.add_argument(
        "--placement", choices=("colocated", "separate"), help="of a vLLM server (default: by rollout.options.sleep)"
    )
    command.add_argument("--server-gpus", type=int, help="of a vLLM server (default: the trainer's, of one machine)")
    command.add_argument("--prompt-tokens", type=int, help="default: the longest of 256 prompts of the task")
    command.add_argument("--response-tokens", type=float, help="mean length, for times (default: the longest allowed)")
    command.add_argument(
        "--mfu", type=float, help="share of the peak that training reaches, for the expected time (0.1)"
    )
    command.add_argument("--json", metavar="FILE", help="write everything there, too")
    command.add_argument("--out", metavar="FIGURE", help="draw the memory into this file, such as memory.png")

    add("Engines and clusters", "doctor", _doctor, "Print versions, threads, what is installed and what is missing.")

    command = add("Models", "cold-start", _cold_start, "Fine-tune a fresh tiny model on a teacher's demonstrations.")
    command.add_argument("--out", required=True, help="folder for the model")
    command.add_argument("--task", default="chain", choices=("chain", "trail"))
    command.add_argument("--style", default="steps", choices=("steps", "operands", "copy"), help="of chain")
    command.add_argument("--operators", default="+", help="of chain: some of +-*")
    command.add_argument("--architecture", default="moe", choices=("moe", "experts", "dense"))
    command.add_argument("--error-rate", type=float, default=0.21, help="chance that the teacher errs at a step")
    command.add_argument("--steps", type=int, default=1500)
    command.add_argument("--batch-size", type=int, default=128, help="demonstrations of a step")
    command.add_argument("--lr", type=float, default=1e-3)
    command.add_argument("--seed", type=int, default=0)
    parser.description = "\n".join(
        [
            f"minirl {__version__}: stable reinforcement learning for language models, from a laptop CPU up.",
            *(f"\n{group}\n" + "\n".join(lines) for group, lines in groups.items()),
            f"\nRecipes for --config: {known}.",
            "The arguments of a command: minirl COMMAND --help.",
        ]
    )
    return parser


def _config_names(prefix: str, **_: Any) -> list[str]:
    """What `--config` may be, for the shell: recipes and files."""
    return [*recipes(), *(f"{path}{os.sep * path.is_dir()}" for path in sorted(Path().glob(f"{prefix}*")))]


def _field_names(**_: Any) -> list[str]:
    """What `--set` may begin with, for the shell."""
    from minirl_edu.config import describe

    return [f"{field.name}=" for field in describe() if field.default]


if __name__ == "__main__":
    sys.exit(main())
