"""Which ranks may train together, and on what; read from the environment before any of them is connected."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch

from supra_cli.core import parallel
from supra_cli.core.errors import Elsewhere, ResourceError, SupraError, UsageError


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun tells the second of two."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)


def test_a_process_by_itself_is_a_world_of_one_and_connects_to_nothing() -> None:
    with parallel.joined("cpu") as world:
        assert world == parallel.ALONE
        assert not torch.distributed.is_initialized()
        assert world.leads
        assert world.shared("said") == "said"
        assert world.gathered("said") == ["said"]
        assert world.total(torch.tensor(2.0)) == 2


def test_one_process_of_torchrun_knows_how_often_it_started_and_is_refused_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agents = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = {
        "WORLD_SIZE": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(agents.port),
    }
    for name, value in {**given, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "3"}.items():
        monkeypatch.setenv(name, value)
    with parallel.joined("cpu") as world:
        assert (world.size, world.restarts) == (1, 3)
    with pytest.raises(UsageError, match="occupied"), parallel.joined("cpu"):
        raise UsageError("occupied")
    with pytest.raises(Elsewhere) as refused, parallel.joined("cpu"):
        pass
    assert refused.value.exit_code == UsageError.exit_code


@pytest.mark.usefixtures("two_ranks")
def test_of_ranks_that_all_refuse_one_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    agents = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agents.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ResourceError, match="no cuda device"), parallel.joined("cuda"):
        pass
    for rank, restarts in (("0", "0"), ("1", "1")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        with pytest.raises(Elsewhere) as refused, parallel.joined("cuda"):
            pass
        assert refused.value.exit_code == ResourceError.exit_code


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(
    ("device", "version", "sentence"),
    [
        ("cpu", "2.12.1", r"2 ranks need torch 2\.13 or later, got 2\.12; upgrade it, or run one process"),
        ("mps", "2.13.0", "2 ranks cannot share the one device 'mps'; use cuda or cpu, or run one process"),
    ],
)
def test_what_several_ranks_cannot_run_on_is_refused(
    device: str, version: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(UsageError, match=sentence):
        parallel.own_device(device)


@pytest.mark.usefixtures("two_ranks")
def test_each_rank_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parallel.own_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parallel.own_device("cuda") == parallel.own_device("auto") == "cuda:1"
    with pytest.raises(UsageError, match="each of 2 ranks takes its own GPU; say --device cuda"):
        parallel.own_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ResourceError, match="rank 1 of this machine has no GPU: there are 1"):
        parallel.own_device("cuda")


def test_an_environment_that_torchrun_has_not_made_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(UsageError, match="WORLD_SIZE is 4 and LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        parallel.joined("cpu"),
    ):
        pass


@pytest.fixture
def store() -> torch.distributed.Store:
    return torch.distributed.HashStore()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_not_waited_for_without_end(
    rank: int, store: torch.distributed.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead predecessor's name is there; nobody answers by it."""
    store.set("supra.came.1", "name")
    monkeypatch.setattr(parallel, "_MEETING", timedelta(seconds=0.3))
    with pytest.raises(SupraError, match=r"the 2 ranks of this run did not all start within 0 seconds"):
        parallel._fresh(store, rank, 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_wait_for_one_that_refuses_end_with_it(
    rank: int, store: torch.distributed.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "_LAST_WORDS", 0.0)
    store.set(parallel._REFUSED, f"{1 - rank} 5")
    with pytest.raises(Elsewhere) as refused:
        parallel._fresh(store, rank, 2)
    assert refused.value.exit_code == ResourceError.exit_code


def test_ranks_meet_though_their_predecessors_names_are_there(store: torch.distributed.Store) -> None:
    store.set("supra.came.1", "dead")
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda rank: parallel._fresh(store, rank, 2), range(2))
    first.set("said", "yes")
    assert second.get("said") == b"yes"


def test_a_store_that_is_gone_is_a_rank_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*given: object) -> None:
        raise torch.distributed.DistNetworkError("failed to recv, got 0 bytes")

    monkeypatch.setattr(parallel, "_fresh", lost)
    gone = torch.distributed.HashStore()
    with (
        pytest.raises(SupraError, match="another rank of this run ended without a word"),
        parallel._connected(gone, 0, 2, "cpu"),
    ):
        pass
