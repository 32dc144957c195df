"""Pictures of a request: what stands for them in its prompt, and which requests are refused."""

import pytest

from orchestrator.control.prompt_images import PromptImages
from orchestrator.errors import InvalidRequest
from orchestrator.gateway import images as gateway_images
from orchestrator.gateway.images import plan_images
from orchestrator.gateway.model_texts import ModelTexts
from orchestrator.gateway.validation import CheckedRequest, check_request
from protos import inference_pb2 as pb
from tests.support.fake_worker import byte_ids, byte_model
from tests.support.picture_models import IDEFICS3, IMAGE_TOKEN_ID, QWEN, picture_model
from tests.support.pictures import picture
from workers.api import ModelInfo
from workers.embeddings.names import embedding_key, image_digest
from workers.images.limits import ImageLimits
from workers.model.vision.config import VisionConfig, processor_digest, read_vision_json

MODELS = {vision.family: picture_model(vision) for vision in (IDEFICS3, QWEN)}
VISIONS: dict[str, VisionConfig] = {vision.family: vision for vision in (IDEFICS3, QWEN)}
TEXTS = {family: ModelTexts(model) for family, model in MODELS.items()}
TEXT_MODEL = byte_model()
ONE, TWO = picture(1), picture(2, 20, 40)

every_family = pytest.mark.parametrize("family", MODELS)


def check(request: pb.GenerateRequest, model: ModelInfo) -> CheckedRequest:
    return check_request(
        request,
        model=model,
        texts=TEXTS.get(model.architecture) or ModelTexts(model),
        served_name="tiny",
        draw_seed=lambda: 1,
        vision=read_vision_json(model.vision_json) if model.vision_json else None,
    )


def refusal(request: pb.GenerateRequest, model: ModelInfo) -> str:
    with pytest.raises(InvalidRequest) as caught:
        check(request, model)
    return str(caught.value)


def of_text(text: str, *files: bytes) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, images=[pb.Image(data=file) for file in files])


def chat(*messages: pb.ChatMessage) -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=pb.ChatMessages(messages=messages))


def user(*parts: str | bytes, role: str = "user") -> pb.ChatMessage:
    """Bytes are pictures."""
    return pb.ChatMessage(
        role=role,
        parts=[
            pb.ContentPart(text=part) if isinstance(part, str) else pb.ContentPart(image=pb.Image(data=part))
            for part in parts
        ],
    )


def images_of(checked: CheckedRequest) -> PromptImages:
    assert checked.images is not None
    return checked.images


def check_places(checked: CheckedRequest) -> None:
    """The image tokens of the prompt are those of the tiles, each once and in order."""
    places = [i for i, token_id in enumerate(checked.prompt_ids) if token_id == IMAGE_TOKEN_ID]
    tiles = [placed.tile for placed in images_of(checked).tiles]
    assert places == [i for tile in tiles for i in range(tile.start, tile.start + tile.num_embeddings)]


@every_family
def test_a_text_has_its_pictures_where_the_placeholders_are(family: str) -> None:
    vision, texts = VISIONS[family], TEXTS[family]
    checked = check(of_text(f"a{vision.placeholder}b{vision.placeholder}c", ONE, TWO), MODELS[family])
    plans = vision.plan(50, 30), vision.plan(20, 40)
    assert list(checked.prompt_ids) == texts.encode(f"a{plans[0].text}b{plans[1].text}c")
    check_places(checked)
    images = images_of(checked)
    assert [(file.data, file.media_type, file.width, file.height) for file in images.files] == [
        (ONE, "image/png", 50, 30),
        (TWO, "image/png", 20, 40),
    ]
    numbers = [(file, number) for file, plan in enumerate(plans) for number in range(len(plan.tiles))]
    assert [(placed.file, placed.number) for placed in images.tiles] == numbers
    assert [placed.num_patches for placed in images.tiles] == [
        tile.num_patches for plan in plans for tile in plan.tiles
    ]
    assert [placed.tile.grid for placed in images.tiles] == [plan.grid for plan in plans for _ in plan.tiles]
    assert images.num_embeddings == sum(plan.num_embeddings for plan in plans)


