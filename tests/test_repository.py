"""The house rules that a machine can check: floors, docstrings, no code from data, one list of dependencies."""

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jaxtyping
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import minirl_edu
from minirl_edu.config import Config
from minirl_edu.diagnostics import kl_k1

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "minirl_edu"
SOURCES = sorted(LIBRARY.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

FLOORS = {
    0: "advantages archives balance diagnostics doctor exact objectives packing precision recipes records routing "
    "seeding streaming",
    1: "config drift models plugins tasks",
    2: "rollout",
    3: "lm_head",
    4: "logprobs",
    5: "batches cold_start gap plan",
    6: "ranks run",
    7: "trainer",
    8: "experiments live plots report worlds",
    9: "cli",
    10: "course",
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules.split()}
SIBLINGS = {
    **{"run": {"ranks"}, "report": {"plots"}, "live": {"plots"}, "worlds": {"plots"}},
    "experiments": {"plots", "report"},
}
FOLDERS = {".binder", ".ci", "benchmarks", "lessons", "minirl_edu", "notebooks", "scale", "tests"}


def module_of(path: Path) -> str:
    """The part of the house that a file belongs to: `tasks/chain.py` is `tasks`."""
    return path.relative_to(LIBRARY).with_suffix("").parts[0]


def imports_of(source: str) -> set[str]:
    """What a source imports from this library, wherever in the file: parts of the house, or `.name` of the root."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in line {node.lineno}: write minirl_edu.…"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("minirl_edu.")}
    return found - {"__version__"}


def upward_imports(module: str, source: str) -> set[str]:
    """What `module` imports although it is neither on a floor below nor a listed sibling."""
    allowed = {other for other in FLOOR if FLOOR[other] < FLOOR[module]} | SIBLINGS.get(module, set()) | {module}
    return imports_of(source) - allowed


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_a_module_imports_only_from_the_floors_below(path):
    module = module_of(path)
    if module == "__init__":
        return  # names every floor, imports none: tests/test_library.py
    assert module in FLOOR, f"{module} is on no floor: say in FLOORS where it lives"
    assert upward_imports(module, path.read_text()) == set()


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("objectives", "from minirl_edu.trainer import MiniRLTrainer", {"trainer"}),
        ("objectives", "def f():\n  import minirl_edu.advantages", {"advantages"}),
        ("tasks", "from minirl_edu import models, seeding, __version__", {"models"}),
        ("tasks", "from minirl_edu.tasks.base import Task", set()),
        ("rollout", "from minirl_edu import Rollout", {"Rollout"}),
        ("trainer", "from minirl_edu.run.checkpoint import save_checkpoint", set()),
        ("run", "from minirl_edu.trainer import MiniRLTrainer", {"trainer"}),
        ("cli", "from minirl_edu.trainer import MiniRLTrainer\nimport torch", set()),
        ("cli", "from minirl_edu.course import check", {"course"}),
    ],
)
def test_the_floors_are_really_checked(module, source, found):
    assert upward_imports(module, source) == found


def test_the_course_is_imported_by_its_notebooks_alone():
    course = {"minirl_edu/course", "notebooks", "tests/course", "tests/notebooks"}
    users = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if "course" in imports_of(path.read_text(encoding="utf-8"))
    }
    assert users and not {user for user in users if not user.startswith(tuple(f"{folder}/" for folder in course))}


def undocumented(source: str) -> list[str]:
    """Public names without a docstring: the module, its functions and classes, and their methods."""
    found = []

    def visit(node: ast.Module | ast.ClassDef, prefix: str) -> None:
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name[0] != "_":
                if ast.get_docstring(child) is None:
                    found.append(prefix + child.name)
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{prefix}{child.name}.")

    tree = ast.parse(source)
    if ast.get_docstring(tree) is None:
        found.append("module")
    visit(tree, "")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_every_public_name_has_a_docstring(path):
    assert undocumented(path.read_text()) == []


def test_docstrings_are_really_looked_for():
    public = 'class A:\n  """A."""\n  def f(self): ...\n  def _g(self): ...\ndef h(): ...\n'
    assert undocumented(public + "class _B:\n  def i(self): ...") == ["module", "A.f", "h"]


FORBIDDEN_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
FORBIDDEN_NAMES = {"eval", "exec", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    *("torch.load", "torch.save", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"),
    *("os.system", "os.popen"),
}
FORBIDDEN_KEYWORDS = {"allow_pickle": True, "shell": True, "trust_remote_code": True, "weights_only": False}


def runs_data_as_code(source: str) -> list[str]:
    """Uses of what can run code hidden in a file or a setting."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [n for n in names if n in FORBIDDEN_ATTRIBUTES or n.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in FORBIDDEN_ATTRIBUTES:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_NAMES:
                found.append(node.func.id)
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg in FORBIDDEN_KEYWORDS and value is FORBIDDEN_KEYWORDS[keyword.arg]:
                    found.append(f"{keyword.arg}={value}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_the_library_never_runs_data_as_code(path):
    assert runs_data_as_code(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "from torch import load",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "eval('1')",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_code_from_data_is_really_looked_for(source):
    assert len(runs_data_as_code(source)) == 1
    assert runs_data_as_code("model.eval(); yaml.safe_load(t); f(trust_remote_code=config.trust_remote_code)") == []


def test_remote_code_is_off_by_default():
    assert Config().model.trust_remote_code is False


CONTRACTS = {  # what notebooks, lessons and launchers rely on
    "advantages": "ADVANTAGES group_mean_advantages group_mean_std_advantages leave_one_out_advantages",
    "run.checkpoint": "save_checkpoint load_checkpoint latest_checkpoint CheckpointError",
    "config": "Config ConfigError load_config save_config",
    "diagnostics": "CollapseDetector",
    "objectives": "OBJECTIVES Objective PolicyLoss minirl_loss grpo_loss cispo_loss",
    "rollout": "Rollout RolloutEngine VLLMEngine VLLMServerEngine make_engine",
    "routing": "Routes RoutingReplay UnsupportedRouter",
    "tasks": "Task",
    "models": "load_model load_tokenizer",
    "trainer": "MiniRLTrainer",
}


@pytest.mark.parametrize("module", CONTRACTS)
def test_promised_names_exist(module):
    found = importlib.import_module(f"minirl_edu.{module}")
    assert [name for name in CONTRACTS[module].split() if not hasattr(found, name)] == []


def test_the_defaults_of_minirl_loss_are_the_papers():
    from minirl_edu.objectives import minirl_loss

    parameters = inspect.signature(minirl_loss).parameters
    promised = dict(eps_low=0.2, eps_high=0.27, is_cap=5.0, clip=True, is_correction=True, length_norm=False)
    assert {name: parameters[name].default for name in promised} == promised
    assert list(parameters)[:5] == ["logp", "logp_old", "logp_rollout", "advantages", "mask"]


def test_shapes_are_checked_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        kl_k1(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3))


def test_top_level_folders_are_the_houses_own():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {name.split("/")[0] for name in files if "/" in name} <= FOLDERS


def test_conda_adds_python_and_pip_to_the_one_list_of_dependencies():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    *plain, from_pip = conda["dependencies"]
    (editable,) = from_pip["pip"]
    match = re.fullmatch(r"-e \.\[([a-z,-]+)\]", editable)
    assert match
    assert set(match[1].split(",")) <= set(EXTRAS)
    assert plain == [f"python{PROJECT['requires-python']}", "pip"]


def test_the_pins_are_exact_and_satisfy_the_one_list_of_dependencies():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {}
    for line in lines:
        if not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)  # no files, no local builds
            assert match, line
            pins[canonicalize_name(match[1])] = match[2]
    assert pins["torch"] and not pins.keys() & {"torchvision", "torchaudio", "torchcodec"}  # the Makefile removes them
    wanted = [*PROJECT["dependencies"], *(line for extra in EXTRAS if extra != "vllm" for line in EXTRAS[extra])]
    for requirement in map(Requirement, wanted):
        if requirement.name == PROJECT["name"]:
            assert requirement.extras and requirement.extras <= set(EXTRAS)
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pin), f"{requirement} is pinned to {pin}"


