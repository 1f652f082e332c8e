"""The discrepancy between an inference engine and the training engine, measured on the same weights and tokens.

An engine samples responses and reports log μ of each token; the training engine scores the same tokens with the same
weights, log π. `run_setting` measures how far they are apart, overall, by position and by layer, with and without
rollout routing replay (R3); `mechanism` is the paper's story on random models, `suite` a list of real and emulated
engines. `diagnose` finds the mistakes that look like an engine's gap (a temperature on one side only, top-p, stale
weights, end tokens) from logits, tokens and reported numbers alone; `accidents` commits them, each with
`transformers.generate`'s own options, and shows that they are recognised.
"""

from minirl_edu.gap.careless import ACCIDENTS, Accident, accidents, careless_rollout, nudged, with_end_token
from minirl_edu.gap.diagnosis import Diagnosis, Finding, Hypothesis, diagnose, examine
from minirl_edu.gap.engines import (
    RANDOM,
    Setting,
    Workload,
    as_dtype,
    mechanism,
    models_for,
    open_engine,
    prompts_for,
    random_model,
    random_prompts,
    run_setting,
    suite,
    suite_settings,
    usual_workload,
    vllm_missing,
    write_json,
)
from minirl_edu.gap.measurement import LEGEND, Scores, interval, measure, metrics, score
from minirl_edu.gap.tables import accident_table, details, legend, summary, table

__all__ = [
    "ACCIDENTS",
    "LEGEND",
    "RANDOM",
    "Accident",
    "Diagnosis",
    "Finding",
    "Hypothesis",
    "Scores",
    "Setting",
    "Workload",
    "accident_table",
    "accidents",
    "as_dtype",
    "careless_rollout",
    "details",
    "diagnose",
    "examine",
    "interval",
    "legend",
    "measure",
    "mechanism",
    "metrics",
    "models_for",
    "nudged",
    "open_engine",
    "prompts_for",
    "random_model",
    "random_prompts",
    "run_setting",
    "score",
    "suite",
    "suite_settings",
    "summary",
    "table",
    "usual_workload",
    "vllm_missing",
    "with_end_token",
    "write_json",
]
