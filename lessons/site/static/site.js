// What scrolls sideways fades at the side on which more of it lies; site.css has the fade.
const SCROLLS = [".pst-scrollable-table-container", ".math", "mjx-container", "pre", ".output", "p:has(> img)"]
  .map((name) => `.bd-article ${name}`)
  .join(", ");

function mark(element) {
  const left = element.scrollLeft;
  element.classList.toggle("more-left", left > 1);
  element.classList.toggle("more-right", element.scrollWidth - element.clientWidth - left > 1);
}

addEventListener("load", async () => {
  if (window.MathJax?.startup) await MathJax.startup.promise;
  const resized = new ResizeObserver((entries) => entries.forEach((entry) => mark(entry.target)));
  for (const element of document.querySelectorAll(SCROLLS)) {
    if (!["auto", "scroll"].includes(getComputedStyle(element).overflowX)) continue;
    element.addEventListener("scroll", () => mark(element), { passive: true });
    resized.observe(element);
  }
});
