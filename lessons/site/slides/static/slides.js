// Shrink an equation that is wider than its slide, and the text of a slide that is too long for it. A slide can only be
// measured while it is shown.
const SIZE = 30, SMALLEST = 16, HEIGHT = 690;
function fit() {
  const slide = Reveal.getCurrentSlide();
  if (!slide || slide.dataset.fitted) return;
  for (const box of slide.querySelectorAll('mjx-container[display="true"]')) {
    for (let percent = 92; box.scrollWidth > slide.clientWidth && percent > 40; percent -= 4)
      box.style.setProperty("font-size", `${percent}%`, "important");
  }
  for (let size = SIZE; slide.offsetHeight > HEIGHT && size > SMALLEST; size--) slide.style.fontSize = `${size}px`;
  slide.dataset.fitted = "yes";
}
window.addEventListener("load", () => {
  MathJax.startup.promise.then(() => {
    Reveal.on("slidechanged", fit);
    fit();
  });
});
