"""A model's folder under any spelling of its path is that folder, for everyone who asks for it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT
from toolkit.doctor.examine import out_of_reach
from toolkit.engine.base import fingerprint, hub
from toolkit.errors import UserError
from toolkit.export import model_card
from toolkit.recipe import stages
from toolkit.recipe.load import load
from toolkit.recipe.schema import Recipe
from toolkit.run import adapters

BASE = ROOT / "recipes/tiny/base"
NAMES = st.text(st.sampled_from("aB1 ä-_.[]'$&"), min_size=1, max_size=6).filter(lambda name: name.strip("."))

# How a user writes the folder `name`, once it lies where that is looked for: (the folder it is in, what is written)
SPELLINGS: dict[str, tuple[str, Callable[[Path, str], str]]] = {
    "absolute": ("elsewhere", lambda root, name: str(root / "elsewhere" / name)),
    "beside the recipe": ("recipes", lambda root, name: name),
    "beside the recipe, with a dot": ("recipes", lambda root, name: f"./{name}/"),
    "from the working directory": ("cwd", lambda root, name: name),
    "up and down": ("elsewhere", lambda root, name: f"../elsewhere/../elsewhere/{name}"),
    "home": ("home", lambda root, name: f"~/{name}"),
    "a link": ("cwd", lambda root, name: f"link to/{name}"),
}


def recipe_of(root: Path, spelled: str) -> Recipe:
    return load(str(root / "recipes/mine.yaml"), (f"model.path={json.dumps(spelled)}",))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("elsewhere", "recipes", "cwd", "home"):
        (tmp_path / name).mkdir()
    (tmp_path / "cwd/link to").symlink_to(tmp_path / "cwd")
    shutil.copy(ROOT / "recipes/tiny.yaml", tmp_path / "recipes/mine.yaml")
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES, st.sampled_from(sorted(SPELLINGS)))
def test_every_spelling_leads_to_the_folder(root: Path, name: str, spelling: str) -> None:
    place, spell = SPELLINGS[spelling]
    folder = root / place / name
    shutil.copytree(BASE, folder)
    try:
        recipe = recipe_of(root, spell(root, name))
        located = recipe.locate(recipe.model.path)
        assert os.path.samefile(located, folder)
        assert hub.check_base(recipe, located)["hidden_size"] == 192
        assert hub.fetching(located)() == ""
        assert out_of_reach(recipe, stages.SFT) == []
        assert fingerprint.base_model(located, None) == fingerprint.base_model(str(BASE), None)
        assert model_card.is_local(recipe)
        assert adapters._same_base(str(folder.resolve()), located)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("spelled", ["/data/none", "~/none", "../none", "no such model"])
def test_a_folder_that_is_not_there_is_said_and_nothing_breaks(root: Path, spelled: str) -> None:
    recipe = recipe_of(root, spelled)
    with pytest.raises(UserError, match=r"no such local path|cannot be reached"):
        hub.check_base(recipe, recipe.locate(spelled))
    assert len(out_of_reach(recipe, stages.SFT)) == 1
