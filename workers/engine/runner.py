"""Computes steps with torch: StepPlan -> tensors -> forward pass -> sampled tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from workers.api import TokenLogprobs
from workers.embeddings.memory import EmbeddingMemory
from workers.engine.decoding.acceptance import Accepted, walk
from workers.engine.forwarding import Forward, HostForward
from workers.engine.grammar_masks import GrammarMasks
from workers.engine.grammar_states import GrammarStates
from workers.engine.kv_packer import KvPacker
from workers.engine.lookahead import sources_of
from workers.engine.sampler import SampleResult, SampleRow, sample, score_prompt
from workers.engine.span_reuse.selection import by_deviation
from workers.engine.step_batch import EmbeddedRows, StepBatch, embedded_rows
from workers.engine.step_plan import StepPlan
from workers.engine.step_result import FilteredChunk, RowDetail, StepResult
from workers.engine.step_sampling import is_drawn_alone, likeliest_tokens, sample_rows, score_prompts, to_host
from workers.model.forward_batch import Embeds, ForwardBatch
from workers.model.llama import Llama
from workers.tensor_parallel.kv_moves import copy_blocks, move_slots

if TYPE_CHECKING:
    from workers.device.sampler import DeviceSampler, DeviceTokens
    from workers.tensor_parallel.followers import Followers

#: Of a token that the plan has.
NO_SOURCE = -1
#: Enough for the way that projections of many rows take.
WARM_UP_TOKENS = 64


@dataclass(frozen=True, slots=True)
class GrammarTools:
    """What a runner needs for requests with a grammar."""

    states: GrammarStates
    masks: GrammarMasks


class ModelRunner:
    """A model and the KV cache that its steps read and write. Implements `step_loop.Runner`.

    kv_cache: of `Llama.kv_cache_shape`, contiguous, on the device of the model; fp32 on a CPU. grammars: None refuses
    nothing, but no request may have one. packer: that of the engine; without it no plan may restore a block. embeddings:
    what prompts with pictures read; None: there are none. forward: None is the model's own, for a CPU. sampler: chooses the tokens of plain
    rows where the logits are; None brings all logits to the host. followers: the other ranks of a tensor-parallel group.
    """

    def __init__(
        self,
        model: Llama,
        kv_cache: torch.Tensor,
        block_size: int,
        grammars: GrammarTools | None = None,
        packer: KvPacker | None = None,
        embeddings: EmbeddingMemory | None = None,
        forward: Forward | None = None,
        sampler: "DeviceSampler | None" = None,
        followers: "Followers | None" = None,
    ) -> None:
        self._model = model
        self._run_forward: Forward = forward if forward is not None else HostForward(model, kv_cache)
        self._kv_cache = kv_cache
        self._block_size = block_size
        self._grammars = grammars
        self._sampler = sampler
        self._followers = followers
        self._packer = packer
        self._embeddings = embeddings

    @property
    def may_overlap(self) -> bool:
        """A step can begin before the tokens of the one before it are known."""
        return self._sampler is not None

    def beside(self, forward: Forward, sampler: "DeviceSampler") -> "ModelRunner":
        """Another one of the same model and KV, whose steps run beside those of others; without grammars and pictures.

        Raises ValueError where other ranks follow, which compute one step at a time.
        """
        if self._followers is not None:
            raise ValueError("steps of several ranks are not split: each rank computes one at a time")
        return ModelRunner(
            self._model,
            self._kv_cache,
            self._block_size,
            packer=self._packer,
            forward=forward,
            sampler=sampler,
        )

    def run(self, plan: StepPlan, on_layers: Callable[[int, int], None]) -> StepResult:
        """See Runner."""
        return self.begin(plan, on_layers).result()

    @torch.inference_mode()
    def begin(
        self,
        plan: StepPlan,
        on_layers: Callable[[int, int], None],
        previous: "BegunStep | None" = None,
    ) -> "BegunStep":
        """Begin what `run` does; on a GPU it goes on there. previous: the step whose tokens are assumed in the plan."""
        copy_blocks(self._kv_cache, plan.copies)
        if self._followers is not None:
            self._followers.copy_blocks(plan.copies)
        for block_id, packed in plan.restores.items():
            assert self._packer is not None
            self._packer.unpack(packed, block_id)
        step = StepBatch(plan, self._block_size)
        rows = sample_rows(step)
        on_host = [i for i, row in enumerate(rows) if self._sampler is None or not is_drawn_alone(row)]
        self._begin_masks(step, on_host)
        try:
            logits, filtered = self._forward(step, on_layers, previous)
            sampled = logits[: step.num_sampled_rows]
            tokens = None
            # Also where none is taken of them: they say when the step has ended.
            if self._sampler is not None:
                tokens = self._sampler.begin(sampled, rows)
            before = previous.tokens if previous is not None else None
            return BegunStep(self, step, rows, on_host, logits, tokens, filtered, before)
        except BaseException:
            self._drop_masks()
            raise

    @torch.inference_mode()
    def finish(self, begun: "BegunStep") -> StepResult:
        """Wait for its tokens, and choose those that are chosen on the host."""
        step = begun.step
        try:
            prompt_logprobs = score_prompts(step, begun.logits[step.num_sampled_rows :])
            result = self._sample(begun, prompt_logprobs)
            if self._followers is not None:
                self._followers.check()
            return replace(result, filtered=begun.filtered, device_s=_device_s(begun))
        finally:
            # Nothing is left of them unless the step broke.
            self._drop_masks()

    def _drop_masks(self) -> None:
        if self._grammars is not None:
            self._grammars.masks.drop()

    def _forward(
        self, step: StepBatch, on_layers: Callable[[int, int], None], previous: "BegunStep | None"
    ) -> tuple[torch.Tensor, dict[int, FilteredChunk]]:
        """Logits of all rows, in the order of StepBatch, and what was filtered."""
        # First: when a layer of the others is said to be computed, it is so for these too.
        alone = [
            self._model.forward_selectively(batch, self._kv_cache, by_deviation(fraction))
            for batch, fraction in step.selective
        ]
        filtered: dict[int, FilteredChunk] = {}
        for i, part in step.filtered:
            batch = step.filtering_batch(part, self._embeds(list(embedded_rows(part, 0))))
            found = self._model.forward_filtering(batch, self._kv_cache)
            alone.append(found.logits)
            gone = np.setdiff1d(np.arange(part.end), found.rows.cpu().numpy(), assume_unique=True)
            filtered[i] = FilteredChunk(tuple(gone.tolist()), found.layer_rows)
        if step.forward is None:
            on_layers(0, len(self._kv_cache))
            return torch.cat(alone), filtered
        logits = self._run_forward(
            self._with_embeds(step, step.forward),
            layer_group_size=step.plan.layer_group_size,
            on_layers=on_layers,
            **_token_sources(step, previous),
        )
        if not alone:
            return logits, filtered
        num_before = step.num_sampled_rows - sum(map(len, alone))
        return torch.cat((logits[:num_before], *alone, logits[num_before:])), filtered

    def _with_embeds(self, step: StepBatch, batch: ForwardBatch) -> ForwardBatch:
        """With the embeddings of the pictures that this step computes."""
        embedded = list(step.embedded_rows())
        return replace(batch, embeds=self._embeds(embedded)) if embedded else batch

    def _embeds(self, embedded: list[EmbeddedRows]) -> Embeds:
        assert self._embeddings is not None
        rows = torch.tensor([row for some, _, _ in embedded for row in some])
        spans = [(blocks, first, len(some)) for some, blocks, first in embedded]
        return Embeds(rows, self._embeddings.read(spans))

    def warm_up(self) -> None:
        """Compute a prompt and a token in blocks that no sequence owns yet: pages, kernels and weights are then in place."""
        num_slots = self._kv_cache.shape[2] * self._block_size
        for num_tokens in (min(WARM_UP_TOKENS, num_slots), 1):
            lens = np.array([num_tokens])
            batch = ForwardBatch(
                token_ids=torch.zeros(num_tokens, dtype=torch.int64),
                positions=torch.arange(num_tokens),
                slots=torch.arange(num_tokens),
                block_tables=np.arange(-(-num_tokens // self._block_size), dtype=np.int32)[None],
                query_lens=lens,
                context_lens=lens,
                logit_rows=torch.tensor([num_tokens - 1]),
            )
            logits = self._run_forward(batch)
            if self._sampler is not None:
                self._sampler.warm_up(logits)

    def close(self) -> None:
        """End its threads, and the other ranks."""
        if self._followers is not None:
            self._followers.close()
        if self._grammars is not None:
            self._grammars.masks.close()

    def _begin_masks(self, step: StepBatch, rows: list[int]) -> None:
        """rows: of logits, those that are sampled on the host."""
        if self._grammars is None:
            return
        self._grammars.states.keep(step.sampled)
        if any(sequence.sampling.grammar is not None for sequence in step.sampled):
            # A sequence with a grammar has no drafts, so its row has its own index.
            sequences = step.sequence_of_rows
            self._grammars.masks.begin([self._grammars.states.of(sequences[row]) for row in rows])

    def _sample(
        self, begun: "BegunStep", prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]]
    ) -> StepResult:
        step = begun.step
        if not step.sampled:
            if begun.tokens is not None:
                begun.tokens.wait()
            return StepResult((), {}, prompt_logprobs)
        logits = begun.logits[: step.num_sampled_rows]
        tops = likeliest_tokens(step, logits)
        forced = self._rows_with_logprobs_and_grammar(step, logits)
        result = SampleResult(begun.tokens.wait()) if begun.tokens is not None else SampleResult([])
        if begun.on_host:
            result = self._sample_on_host(begun, logits, result)
        token_ids = [result.token_ids[row] for row in step.first_rows]
        details = self._details(step, result, tops, token_ids, forced)
        return StepResult(token_ids, details, prompt_logprobs)

    def _sample_on_host(self, begun: "BegunStep", logits: torch.Tensor, chosen: SampleResult) -> SampleResult:
        """With the tokens of the rows that need more than a draw. chosen: those of the device, if there are any."""
        rows, indices = begun.rows, begun.on_host
        is_all = len(indices) == len(rows)
        rule_out = self._grammars.masks.rule_out if self._grammars is not None else None
        found = sample(to_host(logits if is_all else logits[indices]), [rows[i] for i in indices], rule_out)
        if is_all:
            return found
        for i, token_id in zip(indices, found.token_ids, strict=True):
            chosen.token_ids[i] = token_id
        return SampleResult(
            chosen.token_ids,
            {indices[i]: one for i, one in found.logprobs.items()},
            {indices[i]: one for i, one in found.warped_logprobs.items()},
            {indices[i]: one for i, one in found.branches.items()},
        )

    def _details(
        self,
        step: StepBatch,
        result: SampleResult,
        tops: dict[int, tuple[tuple[int, float], ...]],
        token_ids: list[int],
        forced: dict[int, torch.Tensor],
    ) -> dict[int, RowDetail]:
        """Of the sequences that ask for more than a token. A grammar may replace the token."""
        details: dict[int, RowDetail] = {}
        for i in step.special:
            sequence, row = step.sampled[i], step.first_rows[i]
            logprobs = result.logprobs.get(row)
            accepted, is_complete, problem = None, False, None
            if i in step.plan.drafts:
                accepted = self._verify(step, i, result.token_ids)
            elif self._grammars is not None and sequence.sampling.grammar is not None:
                token_ids[i], is_complete = self._grammars.states.take(sequence, token_ids[i])
                problem = self._grammars.states.problem_of(sequence)
                if i in forced and logprobs is not None and logprobs.token_id != token_ids[i] >= 0:
                    num_top = sequence.sampling.num_logprobs or 0
                    logprobs = score_prompt(forced[i][None], [token_ids[i]], num_top)[0]
            details[i] = RowDetail(
                logprobs=logprobs,
                warped_logprob=result.warped_logprobs.get(row, 0.0),
                branches=result.branches.get(row, ()),
                accepted=accepted,
                num_rows=step.num_rows_of(i),
                top=tops.get(i, ()),
                is_complete=is_complete,
                problem=problem,
            )
        return details

    def _verify(self, step: StepBatch, index: int, sampled: list[int]) -> Accepted:
        """Follow the drafts as far as they are what was sampled, and put their KV where it belongs."""
        assert step.forward is not None
        sequence, tree = step.sampled[index], step.plan.drafts[index]
        first = step.first_rows[index]
        accepted = walk(
            tree,
            sampled[first : first + tree.num_drafts + 1],
            stop_token_ids=sequence.stop_token_ids,
            max_tokens=sequence.max_tokens - len(sequence.token_ids),
        )
        slots = step.forward.slots[first : first + tree.num_drafts + 1]
        moved = [(to, row) for to, row in enumerate(accepted.rows) if to != row]
        if moved:
            targets = slots[[to for to, _ in moved]]
            sources = slots[[row for _, row in moved]]
            move_slots(self._kv_cache, targets, sources)
            if self._followers is not None:
                self._followers.move_slots(targets, sources)
        return accepted

    def _rows_with_logprobs_and_grammar(
        self, step: StepBatch, logits: torch.Tensor
    ) -> dict[int, torch.Tensor]:
        """What the model itself says, where a grammar may replace the token whose logprob is asked for."""
        return {
            i: to_host(logits[step.first_rows[i]]).clone()
            for i in step.special
            if step.sampled[i].sampling.grammar is not None
            and step.sampled[i].sampling.num_logprobs is not None
        }


@dataclass(frozen=True, slots=True)
class BegunStep:
    """A step that runs, or has run. Ends with `result`, once; until then no other may end."""

    runner: ModelRunner
    step: StepBatch
    #: One for each row of logits that a token is sampled from, and which of them are sampled on the host.
    rows: list[SampleRow]
    on_host: list[int]
    logits: torch.Tensor
    tokens: "DeviceTokens | None"
    filtered: dict[int, FilteredChunk]
    #: Of the step that ran when this one was begun.
    before: "DeviceTokens | None"

    @property
    def is_done(self) -> bool:
        """It has ended."""
        return self.tokens is None or self.tokens.is_there

    def result(self) -> StepResult:
        """Wait for it."""
        return self.runner.finish(self)


def _device_s(begun: BegunStep) -> float | None:
    """How long it kept the device. What the host does while it waits for a device, it does at any time: by its clock a step may
    end when the next one was begun, long after it did."""
    if begun.tokens is None or begun.before is None or begun.on_host:
        return None
    return begun.tokens.seconds_since(begun.before)


class _TokenSources(TypedDict, total=False):
    sources: NDArray[np.int64]
    previous: torch.Tensor


def _token_sources(step: StepBatch, previous: BegunStep | None) -> _TokenSources:
    """Where the forward pass finds the tokens that are assumed in the plan."""
    if previous is None or previous.tokens is None or not len(previous.tokens.on_device):
        return {}
    assert step.forward is not None
    sources = np.full(len(step.forward.token_ids), NO_SOURCE, np.int64)
    decodes = step.plan.decodes
    sources[: len(decodes)] = sources_of(previous.step.plan, decodes, NO_SOURCE)
    return {"sources": sources, "previous": previous.tokens.on_device}
