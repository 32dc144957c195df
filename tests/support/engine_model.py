"""An engine with a real model in one thread: requests in, tokens out, every invariant checked after each step."""

from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch

from tests.support.engine_fakes import BOTH, expanded, key
from workers.api import (
    Abort,
    DecodingReport,
    DraftsGenerated,
    EngineConfig,
    FinishReason,
    ImageReduction,
    ImageTile,
    PhaseSet,
    PromptScored,
    RequestFailed,
    SamplingParams,
    Submit,
    TokenLogprobs,
    TokensGenerated,
)
from workers.embeddings.memory import EmbeddingMemory
from workers.engine.engine import Engine
from workers.engine.kv_packer import KvPacker, codec_of
from workers.engine.messages import Output
from workers.engine.runner import GrammarTools, ModelRunner
from workers.engine.step_plan import StepPlan
from workers.latency_model import LatencyModel
from workers.model.llama import Llama
from workers.step_shape import DeviceShape, ModelShape, StepCosts

#: 0.3 s a step and 0.05 s a token, of steps that take 1.1 s here: what the target leaves is between nothing and some ten tokens.
STEP_MODEL = ModelShape("m", 10**6, 0, 4.0, 1, 16, 64)
STEP_DEVICE = DeviceShape("cpu", 4e7, 1e15, 1e15, 0.3, 1e9, 1e9, is_reading_hidden=False)
STEP_COSTS = StepCosts(STEP_MODEL, STEP_DEVICE, (1.0, 1.0, 1.0, 1.0), 100, 0.1, 1.2)
TPOT_TARGET_S, TTFT_TARGET_S = 1.0, 10.0
#: Nothing about it is special but that blocks are small.
PLAIN = EngineConfig(block_size=4, token_budget=32, max_running_sequences=8, max_waiting_requests=64)


class EngineWithModel:
    """Slots that were never written are NaN: whatever reads one yields no token."""

    def __init__(
        self,
        model: Llama,
        config: EngineConfig = PLAIN,
        *,
        num_blocks: int = 64,
        punctuation: frozenset[int] = frozenset(),
        grammars: GrammarTools | None = None,
        embeddings: EmbeddingMemory | None = None,
    ) -> None:
        kv_cache = torch.full(model.kv_cache_shape(num_blocks, config.block_size), float("nan"))
        codec = codec_of(config.host_cache_codec)
        packer = KvPacker(kv_cache, codec) if config.host_cache_bytes else None
        self.engine = Engine(
            config,
            BOTH,
            num_blocks=num_blocks,
            max_context_tokens=model.config.max_context_tokens,
            claim_s=5.0,
            punctuation=punctuation,
            packer=packer,
            latency=LatencyModel.fitted(STEP_COSTS),
        )
        self.runner = ModelRunner(model, kv_cache, config.block_size, grammars, packer, embeddings)
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.finished: dict[str, FinishReason] = {}
        self.failed: dict[str, RequestFailed] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = defaultdict(list)
        self.prompt_logprobs: dict[str, list[TokenLogprobs]] = defaultdict(list)
        self.drafts: dict[str, DraftsGenerated] = {}
        self.reports: dict[str, DecodingReport] = {}
        self.num_cached: dict[str, int] = {}
        self.outputs: list[Output] = []
        self.num_steps = 0
        self._begin: dict[str, int] = {}

    def submit(
        self,
        name: str,
        token_ids: SequenceOf[int],
        max_new: int = 8,
        *,
        phases: PhaseSet = BOTH,
        priority: int = 0,
        cache_salt: str = "",
        num_delivered: int = 0,
        sampling: SamplingParams | None = None,
        images: tuple[ImageTile, ...] = (),
        reduction: ImageReduction | None = None,
    ) -> None:
        """sampling: its max_new_tokens is replaced."""
        params = replace(sampling or SamplingParams(1), max_new_tokens=max_new)
        self._begin[name] = len(token_ids)
        submit = Submit(
            key(name),
            phases,
            tuple(token_ids),
            params,
            1e6,
            priority=priority,
            cache_salt=cache_salt,
            num_delivered=num_delivered,
            images=images,
            reduction=reduction,
            ttft_left_s=TTFT_TARGET_S,
            tpot_target_s=TPOT_TARGET_S,
        )
        self.engine.handle(submit, float(self.num_steps))

    def abort(self, name: str) -> None:
        self.engine.handle(Abort(key(name)), float(self.num_steps))
        self._read()

    def step(self) -> StepPlan | None:
        """One step, whatever there is to do."""
        self.num_steps += 1
        plan = self.engine.schedule(float(self.num_steps))
        if plan is not None:
            result = self.runner.run(plan, lambda _lo, _hi: None)
            self.engine.complete(plan, result, self.num_steps + 0.1)
        self._read()
        self.engine.check_invariants()
        return plan

    def run(self, max_steps: int = 2000) -> None:
        """Until nothing runs or waits."""
        for _ in range(max_steps):
            if self.engine.num_running + self.engine.num_waiting == 0:
                counts = self.engine.block_counts()
                assert counts.free + counts.cached == counts.total
                return
            assert self.step() is not None, "nothing to compute, but requests are open"
        raise AssertionError(f"no end after {max_steps} steps")

    def _read(self) -> None:
        for output in expanded(self.engine.take_outputs()):
            self.outputs.append(output)
            match output:
                case TokensGenerated():
                    name = output.key.request_id
                    assert output.first_position == self._begin[name] + len(self.tokens[name])
                    self.tokens[name].extend(output.token_ids)
                    self.logprobs[name].extend(output.logprobs)
                    if output.prefill_s is not None:
                        self.num_cached[name] = output.num_cached_tokens
                    if output.finish_reason is not None:
                        self.finished[name] = output.finish_reason
                case PromptScored():
                    scored = self.prompt_logprobs[output.key.request_id]
                    assert output.first_position == 1 + len(scored)
                    scored.extend(output.logprobs)
                case DraftsGenerated():
                    self.drafts[output.key.request_id] = output
                case DecodingReport():
                    self.reports[output.key.request_id] = output
                case RequestFailed():
                    self.failed[output.key.request_id] = output
