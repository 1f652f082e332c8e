"""What is to be run and judged, from `paper.yaml`; and the CSV file that each run leaves.

`read_runs` reads all runs of a setting, whether they lie in files or in the setting's archive (`archives.py`).

A spec is data: every name and every number in it is checked when it is read, and each run's overrides make a `Config`,
so a spelling mistake is an error before the first gradient step.
"""

import csv
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minirl_edu.archives import files_in
from minirl_edu.config import Config, ConfigError, read_yaml
from minirl_edu.plots import Metrics

PAPER = Path(__file__).parent / "paper.yaml"
"""The spec that ships with the package."""

Run = tuple[str, str]
"""Names of a setting and of a variant."""

COLUMNS = (
    *("global_step", "grad_step", "score", "score_rollout", "reward", "entropy", "kl_rollout_old", "k3_rollout_old"),
    *("ess", "clip_frac_pos", "clip_frac_neg", "is_weight_max", "log_ratio_mismatch", "log_ratio_staleness"),
    *("first_order_gap", "routing_flip_rate", "grad_norm", "response_length", "lr"),
    *("length_reward_cov", "entropy_drift"),
)
"""Columns of a run's CSV file, in order; keys of metrics.jsonl. Older files end before the last two."""


class Metric(NamedTuple):
    """A number that summarises a run: its name in sentences, and how two runs are compared."""

    words: str
    log: bool
    """Compared as a ratio, because it spans decades; otherwise as a difference."""


METRICS = {
    "final_score": Metric("final score", log=False),
    "best_score": Metric("best score", log=False),
    "auc_score": Metric("mean score over the run", log=False),
    "final_entropy": Metric("entropy in the last third", log=True),
    "mean_entropy": Metric("mean entropy", log=True),
    "kl": Metric("training–inference KL", log=True),
}
"""What criteria may compare; computed by `statistics.summary`. Scores are from 0 to 1, the others in nats per token."""


class _Kind(NamedTuple):
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


KINDS = {
    "higher": _Kind(("metric", "than"), ("margin",)),
    "lower": _Kind(("metric", "than"), ("margin",)),
    "comparable": _Kind(("metric", "than", "margin")),
    "collapses": _Kind((), ("share",)),
    "stable": _Kind((), ("share",)),
    "more_collapse": _Kind(("than",)),
    "learns": _Kind(()),
    "unlearns": _Kind(()),
}
"""Kinds of criteria and the fields of each beside `run`; `claims.judge` says what each means."""


# --------------------------------------------------------------------------------------------------------- the spec


@dataclass(frozen=True)
class Setting:
    """What the runs that are compared with each other share."""

    name: str
    about: str
    overrides: Mapping[str, Any]
    """Dotted fields of `Config` and their values."""


@dataclass(frozen=True)
class Variant:
    """One of the methods compared."""

    name: str
    label: str
    """In figures; `plots.METHOD_STYLE` knows how the paper's methods look."""
    overrides: Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """Runs that are drawn together."""

    name: str
    title: str
    runs: tuple[Run, ...]
    seeds: int | None = None
    """At most so many seeds; None: the tier's."""
    calibration: bool = False
    """Made to choose settings by: on seeds that no verdict uses."""
    error_parts: bool = False
    """Measure as well what part of each setting's engine error is systematic."""
    cases: bool = False
    """Drawn with the settings side by side: entropy and score, the same methods in each."""


@dataclass(frozen=True)
class Grid:
    """Settings on a lattice, such as learning rate × precision: one phase diagram, and a figure of the same name."""

    name: str
    across: tuple[str, tuple[str, ...]]
    """The axis and its values, as the figure writes them."""
    up: tuple[str, tuple[str, ...]]
    variants: tuple[str, ...]

    def setting(self, across: str, up: str) -> str:
        """Name of the cell's setting."""
        return _cell_name(self.name, across, up)


@dataclass(frozen=True)
class Tier:
    """How much is spent: the number of seeds, settings made shorter, settings left out."""

    name: str
    seeds: int
    overrides: Mapping[str, Mapping[str, Any]]
    """Per setting, its overrides in this tier."""
    leave_out: tuple[str, ...] = ()
    """Settings and grids that are not run."""


