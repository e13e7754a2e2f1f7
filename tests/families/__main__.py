"""Takes families through the toolkit: `python -m tests.families [FAMILY ...]`.

Without names all are taken, and docs/families.md is written.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

# Before anything imports a library that reads them; a process for each core, one thread each.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TQDM_DISABLE"] = "1"


def main() -> int:
    """Returns 1 if a family does not work."""
    from tests.families.check import LOOKALIKE
    from tests.families.models import CONFIGS
    from tests.families.outcome import COLUMNS
    from tests.families.page import PAGE, page
    from tests.families.pool import check_all
    from tests.families.text import NO_LANGUAGE_MODEL

    every = [*sorted({*CONFIGS, *NO_LANGUAGE_MODEL}), LOOKALIKE]
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("family", nargs="*", help="model types; all of them if none is given")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    given = parser.parse_args()
    if unknown := set(given.family) - set(every):
        parser.error(f"no such family: {', '.join(sorted(unknown))}")
    started = time.perf_counter()

    def done(outcome) -> None:
        words = "refused" if outcome.refused else "works" if outcome.works else "does not work"
        print(f"{time.perf_counter() - started:6.0f} s  {outcome.family}: {words}", flush=True)
        for said, keys in outcome.reasons().items():
            print(f"          {', '.join(COLUMNS[key] for key in keys)}: {said}", flush=True)

    outcomes = check_all(given.family or every, given.jobs, done)
    if not given.family:
        PAGE.write_text(page(outcomes), encoding="utf-8")
        print(f"{PAGE} is written")
    return 0 if all(found.works or found.refused for found in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
