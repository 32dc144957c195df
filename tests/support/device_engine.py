"""A tiny model with random weights, on a device of choice, and an engine that serves prompts with it."""

from collections.abc import Callable, Mapping, Sequence

import torch

from phasewise_kernels.kv_int4.op import PACKED_DTYPE
from workers.api import (
    Abort,
    EngineConfig,
    Phase,
    RequestFailed,
    RequestId,
    RequestKey,
    SamplingParams,
    Submit,
    TokensGenerated,
)
from workers.device.forward import DeviceForward
from workers.device.sampler import DeviceSampler
from workers.device.sm_share import SmShares
from workers.device.split_runner import SplitRunner, open_split
from workers.engine.engine import Engine
from workers.engine.messages import Output, TokensDecoded
from workers.engine.runner import ModelRunner
from workers.engine.running import Splitting
from workers.engine.sharing import Sharing, SharingLog
from workers.engine.step_loop import StepLoop
from workers.model.config import ModelConfig, RopeConfig
from workers.model.convert import output_shapes
from workers.model.llama import Llama

TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=3,
    hidden_size=128,
    intermediate_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rope=RopeConfig(theta=10_000.0),
    rms_norm_eps=1e-5,
    max_context_tokens=256,
    vocab_size=512,
    tie_embeddings=True,
    eos_token_ids=(2,),
    bos_token="",
    eos_token="",
)
ENGINE = EngineConfig(
    block_size=16, token_budget=64, max_running_sequences=8, max_waiting_requests=64, is_prefix_cache_on=False
)
BOTH = frozenset({Phase.PREFILL, Phase.DECODE})
PROMPTS = tuple(
    tuple((7 * i + 13 * j * j) % 509 + 3 for j in range(length))
    for i, length in enumerate((5, 33, 17, 64, 1, 90, 48, 16, 31, 7))
)


