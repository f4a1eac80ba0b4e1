"""Run a part of the alignment evidence over its seeds; write one file a seed, then result.json, figures and tables.

python evidence/alignment/run.py losses              # the reporting seeds
python evidence/alignment/run.py losses 100 101      # some seeds only
python evidence/alignment/run.py table               # only add up what is in seeds/

A seed whose file is whole is not run again, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import sys
from types import ModuleType

import constitution
import losses
import matplotlib
import overoptimisation
import reft
import reward_model
import rlaif
from common import HERE

from polm.evals.claims import write_claims

matplotlib.use("Agg")

PARTS: dict[str, ModuleType] = {
    "losses": losses,
    "overoptimisation": overoptimisation,
    "reward_model": reward_model,
    "rlaif": rlaif,
    "constitution": constitution,
    "reft": reft,
}


def main() -> None:
    part, *numbers = sys.argv[1:] or ["table"]
    if part != "table":
        PARTS[part].main([int(number) for number in numbers])
    claims = []
    for name, module in PARTS.items():
        mine = module.build_claims()
        if mine:
            print(f"\n{name}\n\n{module.write_table(mine)}")
            module.draw(mine)
        claims += mine
    if claims:
        write_claims(HERE / "result.json", claims)


if __name__ == "__main__":
    main()
