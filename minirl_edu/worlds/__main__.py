"""The command `python -m minirl_edu.worlds`; see the package."""

import argparse
import time
from pathlib import Path

from minirl_edu.plots import to_png
from minirl_edu.worlds.report import (
    figure,
    one_table,
    phases,
    phases_agreement,
    phases_figure,
    phases_table,
    run_world,
    world_table,
    write_csv,
    write_phases,
)
from minirl_edu.worlds.simulations import WORLDS


def main(arguments: list[str] | None = None) -> None:
    """Run one world or the phase diagram and write its files, or print the table of all three worlds."""
    parser = argparse.ArgumentParser(prog="python -m minirl_edu.worlds", description=main.__doc__)
    parser.add_argument("world", choices=[*WORLDS, "phases", "table"])
    parser.add_argument("--seeds", type=int, default=8, help="runs of each variant (8)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV files and the figures")
    chosen = parser.parse_args(arguments)
    if chosen.world == "table":
        print(one_table(chosen.out))
        return
    chosen.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if chosen.world == "phases":
        rows = phases(chosen.seeds)
        write_phases(chosen.out / "phases.csv", rows)
        (chosen.out / "phases.png").write_bytes(to_png(phases_figure(rows), scale=1))
        print(phases_table(rows))
        for (predicted, seen), cells in phases_agreement(rows).items():
            print(f"predicted to fail: {predicted}, fails: {seen}: {cells} cells")
        print(f"\n{chosen.seeds} seeds, {time.perf_counter() - start:.0f} s")
        return
    runs, sweep = run_world(chosen.world, chosen.seeds)
    write_csv(chosen.out / f"{chosen.world}.csv", runs, sweep)
    (chosen.out / f"{chosen.world}.png").write_bytes(to_png(figure(chosen.world, runs, sweep), scale=1))
    print(world_table(chosen.world, runs))
    print(f"\n{chosen.seeds} seeds, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
