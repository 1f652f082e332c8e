"""The command `python -m minirl_edu.worlds`; see the package."""

import argparse
import time
from pathlib import Path

from minirl_edu.plots import to_png
from minirl_edu.worlds.report import figure, one_table, run_world, world_table, write_csv
from minirl_edu.worlds.simulations import WORLDS


def main(arguments: list[str] | None = None) -> None:
    """Run one world and write its files, or print the table of all three."""
    parser = argparse.ArgumentParser(prog="python -m minirl_edu.worlds", description=main.__doc__)
    parser.add_argument("world", choices=[*WORLDS, "table"])
    parser.add_argument("--seeds", type=int, default=8, help="runs of each variant (8)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV files and the figures")
    chosen = parser.parse_args(arguments)
    if chosen.world == "table":
        print(one_table(chosen.out))
        return
    chosen.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    runs, sweep = run_world(chosen.world, chosen.seeds)
    write_csv(chosen.out / f"{chosen.world}.csv", runs, sweep)
    (chosen.out / f"{chosen.world}.png").write_bytes(to_png(figure(chosen.world, runs, sweep), scale=1))
    print(world_table(chosen.world, runs))
    print(f"\n{chosen.seeds} seeds, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
