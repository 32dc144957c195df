"""A closed loop of clients of one engine in this process, with lengths as in the Azure conversation trace."""

import math
import random
import time

import numpy as np
import torch

from workers.api import Phase, RequestId, RequestKey, SamplingParams, Submit
from workers.engine.engine import Engine
from workers.engine.messages import Output, TokensDecoded
from workers.engine.step_loop import StepLoop

MEAN_PROMPT, MEAN_ANSWER = 930, 275
#: What cutting at these lengths takes from the mean, given back.
CUT_FACTORS = {4096: 1.065, 1024: 1.007}
BOTH = frozenset({Phase.PREFILL, Phase.DECODE})


class Clients:
    """Requests of random lengths, one after another for each client."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._random = random.Random(1)
        self._num_submitted = 0
        self._left: dict[RequestKey, int] = {}
        self.reset()

    def reset(self) -> None:
        """Count from here."""
        self.num_output = self.num_prompt = self.num_finished = self.num_running = self.num_looks = 0

    def submit(self) -> None:
        """One more."""
        num_prompt = self._length(MEAN_PROMPT, 1.0, 4096)
        num_answer = self._length(MEAN_ANSWER, 0.6, 1024)
        key = RequestKey(RequestId(f"r{self._num_submitted}"), 1)
        self._num_submitted += 1
        tokens = np.random.default_rng(self._num_submitted).integers(0, 128_000, num_prompt).tolist()
        self._left[key] = num_answer
        self.num_prompt += num_prompt
        self._engine.handle(
            Submit(key, BOTH, tuple(tokens), SamplingParams(num_answer), 1e6), time.monotonic()
        )

    def take(self, outputs: list[Output]) -> None:
        """Count tokens, and follow each request that ended by another."""
        for output in outputs:
            if isinstance(output, TokensDecoded):
                pairs = [(key, 1) for key in output.keys]
            elif hasattr(output, "token_ids") and hasattr(output, "key"):
                pairs = [(output.key, len(output.token_ids))]
            else:
                continue
            for key, num in pairs:
                self.num_output += num
                self._left[key] -= num
                if self._left[key] == 0:
                    del self._left[key]
                    self.num_finished += 1
                    self.submit()

    def run(self, loop: StepLoop, duration_s: float) -> float:
        """Steps for so long; returns the seconds in which the host waited for the GPU."""
        waited_s, end_s = 0.0, time.perf_counter() + duration_s
        synchronize = torch.cuda.Event.synchronize

        def wait(event: torch.cuda.Event) -> None:
            nonlocal waited_s
            began_s = time.perf_counter()
            synchronize(event)
            waited_s += time.perf_counter() - began_s

        torch.cuda.Event.synchronize = wait
        try:
            while time.perf_counter() < end_s:
                loop.step()
                self.num_running += self._engine.num_running
                self.num_looks += 1
        finally:
            torch.cuda.Event.synchronize = synchronize
        return waited_s

    def _length(self, mean: float, sigma: float, most: int) -> int:
        """Lognormal, cut at `most`; its mean is that of what is cut."""
        median = mean / math.exp(sigma**2 / 2) * CUT_FACTORS[most]
        return max(8, min(most, round(self._random.lognormvariate(math.log(median), sigma))))
