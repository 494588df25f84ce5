"""Which process of a run this one is, as its launcher says it."""

import os

import pytest

from toolkit import env
from toolkit.errors import UserError
from toolkit.world import ALONE, World, of

LAUNCHED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "0",
}


def test_a_launchers_variables_are_read() -> None:
    assert of(LAUNCHED) == World(3, 4, 1, 2, "10.0.0.1", 29500, launcher_holds_store=True)
    assert of({}) == of(LAUNCHED | {"WORLD_SIZE": "1", "RANK": "0"}) == ALONE


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": ""}, "RANK is not set"),
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK=one"),
        ({"RANK": "4"}, "RANK=4 of WORLD_SIZE=4"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 of LOCAL_WORLD_SIZE=2"),
    ],
)
def test_a_description_that_cannot_be_is_refused(changed: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        of(LAUNCHED | changed)


@pytest.mark.parametrize(("visible", "own"), [(None, "1"), ("4,6", "6"), ("GPU-a,GPU-b", "GPU-b"), ("", "")])
def test_each_process_sees_its_own_card_and_no_launcher(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, own: str
) -> None:
    """An empty list stays empty: nobody is to use a GPU."""
    monkeypatch.setattr(
        os, "environ", LAUNCHED | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    )
    env.keep_apart(of(os.environ))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own
    assert of(os.environ) == ALONE


def test_more_processes_than_cards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": "4"})
    with pytest.raises(UserError, match=r"2 processes .* leaves 1 GPU: start one process for each"):
        env.keep_apart(of(LAUNCHED))
