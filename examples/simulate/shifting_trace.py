"""A trace whose load shifts: long prompts with short answers, then shorter prompts with long answers.

    python examples/simulate/shifting_trace.py > examples/simulate/shifting.csv

The first half of the rows is of one kind and the second of the other. One seed: the same bytes each time.
"""

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

NUM_ROWS, RATE_RPS, SEED = 440, 10.0, 1
#: Of prompt and answer, before and after the shift.
BEFORE, AFTER = ((6000, 14000), (10, 30)), ((1500, 2500), (1200, 2400))
BEGIN = datetime(2026, 11, 26, 12, tzinfo=UTC)


def lines() -> Iterator[str]:
    """The CSV of the Azure LLM inference traces."""
    rng = random.Random(SEED)
    yield "TIMESTAMP,ContextTokens,GeneratedTokens"
    at_s = 0.0
    for index in range(NUM_ROWS):
        prompt, answer = BEFORE if index < NUM_ROWS // 2 else AFTER
        moment = BEGIN + timedelta(seconds=at_s)
        yield f"{moment:%Y-%m-%d %H:%M:%S.%f}0,{rng.randint(*prompt)},{rng.randint(*answer)}"
        at_s += rng.expovariate(RATE_RPS)


if __name__ == "__main__":
    print("\n".join(lines()))
