"""Run a part of the alignment evidence over its seeds: one file a seed, then result.json, figures, the README's tables.

python evidence/alignment/run.py losses              # the reporting seeds
python evidence/alignment/run.py losses 100 101      # some seeds only
python evidence/alignment/run.py table               # only add up what is in seeds/

A seed whose file is in seeds/ is not run again, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import sys
from types import ModuleType

import constitution
import fine_tuning
import importance
import judged
import losses
import matplotlib
import overoptimisation
import own_answers
import principles
import reft
import reward_kinds
import reward_model
import rlaif
import steps
from common import HERE, RUNS, read_row, write_row

from polm.evals.claims import fill_tables, write_claims

matplotlib.use("Agg")

PARTS: dict[str, ModuleType] = {
    "fine_tuning": fine_tuning,
    "losses": losses,
    "overoptimisation": overoptimisation,
    "own_answers": own_answers,
    "importance": importance,
    "reward_model": reward_model,
    "reward_kinds": reward_kinds,
    "steps": steps,
    "rlaif": rlaif,
    "judged": judged,
    "constitution": constitution,
    "principles": principles,
    "reft": reft,
}


def run_seed(module: ModuleType, part: str, seed: int) -> None:
    """Run a seed of a part; its file comes into seeds/ when all of its arms are there."""
    done = HERE / "seeds" / f"{part}-{seed}.json"
    if done.is_file():
        return
    unfinished = RUNS / "unfinished" / done.name
    module.run(seed, unfinished)
    write_row(done, read_row(unfinished))
    unfinished.unlink()


def main() -> None:
    part, *numbers = sys.argv[1:] or ["table"]
    if part != "table":
        for seed in [int(number) for number in numbers] or PARTS[part].MY_SEEDS:
            run_seed(PARTS[part], part, seed)
    claims, tables = [], {}
    for name, module in PARTS.items():
        mine = module.build_claims()
        if mine:
            tables[name] = module.write_table(mine)
            print(f"\n{name}\n\n{tables[name]}")
            module.draw(mine)
        claims += mine
    fill_tables(HERE / "README.md", tables)
    if claims:
        write_claims(HERE / "result.json", claims)


if __name__ == "__main__":
    main()
