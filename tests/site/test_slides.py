"""Each unit's deck holds the lesson's derivation, and in a browser no slide is cut off."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.site.browser import Complaints, opened
from tests.site.test_site import ROOT, SITE, UNITS, module_at

slides = module_at(SITE / "slides.py")


@pytest.mark.parametrize("unit", UNITS)
def test_a_deck_has_the_equations_figures_and_exercises_of_its_lesson(unit):
    lesson = (ROOT / "lessons" / f"{unit}.md").read_text(encoding="utf-8")
    deck = slides.deck(lesson, unit[:2])
    derivation = lesson.partition("\n## Derivation")[2].partition("\n## ")[0]
    labels = re.findall(r"^\$\$ (\([\w-]+\))$", derivation, re.MULTILINE)
    assert labels and re.findall(r"^\$\$ (\([\w-]+\))$", deck, re.MULTILINE) == labels
    figures = re.findall(r"\]\(([\w/.]+\.png)\)", lesson)
    assert figures and re.findall(r"\]\(([\w/.]+\.png)\)", deck) == figures
    asked = len(re.findall(r"<details><summary>Answer", lesson))
    assert deck.count("\n## With a pencil") == deck.count("\n### Answer") == asked > 0
    assert deck.count("~~~{revealjs-notes}") > len(re.findall(r"^### ", derivation, re.MULTILINE)) - 1
    assert "](http" not in deck and "](../" not in deck and deck.startswith(f"# {unit[:2]} · ")


def test_a_slide_leads_to_an_equation_with_the_sentence_before_it():
    step = "Long ago. It is known, since Cramér (1946), that\n\n$$\na = b \\tag{1}\n$$ (00-one)\n\nSo we are done."
    (slide,) = slides._step("1 · A step", step)
    assert slide.startswith(
        "## 1 · A step\n\nIt is known, since Cramér (1946), that\n\n$$\na = b \\tag{1}\n$$ (00-one)"
    )
    assert "Long ago. " in slide.partition("revealjs-notes")[2]


# --------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def decks(tmp_path_factory) -> Path:
    """The slides of all units, as HTML."""
    out = tmp_path_factory.mktemp("slides")
    code = (
        f"import sys, slides; from pathlib import Path as P; sys.exit(slides.build(P({str(ROOT)!r}), P('s'), P('h')))"
    )
    env = {"PYTHONPATH": str(SITE), "PATH": "/usr/bin:/bin"}
    built = subprocess.run([sys.executable, "-c", code], cwd=out, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return out / "h"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with opened() as found:
        yield found


WALK = """async () => {
    await MathJax.startup.promise;
    const bad = [], slides = Reveal.getSlides();
    for (const slide of slides) {
        const { h, v } = Reveal.getIndices(slide);
        Reveal.slide(h, v);
        await new Promise(done => setTimeout(done, 30));
        const images = [...slide.querySelectorAll('img')];
        for (const image of images) if (image.dataset.src) image.src = image.dataset.src;
        await Promise.all(images.map(image => image.decode().catch(() => null)));
        const where = `${h}/${v} ${slide.querySelector('h1, h2, h3')?.textContent}`;
        const right = slide.getBoundingClientRect().right + 1;
        const seen = [...slide.querySelectorAll('*')].filter(e => !e.closest('mjx-assistive-mml'));
        if (slide.offsetHeight > 700 || seen.some(e => e.getBoundingClientRect().right > right))
            bad.push(`${where}: too large`);
        if (images.some(i => i.naturalWidth === 0)) bad.push(`${where}: no figure`);
        if (slide.querySelector('[data-mml-node="merror"]') || /\\$\\$|\\\\tag/.test(slide.innerText))
            bad.push(`${where}: an equation`);
    }
    return [slides.length, bad];
}"""


@pytest.mark.slow
@pytest.mark.parametrize("unit", [pytest.param(u, marks=[] if u[:2] == "03" else pytest.mark.nightly) for u in UNITS])
def test_no_slide_is_cut_off(decks, browser, unit):
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    complaints = Complaints(page, allowed=("file:",))
    page.goto((decks / f"{unit}.html").as_uri())
    count, bad = page.evaluate(WALK)
    assert bad == [] and complaints.found == []
    assert count > 10
