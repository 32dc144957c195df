"""A load that shifts between long answers and long prompts, sized by how fast the machine is, and the clients that ask for it."""

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc.aio

from orchestrator.control.slo import Slo
from orchestrator.control.view import ClusterView
from orchestrator.control.view_wire import view_from_pb
from protos import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

STORY = "The long journey to the north went on through rain and snow and over many hills, and nobody knew its end. "
NUM_PROMPTS = 4
#: Prompts and the tokens of their answers, of each kind of load.
KINDS = {
    "answers": ([f"Day {day}. Tell me" for day in range(NUM_PROMPTS)], 100),
    "prompts": ([f"Day {day}. {STORY * 12}" for day in range(NUM_PROMPTS)], 8),
}
#: Long answers that are decoded at a time, long prompts that come while one is computed, and the targets: in what one alone takes.
ANSWERS_AT_A_TIME, PROMPTS_A_PROMPT = 3.0, 1.3
TTFT_PROMPTS, TPOT_TOKENS = 4.0, 4.0


@dataclass(frozen=True, slots=True)
class Speed:
    """Of this machine, alone: a long prompt, and a token of an answer."""

    prompt_s: float
    token_s: float

    @property
    def slo(self) -> Slo:
        """The targets."""
        return Slo(TTFT_PROMPTS * self.prompt_s, TPOT_TOKENS * self.token_s)

    def rate_rps(self, kind: str) -> float:
        """Requests of a span."""
        if kind == "prompts":
            return PROMPTS_A_PROMPT / self.prompt_s
        return ANSWERS_AT_A_TIME / (KINDS[kind][1] * self.token_s)


@dataclass(frozen=True, slots=True)
class Arrival:
    """at_s: from the beginning of the load. number: of the prompt, of its kind."""

    at_s: float
    span: int
    kind: str
    number: int


@dataclass(slots=True)
class Answer:
    """What came of one."""

    arrival: Arrival
    ttft_s: float
    tpot_s: float
    is_right: bool
    attempts: int
    pauses_s: list[float]


def arrivals(spans: Sequence[tuple[str, float]], speed: Speed, seed: int) -> list[Arrival]:
    """The same for every run of a round."""
    rng, found, begins_s = random.Random(seed), [], 0.0
    for span, (kind, length_s) in enumerate(spans):
        at_s = begins_s
        while (at_s := at_s + rng.expovariate(speed.rate_rps(kind))) < begins_s + length_s:
            found.append(Arrival(at_s, span, kind, rng.randrange(NUM_PROMPTS)))
        begins_s += length_s
    return found


class Clients:
    """Asks, and knows what is right."""

    def __init__(self, channel: grpc.aio.Channel, control: grpc.aio.Channel) -> None:
        self._client = inference_pb2_grpc.InferenceServiceStub(channel)
        self._control = control_pb2_grpc.GatewayControlServiceStub(control)
        self._num_asked = 0

    async def ask(self, kind: str, number: int) -> tuple[list[int], list[float], str, int]:
        """Tokens, seconds after which they came, the id, the attempts. Nobody has its prompt in a cache."""
        self._num_asked += 1
        prompts, num_tokens = KINDS[kind]
        request = inference_pb2.GenerateRequest(
            text=prompts[number],
            sampling=inference_pb2.SamplingParams(max_tokens=num_tokens, ignore_eos=True),
            cache_salt=f"{self._num_asked}",
        )
        tokens: list[int] = []
        times: list[float] = []
        request_id, attempts, began_s = "", 0, time.monotonic()
        async for message in self._client.Generate(request):
            tokens += message.token_ids
            times += [time.monotonic() - began_s] * len(message.token_ids)
            request_id = message.request_id or request_id
            attempts = message.timings.attempts or attempts
        return tokens, times, request_id, attempts

    async def pauses_s(self, request_id: str) -> list[float]:
        """Of its moves, from the last token of the one worker to the next of the other."""
        answer = await self._control.Explain(control_pb2.ExplainRequest(request_id=request_id))
        moves = [move for sample in answer.record.samples for move in sample.migrations]
        return [move.pause_s for move in moves if move.HasField("pause_s")]

    async def view(self) -> ClusterView:
        """That the gateway has."""
        return view_from_pb((await self._control.GetView(control_pb2.GetViewRequest())).view)


def mean_gap_s(times_s: Sequence[float]) -> float:
    """Between two tokens."""
    return (times_s[-1] - times_s[0]) / (len(times_s) - 1)


Expected = dict[tuple[str, int], list[int]]


async def measure_speed(clients: Clients) -> tuple[Speed, Expected]:
    """Each prompt alone: what is right, and how long it takes."""
    expected: Expected = {}
    prompts_s, tokens_s = [], []
    for kind, (prompts, _) in KINDS.items():
        for number in range(len(prompts)):
            tokens, times, _, _ = await clients.ask(kind, number)
            expected[kind, number] = tokens
            if kind == "prompts":
                prompts_s.append(times[0])
            else:
                tokens_s.append(mean_gap_s(times))
    return Speed(statistics.median(prompts_s), statistics.median(tokens_s)), expected


async def serve(clients: Clients, load: Sequence[Arrival], expected: Expected) -> list[Answer]:
    """All of the load, each at its time. Raises grpc.RpcError when a request fails."""
    began_s = time.monotonic()

    async def one(arrival: Arrival) -> Answer:
        await asyncio.sleep(began_s + arrival.at_s - time.monotonic())
        tokens, times, request_id, attempts = await clients.ask(arrival.kind, arrival.number)
        return Answer(
            arrival,
            times[0],
            mean_gap_s(times),
            tokens == expected[arrival.kind, arrival.number],
            attempts,
            await clients.pauses_s(request_id),
        )

    return list(await asyncio.gather(*map(one, load)))