@dataclass(frozen=True)
class Criterion:
    """One statement about runs that data can support or contradict; `claims.judge` says how."""

    kind: str
    """One of `KINDS`."""
    run: Run
    than: Run | None = None
    metric: str | None = None
    """One of `METRICS`."""
    margin: float | None = None
    """A difference in the metric's unit, or a factor for metrics compared as ratios."""
    share: float = 0.5
    """Of the runs that collapse."""


@dataclass(frozen=True)
class Claim:
    """A finding of the paper (or of its critics), with the criteria that must all hold to call it reproduced."""

    id: str
    paper: str
    setting: str
    """The paper's."""
    figures: tuple[str, ...]
    criteria: tuple[Criterion, ...]
    not_testable: str | None = None
    """Why it cannot be tested at this size; then there are no criteria."""
    side: str = ""
    """One of `Spec.sides`: the kind of setting in which findings of the paper are judged once more."""
    findings: tuple[str, ...] = ()
    """Ids of the claims that it judges once more there."""
    predicted: str = ""
    """What the identity of `minirl_edu.drift` says of it, written before its seeds were run."""


@dataclass(frozen=True)
class Definitions:
    """Thresholds that turn a run into numbers; see `statistics.summary`."""

    final_evaluations: int
    """The final score is the mean of so many last evaluations."""
    collapse_share: float
    """A run has collapsed where its score ended below this share of its best."""


@dataclass(frozen=True)
class Spec:
    """Everything in a spec file. Overrides are layered: base < setting < variant < the tier's for that setting."""

    base: Mapping[str, Any]
    settings: Mapping[str, Setting]
    variants: Mapping[str, Variant]
    figures: Mapping[str, Figure]
    grids: Mapping[str, Grid]
    tiers: Mapping[str, Tier]
    groups: Mapping[str, tuple[str, ...]]
    """Names for several figures at once, such as `all`."""
    first_seed: int
    first_calibration_seed: int
    definitions: Definitions
    claims: tuple[Claim, ...]
    sides: Mapping[str, str] = field(default_factory=dict)
    """Kinds of settings in which a finding is judged, in words; the first is that of claims that name none."""

    def overrides(self, tier: str, setting: str, variant: str | None = None) -> dict[str, Any]:
        """The dotted fields that differ from `Config()`'s defaults by intent; None: those that all variants share.

        Raises ConfigError for an unknown name.
        """
        shorter = _known(tier, self.tiers, "tier").overrides.get(setting, {})
        own = {} if variant is None else _known(variant, self.variants, "variant").overrides
        return {**self.base, **_known(setting, self.settings, "setting").overrides, **own, **shorter}

    def config(self, tier: str, setting: str, variant: str | None, seed: int) -> Config:
        """The config of a run. Raises ConfigError for an unknown name or overrides that make no valid config."""
        return Config.from_dict(_nested({**self.overrides(tier, setting, variant), "seed": seed}))

    def runs(self, figures: Sequence[str], tier: str) -> list[Run]:
        """What the figures need in this tier, in order and without repeats. Raises ConfigError for unknown names."""
        left_out = _known(tier, self.tiers, "tier").leave_out
        wanted = [_known(name, self.figures, "figure") for name in figures if name not in left_out]
        return list(dict.fromkeys(run for figure in wanted for run in figure.runs if run[0] not in left_out))

    def seeds(self, figure: str, count: int) -> range:
        """The seeds of a figure's runs: `count` of them or as many as it wants at most, from `first_seed`, or those
        that verdicts do not use if it serves to calibrate."""
        wanted = _known(figure, self.figures, "figure")
        first = self.first_calibration_seed if wanted.calibration else self.first_seed
        return range(first, first + min(count, wanted.seeds or count))

    def expand(self, names: Sequence[str]) -> list[str]:
        """Figures by name, groups replaced by theirs, without repeats. Raises ConfigError for an unknown name."""
        known = (*self.figures, *self.groups)
        members = (self.groups.get(_name_in(known, name, "figure"), (name,)) for name in names)
        return list(dict.fromkeys(figure for several in members for figure in several))


def load_spec(path: str | Path | None = None) -> Spec:
    """Read a spec file; None: the one that ships with the package.

    Raises ConfigError, which says where in the file, for unknown keys and names, missing and wrong values, and for
    overrides that make no valid `Config`; OSError for a file that cannot be read.
    """
    path = PAPER if path is None else Path(path)
    data = read_yaml(path)
    try:
        return _spec(data)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from error