def test_one_version_everywhere():
    assert minirl_edu.__version__ == PROJECT["version"]
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()
    assert SpecifierSet(PROJECT["requires-python"]).contains(".".join(map(str, sys.version_info[:3])))


def test_the_makefile_lists_its_targets_and_they_run_what_exists():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    documented = re.findall(r"^([\w-]+):.*##", makefile, re.MULTILINE)
    assert phony
    assert phony[1].split() == documented
    extras = re.search(r'-e "\.\[(.*)\]"', makefile)
    assert extras
    assert set(extras[1].split(",")) <= set(EXTRAS)
    for module in re.findall(r"-m ([a-z_.]+)", makefile):
        # Our own modules are looked up; tools are the environment's business.
        if module.startswith(("minirl_edu", "benchmarks")):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for script in re.findall(r"\$\(PYTHON\) (\S+\.py)", makefile):
        assert (ROOT / script).exists(), script


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_lists_the_targets():
    # `make test` runs this test, and a make inside a make says where it is, unless told not to.
    command = ["make", "--no-print-directory"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in printed.splitlines()] == re.findall(
        r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE
    )


def test_hooks_use_the_tools_of_the_environment():
    tools = {Requirement(line).name for line in EXTRAS["dev"]}
    for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]:
        assert repository["repo"] == "local"  # no download
        for hook in repository["hooks"]:
            assert hook["language"] == "system"
            match = re.match(r"python -m (\w+)", hook["entry"])
            assert match
            assert match[1] in tools


def test_continuous_integration_can_be_executed():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)


def test_a_clone_stays_small():
    """Results, notebooks and figures are what grows. Cold starts (16 MB) count apart: stored runs need them."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name and "/cold_starts/" not in name]
    assert sum(path.stat().st_size for path in paths if path.is_file()) < 20e6
