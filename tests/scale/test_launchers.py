"""Recipes, accelerate configs, Slurm scripts and `scale/train.py`: what is in the folders is what is tested."""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import AutoModelForCausalLM

from minirl_edu import cli
from minirl_edu.config import Config, ModelConfig, RolloutConfig, load_config
from minirl_edu.models import load_architecture, random_model
from minirl_edu.records import read_records
from scale import serve, train
from tests.scale.launch import ROOT, TRAIN, Launched, launch

RECIPES = sorted((ROOT / "scale/recipes").glob("*.yaml"))
ACCELERATE = sorted((ROOT / "scale/accelerate").glob("*.yaml"))
SCRIPTS = sorted((ROOT / "scale/slurm").glob("*.sbatch"))
QWEN = ROOT / "scale/recipes/qwen3_30b_a3b_64gpu.yaml"

each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def words(command: str) -> tuple[dict[str, str], list[str]]:
    """The variables in front of a command, and its words."""
    parts = shlex.split(command)
    count = next(i for i, part in enumerate(parts) if "=" not in part)
    return dict(part.split("=", 1) for part in parts[:count]), parts[count:]


def commands(recipe: Path, program: str) -> list[list[str]]:
    """The arguments of `program` in each command of a recipe's head that runs it."""
    found = [words(command)[1] for command in train.commands(recipe)]
    return [line[line.index(program) + 1 :] for line in found if program in line]


def launch_arguments(line: list[str]) -> argparse.Namespace:
    """What `accelerate launch` makes of its command line and its config file."""
    return _validate_launch_command(launch_command_parser().parse_args(line))[0]


# ------------------------------------------------------------------------------------------------------------ recipes


@each_recipe
def test_a_recipe_says_how_to_run_it_on_what_and_where_its_settings_come_from(recipe):
    load_config(recipe)
    head = recipe.read_text().partition("\nseed:")[0]
    assert all(line.startswith("# ") for line in head.splitlines())
    assert "\n# Hardware: " in head and "\n# Sources: " in head
    assert commands(recipe, "scale/train.py")


