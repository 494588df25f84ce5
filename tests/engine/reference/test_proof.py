"""The reference pass: a kill costs one batch of it, a sweep nothing, and what is found on disk is what it was."""

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.engine.conftest import Stage, run_stage, start, tiny, wait_for, weights
from toolkit.engine.reference import cache as reference_cache
from toolkit.engine.reference import precompute as reference_pass
from toolkit.engine.reference import proof as proving
from toolkit.engine.reference.cache import Batch, decode, encode
from toolkit.engine.train import dpo
from toolkit.memory.plan import plan_stage
from toolkit.run.rundir import RunDir
from toolkit.training.job import Job

PAIRS = ("dpo.eval_datasets=[]", "dpo.precompute_ref_batch_size=4", "dpo.max_steps=2")  # 24 pairs, 6 batches


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "finetune-toolkit" / "reference"


@pytest.fixture(scope="module")
def cache_of_whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(sft: Stage, cache_of_whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A DPO run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache_of_whole))
        return run_stage(tiny(*PAIRS), "dpo", beside(sft, tmp_path_factory.mktemp("whole")))


@pytest.fixture(scope="module")
def trainer(sft: Stage, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A DPO trainer before its reference pass."""

    class Built(Exception):
        pass

    def take(trainer: Any, *args: Any) -> None:
        raise Built(trainer)

    recipe, runs = tiny(*PAIRS), beside(sft, tmp_path_factory.mktemp("runs"))
    job = Job(recipe, plan_stage(recipe, "dpo", None, 16), RunDir(runs, "tiny", "dpo"), Console(quiet=True))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Built) as built:
        patch.setattr(proving, "establish", take)
        dpo.run(job)
    return built.value.args[0]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs each batch of the pass had."""
    seen: list[int] = []
    log_probs_of = reference_pass.log_probs_of

    def count(trainer: Any, batch: Any) -> Any:
        seen.append(len(batch["input_ids"]) // 2)
        return log_probs_of(trainer, batch)

    monkeypatch.setattr(reference_pass, "log_probs_of", count)
    return seen


def beside(sft: Stage, folder: Path) -> Path:
    """A runs directory that holds the shared SFT run."""
    (folder / "tiny").mkdir()
    (folder / "tiny" / "sft").symlink_to(sft.run.path)
    return folder


def precompute(trainer: Any, batch_size: int = 4) -> reference_pass.Pass:
    return reference_pass.precompute(trainer, batch_size, Console(quiet=True))


def values(trainer: Any) -> list[list[float]]:
    return [trainer.train_dataset[column][:] for column in trainer.reference_kind.columns]


def test_a_pass_that_breaks_off_goes_on_where_it_was_to_the_same_weights(
    whole: Stage, sft: Stage, tmp_path: Path, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(Exception):
        pass

    append = reference_cache.Entry.append

    def die_in_the_fifth(entry: Any, batch: Batch) -> None:
        if len(entry.batches) == 4:
            raise Died
        append(entry, batch)

    runs = beside(sft, tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        patch.setattr(reference_cache.Entry, "append", die_in_the_fifth)
        run_stage(tiny(*PAIRS), "dpo", runs)
    batches.clear()
    again = run_stage(tiny(*PAIRS), "dpo", runs)
    assert batches == [4, 4]
    assert "reference log-probs: 16 of 24 train pairs were there already" in again.shown
    assert (again.report["reference"]["pairs"], again.report["reference"]["reused"]) == (24, 16)
    assert weights(again) == weights(whole)


@pytest.mark.long
def test_kill_9_in_the_pass_costs_no_batch_that_was_done(
    sft: Stage, tmp_path: Path, cache: Path, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (*PAIRS, "dpo.max_rows=64", "dpo.precompute_ref_batch_size=1")
    runs = beside(sft, tmp_path)
    script = start("dpo", runs, *overrides)
    wait_for(script, lambda: any(path.stat().st_size >= 5 * 24 for path in cache.glob("*.logps")))
    script.kill()
    script.wait()
    again = run_stage(tiny(*overrides), "dpo", runs)
    assert 5 <= again.report["reference"]["reused"] == 64 - len(batches) < 64
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another cache"))
    (tmp_path / "undisturbed").mkdir()
    undisturbed = run_stage(tiny(*overrides), "dpo", beside(sft, tmp_path / "undisturbed"))
    assert undisturbed.report["reference"]["reused"] == 0
    assert weights(again) == weights(undisturbed)


@pytest.mark.campaign
def test_another_beta_finds_everything_and_trains_as_if_it_had_computed_it(
    whole: Stage,
    sft: Stage,
    tmp_path: Path,
    cache_of_whole: Path,
    batches: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny(*PAIRS, "dpo.beta=0.3", "dpo.learning_rate=1e-4")
    (tmp_path / "computed").mkdir()
    computed = run_stage(recipe, "dpo", beside(sft, tmp_path / "computed"))
    assert batches == [4] * 6 and computed.report["reference"]["reused"] == 0
    batches.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_of_whole))
    found = run_stage(recipe, "dpo", beside(sft, tmp_path))
    assert batches == [] and found.report["reference"]["reused"] == 24
    assert weights(found) == weights(computed)


def test_what_decides_a_value_decides_which_entry_is_found(trainer: Any) -> None:
    """The set of pairs, not its order; every weight, every token, the scaling, the batch size."""
    precompute(trainer)
    before, rows = values(trainer), trainer.train_dataset
    assert precompute(trainer).reused == 24

    trainer.train_dataset = rows.select(range(23, -1, -1))
    assert precompute(trainer).reused == 24
    assert [side[::-1] for side in values(trainer)] == before

    for change in (
        rows.select(range(23)),
        rows.map(
            lambda row, index: {"chosen_ids": row["chosen_ids"][: -1 if index == 5 else None]},
            with_indices=True,
        ),
        rows.map(
            lambda row, index: {
                "prompt_ids": [20 if index == 7 else row["prompt_ids"][0], *row["prompt_ids"][1:]]
            },
            with_indices=True,
        ),
    ):
        trainer.train_dataset = change
        assert precompute(trainer).reused == 0
    trainer.train_dataset = rows
    assert precompute(trainer, batch_size=3).reused == 0

    named = dict(trainer.model.named_parameters())
    lora = named["base_model.model.model.layers.3.mlp.down_proj.lora_A.ref.weight"]
    norm = named["base_model.model.model.norm.weight"]
    for weight in (lora, norm):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.view(-1)[7] += weight.view(-1)[7] * 2**-7
        assert not torch.equal(weight, kept) and precompute(trainer).reused == 0
        weight.data.copy_(kept)
    config = trainer.model.peft_config["ref"]
    config.lora_alpha *= 2
    assert precompute(trainer).reused == 0
    config.lora_alpha //= 2
    assert precompute(trainer).reused == 24 and values(trainer) == before


@pytest.mark.parametrize("damage", ["torn", "flipped", "zeroed tail", "another file"])
def test_a_damaged_entry_is_used_up_to_the_damage(damage: str, trainer: Any, cache: Path) -> None:
    precompute(trainer)
    before = values(trainer)
    [path] = cache.glob("*.logps")
    data = bytearray(path.read_bytes())
    record = len(data) // 6
    if damage == "torn":
        del data[-3:]
    elif damage == "flipped":
        data[2 * record + 20] ^= 1
    elif damage == "zeroed tail":
        data[3 * record :] = bytes(3 * record)
    else:
        data = bytearray(b"not log-probs at all, but longer than the head of a record")
    path.write_bytes(data)
    reused = {"torn": 20, "flipped": 8, "zeroed tail": 12, "another file": 0}[damage]
    assert precompute(trainer).reused == reused
    assert values(trainer) == before
    assert precompute(trainer).reused == 24, "the entry was fixed"


def test_numbers_on_disk_that_this_machine_does_not_compute_are_computed_again(
    whole: Stage, sft: Stage, tmp_path: Path, cache_of_whole: Path, cache: Path
) -> None:
    shutil.copytree(cache_of_whole, tmp_path / "cache")
    [path] = cache.glob("*.logps")
    kept, _ = decode(path.read_bytes(), 24)
    kept[-1] = Batch(4, kept[-1].first + np.float32(0.07), kept[-1].second)
    path.write_bytes(b"".join(encode(batch, 4 * index) for index, batch in enumerate(kept)))
    again = run_stage(tiny(*PAIRS), "dpo", beside(sft, tmp_path))
    assert "found on disk are not those of the policy (largest margin 0.0070)" in again.shown
    assert again.report["reference"]["reused"] == 0
    assert weights(again) == weights(whole)


def test_the_proof_takes_the_batch_of_the_pass_though_the_memory_shrank_on_the_way(
    trainer: Any, tmp_path: Path
) -> None:
    """In smaller batches than those of the pass equal weights give other numbers, and would look unequal."""
    log_probs_of = reference_pass.log_probs_of
    sizes: list[int] = []

    def scarce(trainer: Any, batch: Any) -> Any:
        sizes.append(len(batch["input_ids"]) // 2)
        if len(sizes) > 1 and sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        return log_probs_of(trainer, batch)

    trainer.recovery.file = tmp_path / "events.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_pass, "log_probs_of", scarce)
        done = precompute(trainer, batch_size=8)
    assert sizes[:4] == [8, 8, 4, 2] and list(map(len, done.ends)) == [8, 2]
    proof = proving.prove(trainer, done)
    assert proof.holds and proof.margin == 0
    before = values(trainer)
    assert precompute(trainer, batch_size=8).reused == 24 and values(trainer) == before
    assert proving.prove(trainer, done).margin == 0


def test_two_processes_never_write_one_entry_and_a_full_disk_ends_only_the_keeping(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    batch = Batch(2, np.float32([1, 2]), np.float32([3, 4]))
    with reference_cache.opened("key", 6, console) as mine:
        mine.append(batch)
        with reference_cache.opened("key", 6, console) as other:
            assert other.batches == []
            other.append(batch)
            other.append(batch)
        mine.append(batch)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with reference_cache.opened("key", 6, console) as mine:
        assert len(mine.batches) == 2
        monkeypatch.setattr(os, "fsync", full)
        mine.append(batch)
        assert len(mine.batches) == 3
    shown = " ".join(console.export_text().split())
    assert "another process is computing the same reference log-probs: this run computes its own" in shown
    assert "(No space left on device): if this run is killed, their pass starts again" in shown


def test_the_newest_entries_stay(cache: Path) -> None:
    cache.mkdir(parents=True)
    for age in range(60):
        path = cache / f"{age}.logps"
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    with reference_cache.opened("new", 1, Console(quiet=True)):
        pass
    left = {path.stem for path in cache.iterdir()}
    assert left == {"new", *map(str, range(reference_cache.ENTRIES - 1))}


numbers = st.floats(width=32, allow_nan=False)
passes = st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5), max_size=6)


def records(pairs: list[list[tuple[float, float]]]) -> list[bytes]:
    befores = itertools.accumulate((len(batch) for batch in pairs), initial=0)
    return [
        encode(Batch(len(batch), *np.float32(batch).T), before)
        for batch, before in zip(pairs, befores, strict=False)
    ]


def pairs_of(batches: list[Batch]) -> list[list[tuple[float, float]]]:
    return [list(zip(batch.first.tolist(), batch.second.tolist(), strict=True)) for batch in batches]


@given(passes, st.data())
def test_of_a_damaged_file_exactly_the_batches_before_the_damage_are_read(
    pairs: list[list[tuple[float, float]]], data: st.DataObject
) -> None:
    written = records(pairs)
    file, total = b"".join(written), sum(map(len, pairs))
    batches, place = decode(file, total)
    assert pairs_of(batches) == pairs and place == len(file)
    ends = list(itertools.accumulate(map(len, written)))

    cut = data.draw(st.integers(0, len(file)))
    assert pairs_of(decode(file[:cut], total)[0]) == pairs[: sum(end <= cut for end in ends)]
    assert pairs_of(decode(file + data.draw(st.binary(max_size=40)), total)[0]) == pairs
    if file:
        flipped = bytearray(file)
        place = data.draw(st.integers(0, len(file) - 1))
        flipped[place] ^= data.draw(st.integers(1, 255))
        assert pairs_of(decode(bytes(flipped), total)[0]) == pairs[: sum(end <= place for end in ends)]
    swapped = data.draw(st.permutations(written))
    same = sum(
        1 for _ in itertools.takewhile(lambda two: two[0] == two[1], zip(swapped, written, strict=True))
    )
    assert pairs_of(decode(b"".join(swapped), total)[0])[:same] == pairs[:same]
