"""What a worker is told about requests."""

import math
from dataclasses import dataclass

from workers.api.images import ImageReduction, ImageTile
from workers.api.keys import RequestKey, WorkerId
from workers.api.phases import PhaseSet
from workers.api.sampling import SamplingParams

MAX_SALT_CHARS = 256


@dataclass(frozen=True, slots=True)
class Handoff:
    """The KV of a request goes from one worker to another under this transfer id.

    `decode_address` (host:port) is empty in the copy that the decode worker gets.
    """

    transfer_id: str
    decode_address: str = ""
    decode_incarnation: int = 0


@dataclass(frozen=True, slots=True)
class PrefixPeer:
    """A worker that may have the KV of the beginning of a prompt. address: host:port."""

    address: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Submit:
    """Run `phases` of a request. With prefill and decode on two workers both get one, with `handoff`.

    token_ids: prompt and, after a failover, the tokens already delivered; at least one.
    timeout_s: what is left of the request's deadline.
    num_delivered: tokens at the end of token_ids that were generated; max_new_tokens counts from there.
    priority: higher ones start first and are preempted last.
    cache_salt: prompts share KV only with prompts of the same salt.
    prefix_peers: workers that are asked for the beginning of the prompt, where fetching it is faster than computing it.
    images: all tiles of all pictures, in the order of the prompt. With prefill their embeddings are asked for by
    ImagesWanted; decode needs to know of them too, since KV is named by what it was computed from.
    reduction: of these pictures; decode then takes KV of fewer tokens than the prompt has.
    ttft_left_s: until the first token should come, below 0 when that time has passed. tpot_target_s: for the time per token
    after it. Infinity: no target.
    tenant_weight: > 0, what the request's tenant, which its cache_salt names, is worth beside others.
    """

    key: RequestKey
    phases: PhaseSet
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    timeout_s: float
    handoff: Handoff | None = None
    num_delivered: int = 0
    priority: int = 0
    cache_salt: str = ""
    prefix_peers: tuple[PrefixPeer, ...] = ()
    images: tuple[ImageTile, ...] = ()
    reduction: ImageReduction | None = None
    ttft_left_s: float = math.inf
    tpot_target_s: float = math.inf
    tenant_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Encode:
    """Turn tiles of one picture into embeddings, and bring them to a prefill worker, which may be this one.

    key: of this piece of work alone; attempts are numbered over all requests. image: the file. width, height: pixels,
    upright, as the gateway read them from its header. tile_lo, tile_hi: which of its tiles. keys: theirs.
    prefill: the attempt whose prompt they are for, and `first_tile` the index in its `images` of tile_lo. prefill_worker:
    where they go; prefill_address: host:port.
    timeout_s: what is left of the request's deadline. cache_salt: embeddings are shared within it.
    """

    key: RequestKey
    image: bytes
    media_type: str
    width: int
    height: int
    tile_lo: int
    tile_hi: int
    keys: tuple[bytes, ...]
    prefill: RequestKey
    first_tile: int
    prefill_worker: WorkerId
    prefill_address: str
    prefill_incarnation: int
    timeout_s: float
    cache_salt: str = ""
    reduction: ImageReduction | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """Drop the request and free all it holds. Unknown keys are ignored."""

    key: RequestKey


@dataclass(frozen=True, slots=True)
class Migrate:
    """A sequence that is decoded here goes on elsewhere: its KV leaves by this hand-off between two steps, and then it ends here.

    num_known_tokens: of its tokens from the first on, that the other worker's Submit has; it is sent the others. One that does not
    decode now goes as soon as it does. When it cannot be brought there it fails here. Unknown keys are ignored.
    """

    key: RequestKey
    handoff: Handoff
    num_known_tokens: int


@dataclass(frozen=True, slots=True)
class SubscribeKvEvents:
    """Tell from now on what is stored in the prefix cache and removed from it, beginning with all that is there."""


#: What the engine is told.
EngineCommand = Submit | Abort | Migrate | SubscribeKvEvents
Command = EngineCommand | Encode
