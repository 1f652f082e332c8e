"""The site builds without a warning, offline, and its pages show their equations, figures and links in a browser."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest
from playwright.sync_api import Browser, Page

from minirl_edu.config import load_config
from minirl_edu.diagnostics import CollapseDetector
from minirl_edu.models import tiny_moe
from minirl_edu.trainer import MiniRLTrainer
from tests.site.browser import Complaints, opened

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "lessons" / "site"
UNITS = sorted(path.stem for path in (ROOT / "notebooks" / "src").glob("[0-9][0-9]_*.py"))
OWN_PAGES = [*sorted(SITE.glob("*.md")), ROOT / "lessons" / "README.md", ROOT / "notebooks" / "README.md"]


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"site_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


api, build = module_at(SITE / "api.py"), module_at(SITE / "build.py")


# --------------------------------------------------------------------------------------------- pages written by hand


@pytest.mark.parametrize("page", OWN_PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_links_of_a_page_lead_somewhere(page):
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))]
    local = [link for link in links if link and "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", ["lessons/README.md", "notebooks/README.md"])
def test_every_unit_is_listed_with_its_lesson_and_its_lab(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert list(dict.fromkeys(re.findall(r"(\d\d_\w+)\.md\)", text))) == UNITS
    assert list(dict.fromkeys(re.findall(r"(\d\d_\w+)\.ipynb\)", text))) == UNITS


def test_labels_of_equations_are_unique_over_the_whole_site():
    pages = [*(ROOT / "lessons").glob("*.md"), *SITE.glob("*.md")]
    labels = [label for page in pages for label in re.findall(r"^\$\$ \(([\w-]+)\)$", page.read_text("utf-8"), re.M)]
    assert len(labels) == len(set(labels)) > 0


def test_every_metric_that_a_run_writes_has_a_section_and_every_section_a_metric(tmp_path, monkeypatch):
    monkeypatch.setattr(CollapseDetector, "update", lambda self, metrics: ["a warning"])
    small = (
        "train.global_steps=1",
        "train.mini_batch_prompts=2",
        "train.group_size=2",
        "eval.problems=4",
        "eval.samples=2",
    )
    model = tiny_moe(18, seed=0, eos_token_id=17, pad_token_id=16)
    MiniRLTrainer(load_config(None, small), tmp_path / "run", model=model, progress=False).train()
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    written = {key for line in lines for key in line}
    page = (SITE / "metrics.md").read_text(encoding="utf-8")
    sections = re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
    assert {name for name, _ in sections} == written
    for name, text in sections:
        for part in ("**What it is.**", "**Healthy.**", "**When it moves.**"):
            assert part in text, f"{name} has no {part}"


def test_the_ranges_are_those_of_the_stored_runs():
    assert module_at(SITE / "ranges.py").table() in (SITE / "metrics.md").read_text(encoding="utf-8")


def test_the_glossary_has_a_korean_term_a_sentence_and_a_unit_for_each_term():
    rows = re.findall(
        r"^\| \*\*(.+?)\*\* \| (.+?) \| (.+?) \| \[(\d\d)\]", (SITE / "glossary.md").read_text("utf-8"), re.M
    )
    assert len(rows) >= 50
    algorithms = {"MiniRL", "GRPO", "CISPO"}  # names stay names
    assert [term for term, korean, *_ in rows if not re.search("[가-힣]", korean) and term not in algorithms] == []
    assert [term for term, _, sentence, _ in rows if not sentence.endswith(".")] == []
    assert {unit for *_, unit in rows} == {unit[:2] for unit in UNITS}


# ------------------------------------------------------------------------------------------------ what build.py makes


def test_an_undocumented_public_name_is_an_error_that_names_it(tmp_path):
    (tmp_path / "minirl_edu").mkdir()
    source = (
        '"""A module."""\n\nclass A:\n    """A."""\n\n    def f(self): ...\n    def _g(self): ...\n\ndef h(): ...\n'
    )
    (tmp_path / "minirl_edu" / "some.py").write_text(source)
    with pytest.raises(api.Undocumented, match=r"minirl_edu\.some\.A\.f\n  minirl_edu\.some\.h$"):
        api.pages(tmp_path)


def test_every_public_function_and_class_has_its_entry_in_the_reference():
    pages = api.pages(ROOT)
    assert Path("minirl_edu/index.md") in pages
    for module in api.read_modules(ROOT):
        if api.UNIT.search(f"{module.name}.py") or module.name == "minirl_edu":
            continue
        text = pages[module.page]
        for node in module.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert f"## `{node.name}`" in text, f"{module.name}.{node.name}"


def test_a_docstring_becomes_markdown():
    docstring = (
        "Loss, with r < 1 and `other`:\n\n    loss = −Σ_t x\n\nText.\n\n"
        "Args:\n    a, b: first\n        and more.\n    c: `other`."
    )
    assert api.markdown(docstring, {"other": "x.md#other"}) == (
        "Loss, with r &lt; 1 and [`other`](x.md#other):\n\n```text\nloss = −Σ_t x\n```\n\n\nText.\n\n\n"
        "**Args**\n\n- `a, b`: first and more.\n- `c`: [`other`](x.md#other)."
    )


def test_a_signature_is_that_of_the_source():
    tree = ast.parse("def f(a: int, *b, c: str = 'x', **d) -> None: ...\ndef g(x, /, y=1): ...")
    assert [api._signature(node) for node in tree.body] == [
        "f(a: int, *b, c: str = 'x', **d) -> None", "g(x, /, y=1)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("origin", "text", "expected"),
    [
        ("lessons/01_a.md", "[lab](../notebooks/01_a.ipynb#x)", "[lab](../notebooks/01_a.ipynb#x)"),
        ("lessons/01_a.md", "[`lib`](../minirl_edu/lib.py#L3)", "[`lib`](../minirl_edu/lib.md)"),
        ("lessons/01_a.md", "[data](../minirl_edu/sub)", "[data](../minirl_edu/sub/index.md)"),
        ("lessons/01_a.md", "[folder](results/)", "folder"),
        ("lessons/01_a.md", "`f[a](../notebooks)`, [nowhere](x.md)", "`f[a](../notebooks)`, [nowhere](x.md)"),
        ("lessons/site/a.md", "![p](../results/f.png)", "![p](../results/f.png)"),
        ("notebooks/solutions/01_a.md", "[lesson](../../lessons/01_a.md)", "[lesson](../../lessons/01_a.md)"),
        ("README.md", "[a](lessons/site/a.md)", "[a](lessons/site/a.md)"),
        ("lessons/site/a.md", "[start](../../README.md#x)", "[start](../../index.md#x)"),
    ],
)
def test_links_are_kept_rewritten_or_made_plain_text(tmp_path, origin, text, expected):
    names = ("lessons/01_a.md", "lessons/site/a.md", "notebooks/01_a.ipynb", "notebooks/solutions/01_a.md")
    for name in (*names, "minirl_edu/lib.py", "minirl_edu/sub/__init__.py", "lessons/results/f.png", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    pages = {Path(name) for name in (*names, "README.md", "minirl_edu/lib.md", "minirl_edu/sub/index.md")}
    wanted: set[Path] = set()
    assert build.relink(text, Path(origin), tmp_path, pages, wanted) == expected
    assert wanted == ({Path("lessons/results/f.png")} if "png" in text else set())


# --------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Path]:
    """The built site."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, str(SITE / "build.py"), "--out", str(out)]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    yield out / "html"
    shutil.rmtree(out)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with opened() as found:
        yield found


