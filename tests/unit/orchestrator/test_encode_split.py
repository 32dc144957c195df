"""split: tiles go where they are done first, in runs of neighbours, each to one worker."""

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.encode_split import EncoderMemory, Shard, split
from orchestrator.control.prompt_images import PlacedTile
from orchestrator.control.router import LoadLedger, Refuse, Wait
from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from workers.api import ImagesEncoded, ImageTile, Phase, RequestId, RequestKey, WorkerId


def _worker(name: str, *phases: Phase, state: LifecycleState = LifecycleState.READY) -> WorkerView:
    return WorkerView(WorkerId(name), 1, frozenset(phases), state, f"127.0.0.1:{sum(map(ord, name))}")


E0, E1 = _worker("e-0", Phase.ENCODE), _worker("e-1", Phase.ENCODE)
P0 = _worker("p-0", Phase.PREFILL)
B0 = _worker("b-0", Phase.ENCODE, Phase.PREFILL, Phase.DECODE)


def _view(*workers: WorkerView) -> ClusterView:
    return ClusterView("test", 1, 1, "model", workers)


def _tiles(*files: int, num_patches: int = 256) -> list[tuple[int, PlacedTile]]:
    """One number of tiles for each file."""
    found: list[tuple[int, PlacedTile]] = []
    for file, num in enumerate(files):
        for number in range(num):
            index = len(found)
            tile = ImageTile(index * 64, 64, f"{file}/{number}".encode())
            found.append((index, PlacedTile(file, number, num_patches, tile)))
    return found


def _split(
    view: ClusterView | None,
    tiles: list[tuple[int, PlacedTile]],
    *,
    ledger: LoadLedger | None = None,
    memory: EncoderMemory | None = None,
    prefill: WorkerView = P0,
    avoided: frozenset[WorkerId] = frozenset(),
) -> list[Shard] | Wait | Refuse:
    return split(
        view,
        ledger or LoadLedger(),
        lambda _: True,
        memory or EncoderMemory(),
        tiles=tiles,
        salt="",
        prefill=prefill,
        avoided=avoided,
    )


def _load(shards: list[Shard] | Wait | Refuse) -> dict[str, int]:
    assert isinstance(shards, list)
    found: dict[str, int] = {}
    for shard in shards:
        found[shard.worker.worker_id] = found.get(shard.worker.worker_id, 0) + shard.num
    return found


def test_pictures_are_spread_evenly() -> None:
    assert _load(_split(_view(E0, E1, P0), _tiles(1, 1, 1, 1, 1, 1, 1, 1))) == {"e-0": 4, "e-1": 4}


def test_tiles_of_one_picture_are_spread_too_in_two_runs() -> None:
    shards = _split(_view(E0, E1, P0), _tiles(16))
    assert shards == [Shard(E0, 0, 8), Shard(E1, 8, 8)]


def test_a_loaded_worker_gets_less() -> None:
    ledger = LoadLedger()
    ledger.add(E0.worker_id, encode_patches=4 * 256)
    assert _load(_split(_view(E0, E1, P0), _tiles(1, 1, 1, 1), ledger=ledger)) == {"e-1": 4}


def test_a_slow_worker_gets_less() -> None:
    memory = EncoderMemory({E0.worker_id: 1e-3, E1.worker_id: 3e-3})
    assert _load(_split(_view(E0, E1, P0), _tiles(1, 1, 1, 1), memory=memory)) == {"e-0": 3, "e-1": 1}


def test_what_a_worker_was_given_goes_there_again() -> None:
    memory, tiles = EncoderMemory(), _tiles(1, 1, 1)
    memory.given(E1, "", [placed for _, placed in tiles])
    assert _load(_split(_view(E0, E1, P0), tiles, memory=memory)) == {"e-1": 3}
    # Not so of another tenant, nor of a worker that was started again.
    assert not memory.has(E1, "salt", tiles[0][1].tile.key)
    assert not memory.has(WorkerView(E1.worker_id, 2, E1.phases, E1.state), "", tiles[0][1].tile.key)
    memory.forget(E0, "", [tiles[0][1]])
    memory.forget(E1, "", [tiles[2][1]])
    assert [memory.has(E1, "", placed.tile.key) for _, placed in tiles] == [True, True, False]


