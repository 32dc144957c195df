"""What a client sent, checked and turned into what is run. Pure, apart from the tokenizer that it is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from orchestrator.control.prompt_images import PromptImages
from orchestrator.errors import InvalidRequest, RequestTooLarge, UnknownModel
from orchestrator.gateway.images import REDUCIBLE_FAMILY, place_images, plan_images
from orchestrator.gateway.model_texts import ChatTurn
from orchestrator.gateway.reduction import image_reduction
from orchestrator.gateway.sampling import sampling_params
from protos import inference_pb2 as pb
from workers.api import (
    MAX_SALT_CHARS,
    MAX_STOP_TOKEN_IDS,
    ImageReduction,
    ModelInfo,
    RequestId,
    SamplingParams,
)
from workers.model.vision.config import VisionConfig
from workers.sampling_check import sampling_problem

ROLES = ("system", "user", "assistant")
MAX_REQUEST_ID_LENGTH = 128
MAX_SAMPLES = 16
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
#: Between the seeds of two samples. Odd, so that no two of them have the same; 2**64 over the golden ratio.
SEED_STEP = 0x9E3779B97F4A7C15


class Texts(Protocol):
    """What is needed of `model_texts.ModelTexts`."""

    def encode(self, text: str, *, is_rendered: bool = False) -> list[int]:
        """Token ids of a text."""

    def render_chat(self, messages: Sequence[ChatTurn]) -> str:
        """The prompt that chat messages make."""


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request that workers can run, as far as its numbers go."""

    request_id: RequestId
    prompt_ids: tuple[int, ...]
    #: Of sample 0.
    sampling: SamplingParams
    num_samples: int = 1
    stop_strings: tuple[str, ...] = ()
    #: The output answers messages; otherwise it goes on from the prompt.
    is_chat: bool = False
    priority: int = 0
    cache_salt: str = ""
    images: PromptImages | None = None
    #: What the first block of its KV is chained to; see workers.block_hash.
    prefix_root: bytes = b""

    def samplings(self) -> list[SamplingParams]:
        """Those of each sample: each has a seed of its own, and the prompt is scored once."""
        if self.num_samples == 1:
            return [self.sampling]
        others = replace(self.sampling, num_prompt_logprobs=None)
        return [
            self.sampling,
            *(
                replace(others, seed=(self.sampling.seed + index * SEED_STEP) % 2**64)
                for index in range(1, self.num_samples)
            ),
        ]


def check_request(
    request: pb.GenerateRequest,
    *,
    model: ModelInfo,
    texts: Texts,
    served_name: str,
    draw_seed: Callable[[], int],
    vision: VisionConfig | None = None,
    default_reduction: ImageReduction | None = None,
) -> CheckedRequest:
    """What to run. draw_seed: a random number below 2**64. vision: how pictures stand in prompts; None: they cannot.
    default_reduction: of pictures, where a request says nothing of it.

    Raises InvalidRequest, UnknownModel or RequestTooLarge. Whatever costs little is checked first.
    """
    request_id = _request_id(request.request_id, draw_seed)
    if request.model not in ("", served_name):
        raise UnknownModel(request.model[:MAX_REQUEST_ID_LENGTH], served_name)
    if len(request.cache_salt) > MAX_SALT_CHARS:
        value = f"{len(request.cache_salt)} characters long"
        raise InvalidRequest("cache_salt", value, f"at most {MAX_SALT_CHARS} characters")
    asked = request.sampling
    sampling = sampling_params(
        asked,
        # Until the prompt's length is known.
        max_new_tokens=asked.max_tokens if asked.HasField("max_tokens") else model.max_context_tokens,
        seed=asked.seed if asked.HasField("seed") else draw_seed(),
        stop_token_ids=_stop_token_ids(asked, model),
    )
    problem = sampling_problem(sampling, model.vocab_size)
    if problem is not None:
        raise InvalidRequest(f"sampling.{problem.field}", problem.value, problem.allowed)
    num_samples = _num_samples(asked)
    stop_strings = _stop_strings(asked)
    if vision is not None and vision.family != REDUCIBLE_FAMILY:
        # Only who asks for it by himself is told that it cannot be had.
        default_reduction = None
    reduction = image_reduction(request, default_reduction)
    prompt_ids, images = _prompt(request, model, texts, vision, reduction)
    sampling = replace(sampling, max_new_tokens=_max_new_tokens(asked, len(prompt_ids), model))
    if sampling.min_new_tokens > sampling.max_new_tokens:
        allowed = f"at most {sampling.max_new_tokens}, what a prompt of {len(prompt_ids)} tokens leaves"
        raise InvalidRequest("sampling.min_tokens", str(sampling.min_new_tokens), allowed)
    return CheckedRequest(
        request_id=request_id,
        prompt_ids=prompt_ids,
        sampling=sampling,
        num_samples=num_samples,
        stop_strings=stop_strings,
        is_chat=request.WhichOneof("prompt") == "chat",
        priority=request.priority,
        cache_salt=request.cache_salt,
        images=images,
    )