@each_recipe
def test_the_commands_of_a_recipe_are_valid(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(recipe)
    for command in train.commands(recipe):
        variables, line = words(command)
        if line[:2] == ["accelerate", "launch"]:
            arguments = launch_arguments(line[2:])
            assert arguments.training_script == "scale/train.py" and arguments.num_processes >= 1
            ours = train._parse(arguments.training_script_args)
            load_config(ours.config, ours.set)
            assert Path(ours.config).resolve() == recipe
        elif line[:2] == ["python", "scale/serve.py"]:
            assert serve.parse(line[2:])[0].model == config.model.name
        elif line[:2] == ["minirl", "plan"]:
            assert ROOT / cli._parser().parse_args(line[1:]).config == recipe
        else:
            assert line[0] == "sbatch" and (ROOT / line[-1]).resolve() in SCRIPTS
            assert ROOT / variables["RECIPE"] == recipe
            serve.parse(["--model", config.model.name, *variables["SERVE"].split()])


@each_recipe
def test_a_recipe_with_a_server_says_how_to_start_it(recipe):
    config, servers = load_config(recipe), commands(recipe, "scale/serve.py")
    assert bool(servers) == (config.rollout.engine == "vllm_server")
    for line in servers:
        ours, theirs = serve.parse(line)
        assert ours.routes == config.engine_routes  # every server here has a Mixture-of-Experts model
        assert config.rollout.max_new_tokens and ours.max_model_len > config.rollout.max_new_tokens
        # Colocated or not is said twice, and has to be said alike.
        assert ("--enable-sleep-mode" in theirs) == config.rollout.options.get("sleep", False)


@pytest.mark.slow  # vLLM takes seconds to import
def test_vllm_knows_the_options_of_the_servers():
    pytest.importorskip("vllm")
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    on_gpu, on_cpu = FlexibleArgumentParser(), make_arg_parser(FlexibleArgumentParser())
    ServeSubcommand().subparser_init(on_gpu.add_subparsers())
    lines = [line for recipe in RECIPES for line in commands(recipe, "scale/serve.py")]
    assert lines
    for line in lines:
        ours, rest = serve.parse([*line, "--api-server-count", "4"])
        command = serve.command("a/model", ours, rest, cpu=False)
        parsed: Any = on_gpu.parse_args(command[command.index("serve") :])
        assert (parsed.model_tag, parsed.api_server_count) == ("a/model", 4)
        with pytest.raises(ValueError, match="--api-server-count: needs `vllm serve`"):
            serve.command("a/model", ours, rest, cpu=True)
        command = serve.command("a/model", *serve.parse(line), cpu=True)
        parsed = on_cpu.parse_args(command[command.index("--model") :])
        assert parsed.model == "a/model"


@pytest.mark.slow
def test_fp8_rounds_in_blocks_and_leaves_routers_alone():
    """What vLLM makes of `serve.py --fp8`, layer by layer. Its kernels need a GPU, or a CPU with AMX."""
    pytest.importorskip("vllm")
    from vllm.config.quantization import resolve_quantization_config
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
    from vllm.model_executor.layers.linear import QKVParallelLinear
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = serve.command("m", *serve.parse(["--model", "m", "--fp8"]), cpu=True)
    parsed: Any = make_arg_parser(FlexibleArgumentParser()).parse_args(command[command.index("--model") :])

    def blocks(quantization: str, options: Any) -> dict[str, tuple[int, ...] | None]:
        """The rows and columns that share a scale, None where nothing is rounded."""
        args = resolve_quantization_config(quantization, options)
        assert args is not None
        config, shapes = OnlineQuantizationConfig(args), {}
        config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
        layers = {"self_attn.qkv_proj": QKVParallelLinear, "mlp.experts": RoutedExperts, "mlp.gate": GateLinear}
        for name, kind in {**layers, "mlp.router": GateLinear, "block_sparse_moe.gate": GateLinear}.items():
            found: Any = config.resolve_quant_method_cls(kind, f"model.layers.0.{name}")
            shapes[name] = None if found is None else tuple(found[3].weight.scale.group_shape)
        return shapes

    routers = dict.fromkeys(("mlp.gate", "mlp.router", "block_sparse_moe.gate"))
    expected = {"self_attn.qkv_proj": (128, 128), "mlp.experts": (128, 128), **routers}
    assert blocks(parsed.quantization, parsed.quantization_config) == expected
    plain = blocks("fp8_per_tensor", None)  # what vLLM takes `--quantization fp8` for
    assert set(plain.values()) == {(-1, -1)}


@pytest.mark.parametrize("cpu", [True, False])
def test_the_server_is_started_by_a_module_that_vllm_does_not_call_deprecated(cpu):
    if (vllm := find_spec("vllm")) is None or vllm.origin is None:  # found without an import, which takes seconds
        pytest.skip("vLLM is not installed")
    program = serve.command("m", *serve.parse(["--model", "m"]), cpu=cpu)
    path = Path(vllm.origin).parents[1] / f"{program[program.index('-m') + 1].replace('.', '/')}.py"
    source = path.read_text()
    assert 'if __name__ == "__main__":' in source and "deprecated" not in source


def test_the_large_recipe_has_the_papers_setting():
    config = load_config(QWEN)
    assert (config.train.mini_batch_prompts, config.train.group_size, config.train.mini_batches) == (64, 16, 1)
    assert (config.rollout.max_new_tokens, config.rollout.temperature) == (32768, 1.0)
    algorithm = config.algorithm
    assert (algorithm.eps_low, algorithm.eps_high, algorithm.is_cap) == (0.2, 0.27, 5.0)
    assert (algorithm.objective, algorithm.clip, algorithm.is_correction) == ("minirl", True, True)
    assert not algorithm.length_norm and algorithm.replay == "none"  # on-policy, replay brings nothing
    (line,) = commands(QWEN, "scale/serve.py")
    assert serve.parse(line)[0].fp8


# --------------------------------------------------------------------------------------------------------- accelerate


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_an_accelerate_config_is_one_and_has_no_key_that_does_nothing(path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know, but looks into no section
    assert isinstance(config, ClusterConfig) and config.fsdp_config is not None
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(config.fsdp_config) <= set(known)


@pytest.mark.parametrize("path", [p for p in ACCELERATE if "FSDP" in p.read_text()], ids=lambda path: path.stem)
def test_sharded_means_fsdp2_by_layers_without_a_second_checkpointing(path):
    command = ["--config_file", str(path), "--num_machines", "1", "--num_processes", "2", "script.py"]
    variables = prepare_multi_gpu_env(launch_arguments(command))
    expected = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
        "FSDP_OFFLOAD_PARAMS": "false",
        "ACCELERATE_MIXED_PRECISION": "no" if path.stem.startswith("cpu") else "bf16",
    }
    assert {name: variables[name] for name in expected} == expected


@pytest.mark.parametrize("name", ["cpu_ddp", "cpu_fsdp2"])
def test_two_runs_on_cpus_do_not_meet_at_one_port(name):
    launches = [launch_arguments(["--config_file", f"{train.ACCELERATE / name}.yaml", "script.py"]) for _ in range(3)]
    for arguments in launches:
        prepare_multi_gpu_env(arguments)
    assert len({arguments.master_port for arguments in launches}) > 1


# ----------------------------------------------------------------------------------------------------------- in small


@pytest.mark.parametrize(
    "recipe",
    # The sizes of a GGUF file are read with all of its weights, several times.
    [pytest.param(r, id=r.stem, marks=[pytest.mark.slow] if "smollm2" in r.stem else []) for r in RECIPES],
)
def test_a_dry_run_is_the_recipe_but_small(recipe):
    config = load_config(recipe)
    small = train.shrink(config)
    assert small.algorithm == config.algorithm and small.seed == config.seed
    kept = ("dtype", "gradient_checkpointing", "experts_implementation", "name", "trust_remote_code")
    assert [getattr(small.model, name) for name in kept] == [getattr(config.model, name) for name in kept]
    sizes = ("global_steps", "mini_batch_prompts", "group_size", "tokens_per_micro_batch")
    assert replace(small.train, **{name: getattr(config.train, name) for name in sizes}) == config.train
    assert small.train.global_steps == 2 and small.rollout.on_fault == config.rollout.on_fault
    assert Config.from_dict(small.to_dict()) == small

    model = random_model(
        small.model.name, small.model.overrides, seed=0, attn_implementation=small.model.attn_implementation
    )
    full = load_architecture(config.model.name, config.model.overrides)
    assert type(model) is AutoModelForCausalLM._model_mapping[type(full)]
    assert model.num_parameters() < 200_000 and model.config.vocab_size == 18
    if top_k := getattr(full, "num_experts_per_tok", None):
        assert model.config.num_experts_per_tok == min(2, top_k) < model.config.num_local_experts
    if getattr(full, "layer_types", None):
        assert set(model.config.layer_types) == set(full.layer_types)


@pytest.mark.parametrize(
    ("rollout", "precision"),
    [
        (RolloutConfig(precision="int3/int4"), "int3/int4"),
        (RolloutConfig(engine="vllm", precision="bf16"), "bf16"),
        (RolloutConfig(engine="vllm", precision="fp16"), "bf16"),
        (RolloutConfig(engine="vllm", precision="bf16", options={"kv_cache_dtype": "fp8"}), "fp8_e4m3"),
        (RolloutConfig(engine="vllm_server", precision="bf16"), "fp8_e4m3"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.engine,
)
def test_a_dry_run_emulates_the_engines_precision(rollout, precision):
    small = train.shrink(Config(rollout=rollout)).rollout
    assert (small.engine, small.precision, small.options) == ("hf", precision, {})


def test_a_dry_run_keeps_what_the_recipe_says_about_the_architecture():
    model = ModelConfig("Qwen3-30B-A3B", random=True, overrides={"norm_topk_prob": False}, expert_parallel=8)
    small = train.shrink(Config(model=model)).model
    assert small.overrides["norm_topk_prob"] is False and small.overrides["hidden_size"] == 64
    assert small.expert_parallel == 2


def test_commands_of_a_recipe_are_its_indented_lines(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# Text.\n#   one --a \\\n#       --b\n# More.\n#   two\nseed: 0  # x\n#   not this\n")
    assert train.commands(recipe) == ["one --a --b", "two"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "no.yaml"], "no.yaml"),
        (["--config", "tiny"], "tiny_cpu"),
        (["--set", "model.nmae=x"], "did you mean model.name"),
        (["--set", "model.name=no/model"], "no/model"),
    ],
)
def test_a_mistake_is_told_in_one_line(capfd, arguments, message):
    assert train.main(["--dry-run", *arguments]) == 2
    said = capfd.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_only_a_dry_run_may_choose_its_folder(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        train.main([])
    monkeypatch.setenv("RANK", "0")  # the processes of `accelerate launch` have to agree on one
    with pytest.raises(SystemExit):
        train.main(["--dry-run"])
    assert capsys.readouterr().err.count("--out is needed") == 2


DRY_RUNS = {recipe.stem: (recipe, []) for recipe in RECIPES} | {
    "N=8, R3, experts over two": (
        QWEN,
        ["model.expert_parallel=2", "train.mini_batches=8", "algorithm.replay=R3"],
    ),
}


# In two ranks. The other recipes have the layers and the sharding of one of these, and run at night.
EVERY_DAY = {"gpt_oss_20b", "qwen3_0p6b_1gpu", "smollm2_cpu", "tiny_cpu", "N=8, R3, experts over two"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "launched"),
    [
        ("tiny_cpu", True),
        *((name, False) for name in DRY_RUNS if name in EVERY_DAY - {"tiny_cpu"}),
        *(pytest.param(name, True, marks=pytest.mark.nightly) for name in DRY_RUNS if name != "tiny_cpu"),
    ],
)
def test_a_recipe_runs_in_small_on_two_processes(tmp_path, capfd, name, launched):
    """Under `accelerate launch`, which scale/train.py starts, or in two ranks as that would start them."""
    recipe, overrides = DRY_RUNS[name]
    config, out = load_config(recipe, overrides), tmp_path / "run"
    options = ["--dry-run", "--config", recipe.stem, "--out", str(out)]  # found by its name
    options += [part for setting in overrides for part in ("--set", setting)]
    if launched:
        assert train.main(options) == 0
        said = capfd.readouterr().out.splitlines()
    else:
        done = launch("ddp" if config.model.expert_parallel > 1 else "fsdp2", TRAIN, *options)
        assert done.returncode == 0, done.output
        said = done.output.splitlines()
    assert load_config(out / "config.yaml") == train.shrink(config)
    records = [record for record in read_records(out / "metrics.jsonl") if "grad_norm" in record]
    assert len(records) == 2 * config.train.mini_batches
    assert all(record["grad_norm"] > 0 for record in records)  # some group had good and bad responses
    how = "expert parallelism over 2" if config.model.expert_parallel > 1 else "FSDP2"
    (last,) = [line for line in said if line.startswith("dry run")]
    assert f"on 2 processes ({how})" in last
    assert f"grad_norm {records[-1]['grad_norm']:.3g}" in last and last.endswith(
        next(line for line in train.commands(recipe) if "scale/train.py" in line)
    )


@pytest.mark.slow
def test_a_run_of_two_processes_stops_when_asked_and_reports_once(tmp_path):
    """What the Slurm scripts rely on: SIGTERM to the launcher ends the run after a global step, which is saved."""
    out = tmp_path / "run"
    small = ("global_steps=1000", "mini_batch_prompts=4", "group_size=4", "mini_batches=1")
    settings = [*(f"train.{setting}" for setting in small), "eval.every=0", "output.save_every=0"]
    options = [part for setting in settings for part in ("--set", setting)]
    with Launched(
        "ddp", TRAIN, "--config", ROOT / "scale/recipes" / "tiny_cpu.yaml", "--out", out, *options
    ) as launcher:
        try:
            wait_for(out / "metrics.jsonl", 120)
            launcher.send_signal(signal.SIGTERM)
            said = launcher.communicate(timeout=120)[0]
        finally:
            launcher.kill()
    assert said.count("report: ") == 1 and said.count("stopped after global step") == 1, said
    (checkpoint,) = (out / "checkpoints").iterdir()
    steps = read_records(out / "metrics.jsonl")[-1]["global_step"]
    assert 0 < steps < 1000 and checkpoint.name == f"step-{steps:06d}"


def wait_for(path: Path, seconds: float, lines: int = 1) -> None:
    """Until the file is there and has so many lines."""
    deadline = time.monotonic() + seconds
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert time.monotonic() < deadline, f"no {path.name} within {seconds} s"
        time.sleep(0.05)


# -------------------------------------------------------------------------------------------------------------- Slurm

# Each writes down what it was called with; then they do as little of their work as the scripts need.
STUBS = {
    # What a script asks about a recipe takes the import of torch, and most jobs ask the same: an answer is kept.
    "python": """if [[ $1 == scale/serve.py ]]; then record serve; exec tail -f /dev/null; fi
        kept=$ANSWERS/$(printf '%s\\n' "$@" | sha256sum | cut -c1-32)
        [[ -f $kept ]] || { "$PYTHON" "$@" >"$kept.part" && mv "$kept.part" "$kept"; } || exit
        cat "$kept" """,
    "curl": """record curl; grep -q '"name": "serve"' "$CALLS" """,  # healthy once it was started
    "sleep": "exec /bin/sleep 0.1",
    "accelerate": """record accelerate
        [[ -n ${HANGS:-} ]] || exit "${STATUS:-0}"
        trap 'record stopped; exit 1' TERM  # as torch's launcher: it ends with a SignalException
        echo >>"$HANGS"
        while :; do sleep 0.1; done""",
    "scontrol": 'record scontrol; if [[ $1 == show ]]; then printf "node%s\\n" 1 2 3; fi',
    # SIGTERM is SIGKILL for its tasks, as in _srun_signal_mgr of Slurm's src/srun/libsrun/srun_job.c.
    "srun": """record srun
        while [[ $1 == -* ]]; do
            case $1 in --ntasks=*) tasks=${1#*=} ;; --job-name=*) name=${1#*=} ;; esac
            shift
        done
        step=0 status=0 pids=()
        until mkdir "$STEPS/$step" 2>/dev/null; do ((step += 1)); done
        trap 'kill -KILL "${pids[@]}"' TERM
        for ((i = 0; i < tasks; i++)); do SLURM_NODEID=$i "$@" & pids+=($!); done
        echo "${name:-bash}" >"$STEPS/$step/name"
        echo "${pids[@]}" >"$STEPS/$step/pids"
        for pid in "${pids[@]}"; do
            wait $pid || status=$?
            while kill -0 $pid 2>/dev/null; do wait $pid; done
        done
        rm "$STEPS/$step/pids"
        exit $status""",
    "squeue": """record squeue
        [[ "$*" == "--noheader --steps --jobs=7 --format=%i %j" ]] || exit 2
        for step in "$STEPS"/*; do [[ ! -f $step/pids ]] || echo "7.${step##*/} $(<"$step/name")"; done""",
    # The tasks themselves get the signal, and not what they have started: proctrack_p_signal of proctrack/cgroup.
    "scancel": """record scancel
        [[ $1 == --signal=TERM && $2 == 7.* ]] || exit 2
        kill -TERM $(<"$STEPS/${2#7.}/pids")""",
}
RECORD = """#!/bin/bash
words=("$@")
record() { "$PYTHON" -c 'import json, os, sys; line = json.dumps(dict(name=sys.argv[1], words=sys.argv[2:],
    gpus=os.environ.get("CUDA_VISIBLE_DEVICES"), key=os.environ.get("MINIRL_VLLM_API_KEY")))
os.write(1, (line + "\\n").encode())' "$1" "${words[@]}" >>"$CALLS"; }  # at once: several processes append
"""


class Job:
    """A Slurm script in a folder of stubs: the calls that it makes, in order."""

    def __init__(self, folder: Path, script: str, **variables: str) -> None:
        self.calls_file, self.log = folder / "calls", folder / "log"
        stubs = folder / "stubs"
        stubs.mkdir()
        (folder / "steps").mkdir()
        for name, body in STUBS.items():
            (stubs / name).write_text(RECORD + body + "\n")
            (stubs / name).chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MINIRL")}
        environment |= {
            "PATH": f"{stubs}:{environment['PATH']}",
            "PYTHON": sys.executable,
            "CALLS": str(self.calls_file),
            "STEPS": str(folder / "steps"),
        }
        environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-3]", "SLURM_SUBMIT_DIR": str(ROOT)}
        environment |= {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4", "OUT": str(folder / "run")}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["bash", str(ROOT / "scale/slurm" / script)],
                env=environment | variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self) -> int:
        """The script's exit status."""
        return self.process.wait(60)

    def calls(self, name: str) -> list[dict]:
        """What a stub was called with."""
        calls = [json.loads(line) for line in self.calls_file.read_text().splitlines()]
        return [call for call in calls if call["name"] == name]

    def trainers(self) -> list[argparse.Namespace]:
        """Each `accelerate launch`, with `.run`: what scale/train.py makes of its part."""
        found = []
        for call in self.calls("accelerate"):
            arguments = launch_arguments(call["words"][1:])
            arguments.run = train._parse(arguments.training_script_args)
            found.append(arguments)
        return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Path:
    """What programs answered to scripts, for all jobs."""
    return tmp_path_factory.mktemp("answers")


