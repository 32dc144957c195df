"""Encode, prefill and decode apart, beside other shapes on the same two cores, under Poisson arrivals.

    python benchmarks/serving/epd.py [--quick] [--json FILE] [--plot FILE] [--encoders NAMES] [--duration S]

Two worker processes of one thread each, on a core of their own; the gateway and the client are a third process, on both:

    E + PD     one encodes, one prefills and decodes
    EP + D     one encodes and prefills, one decodes: the paper's baseline (DistServe)
    2 x EPD    each does all, requests are spread: data parallel

The models are random weights: a text model of 21 million parameters, and three encoders that differ in what a picture costs
beside the prefill of its 64 tokens, in FLOPs: light (0.17; InternVL2-8B has 0.20), balanced (1.3; MiniCPM-V 2.6 has 1.2) and
heavy (13; SmolVLM-256M has 15). The workloads are the paper's (2, 4, 6, 8 pictures, 22 tokens of text, 10 of output),
one with long answers, one of which half has no pictures, and one that sends the same six pictures again and again. All
others never repeat a picture. Every shape gets the same requests at the same times.

Each shape has the best of its own settings (SETTINGS): the one with the highest attainment on 4 pictures, then the
lowest TTFT. Loads are parts of what 2 x EPD finishes of that workload in a closed loop. The target of a workload is SLO_SCALE
times the medians of the best shape without load, for TTFT and TPOT. TTFT is the client's: it has all waiting in it.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serving.epd_load import (  # noqa: E402
    EPD,
    Arrival,
    Row,
    Seen,
    Workload,
    arrivals,
    comparison,
    markdown,
    row_of,
    slo_of,
)
from benchmarks.serving.epd_plot import plot  # noqa: E402
from benchmarks.serving.image_models import EncoderShape, TextShape, picture, write_model  # noqa: E402
from benchmarks.serving.image_shapes import (  # noqa: E402
    D,
    E,
    P,
    Served,
    WorkerOption,
    image_request,
    served,
    two_cores,
)
from orchestrator.bench.machine import describe_machine  # noqa: E402
from orchestrator.control.slo import Slo  # noqa: E402
from protos import inference_pb2 as pb  # noqa: E402
from tests.support.tiny_vision_models import IMAGE  # noqa: E402

PARALLEL = "2 x EPD"
SHAPES = {EPD: (E, P | D), "EP + D": (E | P, D), PARALLEL: (E | P | D, E | P | D)}
TEXT = TextShape(num_layers=12, hidden_size=384, intermediate_size=1024, num_heads=6, num_kv_heads=2)
ENCODERS = {
    "light": EncoderShape(3, 128, 512, 4, tile_size=256, scale_factor=2),
    "balanced": EncoderShape(8, 256, 768, 8, tile_size=256, scale_factor=2),
    "heavy": EncoderShape(12, 640, 2560, 10, tile_size=256, scale_factor=2),
}
PAPERS = [Workload(f"{num} pictures", num) for num in (2, 4, 6, 8)]
TUNED_ON, TUNED_ENCODER = PAPERS[1], "balanced"
FAIR = Workload("2 pictures, long answers", 2, output_tokens=(64, 128))
MIXED = Workload("half without pictures", 2, output_tokens=(32, 32), text_tokens=128, text_only=0.5)
REPEATED = Workload("4 of six pictures", 4, num_distinct=6)
WORKLOADS = {"light": [PAPERS[0]], TUNED_ENCODER: [*PAPERS, FAIR, MIXED, REPEATED], "heavy": [PAPERS[0]]}
QUICK_WORKLOADS = {TUNED_ENCODER: [TUNED_ON]}
HIGH_LOAD, LOW_LOAD, TUNING_LOAD = 0.8, 0.5, 0.7
QUICK_DURATION_S = 3.0
#: Those that are sent at the low load too.
AT_BOTH_LOADS = (*PAPERS[1:], FAIR)
SLO_SCALE = 3.0
#: In the mean, unless it is quick: a load lasts longer than --duration where it brings fewer.
MIN_REQUESTS = 30
COMMON = ("--threads", "1", "--kv-cache-mib", "64", "--image-cache-mib", "64")


@dataclass(frozen=True, slots=True)
class Setting:
    """What was tried: tokens of an engine's step, and patches that are encoded together."""

    token_budget: int
    patch_budget: int

    @property
    def options(self) -> tuple[str, ...]:
        """Of a worker."""
        budgets = ("--token-budget", str(self.token_budget), "--encode-patch-budget", str(self.patch_budget))
        return (*COMMON, "--max-running-sequences", "32", *budgets)