def _num_samples(sampling: pb.SamplingParams) -> int:
    number = int(sampling.n) if sampling.HasField("n") else 1
    if not 1 <= number <= MAX_SAMPLES:
        raise InvalidRequest("sampling.n", str(number), f"1 to {MAX_SAMPLES}")
    if number > 1 and sampling.HasField("superposed"):
        raise InvalidRequest("sampling.n", f"{number} together with superposed", "1")
    return number


def _stop_strings(sampling: pb.SamplingParams) -> tuple[str, ...]:
    strings = tuple(sampling.stop)
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequest("sampling.stop", f"{len(strings)} texts", f"at most {MAX_STOP_STRINGS}")
    for i, string in enumerate(strings):
        if not 1 <= len(string) <= MAX_STOP_STRING_CHARS:
            value = f"{len(string)} characters long"
            raise InvalidRequest(f"sampling.stop[{i}]", value, f"1 to {MAX_STOP_STRING_CHARS} characters")
    if strings and sampling.HasField("superposed"):
        raise InvalidRequest("sampling.stop", "set together with superposed", "one of the two")
    return strings


def _request_id(request_id: str, draw_seed: Callable[[], int]) -> RequestId:
    if not request_id:
        return RequestId(f"req-{draw_seed():016x}")
    if len(request_id) > MAX_REQUEST_ID_LENGTH:
        value = f"{len(request_id)} characters long"
        raise InvalidRequest("request_id", value, f"1 to {MAX_REQUEST_ID_LENGTH} visible ASCII characters")
    if not all("!" <= character <= "~" for character in request_id):
        raise InvalidRequest("request_id", ascii(request_id), "visible ASCII characters, without spaces")
    return RequestId(request_id)


def _stop_token_ids(sampling: pb.SamplingParams, model: ModelInfo) -> frozenset[int]:
    given = tuple(sampling.stop_token_ids)
    end_token_ids = () if sampling.ignore_eos else model.eos_token_ids
    together = frozenset((*given, *end_token_ids))
    if len(together) > MAX_STOP_TOKEN_IDS:
        value = f"{len(frozenset(given))} ids"
        allowed = f"at most {MAX_STOP_TOKEN_IDS}, the model's end tokens included: {list(end_token_ids)}"
        raise InvalidRequest("sampling.stop_token_ids", value, allowed)
    _check_token_ids("sampling.stop_token_ids", given, model)
    return together