READ = """async () => {
    if (window.MathJax) await MathJax.startup.promise;
    const images = [...document.images];
    for (const image of images) image.loading = 'eager';
    await Promise.all(images.map(image => image.decode().catch(() => null)));
    const math = [...document.querySelectorAll('.math')];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const raw = [];
    while (walker.nextNode()) {
        const { data, parentElement } = walker.currentNode;
        if (parentElement.closest('pre, code, script, mjx-container')) continue;
        if (/^\\| |\\$\\$|\\\\tag|\\\\frac|\\\\\\[|\\\\\\(/.test(data)) raw.push(data.slice(0, 80));
    }
    return {
        title: document.title,
        equations: math.length,
        untypeset: math.filter(m => !m.querySelector('mjx-container svg')).map(m => m.textContent.slice(0, 80)),
        errors: [...document.querySelectorAll('[data-mml-node="merror"]')].map(e => e.textContent.slice(0, 80)),
        raw,
        images: images.filter(i => i.closest('main')).length,
        broken: images.filter(i => i.naturalWidth === 0).map(i => i.src),
        width: document.documentElement.scrollWidth,
    };
}"""


LONGEST = "minirl_edu/experiments/early_warning"  # the name of a module, as a heading


def pages(site: Path) -> list[Path]:
    found = sorted(site.rglob("*.html"))
    return [path for path in found if not {"_static", "_downloads", "slides"} & set(path.relative_to(site).parts)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lessons, one lab", pytest.param("all", marks=pytest.mark.nightly)])
def test_a_page_shows_its_equations_and_figures(site, browser, kind):
    lab = f"notebooks/{UNITS[0]}"
    wanted = {site / f"{name}.html" for name in ("index", lab, f"notebooks/solutions/{UNITS[0]}", LONGEST)}
    paths = [path for path in pages(site) if kind == "all" or site / "lessons" in path.parents or path in wanted]
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(300_000)  # on a busy machine, a page with many equations takes more than the usual 30 s
    complaints = Complaints(page, allowed=("file:",))
    seen = {}
    for path in paths:
        page.goto(path.as_uri())
        seen[path] = found = page.evaluate(READ)
        assert complaints.found == [], path
        assert (found["untypeset"], found["errors"], found["raw"], found["broken"]) == ([], [], [], []), path
    for unit in UNITS:
        labelled = re.findall(r"^\$\$ \(", (ROOT / "lessons" / f"{unit}.md").read_text(encoding="utf-8"), re.MULTILINE)
        assert seen[site / "lessons" / f"{unit}.html"]["equations"] > len(labelled) >= 3
        notebook = site / "notebooks" / f"{unit}.html"
        assert notebook not in seen or seen[notebook]["images"] >= 3
    assert site / f"{lab}.html" in seen


class Anchors(HTMLParser):
    """The links of a page, and what in it can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {value for value in (values.get("id"), values.get("name") if tag == "a" else None) if value}
        if tag == "a" and (link := values.get("href")):
            self.links.append(link)


@pytest.mark.slow
def test_no_link_is_dead(site):
    anchors = {path: Anchors(path) for path in pages(site)}
    assert sum(len(found.links) for found in anchors.values()) > 1000
    dead = set()
    for path, found in anchors.items():
        for link in found.links:
            address, _, anchor = link.partition("#")
            if ":" in address:
                continue
            target = (path.parent / unquote(address.partition("?")[0])).resolve() if address else path
            known = anchors[target].ids if target in anchors else None
            if not target.is_file() or (anchor and known is not None and unquote(anchor) not in known):
                dead.add((path.relative_to(site).as_posix(), link))
    assert dead == set()


LAYOUT = """() => {
    const found = [], gone = element => {
        const { width, height } = element.getBoundingClientRect();
        return width <= 1 || height <= 1 || getComputedStyle(element).visibility === 'hidden';
    };
    const scrolls = element => ['auto', 'scroll'].includes(getComputedStyle(element).overflowX);
    const said = element => `${element.tagName} ${element.className}: ${element.textContent.trim().slice(0, 40)}`;
    if (document.documentElement.scrollWidth > innerWidth) found.push('the page is wider than the window');
    for (const element of document.querySelectorAll('main *')) {
        if (element.closest('mjx-container, svg, .sr-only, .visually-hidden') || gone(element)) continue;
        if (getComputedStyle(element).display === 'inline') continue;
        if (element.scrollWidth <= element.clientWidth + 1) continue;
        if (!scrolls(element)) found.push(`cut: ${said(element)}`);
        else if (!element.matches('.more-left, .more-right')) found.push(`scrolls without a sign: ${said(element)}`);
    }
    const walker = document.createTreeWalker(document.querySelector('article') ?? document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode, parent = node.parentElement, range = document.createRange();
        if (parent.closest('script, style, mjx-container, pre, .sr-only') || gone(parent)) continue;
        if (parent.closest('p code') && !parent.closest('table')) continue;  // a name may be longer than a line
        for (const word of node.data.matchAll(/[\\p{L}\\p{N}_]{2,}/gu)) {
            range.setStart(node, word.index);
            range.setEnd(node, word.index + word[0].length);
            const boxes = [...range.getClientRects()].filter(box => box.width > 0);
            if (new Set(boxes.map(box => Math.round(box.top))).size > 1) found.push(`a broken word: ${word[0]}`);
        }
    }
    return found;
}"""
WIDTHS = (1280, 390)  # a laptop's window, a telephone


def layout(page: Page, path: Path) -> dict[int, list[str]]:
    """What is wrong with a page in each width: text cut off, words broken, things that scroll without a sign of it."""
    page.goto(path.as_uri())
    page.evaluate("async () => { if (window.MathJax) await MathJax.startup.promise; }")
    page.evaluate("() => document.querySelectorAll('details').forEach(folded => folded.open = true)")
    found: dict[int, list[str]] = {}
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        for _ in range(30):  # until site.js has seen the new width: at once, or a little later on a busy machine
            found[width] = page.evaluate(LAYOUT)
            if not found[width]:
                break
            page.wait_for_timeout(100)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["written by hand", pytest.param("all", marks=pytest.mark.nightly)])
def test_no_page_cuts_text_off_or_breaks_words(site, browser, kind):
    """By hand: of labs, solutions and the reference, which look alike, the first or the one of the longest name."""
    alike = ("notebooks/[01]*", "notebooks/solutions/*", "minirl_edu/**/*")
    kept = {site / f"{name}.html" for name in (f"notebooks/{UNITS[0]}", f"notebooks/solutions/{UNITS[0]}", LONGEST)}
    left_out = {path for pattern in alike for path in site.glob(pattern)} - kept
    paths = [path for path in pages(site) if kind == "all" or path not in left_out]
    assert len(paths) > 40 and kept <= set(paths)
    page = browser.new_page()
    page.set_default_timeout(300_000)
    wrong = {path.relative_to(site).as_posix(): layout(page, path) for path in paths}
    assert {name: found for name, found in wrong.items() if any(found.values())} == {}


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("<div style='overflow: hidden'><p style='white-space: nowrap'>" + 90 * "word " + "</p></div>", "cut: P "),
        ("<p style='white-space: nowrap'>" + 90 * "word " + "</p>", "the page is wider than the window"),
        ("<div style='overflow: auto'><p style='width: 2000px'>word</p></div>", "scrolls without a sign: DIV "),
        ("<p style='width: 4em; overflow-wrap: anywhere'>kl_rollout_old</p>", "a broken word: kl_rollout_old"),
    ],
)
def test_a_bad_layout_is_noticed(browser, tmp_path, body, complaint):
    (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8><main>{body}</main>", encoding="utf-8")
    found = layout(browser.new_page(), tmp_path / "page.html")
    assert all(any(text.startswith(complaint) for text in found[width]) for width in WIDTHS)
    good = "<p>All words fit.</p><table><tr><td>also here</table>"
    (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8><main>{good}</main>", encoding="utf-8")
    assert layout(browser.new_page(), tmp_path / "page.html") == {width: [] for width in WIDTHS}


@pytest.mark.slow
def test_the_side_bar_lists_the_units_once_and_no_solutions(site):
    links = Anchors(site / "index.html").links
    text = (site / "index.html").read_text(encoding="utf-8")
    bar = text[text.index("bd-sidebar-primary") : text.index("bd-main")]
    shown = re.findall(r'href="([^"#]+)"', bar)
    assert [name for name in shown if "solutions" in name] == []
    assert all(f"notebooks/{unit}.html" in shown and f"lessons/{unit}.html" in shown for unit in UNITS)
    assert any("solutions" in link for link in Anchors(site / "notebooks" / "README.html").links)
    assert {"lessons/README.html", "lessons/site/own_loop.html", "scale/README.html"} <= set(links)  # the three doors


@pytest.mark.slow
def test_the_search_finds_a_word_without_a_server(site, browser):
    page = browser.new_page()
    complaints = Complaints(page, allowed=("file:",))
    page.goto((site / "search.html").as_uri() + "?q=staleness")
    page.wait_for_selector("#search-results a", timeout=20_000)
    assert complaints.found == []