#: One picture has 256 patches and 64 tokens.
SETTINGS = (Setting(512, 1024), Setting(128, 256), Setting(512, 256))


class Bench:
    """All shapes of one model, each with its setting, and what they are sent."""

    def __init__(self, shapes: dict[str, Served], encoder: EncoderShape, seed: int) -> None:
        self._shapes = shapes
        self._side = encoder.tile_size
        self._seed = seed

    def next_seed(self) -> int:
        """Of requests that nobody has sent yet."""
        self._seed += 1
        return self._seed

    async def warm_up(self) -> None:
        """Kernels, connections, and what the gateway knows of how fast encoders are."""
        for shape in self._shapes:
            await self.closed_loop(shape, TUNED_ON, 4, 2)

    async def closed_loop(
        self, shape: str, workload: Workload, num: int, clients: int
    ) -> tuple[float, list[Seen]]:
        """Requests per second, and what each saw, with so many clients that wait for answers."""
        asked = iter(arrivals(workload, 1.0, 10.0 * num, self.next_seed())[:num])
        began_s = time.perf_counter()
        found: list[Seen] = []

        async def client() -> None:
            # Shared by the clients: each takes the next one when its last has ended.
            found.extend([await self._ask(shape, one, began_s) for one in asked])

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
        return len(found) / (time.perf_counter() - began_s), found

    async def open_loop(self, shape: str, asked: Sequence[Arrival]) -> list[Seen]:
        """Each at its time, whatever has been answered."""
        requests = [self._request(one) for one in asked]
        began_s = time.perf_counter()

        async def send(one: Arrival, request: pb.GenerateRequest) -> Seen:
            await asyncio.sleep(began_s + one.at_s - time.perf_counter())
            return await self._see(shape, request, began_s)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(send(*both)) for both in zip(asked, requests, strict=True)]
        return [task.result() for task in tasks]

    async def slo(self, workload: Workload) -> Slo:
        """Of a workload: by the shape that is fastest when nothing else runs."""
        alone = [
            slo_of((await self.closed_loop(shape, workload, 2, 1))[1], SLO_SCALE) for shape in self._shapes
        ]
        return Slo(min(slo.ttft_s for slo in alone), min(slo.tpot_s for slo in alone))

    async def capacity_rps(self, workload: Workload) -> float:
        """What data parallel workers finish when there is always more to do."""
        rate_rps, _ = await self.closed_loop(PARALLEL, workload, 12, 6)
        return rate_rps

    async def rows(
        self, name: str, workload: Workload, loads: Sequence[float], duration_s: float
    ) -> list[Row]:
        """Of all shapes, under each load."""
        slo = await self.slo(workload)
        capacity_rps = await self.capacity_rps(workload)
        found = []
        for load in loads:
            rate_rps = load * capacity_rps
            lasts_s = (
                duration_s if duration_s <= QUICK_DURATION_S else max(duration_s, MIN_REQUESTS / rate_rps)
            )
            asked = arrivals(workload, rate_rps, lasts_s, self.next_seed())
            for shape in self._shapes:
                seen = await self.open_loop(shape, asked)
                found.append(
                    row_of(
                        name, workload.name, shape,
                        load=load, rate_rps=rate_rps, slo=slo, seen=seen,
                    )
                )  # fmt: skip
        return found

    async def _ask(self, shape: str, one: Arrival, began_s: float) -> Seen:
        return await self._see(shape, self._request(one), began_s)

    async def _see(self, shape: str, request: pb.GenerateRequest, began_s: float) -> Seen:
        sent_s = time.perf_counter()
        try:
            answer = await self._shapes[shape].ask(request)
        except grpc.RpcError as error:
            print(f"{shape}: a request failed: {error.code().name}: {error.details()}", file=sys.stderr)
            return Seen(sent_s - began_s, (), 0.0, 0, 0)
        encodes = answer.timings.encodes
        return Seen(
            answer.sent_s - began_s,
            answer.token_times_s,
            answer.timings.encode_s,
            len(request.images),
            sum(encode.num_tiles - encode.num_cached_tiles for encode in encodes),
        )

    def _request(self, one: Arrival) -> pb.GenerateRequest:
        # The number comes first, so that no prompt begins as another does. One letter is about one token.
        text = f"{one.number} "
        words = "x" * max(0, one.num_text_tokens - len(text))
        images = [picture(seed, self._side) for seed in one.pictures]
        return image_request(text + IMAGE * len(images) + words, images, one.num_output_tokens)