@pytest.fixture
def job(tmp_path, answers, monkeypatch):
    """Starts jobs, and leaves none of their processes behind."""
    monkeypatch.chdir(ROOT)
    jobs = []

    def start(script: str, **variables: str) -> Job:
        folder = tmp_path / str(len(jobs))
        folder.mkdir()
        jobs.append(Job(folder, script, ANSWERS=str(answers), **variables))
        return jobs[-1]

    yield start
    for started in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.process.pid, signal.SIGKILL)


def test_the_scripts_are_bash():
    assert SCRIPTS
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", script], check=True)


def test_one_machine_shares_its_gpus(job):
    ran = job("one_node.sbatch", RECIPE=str(QWEN), SERVE="--routes --fp8", SET="train.lr=2e-6 seed=3")
    assert ran.finish() == 0, ran.log.read_text()
    (served,), (trainer,) = ran.calls("serve"), ran.trainers()
    ours, theirs = serve.parse(served["words"][1:])
    assert (ours.model, ours.host, ours.port, ours.routes) == ("Qwen/Qwen3-30B-A3B", "127.0.0.1", 8000, True)
    assert ours.fp8 and theirs == ["--tensor-parallel-size", "4", "--enable-sleep-mode"]
    assert served["gpus"] == ran.calls("accelerate")[0]["gpus"] == "0,1,2,3"
    assert (trainer.num_processes, trainer.use_fsdp, trainer.training_script) == (4, True, "scale/train.py")
    config = load_config(trainer.run.config, trainer.run.set)
    assert (config.train.lr, config.seed) == (2e-6, 3)
    assert config.rollout.options["sleep"] is True and config.rollout.options["url"] == "http://127.0.0.1:8000"
    assert not trainer.run.resume and not ran.calls("scontrol")


