"""What a client sent, checked and turned into what is run. Pure, apart from the tokenizer that it is given."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from orchestrator.errors import InvalidRequest, RequestTooLarge, UnknownModel
from protos import inference_pb2 as pb
from workers.api import MAX_STOP_TOKEN_IDS, MAX_TEMPERATURE, ModelInfo, RequestId, SamplingParams

ROLES = ("system", "user", "assistant")
MAX_REQUEST_ID_LENGTH = 128


class Texts(Protocol):
    """What is needed of `model_texts.ModelTexts`."""

    def encode(self, text: str, *, is_rendered: bool = False) -> list[int]:
        """Token ids of a text."""

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """The prompt that chat messages make."""


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request that workers can run, as far as its numbers go."""

    request_id: RequestId
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams


def check_request(
    request: pb.GenerateRequest,
    *,
    model: ModelInfo,
    texts: Texts,
    served_name: str,
    draw_seed: Callable[[], int],
) -> CheckedRequest:
    """What to run. draw_seed: a random number below 2**64.

    Raises InvalidRequest, UnknownModel or RequestTooLarge. Whatever costs little is checked first.
    """
    request_id = _request_id(request.request_id, draw_seed)
    if request.model not in ("", served_name):
        raise UnknownModel(request.model[:MAX_REQUEST_ID_LENGTH], served_name)
    sampling = request.sampling
    temperature = sampling.temperature if sampling.HasField("temperature") else 0.0
    # Written so that NaN is refused.
    if not 0.0 <= temperature <= MAX_TEMPERATURE:
        raise InvalidRequest("sampling.temperature", f"{temperature:g}", f"0 to {MAX_TEMPERATURE:g}")
    top_p = sampling.top_p if sampling.HasField("top_p") else 1.0
    if not 0.0 < top_p <= 1.0:
        raise InvalidRequest("sampling.top_p", f"{top_p:g}", "above 0, up to 1")
    if sampling.HasField("max_tokens") and sampling.max_tokens < 1:
        raise InvalidRequest("sampling.max_tokens", str(sampling.max_tokens), "1 or more")
    stop_token_ids = _stop_token_ids(sampling, model)
    prompt_ids = _prompt_ids(request, model, texts)
    return CheckedRequest(
        request_id=request_id,
        prompt_ids=prompt_ids,
        sampling=SamplingParams(
            max_new_tokens=_max_new_tokens(sampling, len(prompt_ids), model),
            temperature=temperature,
            top_p=top_p,
            seed=sampling.seed if sampling.HasField("seed") else draw_seed(),
            stop_token_ids=stop_token_ids,
        ),
    )


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


def _prompt_ids(request: pb.GenerateRequest, model: ModelInfo, texts: Texts) -> tuple[int, ...]:
    kind = request.WhichOneof("prompt")
    match kind:
        case None:
            raise InvalidRequest("prompt", "missing", "one of text, chat and token_ids")
        case "text":
            prompt_ids = tuple(texts.encode(request.text))
        case "chat":
            prompt_ids = _chat_ids(request.chat, texts)
        case "token_ids":
            prompt_ids = tuple(request.token_ids.ids)
            _check_token_ids("token_ids.ids", prompt_ids, model)
    if not prompt_ids:
        raise InvalidRequest(kind, "empty", "at least one token")
    if len(prompt_ids) >= model.max_context_tokens:
        allowed = f"at most {model.max_context_tokens - 1}, since the context holds {model.max_context_tokens} with the output"
        raise InvalidRequest(kind, f"{len(prompt_ids)} tokens", allowed)
    return prompt_ids


def _chat_ids(chat: pb.ChatMessages, texts: Texts) -> tuple[int, ...]:
    if not chat.messages:
        raise InvalidRequest("chat.messages", "empty", "at least one message")
    for i, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise InvalidRequest(f"chat.messages[{i}].role", repr(message.role[:80]), ", ".join(ROLES))
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    return tuple(texts.encode(texts.render_chat(messages), is_rendered=True))


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