@every_family
def test_keys_name_the_content_the_processor_and_the_tile(family: str) -> None:
    vision = VISIONS[family]
    images = images_of(check(of_text(vision.placeholder * 3, ONE, TWO, ONE), MODELS[family]))
    keys = [[placed.tile.key for placed in images.tiles if placed.file == file] for file in range(3)]
    assert keys[0] == keys[2]
    assert len({key for some in keys for key in some}) == len(keys[0]) + len(keys[1])
    assert keys[0][0] == embedding_key(image_digest(ONE), processor_digest(vision), 0)


@every_family
def test_pictures_of_a_chat_come_in_the_order_of_messages_and_parts(family: str) -> None:
    vision, texts = VISIONS[family], TEXTS[family]
    request = chat(
        user("s", role="system"),
        user("a", ONE, "b", TWO),
        pb.ChatMessage(role="assistant", content="x"),
        user(ONE),
    )
    checked = check(request, MODELS[family])
    check_places(checked)
    assert [file.data for file in images_of(checked).files] == [ONE, TWO, ONE]
    one, two = vision.plan(50, 30).text, vision.plan(20, 40).text
    rendered = (
        f"<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na{one}b{two}<|im_end|>\n"
        f"<|im_start|>assistant\nx<|im_end|>\n<|im_start|>user\n{one}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert list(checked.prompt_ids) == texts.encode(rendered, is_rendered=True)


def test_a_template_of_texts_alone_gets_placeholders() -> None:
    template = "{% for message in messages %}{{ message.role }}: {{ message.content | trim }}\n{% endfor %}"
    model = picture_model(chat_template=template, architecture="other")
    checked = check(chat(user("what is ", ONE, "?")), model)
    check_places(checked)
    expected = f"user: what is {IDEFICS3.plan(50, 30).text}?\n"
    assert list(checked.prompt_ids) == ModelTexts(model).encode(expected, is_rendered=True)


@every_family
def test_without_pictures_nothing_is_different(family: str) -> None:
    checked = check(of_text("hello"), MODELS[family])
    assert (checked.images, list(checked.prompt_ids)) == (None, byte_ids("hello"))
    assert check(of_text("hello"), TEXT_MODEL).images is None
    # To a model without pictures the text of a placeholder is text.
    assert check(of_text("<image>"), TEXT_MODEL).images is None


@every_family
@pytest.mark.parametrize("num_placeholders", [0, 1, 3])
def test_a_text_needs_one_placeholder_for_each_picture(family: str, num_placeholders: int) -> None:
    placeholder = VISIONS[family].placeholder
    said = refusal(of_text("a" + placeholder * num_placeholders, ONE, TWO), MODELS[family])
    assert f"text is a text with {num_placeholders} times {placeholder!r}" in said
    assert "once for each picture, so 2 times" in said


@every_family
def test_a_placeholder_that_a_user_spells_is_not_taken_for_a_picture(family: str) -> None:
    vision, model = VISIONS[family], MODELS[family]
    spelled = pb.ChatMessage(role="user", content=f"I say {vision.placeholder}")
    assert "so 0 times" in refusal(chat(spelled), model)
    assert "so 1 times" in refusal(chat(spelled, user(ONE)), model)
    assert "so 0 times" in refusal(of_text(vision.placeholder), model)


@pytest.mark.parametrize("files", [(), (ONE,)])
def test_an_image_token_outside_of_a_placeholder_is_refused(files: tuple[bytes, ...]) -> None:
    request = of_text(QWEN.placeholder * len(files) + QWEN.image_token, *files)
    said = refusal(request, MODELS[QWEN.family])
    assert f"text is a text with {QWEN.image_token!r}, which stands for an embedding" in said


@every_family
def test_image_tokens_among_token_ids_are_refused(family: str) -> None:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, IMAGE_TOKEN_ID]))
    assert "token_ids.ids is with 259, which stands for an embedding" in refusal(request, MODELS[family])
    request.token_ids.ids[1] = 6
    assert check(request, MODELS[family]).images is None
    request.images.add(data=ONE)
    assert "images is given with token_ids" in refusal(request, MODELS[family])


def test_pictures_beside_a_chat_are_refused() -> None:
    request = chat(user("x"))
    request.images.add(data=ONE)
    assert "images is given with chat; allowed: pictures beside a prompt of text" in refusal(
        request, MODELS["idefics3"]
    )
    assert "given with no prompt" in refusal(
        pb.GenerateRequest(images=[pb.Image(data=ONE)]), MODELS["idefics3"]
    )