def test_a_busy_worker_still_gets_what_it_has() -> None:
    memory, ledger, tiles = EncoderMemory(), LoadLedger(), _tiles(1, 2)
    memory.given(E1, "", [tiles[1][1]])
    ledger.add(E1.worker_id, encode_patches=10 * 256)
    shards = _split(_view(E0, E1, P0), tiles, memory=memory, ledger=ledger)
    assert shards == [Shard(E0, 0, 1), Shard(E1, 1, 1), Shard(E0, 2, 1)]


def test_what_a_worker_has_makes_it_no_later_with_the_rest() -> None:
    memory, tiles = EncoderMemory(), _tiles(4, 1, 1)
    memory.given(E0, "", [placed for _, placed in tiles[:4]])
    assert _load(_split(_view(E0, E1, P0), tiles, memory=memory)) == {"e-0": 5, "e-1": 1}


def test_known_tiles_keep_their_worker_among_others_of_the_picture() -> None:
    memory, tiles = EncoderMemory(), _tiles(6)
    memory.given(E1, "", [tiles[1][1], tiles[2][1]])
    shards = _split(_view(E0, E1, P0), tiles, memory=memory)
    assert isinstance(shards, list)
    owner = {i: one.worker for one in shards for i in range(one.first, one.first + one.num)}
    assert owner[1] == owner[2] == E1
    assert list(owner) == list(range(6))


def test_workers_that_encode_alike_are_predicted_by_what_was_seen() -> None:
    memory, tiles = EncoderMemory(), _tiles(1, 1, 1)
    done = ImagesEncoded(RequestKey(RequestId("r"), 1), 3, 0, 192, 1, 0.0, 0.0, 192.0, 0.0)
    memory.observe(E1.worker_id, [placed for _, placed in tiles], done, P0.worker_id)
    assert memory.patch_seconds(E1.worker_id) == memory.patch_seconds(E0.worker_id) == 0.25


def test_the_prefill_worker_itself_wins_ties() -> None:
    assert _load(_split(_view(E0, B0), _tiles(1), prefill=B0)) == {"b-0": 1}


def test_avoided_workers_are_used_only_when_nobody_else_is_there() -> None:
    avoided = frozenset({E0.worker_id})
    assert _load(_split(_view(E0, E1, P0), _tiles(2), avoided=avoided)) == {"e-1": 2}
    assert _load(_split(_view(E0, P0), _tiles(2), avoided=avoided)) == {"e-0": 2}


def test_without_an_encoder_it_waits_or_is_refused() -> None:
    assert isinstance(_split(None, _tiles(1)), Wait)
    coming = _worker("e-2", Phase.ENCODE, state=LifecycleState.STARTING)
    assert isinstance(_split(_view(P0, coming), _tiles(1)), Wait)
    refused = _split(_view(P0), _tiles(1))
    assert isinstance(refused, Refuse)
    assert "no worker can encode now" in refused.reason


@given(
    files=st.lists(st.integers(1, 17), min_size=1, max_size=10),
    num_workers=st.integers(1, 5),
    skipped=st.sets(st.integers(0, 30)),
)
def test_each_tile_is_in_one_run_of_one_picture(
    files: list[int], num_workers: int, skipped: set[int]
) -> None:
    workers = [_worker(f"e-{i}", Phase.ENCODE) for i in range(num_workers)]
    tiles = [(i, placed) for i, placed in _tiles(*files) if i not in skipped]
    shards = _split(_view(P0, *workers), tiles)
    assert isinstance(shards, list)
    covered = [i for shard in shards for i in range(shard.first, shard.first + shard.num)]
    assert covered == [i for i, _ in tiles]
    by_index = dict(tiles)
    for shard in shards:
        members = [by_index[i] for i in range(shard.first, shard.first + shard.num)]
        assert len({placed.file for placed in members}) == 1
        numbers = [placed.number for placed in members]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_an_encoder_from_which_embeddings_take_long_gets_fewer() -> None:
    memory = EncoderMemory()
    # 64 embeddings take as long as four tiles are encoded in.
    memory.patch_s = dict.fromkeys((E0.worker_id, E1.worker_id), 1e-3)
    tile_s = (256 + 16) * 1e-3
    memory.move_s = {(E0.worker_id, P0.worker_id): 4 * tile_s / 64, (E1.worker_id, P0.worker_id): 0.0}
    assert _load(_split(_view(E0, E1, P0), _tiles(*[1] * 10), memory=memory)) == {"e-0": 3, "e-1": 7}