def random_weights(
    config: ModelConfig,
    *,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    sharpness: float = 3.0,
) -> dict[str, torch.Tensor]:
    """Sharp enough that greedy output does not soon repeat one token. The same on every device.

    sharpness: with 3 a difference in the first layer grows tenfold until the last; with 1 it grows little.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in output_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm"):
            values = 1 + 0.1 * values
        else:
            values *= (sharpness if name.endswith(("qkv", "down")) else 1.0) * shape[-1] ** -0.5
        weights[name] = values.to(device, dtype)
    return weights


class DeviceEngine:
    """Serves prompts to their end. buckets: see DeviceForward; None takes the model's own forward pass, on a CPU.

    is_overlapping: tokens are sampled on the device, and steps planned while others run. sharing, shares: prompts and decodes on streams
    of their own; these need buckets, and overlap.
    """

    def __init__(
        self,
        model: Llama,
        *,
        config: EngineConfig = ENGINE,
        num_blocks: int = 64,
        buckets: Sequence[int] | None = (),
        mixed_buckets: Sequence[int] = (),
        kv_dtype: torch.dtype | None = None,
        is_overlapping: bool = False,
        sharing: Sharing | None = None,
        shares: SmShares | None = None,
    ) -> None:
        shape = model.kv_cache_shape(num_blocks, config.block_size, kv_dtype or model.dtype)
        # What is in unused slots must reach nobody: NaN, also as the scale of a row in four bits.
        self.kv_cache = (
            torch.full(shape, 0xFF, dtype=PACKED_DTYPE, device=model.device)
            if kv_dtype == PACKED_DTYPE
            else torch.full(shape, float("nan"), device=model.device).to(kv_dtype or model.dtype)
        )
        self.forward: DeviceForward | None = None
        if buckets is not None:
            self.forward = DeviceForward(
                model,
                self.kv_cache,
                max_context_tokens=model.config.max_context_tokens,
                buckets=buckets,
                mixed_buckets=mixed_buckets,
            )
            self.forward.capture(lambda _what, _done: None)
        sampler = DeviceSampler(model.device) if is_overlapping or sharing is not None else None
        self.runner = ModelRunner(
            model, self.kv_cache, config.block_size, forward=self.forward, sampler=sampler
        )
        self.split: SplitRunner | None = None
        self.log = SharingLog()
        splitting: Splitting | None = None
        if sharing is not None and shares is not None:
            self.split = open_split(
                self.runner,
                model,
                self.kv_cache,
                shares,
                max_context_tokens=model.config.max_context_tokens,
                decode_buckets=buckets or (),
                prefill_buckets=mixed_buckets,
                progress=lambda _what, _done: None,
            )
            splitting = Splitting(sharing, self.split, self.log)
        self.engine = Engine(
            config,
            BOTH,
            num_blocks=num_blocks,
            max_context_tokens=model.config.max_context_tokens,
            claim_s=5.0,
        )
        self._outputs: list[Output] = []
        self._broken: list[str] = []
        self._now_s = 0.0
        self.loop = StepLoop(
            self.engine,
            self.split or self.runner,
            self._outputs.extend,
            self._broken.append,
            self._clock,
            overlapping=(self.split or self.runner) if is_overlapping or self.split else None,
            splitting=splitting,
        )

    def _clock(self) -> float:
        self._now_s += 0.25
        return self._now_s

    def serve(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Callable[[int], SamplingParams],
        *,
        steps_between: int = 0,
        aborted: Mapping[int, int] | None = None,
    ) -> list[list[int]]:
        """Tokens of each prompt; one is handed in every `steps_between` steps, or all at once.

        aborted: step -> prompt that is aborted before it.
        """
        names = [f"r{i}" for i in range(len(prompts))]
        waiting = [
            Submit(RequestKey(RequestId(name), 1), BOTH, tuple(prompt), sampling(i), 1e6)
            for i, (name, prompt) in enumerate(zip(names, prompts, strict=True))
        ]
        tokens: dict[str, list[int]] = {name: [] for name in names}
        num_steps, is_working = 0, True
        while waiting or is_working:
            while waiting and (steps_between == 0 or num_steps % steps_between == 0):
                self.engine.handle(waiting.pop(0), self._now_s)
                if steps_between:
                    break
            if aborted is not None and num_steps in aborted:
                gone = RequestKey(RequestId(names[aborted[num_steps]]), 1)
                self.engine.handle(Abort(gone), self._now_s)
            is_working = self.loop.step()
            self.engine.check_invariants()
            num_steps += 1
            gather(self._outputs, tokens)
            failed = [one for one in self._outputs if isinstance(one, RequestFailed)]
            assert not failed, failed
            self._outputs.clear()
        return [tokens[name] for name in names]


def gather(outputs: Sequence[Output], tokens: Mapping[str, list[int]]) -> None:
    """Append the tokens of these outputs to those of their requests."""
    for output in outputs:
        if isinstance(output, TokensGenerated):
            tokens[output.key.request_id].extend(output.token_ids)
        elif isinstance(output, TokensDecoded):
            for key, token_id in zip(output.keys, output.token_ids, strict=True):
                tokens[key.request_id].append(token_id)


def greedy(num_tokens: int = 24) -> Callable[[int], SamplingParams]:
    """Requests of different lengths, so that batches change."""
    return lambda i: SamplingParams(num_tokens - i % 5)


def first_logits(made: DeviceEngine, prompts: Sequence[Sequence[int]] = PROMPTS[:4]) -> torch.Tensor:
    """Of the first step of some prompts, [rows, vocab_size]."""
    found: list[torch.Tensor] = []
    forward = made.runner._run_forward

    def keep(*arguments: object, **options: object) -> torch.Tensor:
        result = forward(*arguments, **options)
        found.append(result.float().cpu())
        return result

    made.runner._run_forward = keep
    made.serve(prompts, greedy(1))
    return torch.cat(found)
