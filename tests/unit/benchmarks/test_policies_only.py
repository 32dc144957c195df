"""Which policies the benchmark of policies is asked for."""

import sys

import pytest

from benchmarks.control import policies


@pytest.mark.parametrize("only", ["sarathy", "sarathi,sarathy", ""])
def test_a_policy_that_there_is_not_ends_it_at_once(
    only: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["policies.py", "--quick", "--only", only])
    with pytest.raises(SystemExit) as stop:
        policies.main()
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"no policy is called {only.rpartition(',')[2]!r}; there are " in err
    assert all(name in err.rpartition("there are ")[2] for name in policies.POLICIES)


def test_each_policy_can_be_asked_for_and_has_a_row() -> None:
    assert policies.named_policies(",".join(policies.POLICIES)) == set(policies.POLICIES)
    assert {policy for policy, _ in policies.variants()} == set(policies.POLICIES)


def test_a_device_that_prefills_alone_bears_some_of_a_load_and_not_all() -> None:
    load = policies.loads(policies.TRACES, policies.TRACES)[2]
    assert policies.reaches_alone(load, policies.P, 2.0)
    assert not policies.reaches_alone(load, policies.P, 12.0)
    assert policies.reaches_alone(load, policies.D, 2.0)
