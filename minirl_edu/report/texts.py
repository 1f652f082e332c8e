"""What a report explains to a reader who has not read the paper, and how the page looks."""

from minirl_edu.report.runs import WINDOW

SAMPLES = """<p>The first held-out problems with one answer each, drawn as in training. ✓: the verifier accepts the
answer.</p>"""
WARNINGS = """<p>A warning says when the reward (a mean over ten gradient steps) or the held-out score had fallen by a
quarter of the scale, or to half of its best.</p>"""
MARKED = """<p class=soft>A vertical line marks the step at which a fall was noticed, in the colour of its run. The fall
itself began earlier; the tables below have both moments.</p>"""
BEST = """<p class=soft>Start, best and final are over a run’s own length; the best of many noisy evaluations flatters
a little. ± is the standard error over the held-out problems, of a single run.</p>"""
MEANS = f"""<p class=soft>Means over {WINDOW} gradient steps, rounded up to whole global steps; of the score, the latest
value. A run that did not fall is shown in the same steps.</p>"""
FACTORS = """<p>The engine that samples a token and the trainer that learns from it give it different probabilities.
Their ratio has two factors: <b>π_θ/μ_old = π_old/μ_old × π_θ/π_old</b>, the <i>training–inference discrepancy</i> (two
engines, the same weights) and the <i>policy staleness</i> (the weights have moved since). Training is sound while both
are near 1, so while their logarithms are near 0.</p>"""
FOUR_CURVES = """<dl>
<dt>Held-out score</dt><dd>Share of the problems never trained on that are solved, sampled by the training engine in
full precision; faint, the same problems through the low-precision rollout engine, as a user of the deployed model
would see them. <i>Healthy:</i> rises, then levels off, both lines together. <i>Ill:</i> falls from its peak, or the
lines part.</dd>
<dt>Training reward</dt><dd>Mean reward of the responses being trained on. <i>Healthy:</i> rises with the score.
<i>Ill:</i> falls, or rises while the score does not.</dd>
<dt>Token entropy</dt><dd>How undecided the policy is about the next token. <i>Healthy:</i> declines slowly.
<i>Ill:</i> drops sharply (the policy has stopped exploring, often just before a collapse) or grows without end.</dd>
<dt>Training–inference KL</dt><dd>How far the engine that samples is from the engine that trains, at the same weights,
estimated from samples. Bold, k3, which is never below 0; faint, k1, the paper’s, which may dip below 0.
<i>Healthy:</i> small and flat. <i>Ill:</i> keeps growing.</dd>
</dl>"""
RATIOS = """<p>Training token by token is a first-order approximation, equation (5) of the paper, of what is really
wanted: the reward of whole responses. It holds while both factors stay near 1.</p>
<dl>
<dt>Discrepancy and staleness</dt><dd>Mean size of either factor’s logarithm, on one scale: the larger is the one to
work on. The discrepancy comes from number formats, kernels and expert routing; the staleness is exactly 0 until the
weights move, so always when each batch serves a single gradient step. <i>Healthy:</i> small and flat. <i>Ill:</i>
growing. A finer number format or routing replay lowers the first; fewer mini-batches per rollout, clipping or a smaller
learning rate lowers the second. Bold, a running mean; faint, each step.</dd>
<dt>First-order gap</dt><dd>What the approximation drops: the weight Π r of a whole response, r = π_θ/μ_old, minus its
first-order expansion 1 + Σ(r − 1), as a mean absolute value. <i>Healthy:</i> far below 1. <i>Ill:</i> near 1 or
above.</dd>
<dt>Routing flips</dt><dd>In a Mixture of Experts, the share of tokens for which the two engines use different experts
at the same weights, per layer. Under R3 the training engine takes over the rollout’s experts, so it is 0.
<i>Healthy:</i> flat. <i>Ill:</i> growing together with the KL.</dd>
<dt>Entropy drift</dt><dd>How much faster the entropy would grow (below 0: fall) if the importance weight were left out.
Its sign is that of the covariance of length and reward, which is below 0 where wrong responses are the longer ones. A
run that uses the weight cancels the drift; one without it follows the drift.</dd>
</dl>"""
CLIPPING = """<dl><dt>Clipped tokens</dt><dd>Share of the tokens left out of the gradient because π_θ/π_old has
already moved far in the direction that the advantage asks for; of a run without clipping, the share that clipping would
leave out. Always 0 when each batch serves a single gradient step. <i>Healthy:</i> a few per cent at most.
<i>Ill:</i> growing: the updates are too large for the number of mini-batches.</dd></dl>"""

STYLE = """
:root { color-scheme: light dark;
  --ink: #222; --soft: #666; --line: #ddd; --page: #fff; --box: #f5f5f3; --link: #0072b2;
  --good: #00704f; --bad: #b04a00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6e3; --soft: #a5a29d; --line: #44423f; --page: #1b1a19; --box: #262523; --link: #6cbcec;
    --good: #4fc79d; --bad: #f0965a; }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
  margin: 0 auto; max-width: 1040px; padding: 1.5rem 1rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; }
p, dl, .headline { max-width: 46rem; }
a { color: var(--link); }
.headline { font-size: 1.08rem; background: var(--box); border-left: 4px solid var(--link); padding: .5rem 1.1rem; }
.headline p { margin: .45rem 0; }
.verdict { font-weight: 500; }
table { width: 100%; max-width: 46rem; border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem;
  margin: .8rem 0 1.4rem; }
th, td { padding: .32rem 0 .32rem 1.4rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child { text-align: left; font-weight: 400; padding-left: 0; }
thead th:first-child { font-weight: 600; }
.samples th, .samples td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; }
.samples td:first-child { padding-left: 0; width: 45%; color: var(--soft); }
.samples tbody th { font-weight: 600; padding-top: .9rem; border-bottom: 0; }
small { font-size: .75rem; color: var(--soft); white-space: nowrap; }
thead th { white-space: nowrap; }
.mark { display: inline-block; min-width: 1.1em; }
.good { color: var(--good); }
.bad { color: var(--bad); }
@media (max-width: 640px) {
  .numbers, .numbers :is(thead, tbody) { display: block; }
  .numbers tr { display: grid; grid-template-columns: repeat(var(--across), minmax(0, 1fr)); gap: 0 .4rem;
    padding: .3rem 0; border-bottom: 1px solid var(--line); }
  .numbers :is(th, td) { border: 0; padding: 0; text-align: left; font-size: .85rem; overflow-wrap: anywhere; }
  .numbers small { display: block; font-size: .68rem; white-space: normal; }
  .numbers th:first-child { grid-column: 1 / -1; }
  .numbers thead th:not(:first-child) { font-weight: 400; color: var(--soft); font-size: .78rem; line-height: 1.2; }
  .numbers tbody th { color: var(--soft); }
  .wrapped thead th:not(:first-child) { display: none; }
  .wrapped td::before { content: attr(data-of); display: block; font-size: .75rem; line-height: 1.2;
    color: var(--soft); }
}
picture { display: block; background: #fff; border: 1px solid var(--line); border-radius: 6px;
  padding: .6rem; margin: .8rem 0; }
img { display: block; max-width: 100%; height: auto; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0; }
sub { font-size: .75em; line-height: 0; }
dd i { color: var(--soft); }
pre { background: var(--box); padding: .7rem .9rem; overflow-x: auto; font-size: .85rem; line-height: 1.4; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--link); }
.soft { color: var(--soft); font-size: .9rem; }
"""