async def start(
    stack: AsyncExitStack, encoder: EncoderShape, folder: Path, settings: dict[str, Setting], seed: int
) -> Bench:
    """All shapes at once; those that are asked nothing compute nothing."""
    cores = two_cores()
    shapes = {}
    for number, (name, phases) in enumerate(SHAPES.items()):
        options = settings[name].options
        workers = [WorkerOption(one, core, options) for one, core in zip(phases, cores, strict=True)]
        shape = served(str(folder), workers, folder.parent, f"s{number}")
        shapes[name] = await stack.enter_async_context(shape)
    bench = Bench(shapes, encoder, seed)
    await bench.warm_up()
    return bench


async def best_settings(encoder: EncoderShape, folder: Path, duration_s: float) -> dict[str, Setting]:
    """Of each shape the setting with the highest attainment, then the lowest TTFT, on 4 pictures."""
    found: dict[str, dict[Setting, tuple[float, float]]] = {shape: {} for shape in SHAPES}
    slo, asked = Slo(0, 0), []
    for number, setting in enumerate(SETTINGS):
        async with AsyncExitStack() as stack:
            bench = await start(stack, encoder, folder, dict.fromkeys(SHAPES, setting), 100 * number)
            if number == 0:
                slo, capacity_rps = await bench.slo(TUNED_ON), await bench.capacity_rps(TUNED_ON)
                asked = arrivals(TUNED_ON, TUNING_LOAD * capacity_rps, duration_s, 99)
            for shape in SHAPES:
                seen = await bench.open_loop(shape, asked)
                row = row_of("", "", shape, load=0, rate_rps=0, slo=slo, seen=seen)
                found[shape][setting] = -row.attainment, row.ttft_p50_ms
    return {shape: min(tried, key=tried.__getitem__) for shape, tried in found.items()}


async def measure(
    workloads: dict[str, list[Workload]], duration_s: float, *, is_tuned: bool
) -> tuple[dict[str, Setting], list[Row]]:
    """The settings of all shapes, and all rows."""
    settings = dict.fromkeys(SHAPES, SETTINGS[0])
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="epd-") as path:
        folders = {name: Path(path) / name / "model" for name in workloads}
        for name, folder in folders.items():
            write_model(folder, ENCODERS[name], TEXT)
        if is_tuned:
            name = TUNED_ENCODER if TUNED_ENCODER in workloads else next(iter(workloads))
            settings = await best_settings(ENCODERS[name], folders[name], duration_s)
        for number, (name, asked) in enumerate(workloads.items()):
            async with AsyncExitStack() as stack:
                bench = await start(stack, ENCODERS[name], folders[name], settings, 1000 * (number + 1))
                for workload in asked:
                    loads = (LOW_LOAD, HIGH_LOAD) if is_tuned and workload in AT_BOTH_LOADS else (HIGH_LOAD,)
                    rows += await bench.rows(name, workload, loads, duration_s)
                    print(f"{name}: {workload.name} is done", file=sys.stderr)
    return settings, rows


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one workload and one load, untuned, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the result there, as SVG")
    parser.add_argument("--encoders", default=",".join(ENCODERS), help="NAME,NAME,...")
    parser.add_argument("--duration", type=float, default=6.0, metavar="S", help="of each load")
    args = parser.parse_args()
    workloads = {name: WORKLOADS[name] for name in args.encoders.split(",")}
    if args.quick:
        workloads = QUICK_WORKLOADS
    duration_s = QUICK_DURATION_S if args.quick else args.duration
    settings, rows = asyncio.run(measure(workloads, duration_s, is_tuned=not args.quick))
    for shape, setting in settings.items():
        print(f"{shape}: token budget {setting.token_budget}, patch budget {setting.patch_budget}")
    print(f"\n{markdown(rows)}\n\n{comparison(rows)}")
    if args.plot:
        args.plot.write_text(plot(rows), encoding="utf-8")
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {
            "date": date,
            "machine": describe_machine(),
            "duration_s": duration_s,
            "slo_scale": SLO_SCALE,
            "is_tuned": not args.quick,
            "settings": {shape: asdict(setting) for shape, setting in settings.items()},
            "encode_to_prefill": {
                name: ENCODERS[name].picture_flops / ENCODERS[name].num_embeddings / TEXT.token_flops
                for name in workloads
            },
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