def test_one_machine_divides_its_gpus_and_goes_on_with_a_run(job, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    ran = job("one_node.sbatch", RECIPE=str(QWEN), PLACEMENT="separate", SERVER_GPUS="1", OUT=str(run), PORT="8123")
    assert ran.finish() == 0, ran.log.read_text()
    (served,), (trainer,) = ran.calls("serve"), ran.trainers()
    assert (served["gpus"], ran.calls("accelerate")[0]["gpus"]) == ("0", "1,2,3")
    assert serve.parse(served["words"][1:])[1] == ["--tensor-parallel-size", "1"]
    assert trainer.num_processes == 3 and trainer.run.resume and trainer.run.out == str(run)
    options = load_config(trainer.run.config, trainer.run.set).rollout.options
    assert options["sleep"] is False and options["url"] == "http://127.0.0.1:8123"


def test_one_machine_starts_no_server_that_nobody_asks(job):
    ran = job("one_node.sbatch", RECIPE="scale/recipes/tiny_cpu.yaml", ACCELERATE="scale/accelerate/cpu_ddp.yaml")
    assert ran.finish() == 0, ran.log.read_text()
    assert not ran.calls("serve") and not ran.calls("curl") and len(ran.trainers()) == 1


@pytest.mark.parametrize("script", [script.name for script in SCRIPTS])
def test_the_key_is_the_same_on_both_sides_and_on_no_command_line(job, script):
    ran = job(script, RECIPE=str(QWEN))
    assert ran.finish() == 0
    keys = {call["key"] for name in ("serve", "accelerate") for call in ran.calls(name)}
    (key,) = keys
    assert len(key) >= 40
    lines = [call["words"] for name in ("serve", "accelerate", "srun", "curl", "scontrol") for call in ran.calls(name)]
    assert key not in str(lines) + ran.log.read_text()
    other = job(script, RECIPE=str(QWEN), MINIRL_VLLM_API_KEY="a-key-of-the-users")
    assert other.finish() == 0 and {call["key"] for call in other.calls("accelerate")} == {"a-key-of-the-users"}


@pytest.mark.parametrize(("script", "launchers"), [("one_node.sbatch", 1), ("several_nodes.sbatch", 2)])
def test_a_job_whose_time_is_up_stops_the_trainer_and_queues_again(job, tmp_path, script, launchers):
    started = tmp_path / "started"
    ran = job(script, RECIPE=str(QWEN), HANGS=str(started))
    wait_for(started, 30, lines=launchers)
    ran.process.send_signal(signal.SIGTERM)  # as Slurm does it with --signal=B:TERM: the script alone
    assert ran.finish() == 0, ran.log.read_text()
    assert len(ran.calls("stopped")) == len(ran.calls("accelerate")) == launchers
    assert [call["words"] for call in ran.calls("scontrol") if call["words"][0] != "show"] == [["requeue", "7"]]
    if script == "several_nodes.sbatch":  # the server, step 0, goes on meanwhile
        assert [call["words"] for call in ran.calls("scancel")] == [["--signal=TERM", "7.1"]]


@pytest.mark.parametrize("script", [script.name for script in SCRIPTS])
def test_a_job_that_fails_does_not_queue_again(job, script):
    ran = job(script, RECIPE=str(QWEN), STATUS="3")
    assert ran.finish() == 3, ran.log.read_text()
    assert not [call for call in ran.calls("scontrol") if call["words"][0] != "show"]


@pytest.mark.parametrize(
    ("placement", "machines", "host"), [("separate", ["node2", "node3"], "node1"), ("colocated", None, "127.0.0.1")]
)
def test_several_machines(job, placement, machines, host):
    machines = machines or ["node1", "node2", "node3"]
    ran = job("several_nodes.sbatch", RECIPE=str(QWEN), PLACEMENT=placement)
    assert ran.finish() == 0, ran.log.read_text()
    (served,), trainers = ran.calls("serve"), ran.trainers()
    ours, theirs = serve.parse(served["words"][1:])
    assert ours.host == host and ("--enable-sleep-mode" in theirs) == (placement == "colocated")
    assert sorted(trainer.machine_rank for trainer in trainers) == list(range(len(machines)))
    for trainer in trainers:
        assert (trainer.num_machines, trainer.num_processes) == (len(machines), 4 * len(machines))
        assert (trainer.main_process_ip, trainer.main_process_port) == (machines[0], 29500)
        options = load_config(trainer.run.config, trainer.run.set).rollout.options
        assert options["url"] == [f"http://{host}:8000"] and options["sleep"] == (placement == "colocated")
    assert f"http://{host}:8000/health" in ran.calls("curl")[0]["words"]
    of_server, of_trainer = (call["words"] for call in ran.calls("srun"))
    assert "--nodelist=node1" in of_server and f"--nodelist={','.join(machines)}" in of_trainer


@pytest.mark.parametrize(
    ("placement", "hosts", "machines"),
    [("separate", ["node1", "node2"], ["node3"]), ("colocated", ["127.0.0.1", "node2"], ["node1", "node2", "node3"])],
)
def test_several_servers_each_on_a_machine(job, placement, hosts, machines):
    ran = job("several_nodes.sbatch", RECIPE=str(QWEN), PLACEMENT=placement, SERVERS="2", SERVE="--routes")
    assert ran.finish() == 0, ran.log.read_text()
    assert sorted(serve.parse(call["words"][1:])[0].host for call in ran.calls("serve")) == hosts
    urls = [f"http://{host}:8000" for host in hosts]
    assert {call["words"][-1] for call in ran.calls("curl")} == {f"{url}/health" for url in urls}
    assert len(ran.trainers()) == len(machines)
    for trainer in ran.trainers():
        assert load_config(trainer.run.config, trainer.run.set).rollout.options["url"] == urls
        assert (trainer.num_machines, trainer.main_process_ip) == (len(machines), machines[0])
    places = [word for call in ran.calls("srun") for word in call["words"] if word.startswith("--nodelist")]
    assert sorted(places) == sorted(f"--nodelist={names}" for names in ("node1", "node2", ",".join(machines)))


def test_more_servers_than_machines_are_refused(job):
    ran = job("several_nodes.sbatch", RECIPE=str(QWEN), SERVERS="3")
    assert ran.finish() == 2
    assert "SERVERS=3: the job has 3 machines, too few to serve and to train" in ran.log.read_text()
