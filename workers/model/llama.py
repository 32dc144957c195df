"""The forward pass of a Llama-like model over a paged KV cache. Inference only, on the device of the weights.

Families differ in what ModelConfig says: biases, norms of Q and K, sliding windows, layers without rotation.
What takes time is in `phasewise_kernels`: projections, norms, rotation with the write into the cache, attention and
the gate of the MLP. Angles are in `rope`; here is the order in which all that runs.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from phasewise_kernels.kv_int4.op import PACKED_DTYPE, values_of
from phasewise_kernels.kv_int4.rows import row_bytes
from phasewise_kernels.linear.op import projection
from phasewise_kernels.paged_attention.op import AttentionBatch, paged_attention
from phasewise_kernels.rms_norm.op import rms_norm
from phasewise_kernels.rope_write.op import rope_write
from workers.api import WeightDtype
from workers.model.config import ModelConfig
from workers.model.forward_batch import Embeds as Embeds
from workers.model.forward_batch import ForwardBatch as ForwardBatch
from workers.model.forward_batch import ForwardInputs, PlacedEmbeds, logit_row_batch
from workers.model.forward_batch import Mixes as Mixes
from workers.model.layer import Layer, make_layer
from workers.model.reduction import Filtered, FilteringBatch, LayerRows
from workers.model.rope import Rope
from workers.model.selective import (
    CHECK_LAYER,
    CheckedLayer,
    Choose,
    Reused,
    RowAttention,
    SelectiveBatch,
    rows_to_compute,
)

if TYPE_CHECKING:
    from workers.tensor_parallel.ranks import Ranks


class Llama:
    """A model whose weights are in memory. Holds no state between steps: that is in the KV cache."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        dtype: WeightDtype = WeightDtype.FLOAT32,
        ranks: "Ranks | None" = None,
    ) -> None:
        """weights: as `prepare.load_weights` names them, fp32 on the CPU, or all of one dtype on a GPU, in which it
        computes; matrices with scales beside them (`fp8.quantised`) are in fp8. dtype: of the matrices in memory of the CPU.
        ranks: those with the other parts of the model; config and weights are then of this one's.
        """
        self.config = config
        self.ranks = ranks
        self._embedding = weights["embedding"]
        self._layers = [make_layer(config, weights, dtype, i, ranks) for i in range(config.num_layers)]
        self._norm = weights["norm"]
        self._lm_head = projection(
            weights["embedding" if config.tie_embeddings else "lm_head"], None, dtype.value
        )
        if ranks is not None:
            self._lm_head = ranks.gathered(self._lm_head, config.vocab_size)
        self._rope = Rope(config, self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """What is between the layers."""
        return self._embedding.dtype

    def kv_cache_shape(
        self, num_blocks: int, block_size: int, dtype: torch.dtype = torch.float32
    ) -> tuple[int, ...]:
        """[num_layers, 2 (K, V), num_blocks, block_size, num_kv_heads, head_dim]; of PACKED_DTYPE the last is the bytes of a row."""
        config = self.config
        width = row_bytes(config.head_dim) if dtype == PACKED_DTYPE else config.head_dim
        return (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, width)

    @torch.inference_mode()
    def forward(
        self,
        batch: ForwardBatch,
        kv_cache: torch.Tensor,
        *,
        layer_group_size: int | None = None,
        on_layers: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Compute the tokens of `batch`, write their K and V, and return logits. On the CPU; see `compute`."""
        if int(batch.slots.max()) >= kv_cache.shape[2] * kv_cache.shape[3] or int(batch.slots.min()) < 0:
            # The kernels do not look: it would be written somewhere else.
            raise ValueError(f"slots {batch.slots.tolist()} are not all in the KV cache")
        inputs = _host_inputs(batch, kv_cache.shape[3])
        return self.compute(inputs, kv_cache, layer_group_size=layer_group_size, on_layers=on_layers)

    @torch.inference_mode()
    def compute(
        self,
        inputs: ForwardInputs,
        kv_cache: torch.Tensor,
        *,
        layer_group_size: int | None = None,
        on_layers: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Compute these tokens, write their K and V, and return logits.

        kv_cache: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim], contiguous, on the device of the
        weights; fp32 on a CPU.
        on_layers(layer_lo, layer_hi) is called as soon as what writes K and V of layers layer_lo..layer_hi-1 has run or, on
        a GPU, is on the current stream, every layer_group_size layers and after the last; None means all layers at once.
        Returns [num_logit_rows, vocab_size] of the dtype of the weights.
        """
        config = self.config
        rotation = self._rotation(inputs.positions, inputs.rope_positions, inputs.rope_lens)
        hidden = self._embed(inputs)
        # What a layer's MLP adds to `hidden`: the next norm does that on its way.
        added: torch.Tensor | None = None
        group_start = 0
        for i, layer in enumerate(self._layers):
            num_computed = i + 1
            normed = rms_norm(hidden, layer.attention_norm, config.rms_norm_eps, added=added)
            query = self._project(layer, normed, rotation, kv_cache[i], inputs.slots)
            if num_computed < config.num_layers:
                attended = paged_attention(
                    query, kv_cache[i, 0], kv_cache[i, 1], inputs.attention, window=layer.window
                )
            else:
                attended = self._attend_last(layer, query, kv_cache[i], inputs)
                hidden = hidden if inputs.logit_rows is None else hidden[inputs.logit_rows]
            added = self._mix(layer, hidden, attended)
            if num_computed - group_start == layer_group_size or num_computed == config.num_layers:
                if on_layers is not None:
                    on_layers(group_start, num_computed)
                group_start = num_computed
        if not len(hidden):
            return hidden.new_empty(0, config.vocab_size)
        return self._lm_head(rms_norm(hidden, self._norm, config.rms_norm_eps, added=added))

    @property
    def can_move_keys(self) -> bool:
        """KV can be taken to other positions, which `forward_selectively` does."""
        return self._rope.can_move

    @torch.inference_mode()
    def forward_selectively(
        self, batch: SelectiveBatch, kv_cache: torch.Tensor, choose: Choose
    ) -> torch.Tensor:
        """Compute a prompt some of whose KV is elsewhere in the cache, and return the logits of its last token.

        The first layers are computed for all tokens; then `choose` says which of the reused ones are computed
        further, beside all others. The rest have, in the other layers, the KV that they have elsewhere, with keys
        turned to where they are now. Not for prompts with pictures, whose keys follow from more than their tokens.
        kv_cache: as for `forward`; no block that is read may be one that is written. Returns [1, vocab_size] fp32.
        Raises ValueError when keys cannot be moved.
        """
        eps, last = self.config.rms_norm_eps, self.config.num_layers - 1
        check = min(CHECK_LAYER, last)
        positions = batch.positions
        slots, rotation = batch.slots(positions), self._rope.cos_sin(positions, None)
        attention = RowAttention(batch, torch.arange(len(positions)))
        hidden = F.embedding(batch.token_ids, self._embedding)
        added: torch.Tensor | None = None
        kept = batch.reused
        for i, layer in enumerate(self._layers):
            normed = rms_norm(hidden, layer.attention_norm, eps, added=added)
            if i > check:
                _put(kv_cache[i], batch.slots(kept.positions), *self._moved(kept, kv_cache[i], layer))
            query = self._project(layer, normed, rotation, kv_cache[i], slots)
            if i == check:
                chosen = choose(self._checked(batch, query, kv_cache[i], layer))
                kept = batch.reused.without(chosen)
                rows = rows_to_compute(batch, kept)
                query, hidden = query[rows], hidden[rows]
                slots, rotation = slots[rows], (rotation[0][rows], rotation[1][rows])
                attention = RowAttention(batch, rows)
            if i == last:
                query, hidden = query[-1:], hidden[-1:]
                attention = RowAttention(batch, attention.rows[-1:])
            added = self._mix(layer, hidden, attention.attend(query, kv_cache[i], layer.window))
        return self._lm_head(rms_norm(hidden, self._norm, eps, added=added))

    @torch.inference_mode()
    def forward_filtering(self, batch: FilteringBatch, kv_cache: torch.Tensor) -> Filtered:
        """Compute a prompt with pictures, of which embeddings leave that its text hardly attends to.

        A row that leaves after a layer takes part in that layer and in none after it. In the end the cache has, in the
        first slots of the sequence and in all layers, the KV of the rows that are left.
        kv_cache: as for `compute`. Rows are counted on the host, which on a GPU waits for each layer after which some may leave.
        """
        eps, last = self.config.rms_norm_eps, self.config.num_layers - 1
        batch = batch.on(self.device)
        rotation = self._rotation(batch.positions, batch.rope_positions, batch.rope_lens)
        hidden = self._embed(batch)
        added: torch.Tensor | None = None
        rows = LayerRows(batch, torch.arange(len(batch.token_ids), device=self.device))
        layers: list[LayerRows] = []
        for i, layer in enumerate(self._layers):
            normed = rms_norm(hidden, layer.attention_norm, eps, added=added)
            query = self._project(layer, normed, rotation, kv_cache[i], rows.slots)
            layers.append(rows)
            if i == last:
                query, hidden = query[batch.logit_rows], hidden[batch.logit_rows]
                if not len(query):
                    break
            attended = rows.attend(query, kv_cache[i], layer.window)
            if i < last and i in batch.filter_layers(self.config.num_layers):
                keys, _ = _at(kv_cache[i], rows.slots)
                stay = rows.staying(query, values_of(keys, query.dtype), layer.window)
                if len(stay) < len(query):
                    rows, hidden, attended = LayerRows(batch, rows.rows[stay]), hidden[stay], attended[stay]
                    rotation = rotation[0][stay], rotation[1][stay]
            added = self._mix(layer, hidden, attended)
        for i, before in enumerate(layers):
            if len(before.rows) > len(rows.rows):
                _put(kv_cache[i], rows.slots, *_at(kv_cache[i], before.slots_of(rows.rows)))
        logits = (
            self._lm_head(rms_norm(hidden, self._norm, eps, added=added))
            if len(hidden)
            else hidden.new_empty(0, self.config.vocab_size)
        )
        return Filtered(logits, rows.rows, tuple(len(one.rows) for one in layers))

    def _rotation(
        self, positions: torch.Tensor, rope_positions: torch.Tensor | None, rope_lens: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles of tokens; see ForwardBatch."""
        if rope_positions is not None:
            # The three are the same where positions follow no picture, but tokens may have left the prompt.
            positions = rope_positions if self.config.rope.mrope_section else rope_positions[0]
        return self._rope.cos_sin(positions, rope_lens)

    def _moved(
        self, reused: Reused, kv_cache: torch.Tensor, layer: Layer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K, turned to where the tokens are now, and V, each [num_reused, num_kv_heads, head_dim]."""
        keys, values = _at(kv_cache, reused.source_slots)
        if layer.is_rotated:
            keys = self._rope.move(keys, reused.source_positions, reused.positions)
        return keys, values

    def _checked(
        self, batch: SelectiveBatch, query: torch.Tensor, kv_cache: torch.Tensor, layer: Layer
    ) -> CheckedLayer:
        keys, values = _at(kv_cache, batch.slots(torch.arange(batch.context_len)))
        k_reused, v_reused = self._moved(batch.reused, kv_cache, layer)
        return CheckedLayer(
            batch,
            query,
            keys,
            k_computed=keys[batch.reused.positions],
            k_reused=k_reused,
            v_computed=values[batch.reused.positions],
            v_reused=v_reused,
            window=layer.window,
        )

    def _embed(self, batch: ForwardInputs | FilteringBatch) -> torch.Tensor:
        """[num_tokens, hidden_size]."""
        hidden = F.embedding(batch.token_ids, self._embedding)
        if isinstance(batch, ForwardInputs) and batch.mixes is not None:
            mixed = F.embedding(batch.mixes.token_ids, self._embedding) * batch.mixes.weights[:, :, None]
            hidden[batch.mixes.rows] = mixed.sum(dim=1).to(hidden.dtype)
        embeds = batch.embeds
        if isinstance(embeds, PlacedEmbeds):
            given = embeds.values[embeds.sources.clamp(min=0)]
            return torch.where(embeds.sources[:, None] >= 0, given, hidden)
        if embeds is not None:
            hidden[embeds.rows] = embeds.values.to(hidden.dtype)
        return hidden

    def _project(
        self,
        layer: Layer,
        normed: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        kv_cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """Write K and V of all tokens; returns the query, [num_tokens, num_heads, head_dim]."""
        config = self.config
        heads = layer.qkv(normed).view(normed.shape[0], -1, config.head_dim)
        if layer.qk_norm is not None:
            # Query and key heads are neighbours, so one norm serves both.
            query_key = heads[:, : config.num_heads + config.num_kv_heads]
            query_key.copy_(_norm_heads(query_key, layer.qk_norm, config.rms_norm_eps))
        return rope_write(heads, rotation, slots, kv_cache[0], kv_cache[1], is_rotated=layer.is_rotated)

    def _attend_last(
        self, layer: Layer, query: torch.Tensor, kv_cache: torch.Tensor, inputs: ForwardInputs
    ) -> torch.Tensor:
        """Attention of the rows that need logits alone, [num_logit_rows, num_heads, head_dim]: nobody reads the others."""
        rows, batch = inputs.logit_rows, inputs.logit_attention
        if rows is not None and not len(rows):
            return query[:0]
        if rows is not None and batch is not None:
            return paged_attention(query[rows], kv_cache[0], kv_cache[1], batch, window=layer.window)
        attended = paged_attention(query, kv_cache[0], kv_cache[1], inputs.attention, window=layer.window)
        return attended if rows is None else attended[rows]

    def _mix(self, layer: Layer, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor | None:
        """What follows attention in a layer: adds its output to `hidden`, and returns what the MLP adds.

        hidden: [num_rows, hidden_size]; attended: [num_rows, num_heads, head_dim]. None without rows.
        """
        if not len(hidden):
            if self.ranks is not None:
                self.ranks.meet()
            return None
        projected = layer.attention_out(attended.flatten(1))
        normed = rms_norm(hidden, layer.mlp_norm, self.config.rms_norm_eps, added=projected)
        return layer.down(layer.gate_up(normed))


def _host_inputs(batch: ForwardBatch, block_size: int) -> ForwardInputs:
    """On the CPU. Worked out once per step, for all layers."""
    rows = logit_row_batch(batch)
    return ForwardInputs(
        token_ids=batch.token_ids,
        positions=batch.positions,
        slots=batch.slots,
        rope_lens=batch.rope_lens,
        rope_positions=batch.rope_positions,
        mixes=batch.mixes,
        embeds=batch.embeds,
        attention=AttentionBatch.build(
            block_tables=batch.block_tables,
            query_lens=batch.query_lens,
            context_lens=batch.context_lens,
            block_size=block_size,
            tree_masks=batch.tree_masks,
        ),
        logit_rows=batch.logit_rows,
        logit_attention=AttentionBatch.build(
            block_tables=rows.block_tables,
            query_lens=np.ones(len(rows.context_lens), np.int64),
            context_lens=rows.context_lens,
            block_size=block_size,
        )
        if rows is not None
        else None,
    )


def _at(kv_cache: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V at these slots of one layer, each [num_slots, num_kv_heads, head_dim], copied."""
    keys, values = kv_cache.flatten(1, 2)
    return keys[slots], values[slots]


def _put(kv_cache: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write K and V to these slots of one layer."""
    layer_keys, layer_values = kv_cache.flatten(1, 2)
    # Not index_copy_, which torch has not for float8_e4m3fn.
    layer_keys[slots] = keys
    layer_values[slots] = values


def _norm_heads(heads: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of each head on its own. heads: [num_tokens, any, head_dim]; weight: [any, head_dim]."""
    values = heads.float()
    return weight * (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps))
