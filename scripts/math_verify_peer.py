"""math-verify on pairs from standard input: run by a Python that has it, which need not be ours; no import of ours.

Reads one JSON object a line with `answer` and `completion`, writes one with `accepted` and `seconds`. The gold is put in
a box unless it has delimiters of its own; settings are the library's own, boxed answers first.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from importlib.metadata import version


def main() -> None:
    """Serve until standard input ends; the first line written names the versions."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify  # pyright: ignore[reportMissingImports]

    logging.disable(logging.CRITICAL)
    config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    print(json.dumps({"math-verify": version("math-verify"), "python": sys.version.split()[0]}), flush=True)
    for line in sys.stdin:
        pair = json.loads(line)
        gold = pair["answer"]
        if "$" not in gold and "\\boxed" not in gold:
            gold = f"\\boxed{{{gold}}}"
        start = time.perf_counter()
        try:
            parsed = parse(pair["completion"], extraction_config=config)
            accepted = bool(verify(parse(gold, extraction_config=config), parsed))
        except Exception as exc:  # noqa: BLE001  (it raises many kinds; each is a pair that it does not accept)
            accepted = False
            print(f"{type(exc).__name__}: {exc}"[:200], file=sys.stderr)
        print(json.dumps({"accepted": accepted, "seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