def _spec(data: Any) -> Spec:
    parts = ("base", "settings", "variants", "figures", "tiers", "seeds", "definitions", "claims")
    data = _fields(data, "the file", parts, ("grids", "groups", "sides"))
    sides = {name: _text(words, f"sides.{name}") for name, words in _mapping(data.get("sides", {}), "sides").items()}
    seeds = {
        key: _integer(value, f"seeds.{key}", 0)
        for key, value in _fields(data["seeds"], "seeds", ("first", "calibration")).items()
    }
    settings = {
        name: Setting(name, _text(entry["about"], f"{at}.about"), _flat(entry["set"], f"{at}.set"))
        for at, name, entry in _entries(data["settings"], "settings", ("about", "set"))
    }
    variants = {
        name: Variant(name, _text(entry["label"], f"{at}.label"), _flat(entry["set"], f"{at}.set"))
        for at, name, entry in _entries(data["variants"], "variants", ("label", "set"))
    }
    figures = {
        name: Figure(
            name,
            _text(entry["title"], f"{at}.title"),
            tuple(_run(run, settings, variants, f"{at}.runs[{i}]") for i, run in _list(entry["runs"], f"{at}.runs")),
            seeds=_integer(entry["seeds"], f"{at}.seeds", 1) if "seeds" in entry else None,
            error_parts=_flag(entry, "error_parts", at),
            cases=_flag(entry, "cases", at),
        )
        for at, name, entry in _entries(
            data["figures"], "figures", ("title", "runs"), ("seeds", "error_parts", "cases")
        )
    }
    grids: dict[str, Grid] = {}
    axes = ("title", "about", "set", "across", "up", "variants")
    for at, name, entry in _entries(data.get("grids", {}), "grids", axes, ("seeds", "calibration")):
        grids[name], figures[name], cells = _grid(name, entry, variants, at)
        settings |= cells
    spec = Spec(
        base=_flat(data["base"], "base"),
        settings=settings,
        variants=variants,
        figures=figures,
        grids=grids,
        tiers={
            name: _tier(name, entry, settings, grids, at)
            for at, name, entry in _entries(data["tiers"], "tiers", ("seeds", "set"), ("leave_out",))
        },
        groups={
            name: tuple(_name_in(figures, figure, f"groups.{name}[{i}]") for i, figure in _list(some, f"groups.{name}"))
            for name, some in _mapping(data.get("groups", {}), "groups").items()
        },
        first_seed=seeds["first"],
        first_calibration_seed=seeds["calibration"],
        definitions=_definitions(data["definitions"]),
        claims=tuple(_claim(claim, figures, sides, f"claims[{i}]") for i, claim in _list(data["claims"], "claims")),
        sides=sides,
    )
    _check_distinct([claim.id for claim in spec.claims], "claims: id")
    for claim in spec.claims:
        for finding in claim.findings:
            _name_in([other.id for other in spec.claims], finding, f"claim {claim.id}: findings")
    # A figure and a table know a run by its label.
    _check_distinct([variant.label for variant in spec.variants.values()], "variants: label")
    _check_configs(spec)
    return spec


def _grid(
    name: str, entry: Mapping[str, Any], variants: Mapping[str, Variant], at: str
) -> tuple[Grid, Figure, dict[str, Setting]]:
    """The grid, all its runs as a figure, and a setting for each cell: the grid's overrides, then the axes'."""
    shared, about = _flat(entry["set"], f"{at}.set"), _text(entry["about"], f"{at}.about")
    across, up = (_axis(entry[side], f"{at}.{side}") for side in ("across", "up"))
    chosen = tuple(_name_in(variants, v, f"{at}.variants[{i}]") for i, v in _list(entry["variants"], f"{at}.variants"))
    cells = {
        (x, y): Setting(_cell_name(name, x, y), f"{about}: {up[0]} {y}, {across[0]} {x}", {**shared, **low, **high})
        for (x, low), (y, high) in product(across[1].items(), up[1].items())
    }
    runs = tuple((cell.name, variant) for cell in cells.values() for variant in chosen)
    seeds = _integer(entry["seeds"], f"{at}.seeds", 1) if "seeds" in entry else None
    grid = Grid(name, (across[0], tuple(across[1])), (up[0], tuple(up[1])), chosen)
    figure = Figure(name, _text(entry["title"], f"{at}.title"), runs, seeds, _flag(entry, "calibration", at))
    return grid, figure, {cell.name: cell for cell in cells.values()}


