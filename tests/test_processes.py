from __future__ import annotations

import pytest
import torch
from torch import distributed

from i3lm.errors import ConfigurationError, ProcessError
from i3lm.processes import (
    first_goes_first,
    from_all,
    from_first,
    is_first,
    is_first_to_fail,
    join_processes,
    naming_lost_processes,
    process_rank,
)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> distributed.TCPStore:
    """The environment of the second of two processes, and the launcher's store."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def test_one_process_is_first_and_all():
    assert process_rank() == (0, 1)
    assert is_first()
    assert is_first_to_fail()
    assert join_processes(torch.device("cpu")) == torch.device("cpu")
    assert from_all(3) == [3]
    assert from_first(lambda: 4) == 4
    with first_goes_first():
        pass
    assert not distributed.is_initialized()


def test_the_first_that_fails_speaks(launched: distributed.TCPStore, monkeypatch):
    assert process_rank() == (1, 2)
    assert not is_first()
    assert is_first_to_fail()
    assert not is_first_to_fail()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the launcher has begun again
    assert is_first_to_fail()


def test_without_a_store_every_process_speaks(launched, monkeypatch):
    monkeypatch.delenv("MASTER_PORT")
    assert is_first_to_fail()


def test_a_device_that_serves_one_process(launched: distributed.TCPStore):
    with pytest.raises(ConfigurationError, match=r"training.device \(mps\) serves one process"):
        join_processes(torch.device("mps"))


def test_a_lost_process_has_a_name():
    lost = "another process of this run has ended"
    with pytest.raises(ProcessError, match=lost), naming_lost_processes():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with pytest.raises(RuntimeError, match="of our own"), naming_lost_processes():
        raise RuntimeError("a mistake of our own")
