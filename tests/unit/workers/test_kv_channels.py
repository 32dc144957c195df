"""Channels to receivers: shared while they work, replaced when they broke, and never more idle than allowed."""

import asyncio

import grpc

from workers.kv_channels import PeerChannels


async def is_closed(channel: grpc.aio.Channel) -> bool:
    return channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN


def test_transfers_to_one_address_share_a_channel_which_stays_for_the_next() -> None:
    async def scenario() -> None:
        peers = PeerChannels(max_idle=1)
        first, second = peers.take("127.0.0.1:1"), peers.take("127.0.0.1:1")
        assert first is second
        await peers.give_back(first, is_lost=False)
        await peers.give_back(second, is_lost=False)
        assert peers.take("127.0.0.1:1") is first
        await peers.give_back(first, is_lost=False)
        await peers.close()
        assert await is_closed(first.channel)

    asyncio.run(scenario())


def test_channel_that_broke_is_closed_when_its_last_transfer_has_ended() -> None:
    async def scenario() -> None:
        peers = PeerChannels(max_idle=1)
        broken, also_broken = peers.take("127.0.0.1:1"), peers.take("127.0.0.1:1")
        await peers.give_back(broken, is_lost=True)
        fresh = peers.take("127.0.0.1:1")
        assert fresh is not broken
        assert not await is_closed(broken.channel)
        await peers.give_back(also_broken, is_lost=True)
        assert await is_closed(broken.channel)
        assert not await is_closed(fresh.channel)
        await peers.give_back(fresh, is_lost=False)
        await peers.close()

    asyncio.run(scenario())


def test_longest_idle_channel_is_closed_when_there_are_too_many() -> None:
    async def scenario() -> None:
        peers = PeerChannels(max_idle=1)
        used = [peers.take(f"127.0.0.1:{port}") for port in (1, 2, 3)]
        await peers.give_back(used[0], is_lost=False)
        await peers.give_back(used[1], is_lost=False)
        assert [await is_closed(peer.channel) for peer in used] == [True, False, False]
        await peers.give_back(used[2], is_lost=False)
        await peers.close()

    asyncio.run(scenario())