def _prompt(
    request: pb.GenerateRequest,
    model: ModelInfo,
    texts: Texts,
    vision: VisionConfig | None,
    reduction: ImageReduction | None,
) -> tuple[tuple[int, ...], PromptImages | None]:
    """Token ids, and the pictures whose embeddings take the place of some of them."""
    kind = request.WhichOneof("prompt")
    if request.images and kind != "text":
        allowed = "pictures beside a prompt of text alone; a chat has them in the parts of its messages"
        raise InvalidRequest("images", f"given with {kind or 'no prompt'}", allowed)
    images: PromptImages | None = None
    match kind:
        case None:
            raise InvalidRequest("prompt", "missing", "one of text, chat and token_ids")
        case "text":
            planned = plan_images(request.images, model, vision, reduction=reduction)
            prompt_ids, images = place_images(request.text, "text", planned, vision, texts.encode)
        case "chat":
            prompt_ids, images = _chat(request.chat, model, texts, vision, reduction)
        case "token_ids":
            prompt_ids = tuple(request.token_ids.ids)
            _check_token_ids("token_ids.ids", prompt_ids, model)
            if vision is not None and vision.image_token_id in prompt_ids:
                value = f"with {vision.image_token_id}, which stands for an embedding of a picture"
                raise InvalidRequest(
                    "token_ids.ids", value, "tokens of text; send pictures with text or chat"
                )
    if not prompt_ids:
        raise InvalidRequest(kind, "empty", "at least one token")
    if len(prompt_ids) >= model.max_context_tokens:
        allowed = f"at most {model.max_context_tokens - 1}, since the context holds {model.max_context_tokens} with the output"
        raise InvalidRequest(kind, f"{len(prompt_ids)} tokens", allowed)
    return prompt_ids, images


def _chat(
    chat: pb.ChatMessages,
    model: ModelInfo,
    texts: Texts,
    vision: VisionConfig | None,
    reduction: ImageReduction | None,
) -> tuple[tuple[int, ...], PromptImages | None]:
    if not chat.messages:
        raise InvalidRequest("chat.messages", "empty", "at least one message")
    turns: list[ChatTurn] = []
    pictures: list[pb.Image] = []
    for i, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise InvalidRequest(f"chat.messages[{i}].role", repr(message.role[:80]), ", ".join(ROLES))
        if message.parts and message.content:
            raise InvalidRequest(f"chat.messages[{i}]", "given both content and parts", "one of them")
        turns.append(ChatTurn(message.role, _parts(message, i, pictures)))
    planned = plan_images(pictures, model, vision, reduction=reduction)
    text = texts.render_chat(turns)
    return place_images(text, "chat", planned, vision, lambda text: texts.encode(text, is_rendered=True))


def _parts(message: pb.ChatMessage, number: int, pictures: list[pb.Image]) -> tuple[str | None, ...]:
    """Its texts, with None for each picture, which is added to `pictures`."""
    if not message.parts:
        return (message.content,)
    parts: list[str | None] = []
    for i, part in enumerate(message.parts):
        field = f"chat.messages[{number}].parts[{i}]"
        match part.WhichOneof("part"):
            case "text":
                parts.append(part.text)
            case "image":
                if message.role != "user":
                    raise InvalidRequest(field, f"a picture of {message.role!r}", "pictures of 'user' alone")
                parts.append(None)
                pictures.append(part.image)
            case _:
                raise InvalidRequest(field, "empty", "text or image")
    return tuple(parts)


def _check_token_ids(field: str, token_ids: tuple[int, ...], model: ModelInfo) -> None:
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < model.vocab_size:
        i = next(i for i, token_id in enumerate(token_ids) if not 0 <= token_id < model.vocab_size)
        raise InvalidRequest(f"{field}[{i}]", str(token_ids[i]), f"0 to {model.vocab_size - 1}")


def _max_new_tokens(sampling: pb.SamplingParams, num_prompt_tokens: int, model: ModelInfo) -> int:
    """As asked for, or what is left; refused when context or KV cache cannot hold it."""
    left = model.max_context_tokens - num_prompt_tokens
    if sampling.HasField("max_tokens"):
        num_new_tokens = int(sampling.max_tokens)
        if num_new_tokens > left:
            allowed = (
                f"1 to {left}, what the prompt of {num_prompt_tokens} tokens leaves of the context of "
                f"{model.max_context_tokens}"
            )
            raise InvalidRequest("sampling.max_tokens", str(num_new_tokens), allowed)
    else:
        num_new_tokens = max(1, min(left, model.max_sequence_tokens - num_prompt_tokens))
    num_tokens = num_prompt_tokens + num_new_tokens
    if num_tokens > model.max_sequence_tokens:
        raise RequestTooLarge(num_prompt_tokens, num_tokens, model.max_sequence_tokens)
    return num_new_tokens
