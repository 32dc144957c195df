"""The reduction of pictures: what requests, the deployment and the command line say of it, and what is said of its effect."""

import pytest

from orchestrator.cli import encode_text
from orchestrator.cli.explain_text import lines as explain_lines
from orchestrator.cli.generate import as_json
from orchestrator.cli.images import reduction
from orchestrator.cli.timeline import lines as timeline_lines
from orchestrator.control.encode_shards import EncodeShards
from orchestrator.control.encode_split import Shard
from orchestrator.control.prompt_images import PromptImages
from orchestrator.control.view import LifecycleState, WorkerView
from orchestrator.errors import InvalidRequest
from orchestrator.gateway.model_texts import ModelTexts
from orchestrator.gateway.validation import CheckedRequest, check_request
from protos import control_pb2, worker_pb2
from protos import inference_pb2 as pb
from tests.support.picture_models import IDEFICS3, QWEN, picture_model
from tests.support.pictures import picture
from workers.api import Encode, ImageReduction, Phase, RequestId, RequestKey, WorkerId
from workers.embeddings.names import embedding_key, image_digest
from workers.model.vision.config import VisionConfig, processor_digest

FILTER = ImageReduction(global_threshold=0.01, individual_threshold=0.02)


def check(
    asked: pb.ImageReduction | None,
    default: ImageReduction | None = None,
    vision: VisionConfig = IDEFICS3,
    *,
    prompt_logprobs: bool = False,
) -> CheckedRequest:
    model = picture_model(vision)
    request = pb.GenerateRequest(text=vision.placeholder, images=[pb.Image(data=picture(1))])
    if asked is not None:
        request.image_reduction.CopyFrom(asked)
    if prompt_logprobs:
        request.sampling.prompt_logprobs = 1
    return check_request(
        request,
        model=model,
        texts=ModelTexts(model),
        served_name="tiny",
        draw_seed=lambda: 1,
        vision=vision,
        default_reduction=default,
    )


def reduction_of(checked: CheckedRequest) -> ImageReduction | None:
    assert checked.images is not None
    return checked.images.reduction


def test_a_request_counts_more_than_the_deployment() -> None:
    assert reduction_of(check(None)) is None
    assert reduction_of(check(None, FILTER)) == FILTER
    assert reduction_of(check(pb.ImageReduction(merge_threshold=0.5), FILTER)) == ImageReduction(0.5)
    assert reduction_of(check(pb.ImageReduction(), FILTER)) is None
    own = pb.ImageReduction(
        global_threshold=0.1, individual_threshold=0.2, key_fraction=0, layers=[0.25, 0.5]
    )
    assert reduction_of(check(own)) == ImageReduction(0.0, 0.1, 0.2, 0.0, (0.25, 0.5))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (pb.ImageReduction(merge_threshold=1.5), "image_reduction.merge_threshold is 1.5; allowed: 0 to 1"),
        (pb.ImageReduction(key_fraction=-1), "image_reduction.key_fraction is -1; allowed: 0 to 1"),
        (pb.ImageReduction(global_threshold=float("nan")), "image_reduction.global_threshold is nan"),
        (pb.ImageReduction(layers=[0.5, 0.25]), "image_reduction.layers is [0.5, 0.25]"),
        (pb.ImageReduction(layers=[0.5, 1.25]), "image_reduction.layers is [0.5, 1.25]"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(asked: pb.ImageReduction, said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(asked)
    assert str(caught.value).startswith(said)


def test_logprobs_of_the_prompt_need_all_of_it() -> None:
    with pytest.raises(InvalidRequest, match="prompt_logprobs"):
        check(pb.ImageReduction(merge_threshold=0.5), prompt_logprobs=True)
    # What the deployment says does not stand in a request's way.
    assert reduction_of(check(None, FILTER, prompt_logprobs=True)) is None


def test_other_families_are_refused_unless_it_changes_nothing() -> None:
    with pytest.raises(InvalidRequest, match="Idefics3 and SmolVLM"):
        check(pb.ImageReduction(merge_threshold=0.5), vision=QWEN)
    assert reduction_of(check(pb.ImageReduction(), vision=QWEN)) is None
    # What the deployment asks for goes without saying where it cannot be had.
    assert reduction_of(check(None, FILTER, vision=QWEN)) is None


def test_embeddings_of_another_merging_have_other_keys_and_a_filter_alone_shares_them() -> None:
    def key(asked: pb.ImageReduction | None) -> bytes:
        checked = check(asked)
        assert checked.images is not None
        return checked.images.tiles[0].tile.key

    plain = embedding_key(image_digest(picture(1)), processor_digest(IDEFICS3), 0)
    assert key(None) == key(pb.ImageReduction()) == plain
    merged = [pb.ImageReduction(merge_threshold=value) for value in (0.5, 0.6)]
    filtered = [pb.ImageReduction(global_threshold=value, individual_threshold=0.1) for value in (0.1, 0.2)]
    assert len({plain, *map(key, merged), *map(key, filtered)}) == 4


def test_encode_workers_are_told() -> None:
    images = check(pb.ImageReduction(merge_threshold=0.5)).images
    assert isinstance(images, PromptImages)
    shards = EncodeShards(RequestId("r"), images)
    shards.want([0])
    worker = WorkerView(WorkerId("e"), 1, frozenset({Phase.ENCODE}), LifecycleState.READY, "e:1")
    key = RequestKey(RequestId("r"), 1)
    (send,) = shards.given([(2, Shard(worker, 0, 1))], worker, key, salt="", timeout_s=1.0, now_s=0.0)
    assert isinstance(send.command, Encode)
    assert send.command.reduction == ImageReduction(0.5)


def test_the_command_line_has_a_short_form() -> None:
    assert reduction("off") == pb.ImageReduction()
    expected = pb.ImageReduction(
        merge_threshold=0.8, global_threshold=0.001, individual_threshold=0.002, key_fraction=0
    )
    assert reduction("merge=0.8,global=0.001, individual=0.002,keys=0") == expected
    for text in ("merge", "merge=x", "shrink=0.5", ""):
        with pytest.raises(ValueError, match=r".*"):
            reduction(text)


def test_what_it_left_is_told() -> None:
    said = "of 64 tokens of pictures 40 encoded, 12 kept; 52% of the prefill's work"
    assert encode_text.reduced(64, 40, 12, 0.52, is_too_long=False) == said
    assert "no filter, as the prompt is too long" in encode_text.reduced(64, 64, 64, 1.0, is_too_long=True)
    last = pb.GenerateResponse(finish_reason=pb.FINISH_REASON_STOP)
    last.usage.image_tokens = 64
    last.usage.image_reduction.CopyFrom(
        pb.ReductionUsage(encoded_tokens=40, kept_tokens=12, prefill_share=0.52)
    )
    last.timings.total_s = 1.0
    assert f"reduction    {said}" in timeline_lines(last)
    assert as_json(last)["usage"]["image_reduction"]["kept_tokens"] == 12
    state = control_pb2.StateRecord(state=control_pb2.REQUEST_STATE_FINISHED)
    reduced = worker_pb2.ImagesReduced(num_planned=64, num_encoded=40, num_kept=12, prefill_share=0.52)
    sample = control_pb2.SampleRecord(states=[state], first_token_at_s=0.5, images_reduced=reduced)
    record = control_pb2.RequestRecord(request_id="r", samples=[sample])
    assert any(said in line for line in explain_lines(record))
