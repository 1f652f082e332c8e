"""JupyterLab opens a lab, runs all of its cells, and a slider changes the figure: what a learner does first."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Page, expect

from tests.site.browser import Complaints, executable, opened

ROOT = Path(__file__).resolve().parents[2]
LAB = "03_sampler_and_policy.ipynb"
MINUTE = 60_000
PROMPTS = (
    "[...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent)"
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """The address of a JupyterLab, token included, that serves a copy of the notebooks."""
    executable()  # before anything is started: without a browser there is nothing to do
    folder = tmp_path_factory.mktemp("jupyter")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    lab = nbformat.read(folder / "notebooks" / LAB, as_version=4)
    for cell in lab.cells:
        if cell.cell_type == "code":  # what is then shown was computed here
            cell.outputs, cell.execution_count = [], None
    nbformat.write(lab, folder / "notebooks" / LAB)
    (folder / "lessons").mkdir()
    (folder / "lessons" / "results").symlink_to(ROOT / "lessons" / "results")  # what labs read
    port, token = free_port(), secrets.token_hex(16)
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": folder / "notebooks",
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
        "LabApp.news_url": None,
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }
    # All cells in the page, also those out of sight.
    settings = folder / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))
    # Nobody's settings, and nothing in the environment of the tests, may have a say.
    homes = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    homes |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "spaces")}
    fast = {"OMP_NUM_THREADS": "1", "MINIRL_LABS": "fast", "JUPYTER_TOKEN": token}
    log = folder / "log.txt"
    with log.open("w") as lines:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", *(f"--{name}={value}" for name, value in options.items())],
            env={**os.environ, **homes, **fast},
            stdout=lines,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        else:
            pytest.fail(f"JupyterLab did not answer in two minutes:\n{log.read_text()}")
        yield f"{address}/lab/tree/{LAB}?token={token}&reset"
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_all_cells(page: Page) -> None:
    """By the menu, as a person would; returns when the kernel has run the last cell."""
    # Sooner, and JupyterLab asks which kernel instead. (The circle in the toolbar says idle from the start.)
    expect(page.get_by_text("(ipykernel) | Idle")).to_be_visible(timeout=3 * MINUTE)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    # [ ]: and [*]: are waiting and running; only what has run has a number. An error ends it early.
    error = "document.querySelector('[data-mime-type=\"application/vnd.jupyter.error\"]')"
    page.wait_for_function(f"() => {error} || /\\d/.test({PROMPTS}.at(-1))", timeout=12 * MINUTE)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # half a minute of processor time for the lab, on a machine that may be busy with others
def test_a_learner_runs_lab_03_and_a_slider_changes_the_figure(server):
    with opened() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        complaints = Complaints(page, allowed=(server.split("/lab/")[0], "ws://127.0.0.1"))
        page.goto(server)
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=2 * MINUTE)
        run_all_cells(page)
        for kind in ("error", "stderr"):
            assert page.locator(f"[data-mime-type='application/vnd.jupyter.{kind}']").all_inner_texts() == []
        assert page.get_by_text("Traceback (most recent call last)").count() == 0

        widget = page.locator(".jp-Notebook .widget-interact").first
        widget.scroll_into_view_if_needed(timeout=MINUTE)
        figure = widget.locator("img").first
        expect(figure).to_be_visible(timeout=MINUTE)
        before = figure.get_attribute("src")
        slider = widget.locator(".noUi-handle").first
        slider.focus()
        page.keyboard.press("ArrowRight")
        expect(figure).not_to_have_attribute("src", before or "", timeout=MINUTE)
        assert [found for found in complaints.found if "network" in found] == []
