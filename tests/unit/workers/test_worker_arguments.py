"""The command line of a plain worker process."""

from collections.abc import Sequence

import pytest
from annotated_types import Ge, Le

from kvtransfer.codecs.codec import CodecId
from kvtransfer.config import TransportChoice
from orchestrator.manifest.engine import Engine, SpanReuse
from orchestrator.manifest.models import KvTransfer
from workers import main as worker_main
from workers.api import (
    Batching,
    Device,
    EngineConfig,
    HostCacheCodec,
    KvDtype,
    PhaseSharing,
    PrefillOrder,
    SpanReuseConfig,
    WeightDtype,
    WorkerSpec,
)

NEEDED = ("--worker-id", "a-0", "--phases", "prefill,decode", "--model", "m.gguf")


def spec_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> WorkerSpec:
    """What a worker with these arguments would be started with."""
    seen: list[WorkerSpec] = []

    async def serve(spec: WorkerSpec) -> None:
        seen.append(spec)

    monkeypatch.setattr(worker_main, "_serve", serve)
    assert worker_main.main([*NEEDED, *arguments]) == 0
    return seen[0]


def error_of(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        worker_main.main([*NEEDED, *arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_without_options_the_engine_has_its_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spec_of(monkeypatch).engine == EngineConfig()


def test_on_a_gpu_weights_are_bfloat16_and_kv_takes_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(monkeypatch, "--device", "cuda")
    assert spec.device is Device.CUDA
    assert spec.engine == EngineConfig(weight_dtype=WeightDtype.BFLOAT16, kv_cache_bytes=0, tile_tokens=128)
    spec = spec_of(monkeypatch, *["--device", "cuda", "--weight-dtype", "float16", "--kv-cache-mib", "7"])
    assert (spec.engine.weight_dtype, spec.engine.kv_cache_bytes) == (WeightDtype.FLOAT16, 7 * 2**20)
    spec = spec_of(monkeypatch, *["--device", "cuda", "--weight-dtype", "fp8", "--kv-dtype", "fp8"])
    assert (spec.engine.weight_dtype, spec.engine.kv_dtype) == (WeightDtype.FP8, KvDtype.FP8)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            "--device cuda --weight-dtype int8",
            "with --device cuda it is one of float32, bfloat16, float16, fp8",
        ),
        ("--weight-dtype float16", "with --device cpu it is one of float32, bfloat16, int8"),
        ("--weight-dtype fp8", "with --device cpu it is one of float32, bfloat16, int8"),
        ("--kv-dtype fp8", "argument --kv-dtype: with --device cpu it is auto"),
        ("--kv-dtype int4", "argument --kv-dtype: with --device cpu it is auto"),
        ("--device cuda --kv-dtype int4 --host-cache-codec fp8", "which is packed already, it is none"),
        ("--device cuda --span-recompute 0.5", "a GPU does not do it yet"),
        (
            "--phase-sharing predicted",
            "argument --phase-sharing: is predicted; it must be mixed on a CPU, which has no SMs to divide",
        ),
        ("--device cuda --phase-sharing predicted", "it must be mixed with a fixed step budget"),
        (
            "--device cuda --step-budget predicted --tensor-parallel 2 --phase-sharing predicted",
            "it must be mixed over 2 devices",
        ),
    ],
)
def test_what_the_device_does_not_do_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: str, says: str
) -> None:
    assert says in error_of(capsys, arguments.split())


def test_steps_of_a_gpu_may_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    options = "--device cuda --step-budget predicted --phase-sharing predicted"
    assert spec_of(monkeypatch, *options.split()).engine.phase_sharing is PhaseSharing.PREDICTED


def test_options_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    options = "--threads 3 --batching decode_maximal --prefill-order shortest_remaining --tile-tokens 64"
    options += " --growth-reserve 0 --no-prefix-cache --weight-dtype bfloat16 --host-cache-codec fp8"
    assert spec_of(monkeypatch, *options.split()).engine == EngineConfig(
        num_threads=3,
        batching=Batching.DECODE_MAXIMAL,
        prefill_order=PrefillOrder.SHORTEST_REMAINING,
        tile_tokens=64,
        growth_reserve=0.0,
        is_prefix_cache_on=False,
        weight_dtype=WeightDtype.BFLOAT16,
        host_cache_codec=HostCacheCodec.FP8,
    )


def test_options_reach_the_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    options = "--streams 3 --codec fp8 --transport grpc --max-chunk-kib 512 --credits 7 --layer-group-size 2"
    config = spec_of(monkeypatch, *options.split()).kv_transfer
    assert (config.num_streams, config.codec, config.transport) == (3, CodecId.FP8, TransportChoice.GRPC)
    assert (config.max_chunk_bytes, config.credits, config.layer_group_size) == (512 * 1024, 7, 2)


