"""Two actors of one node that share a GPU through one MPS daemon, of which one is killed; with a double of the daemon."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_mps import write_fake
from tests.support.local_ray import local_ray
from tests.support.mps_members import daemon_pid, is_running
from tests.support.waiting import until_in_thread

pytestmark = pytest.mark.integration


class Member:
    """A worker that shares a GPU."""

    def join(self, command: str, root: str) -> tuple[int, str]:
        """Its process, and the daemon's folder."""
        from workers.device.mps_member import join

        return os.getpid(), str(join("GPU-1", command=command, root=Path(root)).folder)


def test_a_daemon_outlives_the_actor_that_started_it_and_not_the_last_one(tmp_path: Path) -> None:
    command, root = write_fake(tmp_path), tmp_path / "root"
    root.mkdir()
    with local_ray(tmp_path, num_cpus=2):
        import ray

        remote: Any = ray.remote
        first, second, third = (remote(num_cpus=0)(Member).remote() for _ in range(3))
        pid, folder = ray.get(first.join.remote(command, str(root)))
        assert ray.get(second.join.remote(command, str(root)))[1] == folder
        daemon = daemon_pid(Path(folder))
        ray.kill(first)
        until_in_thread(lambda: not is_running(pid), "the end of the actor")
        assert ray.get(third.join.remote(command, str(root)))[1] == folder
        assert is_running(daemon)
    until_in_thread(lambda: not is_running(daemon), "the end of the daemon")
    until_in_thread(lambda: not list(root.iterdir()), "the end of the folder")
