"""`phasewise simulate` as its user sees it."""

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from orchestrator.cli import exit_codes, main
from tests.support.profile import PROFILE
from workers import profile

ROOT = Path(__file__).parents[3]
AZURE = ROOT / "tests" / "fixtures" / "traces" / "azure_llm_2023_conv.csv"
MOONCAKE = ROOT / "tests" / "fixtures" / "traces" / "mooncake_conversation.jsonl"
EXAMPLES = ROOT / "examples" / "simulate"
#: What goes wrong, for some of the manifests.
FAULTS = set(EXAMPLES.glob("*faults.yaml"))


def simulate(manifest: Path, *arguments: object, trace: Path = AZURE) -> int:
    return main.main(["simulate", str(manifest), "--trace", str(trace), *map(str, arguments)])


@pytest.mark.parametrize(
    "manifest", sorted(set(EXAMPLES.glob("*.yaml")) - FAULTS), ids=lambda path: path.stem
)
def test_every_example_can_be_simulated(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(manifest, "--rate", 10, "--duration", 2) == exit_codes.OK
    out = capsys.readouterr().out
    assert "20 arrived, 20 finished, 0 failed" in out
    assert "attainment" in out
    assert "steps, busy" in out


def test_a_trace_of_shared_prefixes_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(EXAMPLES / "two-full.yaml", "--rate", 2, "--duration", 5, trace=MOONCAKE) == exit_codes.OK
    assert "10 arrived, 10 finished" in capsys.readouterr().out


def test_the_coarse_mode_prints_the_same_report(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--rate", 10, "--duration", 5)
    assert simulate(EXAMPLES / "one-and-one.yaml", *arguments) == exit_codes.OK
    fine = capsys.readouterr().out.splitlines()
    assert simulate(EXAMPLES / "one-and-one.yaml", *arguments, "--mode", "coarse") == exit_codes.OK
    coarse = capsys.readouterr().out.splitlines()
    assert [line.split()[:1] for line in coarse] == [line.split()[:1] for line in fine]
    assert "50 arrived, 50 finished, 0 failed" in coarse[2]


def test_the_coarse_mode_takes_one_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = tmp_path / "two.yaml"
    text = (EXAMPLES / "one-and-one.yaml").read_text()
    manifest.write_text(text.replace("tokenBudget: 2048", "tokenBudget: 1024", 1))
    assert simulate(manifest, "--rate", 10, "--duration", 2, "--mode", "coarse") == exit_codes.USAGE
    assert "one engine for all workers" in capsys.readouterr().err


def test_several_rates_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(EXAMPLES / "one-full.yaml", "--rate", "5,10", "--duration", 2) == exit_codes.OK
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split()[0] for row in rows] == ["5", "10"]


@pytest.mark.parametrize("mode", ["fine", "coarse"])
def test_pictures_are_drawn_and_the_same_each_time(mode: str, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    folders[1].mkdir()
    for folder in folders:
        arguments = ("--rate", "10,20", "--duration", 2, "--mode", mode, "--plot", folder)
        assert simulate(EXAMPLES / "one-and-one.yaml", *arguments) == exit_codes.OK
    names = ["attainment.svg", "phases.svg", "requests.svg"]
    assert sorted(path.name for path in folders[0].iterdir()) == names
    for name in names:
        picture = (folders[0] / name).read_bytes()
        assert picture == (folders[1] / name).read_bytes()
        assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert (">hand-off that decode waits for<" in (folders[0] / "requests.svg").read_text()) == (
        mode == "fine"
    )


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_place_that_cannot_be_written_is_named_before_anything_is_simulated(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Where a file is to be there is a folder.
    path = tmp_path / "taken"
    blocked = path if option == "--json" else path / "phases.svg"
    blocked.mkdir(parents=True)
    arguments = ("--rate", 5, "--duration", 2, option, path)
    assert simulate(EXAMPLES / "one-full.yaml", *arguments) == exit_codes.FAILURE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"{blocked} cannot be written: Is a directory\n"


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_simulated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = Path("/proc/pictures")
    assert simulate(EXAMPLES / "one-full.yaml", "--rate", 5, "--duration", 2, "--plot", path) == 1
    assert capsys.readouterr() == ("", f"{path} cannot be written: No such file or directory\n")


def test_a_place_that_is_lost_meanwhile_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.cli.simulate.file_problem", lambda _path: "")
    arguments = ("--rate", 5, "--duration", 2, "--json", tmp_path)
    assert simulate(EXAMPLES / "one-full.yaml", *arguments) == exit_codes.FAILURE
    printed = capsys.readouterr()
    assert "attainment" in printed.out
    assert printed.err == f"{tmp_path} cannot be written: Is a directory\n"


def test_the_manifest_says_whether_workers_take_other_phases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    off = tmp_path / "off.yaml"
    text = (EXAMPLES / "shifting.yaml").read_text()
    assert 'roleSwitch: "on"' in text
    for mode, said in (("on", ": done in "), ("dryRun", ": not done: dry run: "), ("off", "")):
        off.write_text(text.replace('roleSwitch: "on"', f'roleSwitch: "{mode}"'))
        arguments = ("--rate", 10, "--duration", 5)
        assert simulate(off, *arguments, trace=EXAMPLES / "shifting.csv") == exit_codes.OK
        out = capsys.readouterr().out
        assert (" s decode-0: decode -> prefill+decode" in out) == (mode != "off")
        assert said in out


def test_switches_are_told_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, shifting = tmp_path / "x.json", EXAMPLES / "shifting.csv"
    arguments = ("--duration", 5, "--json", path)
    assert simulate(EXAMPLES / "shifting.yaml", "--rate", "1,10", *arguments, trace=shifting) == exit_codes.OK
    few, many = json.loads(path.read_text())["runs"]
    out = capsys.readouterr().out
    assert len(few["switches"]) < len(many["switches"])
    assert f"switches   {len(few['switches'])} at 1/s, {len(many['switches'])} at 10/s\n" in out
    assert "scales" not in out
    first = many["switches"][0]
    assert (first["before"], first["phases"]) == (["decode"], ["prefill", "decode"])
    assert (first["state"], first["met_after"]) == ("proven", None)
    assert 0 < first["at_s"] < 5
    text = path.read_bytes()
    assert simulate(EXAMPLES / "shifting.yaml", "--rate", "1,10", *arguments, trace=shifting) == exit_codes.OK
    assert path.read_bytes() == text


def test_changes_of_the_number_of_workers_are_told_and_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    autoscale = "{group: full, maxWorkers: 3, holdS: 1, releaseS: 3}"
    spec = f'  controller: {{roleSwitch: "on", autoscale: {autoscale}}}\n'
    manifest, path, shifting = changed(tmp_path, spec=spec), tmp_path / "x.json", EXAMPLES / "shifting.csv"
    arguments = ("--rate", 10, "--duration", 5, "--json", path)
    assert simulate(manifest, *arguments, trace=shifting) == exit_codes.OK
    (run,) = json.loads(path.read_text())["runs"]
    out = capsys.readouterr().out
    assert len(run["scales"]) == len(re.findall(r"^ +\d+\.\d\d s scale ", out, re.MULTILINE)) > 0
    first = run["scales"][0]
    assert (first["num_before"], first["num_wanted"], first["state"]) == (1, 3, "done")
    assert f"{first['at_s']:7.2f} s scale 1 -> 3 workers: done: all of them have a node\n" in out


def test_where_nothing_is_decided_there_are_no_decisions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    for mode in ("fine", "coarse"):
        arguments = ("--rate", "5,10", "--duration", 1, "--mode", mode, "--json", path)
        assert simulate(EXAMPLES / "one-full.yaml", *arguments) == exit_codes.OK
        assert all(run["switches"] == run["scales"] == [] for run in json.loads(path.read_text())["runs"])
    assert not re.search("switches|scale", capsys.readouterr().out)


def test_the_shifting_trace_is_what_its_script_makes() -> None:
    made = runpy.run_path(str(EXAMPLES / "shifting_trace.py"))["lines"]()
    assert "\n".join(made) + "\n" == (EXAMPLES / "shifting.csv").read_text()


def with_pictures(tmp_path: Path, *, is_azure: bool) -> Path:
    """Every second request of a trace has two."""
    path = tmp_path / ("azure.csv" if is_azure else "mooncake.jsonl")
    lines = ["TIMESTAMP,NumImages,ContextTokens,GeneratedTokens"] if is_azure else []
    for i in range(20):
        num = 2 * (i % 2)
        if is_azure:
            lines.append(f"2023-11-16 18:15:{i + 10}.0000000,{num},{900 + i},5")
        else:
            row = {"timestamp": 1000 * i, "input_length": 900, "output_length": 5, "hash_ids": [1, i + 2]}
            lines.append(json.dumps({**row, "num_images": num} if num else row))
    path.write_text("\n".join(lines) + "\n")
    return path


def pictures_manifest(tmp_path: Path) -> Path:
    path = tmp_path / "pictures.yaml"
    text = (EXAMPLES / "one-and-one.yaml").read_text()
    path.write_text(text.replace("phases: [prefill]", "phases: [encode, prefill]"))
    assert "encode" in path.read_text()
    return path


@pytest.mark.parametrize("is_azure", [True, False])
@pytest.mark.parametrize("mode", ["fine", "coarse"])
def test_pictures_of_both_formats_are_simulated_in_both_modes(
    is_azure: bool, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, manifest = with_pictures(tmp_path, is_azure=is_azure), pictures_manifest(tmp_path)
    texts = []
    for name, more in (("a", ()), ("b", ()), ("c", ("--image-tiles", 1))):
        path = tmp_path / name
        plots = ("--plot", tmp_path / "plots")
        arguments = ("--rate", 10, "--duration", 2, "--mode", mode, "--json", path, *plots, *more)
        assert simulate(manifest, *arguments, trace=trace) == exit_codes.OK
        texts.append(path.read_bytes())
    assert texts[0] == texts[1] != texts[2]
    (run,) = json.loads(texts[0])["runs"]
    assert run["summary"]["num_finished"] == 20
    capsys.readouterr()
    assert (
        simulate(EXAMPLES / "one-full.yaml", "--rate", 10, "--duration", 2, trace=trace) == exit_codes.USAGE
    )
    assert "has pictures, and no worker of" in capsys.readouterr().err


def test_pictures_on_a_device_whose_encoding_is_not_known_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, manifest = with_pictures(tmp_path, is_azure=True), pictures_manifest(tmp_path)
    arguments = ("--rate", 10, "--duration", 2)
    assert simulate(manifest, *arguments, "--device", "a100", trace=trace) == exit_codes.USAGE
    said = "how fast it encodes is not known; only h100 is\n"
    assert capsys.readouterr().err == f"{trace}: has pictures, with --device a100: {said}"
    # Without pictures it does not matter.
    assert simulate(manifest, *arguments, "--device", "a100") == exit_codes.OK
    manifest.write_text(re.sub(r"kvCacheMiB: \d+", "kvCacheMiB: 4096", manifest.read_text()))
    path = tmp_path / "p.json"
    for name, code in (("cpu", exit_codes.USAGE), ("NVIDIA H100 80GB HBM3", exit_codes.OK)):
        device = replace(PROFILE.costs.device, name=name)
        path.write_text(profile.to_json(replace(PROFILE, costs=replace(PROFILE.costs, device=device))))
        assert simulate(manifest, *arguments, "--profile", path, trace=trace) == code
        assert (said in capsys.readouterr().err) == (code != exit_codes.OK)


def test_one_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    texts = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        path = tmp_path / name
        arguments = ("--rate", 10, "--duration", 2, "--seed", seed, "--json", path)
        assert simulate(EXAMPLES / "one-and-one.yaml", *arguments) == exit_codes.OK
        texts.append(path.read_bytes())
    assert texts[0] == texts[1] != texts[2]
    (run,) = json.loads(texts[0])["runs"]
    assert run["summary"]["num_finished"] == 20


@pytest.mark.parametrize(
    ("manifest", "arguments", "code", "said"),
    [
        ("examples/simulate/missing.yaml", (), exit_codes.INVALID_MANIFEST, "missing.yaml"),
        (
            "examples/simulate/one-full.yaml",
            ("--model", "llama-3-70b"),
            exit_codes.USAGE,
            "one h100 has 80 GB",
        ),
        ("examples/simulate/one-full.yaml", ("--json", "/no/such/file"), exit_codes.USAGE, "no such folder"),
        ("examples/simulate/one-full.yaml", ("--plot", "/no/such/file"), exit_codes.USAGE, "no such folder"),
        ("examples/simulate/one-full.yaml", ("--plot", __file__), exit_codes.USAGE, "no such folder"),
        ("examples/simulate/shifting.yaml", ("--mode", "coarse"), exit_codes.USAGE, "controller.roleSwitch"),
        (
            "examples/simulate/one-full.yaml",
            ("--first-row", 10**9),
            exit_codes.USAGE,
            "the trace ends at row",
        ),
    ],
)
def test_what_cannot_be_simulated_is_refused_with_the_reason(
    manifest: str,
    arguments: tuple[object, ...],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert simulate(ROOT / manifest, "--rate", 10, "--duration", 2, *arguments) == code
    assert said in capsys.readouterr().err


def changed(folder: Path, *, engine: str = "", group: str = "", spec: str = "") -> Path:
    """examples/simulate/one-full.yaml with more keys."""
    text = (EXAMPLES / "one-full.yaml").read_text()
    for old, new in (
        ("tokenBudget: 2048", f"tokenBudget: 2048{engine}"),
        ("      replicas: 1\n", f"      replicas: 1\n{group}"),
        ("  slo:\n", f"{spec}  slo:\n"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = folder / "manifest.yaml"
    path.write_text(text)
    return path


ONE_GPU = "      resources: {gpus: 1}\n"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"engine": ", hostCacheMiB: 1000"},
            "engine.hostCacheMiB is not simulated: evicted blocks are lost",
        ),
        (
            {"engine": ", spanReuse: {}"},
            "engine.spanReuse is not simulated: prompts share beginnings alone",
        ),
        (
            {"spec": "  kvTransfer: {codec: fp8}\n"},
            "kvTransfer.codec is not simulated: KV travels unpacked",
        ),
        (
            {"group": "      resources: {gpus: 4}\n"},
            "resources.gpus: 4 is not simulated: a worker is one h100",
        ),
        (
            {"engine": ", tensorParallel: 2"},
            "engine.tensorParallel: 2 is not simulated: a worker is one h100",
        ),
        (
            {"engine": ", weightDtype: fp8", "group": ONE_GPU},
            "engine.weightDtype: fp8 is not simulated: a weight of llama-3-8b has 2 bytes",
        ),
        (
            {"engine": ", weightDtype: int8"},
            "engine.weightDtype: int8 is not simulated: a weight of llama-3-8b has 2 bytes",
        ),
        (
            {"engine": ", kvDtype: fp8", "group": ONE_GPU},
            "engine.kvDtype: fp8 is not simulated: a token of llama-3-8b has 131072 bytes of KV",
        ),
        (
            {"engine": ", stepBudget: predicted, phaseSharing: predicted", "group": ONE_GPU},
            "engine.phaseSharing: predicted is not simulated: prompts and decodes are in steps together",
        ),
    ],
)
@pytest.mark.parametrize("mode", ["fine", "coarse"])
def test_a_setting_that_is_not_simulated_is_refused(
    mode: str, more: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = changed(tmp_path, **more)
    assert simulate(manifest, "--rate", 10, "--duration", 2, "--mode", mode) == exit_codes.USAGE
    assert capsys.readouterr().err == f"full-0: {said}; leave it out of the manifest\n"


def test_each_setting_that_is_not_simulated_has_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ", weightDtype: fp8, kvDtype: fp8"
    manifest = changed(tmp_path, engine=more, group="      resources: {gpus: 2}\n")
    assert simulate(manifest, "--rate", 10, "--duration", 2) == exit_codes.USAGE
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [
        "resources.gpus:",
        "engine.weightDtype:",
        "engine.kvDtype:",
    ]


def test_what_is_simulated_as_it_is_asked_for_is_not_refused(tmp_path: Path) -> None:
    manifest = changed(
        tmp_path, engine=", weightDtype: bfloat16, kvDtype: auto, tensorParallel: 1", group=ONE_GPU
    )
    assert simulate(manifest, "--rate", 5, "--duration", 1) == exit_codes.OK


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"spec": "  gateway: {admission: predicted}\n"}, "takes every request; leave out gateway.admission"),
        (
            {"engine": ", batching: decode_maximal"},
            "has stall_free steps alone; leave out engine.batching",
        ),
        ({"engine": ", growthReserve: 0.9"}, "for growth; leave out engine.growthReserve"),
    ],
)
def test_what_the_coarse_mode_alone_does_not_simulate_is_refused_there(
    more: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = changed(tmp_path, **more)
    if "spec" in more:
        text = manifest.read_text()
        manifest.write_text(text[: text.rindex("  gateway:")])
    arguments = ("--rate", 5, "--duration", 1)
    assert simulate(manifest, *arguments) == exit_codes.OK
    assert simulate(manifest, *arguments, "--mode", "coarse") == exit_codes.USAGE
    assert f"{manifest}: --mode coarse " in (err := capsys.readouterr().err)
    assert said in err


def test_pictures_with_fewer_embeddings_are_not_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = pictures_manifest(tmp_path)
    manifest.write_text(manifest.read_text().replace("  gateway:\n", "  gateway:\n    imageReduction: {}\n"))
    assert simulate(manifest, "--rate", 10, "--duration", 2) == exit_codes.USAGE
    assert "gateway.imageReduction is not simulated: pictures keep all" in capsys.readouterr().err


def test_a_profile_says_in_what_weights_and_kv_are(tmp_path: Path) -> None:
    model = replace(PROFILE.costs.model, weight_bytes=1.2)
    path = tmp_path / "p.json"
    path.write_text(profile.to_json(replace(PROFILE, costs=replace(PROFILE.costs, model=model))))
    manifest = changed(tmp_path, engine=", weightDtype: fp8, kvDtype: fp8", group=ONE_GPU)
    assert simulate(manifest, "--rate", 1, "--duration", 1, "--profile", path) == exit_codes.OK


def test_a_profile_says_how_long_steps_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.json").write_text(profile.to_json(PROFILE))
    manifest = tmp_path / "manifest.yaml"
    text = (EXAMPLES / "one-full.yaml").read_text()
    manifest.write_text(re.sub(r"kvCacheMiB: \d+", "kvCacheMiB: 4096", text))
    arguments = ("--rate", 1, "--duration", 2, "--profile", tmp_path / "p.json")
    assert simulate(manifest, *arguments) == exit_codes.OK
    assert "smollm2-135m" in capsys.readouterr().out
    assert simulate(manifest, *arguments, "--device", "h100") == exit_codes.USAGE
    assert "leave out --model and --device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"{}", "is no profile: format: Field required"),
        (b'{"a": 1}', "is no profile: format: Field required"),
        (b"# Phasewise\n", "is no profile: Invalid JSON: expected value at line 1 column 1"),
        (b"\xff", "is no profile: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    ],
)
def test_a_profile_that_is_none_is_refused(
    content: bytes | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.json"
    if content is not None:
        path.write_bytes(content)
    code = simulate(EXAMPLES / "one-full.yaml", "--rate", 1, "--duration", 2, "--profile", path)
    assert code == exit_codes.USAGE
    assert capsys.readouterr().err == f"{path}: {said}; `phasewise calibrate` writes one\n"


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        ("0", "'0' is no rate"),
        ("-3", "'-3' is no rate"),
        ("1,,2", "'' of '1,,2' is no rate"),
        ("5,x", "'x' of '5,x' is no rate"),
        ("nan", "'nan' is no rate"),
        ("5,inf", "'inf' of '5,inf' is no rate"),
    ],
)
def test_a_rate_that_is_none_is_a_wrong_command_line(
    rate: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        simulate(EXAMPLES / "one-full.yaml", "--rate", rate, "--duration", 2)
    assert stop.value.code == exit_codes.USAGE
    assert (
        f"argument --rate: {said}; allowed: numbers above 0, separated by commas" in capsys.readouterr().err
    )