def test_the_host_cache_is_given_in_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spec_of(monkeypatch, "--host-cache-mib", "3").engine == EngineConfig(host_cache_bytes=3 * 2**20)


def test_reuse_of_spans_is_off_until_it_is_said_how_much_is_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert spec_of(monkeypatch, "--span-min-tokens", "9").engine.span_reuse is None
    spec = spec_of(monkeypatch, "--span-recompute", "0.2", "--span-min-tokens", "9")
    assert spec.engine == EngineConfig(span_reuse=SpanReuseConfig(0.2, 9))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--span-recompute", "1.5"], "argument --span-recompute: '1.5' is not a number from 0 to 1"),
        (
            ["--span-recompute", "0", "--no-prefix-cache"],
            "argument --span-recompute: with --no-prefix-cache there is no block to reuse",
        ),
        (["--batching", "mixed"], "argument --batching: invalid choice: 'mixed'"),
        (["--prefill-order", "fifo"], "argument --prefill-order: invalid choice: 'fifo'"),
        (["--weight-dtype", "fp4"], "argument --weight-dtype: invalid choice: 'fp4'"),
        (["--growth-reserve", "1.1"], "argument --growth-reserve: '1.1' is not a number from 0 to 1"),
        (["--growth-reserve", "nan"], "argument --growth-reserve: 'nan' is not a number from 0 to 1"),
        (["--tile-tokens", "0"], "argument --tile-tokens: '0' is not a whole number from 1 to 4096"),
        (
            ["--tile-tokens", "300"],
            "argument --tile-tokens: is 300; it must not be more than --token-budget 256",
        ),
        (["--token-budget", "79"], "--max-running-sequences + --block-size = 80"),
        (
            ["--host-cache-mib", "-1"],
            "argument --host-cache-mib: '-1' is not a whole number from 0 to 16777216",
        ),
        (["--max-chunk-kib", "63"], "argument --max-chunk-kib: '63' is not a whole number from 64 to 65536"),
        (["--streams", "17"], "argument --streams: '17' is not a whole number from 1 to 16"),
        (["--lease-s", "0.5"], "argument --lease-s: '0.5' is not a number from 1 to 3600"),
        (["--resume-s", "inf"], "argument --resume-s: 'inf' is not a number from 0 to 600"),
        (
            ["--transport", "shm", "--codec", "fp8"],
            "argument --codec: with --transport shm nothing is packed",
        ),
        (
            ["--transport", "shm", "--streams", "2"],
            "argument --streams: with --transport shm no chunks travel",
        ),
        (
            ["--host-cache-mib", "1", "--no-prefix-cache"],
            "argument --host-cache-mib: is 1; with --no-prefix-cache",
        ),
        (["--prefix-cash"], "unrecognized arguments: --prefix-cash"),
    ],
)
def test_a_wrong_option_is_named(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert said in error_of(capsys, arguments)


def manifest_bounds() -> dict[str, tuple[object, object]]:
    """Least and most of each number of the manifest that a worker is started with, by option."""
    found = {}
    for section, prefix in ((Engine, ""), (KvTransfer, ""), (SpanReuse, "span_")):
        for name, field in section.model_fields.items():
            bounds = {type(one): one for one in field.metadata}
            if Ge in bounds and Le in bounds:
                option = prefix + name.removesuffix("_fraction")
                found["--" + option.replace("_", "-")] = bounds[Ge].ge, bounds[Le].le
    return found


def test_the_manifest_s_bounds_are_those_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bounds = manifest_bounds()
    assert len(bounds) == 20
    for option, (least, most) in bounds.items():
        assert isinstance(least, int)
        assert isinstance(most, int)
        assert f"argument {option}: " in error_of(capsys, [option, str(most + 1)])
        assert f"argument {option}: " in error_of(capsys, [option, str(least - 1)])
        # Neither end is refused for itself, though it may be for what it does to others.
        for end in (least, most):
            try:
                spec_of(monkeypatch, option, str(end))
            except SystemExit:
                assert f"argument {option}: {str(end)!r}" not in capsys.readouterr().err


def test_every_setting_of_the_manifest_s_engine_and_transfer_is_an_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        worker_main.main(["--help"])
    told = capsys.readouterr().out
    names = [*Engine.model_fields, *KvTransfer.model_fields]
    names.remove("span_reuse")
    names += ["span_recompute", "span_min_tokens"]
    missing = [name for name in names if f"--{name.replace('_', '-')}" not in told]
    assert missing == []