def _axis(data: Any, at: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The axis' name, and the overrides of each of its values."""
    data = _fields(data, at, ("label", "values"))
    values = {str(value): _flat(block, f"{at}.values.{value}") for value, block in data["values"].items()}
    return _text(data["label"], f"{at}.label"), values


def _cell_name(grid: str, across: str, up: str) -> str:
    """Serves as a folder's name."""
    return ".".join(re.sub(r"[^\w=+-]+", "_", part) for part in (grid, up, across))


def _tier(
    name: str, entry: Mapping[str, Any], settings: Mapping[str, Setting], grids: Mapping[str, Grid], at: str
) -> Tier:
    overrides = {
        _name_in(settings, setting, f"{at}.set"): _flat(block, f"{at}.set.{setting}")
        for setting, block in _mapping(entry["set"], f"{at}.set").items()
    }
    left_out = _list(entry.get("leave_out", []), f"{at}.leave_out")
    return Tier(
        name,
        _integer(entry["seeds"], f"{at}.seeds", 1),
        overrides,
        tuple(_name_in((*settings, *grids), left, f"{at}.leave_out[{i}]") for i, left in left_out),
    )


def _definitions(data: Any) -> Definitions:
    data = _fields(data, "definitions", ("final_evaluations", "collapse_share"))
    return Definitions(
        _integer(data["final_evaluations"], "definitions.final_evaluations", 1),
        _number(data["collapse_share"], "definitions.collapse_share", lambda x: 0 < x < 1, "a number between 0 and 1"),
    )


def _claim(data: Any, figures: Mapping[str, Figure], sides: Mapping[str, str], at: str) -> Claim:
    testable = isinstance(data, Mapping) and "not_testable" not in data
    needed = ("id", "paper", "setting", *(("figure", "criteria") if testable else ("not_testable",)))
    data = _fields(data, at, needed, ("side", "findings", "predicted"))
    at = f"claim {_text(data['id'], f'{at}.id')}"
    keys = ("id", "paper", "setting", *(("predicted",) if "predicted" in data else ()))
    text: dict[str, Any] = {key: _text(data[key], f"{at}: {key}") for key in keys}
    text["side"] = _name_in(sides, data["side"], f"{at}: side") if "side" in data else next(iter(sides), "")
    text["findings"] = tuple(
        _text(name, f"{at}: findings[{i}]") for i, name in _list(data.get("findings", []), f"{at}: findings")
    )
    if not testable:
        return Claim(**text, figures=(), criteria=(), not_testable=_text(data["not_testable"], f"{at}: not_testable"))
    names = data["figure"] if isinstance(data["figure"], list) else [data["figure"]]
    names = tuple(_name_in(figures, name, f"{at}: figure") for name in names)
    runs = [run for name in names for run in figures[name].runs]
    criteria = tuple(
        _criterion(criterion, runs, f"{at}: criteria[{i}]")
        for i, criterion in _list(data["criteria"], f"{at}: criteria")
    )
    if not criteria:
        raise ConfigError(f"{at}: criteria = []: expected at least one, or not_testable with the reason")
    return Claim(**text, figures=names, criteria=criteria)


def _criterion(data: Any, runs: Sequence[Run], at: str) -> Criterion:
    kind = _name_in(KINDS, _mapping(data, at).get("kind"), f"{at}.kind")
    data = _fields(data, at, ("kind", "run", *KINDS[kind].required), KINDS[kind].optional)
    fields: dict[str, Any] = {"kind": kind}
    for key in ("run", "than"):
        if key in data:
            run = tuple(data[key]) if isinstance(data[key], list) else data[key]
            if run not in runs:
                known = ", ".join(f"[{setting}, {variant}]" for setting, variant in runs)
                raise ConfigError(f"{at}.{key} = {data[key]!r}: expected a run of the claim's figures: {known}")
            fields[key] = run
    if "metric" in data:
        fields["metric"] = _name_in(METRICS, data["metric"], f"{at}.metric")
    if "margin" in data:
        fields["margin"] = _margin(data["margin"], kind, METRICS[fields["metric"]].log, f"{at}.margin")
    if "share" in data:
        fields["share"] = _number(data["share"], f"{at}.share", lambda x: 0 < x < 1, "a number between 0 and 1")
    return Criterion(**fields)


def _margin(value: Any, kind: str, log: bool, at: str) -> float:
    """A factor for metrics that are compared as ratios; `comparable` needs one that leaves room."""
    least = (1.0 if log else 0.0) if kind == "comparable" else (0.0 if log else -math.inf)
    expected = f"a {'factor' if log else 'difference'} above {least:g}" if least > -math.inf else "a number"
    return _number(value, at, lambda x: x > least, expected)


def _check_distinct(values: Sequence[str], at: str) -> None:
    if twice := [value for value in values if values.count(value) > 1]:
        raise ConfigError(f"{at} {twice[0]!r} is used twice; give each its own")


def _check_configs(spec: Spec) -> None:
    """Build every config once, block by block so that the message can name the block, then as they are run."""
    blocks: dict[str, Mapping[str, Any]] = {"base": {}}
    blocks |= {f"settings.{name}.set": setting.overrides for name, setting in spec.settings.items()}
    blocks |= {f"variants.{name}.set": variant.overrides for name, variant in spec.variants.items()}
    blocks |= {
        f"tiers.{tier.name}.set.{name}": {**spec.settings[name].overrides, **overrides}
        for tier in spec.tiers.values()
        for name, overrides in tier.overrides.items()
    }
    layers = {at: {**spec.base, **overrides} for at, overrides in blocks.items()}
    runs = dict.fromkeys(run for figure in spec.figures.values() for run in figure.runs)
    layers |= {
        f"run [{setting}, {variant}] in tier {tier}": spec.overrides(tier, setting, variant)
        for (setting, variant), tier in product(runs, spec.tiers)
    }
    # Most tiers and figures share their configs: each is built once, in the first place that has it.
    distinct: dict[str, str] = {}
    for at, overrides in layers.items():
        distinct.setdefault(str(sorted(overrides.items())), at)
    for at in distinct.values():
        try:
            Config.from_dict(_nested(layers[at]))
        except ConfigError as error:
            raise ConfigError(f"{at}: {error}") from error


# ------------------------------------------------------------------------------------------------- checks of values


def _mapping(value: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{at} = {value!r}: expected a mapping with names for keys")
    return value


def _fields(data: Any, at: str, required: Iterable[str], optional: Iterable[str] = ()) -> Mapping[str, Any]:
    """The mapping `data`, if it has all the required keys and no unknown one."""
    data, required = _mapping(data, at), tuple(required)
    for key in data:
        _name_in((*required, *optional), key, at)
    if missing := [key for key in required if key not in data]:
        raise ConfigError(f"{at}: {missing[0]} is missing")
    return data


def _entries(
    data: Any, at: str, required: Iterable[str], optional: Iterable[str] = ()
) -> Iterable[tuple[str, str, Mapping[str, Any]]]:
    """Place, name and checked mapping of each named entry."""
    for name, entry in _mapping(data, at).items():
        yield f"{at}.{name}", name, _fields(entry, f"{at}.{name}", required, optional)


def _list(value: Any, at: str) -> Iterable[tuple[int, Any]]:
    if not isinstance(value, list):
        raise ConfigError(f"{at} = {value!r}: expected a list")
    return enumerate(value)


def _text(value: Any, at: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{at} = {value!r}: expected text")
    return value.strip()


def _number(value: Any, at: str, holds: Callable[[float], bool], expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
        raise ConfigError(f"{at} = {value!r}: expected {expected}")
    return float(value)


def _flag(entry: Mapping[str, Any], key: str, at: str) -> bool:
    value = entry.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{at}.{key} = {value!r}: expected true or false")
    return value


def _integer(value: Any, at: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{at} = {value!r}: expected an integer of at least {least}")
    return value


def _run(value: Any, settings: Mapping[str, Setting], variants: Mapping[str, Variant], at: str) -> Run:
    if not isinstance(value, list) or len(value) != 2:
        raise ConfigError(f"{at} = {value!r}: expected [setting, variant]")
    return _name_in(settings, value[0], at), _name_in(variants, value[1], at)


def _name_in(names: Iterable[str], seen: Any, at: str) -> str:
    """`seen` if it is one of `names`."""
    names = list(names)
    if seen not in names:
        close = difflib.get_close_matches(str(seen), names, n=2)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
        raise ConfigError(f"{at}: unknown name {seen!r}; {hint}")
    return seen


def _known(name: str, entries: Mapping[str, Any], kind: str) -> Any:
    return entries[_name_in(entries, name, kind)]


def _flat(data: Any, at: str) -> dict[str, Any]:
    """Overrides as dotted names of single values, so that a later layer replaces values and never whole sections."""
    flat = {}
    for key, value in _mapping({} if data is None else data, at).items():
        flat |= {f"{key}.{k}": v for k, v in _flat(value, at).items()} if isinstance(value, Mapping) else {key: value}
    if "seed" in flat:
        raise ConfigError(f"{at}: seed = {flat['seed']!r}: each run gets its own; use seeds.first")
    return flat


def _nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as the nested mapping that `Config.from_dict` reads; one with the value None is left out."""
    data: dict[str, Any] = {}
    for dotted, value in ((dotted, value) for dotted, value in overrides.items() if value is not None):
        *sections, name = dotted.split(".")
        node = data
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{dotted}: {section} = {node!r} has no fields")
        node[name] = value
    return data


# ----------------------------------------------------------------------------------------------------- a run's file


_HEADER = ("config", "digest", "seconds", "diverged")


@dataclass(frozen=True)
class RunResult:
    """One finished run."""

    seed: int
    metrics: Metrics
    """A column per name in `COLUMNS`, NaN where there is no value."""
    diverged: str | None
    """The message of TrainingDiverged; None where training went to its end."""
    digest: str
    """Of the config and of what else decides the numbers."""
    seconds: float
    """Of the processor."""


def write_run(path: str | Path, records: Sequence[Mapping[str, Any]], *, header: Mapping[str, Any]) -> None:
    """Write a run's CSV file: `# header as JSON`, the names in `COLUMNS`, a row per record with 4 significant digits.
    There are many such files: numbers go without the 0 before the point.

    Records are lines of metrics.jsonl; what is missing, None or NaN becomes an empty cell and other keys are left out.
    `header` holds `config` (the dotted fields that differ from `Config`'s defaults), `digest`, `seconds`, `diverged`.
    The file appears whole or not at all. Raises ValueError for a header that `read_run` could not use.
    """
    path = Path(path)
    if missing := [key for key in _HEADER if key not in header]:
        raise ValueError(f"{path}: the header of a run needs {', '.join(_HEADER)}; {missing[0]} is missing")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{os.getpid()}")  # two processes never write the same one
    with part.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# {json.dumps(header, ensure_ascii=False)}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([_cell(column, record.get(column)) for column in COLUMNS] for record in records)
    part.replace(path)


def read_run(path: str | Path) -> RunResult:
    """Read what `write_run` wrote. Raises FileNotFoundError, or ValueError for a file that is not a run's."""
    return parse_run(Path(path).read_bytes(), path)


def read_runs(folder: str | Path) -> dict[str, dict[int, RunResult]]:
    """All runs of a setting, by variant and seed in ascending order. `folder` is `OUT/runs/<tier>/<setting>`.

    Empty where there are none. Raises ValueError for a file that is not a run's, OSError for a broken archive.
    """
    runs: dict[str, dict[int, RunResult]] = {}
    for name, content in files_in(folder).items():
        run = parse_run(content, Path(folder) / name)
        runs.setdefault(name.partition("/")[0], {})[run.seed] = run
    return runs


def parse_run(content: bytes, path: str | Path) -> RunResult:
    """A run from the bytes of its CSV file. Raises ValueError, which names `path`, if they are not a run's."""
    try:
        first, _, rest = content.decode("utf-8").partition("\n")
        rows, header = list(csv.reader(rest.splitlines())), json.loads(first.removeprefix("#"))
        if tuple(rows[0]) not in (COLUMNS, COLUMNS[:-2]):
            raise ValueError(f"its columns are {rows[0]}")
        cells = [[*row, *[""] * (len(COLUMNS) - len(rows[0]))] for row in rows[1:]]
        table = np.array([[float(cell or math.nan) for cell in row] for row in cells], dtype=np.float64)
        return RunResult(
            seed=header["config"].get("seed", Config.seed),
            metrics=dict(zip(COLUMNS, table.reshape(-1, len(COLUMNS)).T, strict=True)),
            diverged=header["diverged"],
            digest=header["digest"],
            seconds=float(header["seconds"]),
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is not a run's CSV file ({error!r}); delete it and run again") from error


def _cell(column: str, value: float | int | None) -> str:
    if value is None or math.isnan(value):
        return ""
    if column in ("global_step", "grad_step"):
        return str(int(value))
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.4g}")