def test_parts_are_texts_and_pictures_of_users() -> None:
    model = MODELS["idefics3"]
    assert "chat.messages[1].parts[1] is a picture of 'assistant'" in refusal(
        chat(user(ONE), user("x", ONE, role="assistant")), model
    )
    empty = pb.ChatMessage(role="user", parts=[pb.ContentPart()])
    assert "chat.messages[0].parts[0] is empty" in refusal(chat(empty), model)
    both = user("x")
    both.content = "y"
    assert "chat.messages[0] is given both content and parts" in refusal(chat(both), model)


def test_a_text_model_takes_no_pictures() -> None:
    assert refusal(of_text("<image>", ONE), TEXT_MODEL) == (
        "images is 1 pictures; allowed: none, since llama takes no pictures"
    )
    assert "llama takes no pictures" in refusal(chat(user(ONE)), TEXT_MODEL)
    # Texts in parts are as good as content.
    assert check(chat(user("a", "b")), TEXT_MODEL).prompt_ids == (
        check(chat(pb.ChatMessage(role="user", content="ab")), TEXT_MODEL).prompt_ids
    )


@pytest.mark.parametrize(
    ("file", "media_type", "problem"),
    [
        (b"", "", "image 2: it is empty"),
        (b"hello, this is text", "", "image 2: it is text and no picture"),
        (ONE[:20], "", "image 2: "),
        (ONE, "image/jpeg", "image 2: "),
        (ONE, "text/plain", "image 2: "),
    ],
)
def test_a_bad_file_is_refused_with_its_number(file: bytes, media_type: str, problem: str) -> None:
    request = of_text("<image><image>", ONE, file)
    request.images[1].media_type = media_type
    said = refusal(request, MODELS["idefics3"])
    assert said.startswith("images is refused: ")
    assert problem in said


def test_a_shape_that_the_model_does_not_take_is_refused_with_its_number() -> None:
    request = of_text(QWEN.placeholder * 2, ONE, picture(3, 400, 1))
    assert "images is refused: image 2: it has 400 x 1 pixels" in refusal(request, MODELS["qwen2_5_vl"])


def test_too_many_pictures_are_refused_before_any_is_read() -> None:
    said = refusal(of_text("<image>" * 10_000, *[b"no picture"] * 10_000), MODELS["idefics3"])
    assert "the request has 10000 pictures, and 32 are allowed" in said


def test_limits_are_of_all_pictures_together() -> None:
    images = [pb.Image(data=ONE)] * 2
    limits = ImageLimits(max_bytes=len(ONE), max_total_bytes=2 * len(ONE) - 1)
    with pytest.raises(InvalidRequest, match="MiB together"):
        plan_images(images, MODELS["idefics3"], IDEFICS3, limits)


def test_too_many_tiles_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # A picture of 50 x 30 has four tiles and a global view.
    request = of_text("<image><image>", ONE, ONE)
    monkeypatch.setattr(gateway_images, "MAX_TILES", 10)
    assert len(images_of(check(request, MODELS["idefics3"])).tiles) == 10
    monkeypatch.setattr(gateway_images, "MAX_TILES", 9)
    assert "images is 2 pictures of 10 tiles; allowed: at most 9 tiles" in refusal(
        request, MODELS["idefics3"]
    )


def test_too_many_embeddings_for_the_workers_are_refused() -> None:
    request = of_text("<image><image>", ONE, ONE)
    assert check(request, picture_model(max_image_embeddings=40)).images is not None
    said = refusal(request, picture_model(max_image_embeddings=39))
    assert "images is 2 pictures of 40 embeddings; allowed: at most 39" in said
    assert "engine.imageCacheMiB" in said


def test_a_prompt_that_pictures_make_too_long_is_refused() -> None:
    said = refusal(of_text("<image>", ONE), picture_model(max_context_tokens=40))
    assert "tokens; allowed: at most 39" in said


def test_pictures_that_alone_fill_the_context_are_refused_before_a_text_is_made_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("no text is needed")

    monkeypatch.setattr(ModelTexts, "encode", never)
    monkeypatch.setattr(ModelTexts, "render_chat", never)
    model = picture_model(max_context_tokens=20)
    for request in (of_text("<image>", ONE), chat(user("what is", ONE))):
        said = refusal(request, model)
        assert "images is 1 pictures of 20 embeddings; allowed: fewer than 20 embeddings" in said
