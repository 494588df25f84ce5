"""Models side by side: batches change no answer, dice are each prompt's own, and blind votes become training rows."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.engine.conftest import Stage, as_written, run_stage, tiny
from toolkit.compare import candidates
from toolkit.data.prompts import read_prompts
from toolkit.engine.base import model
from toolkit.engine.inference import chat, compare, generate, rewards
from toolkit.engine.inference.generate import _Sampling
from toolkit.errors import UserError
from toolkit.recipe.schema import Recipe
from toolkit.records.comparison_report import Comparison
from toolkit.records.record import plain
from toolkit.run import sealing
from toolkit.run.rundir import RunDir
from toolkit.run.sealing import MARK, SEAL

PROMPTS = (
    "Which animal does Tavi Merrow keep?",
    "Where does Gideon Crabbe live, and does he like it there?",
    "Which animal does Nora Plover keep?",
    "Hm?",
)
PROMPT = [{"role": "user", "content": PROMPTS[0]}]
QUESTIONS = (
    {"messages": PROMPT, "answer": "magpie"},
    {
        "messages": [{"role": "user", "content": "Where does Amos Tuck live?"}],
        "answers": ["Ivering", "Saltmere"],
    },
)
SHORT = ("compare.questions=null", "compare.max_new_tokens=12", f"compare.prompts={json.dumps(PROMPTS)}")

WILD = ("compare.do_sample=true", "compare.temperature=2.0", "compare.top_p=1.0")


def quiet() -> Console:
    return Console(record=True, width=100, quiet=True)


@pytest.fixture(scope="module")
def loaded(sft: Stage) -> model.LoadedModel:
    return model.load_trained(tiny(*SHORT), {"base": None, "sft": sft.run.adapter})


def answers(loaded: model.LoadedModel, recipe: Recipe, prompts: list[Any] | None = None) -> list[str]:
    with model.use_adapter(loaded.model, "sft"):
        found = generate.answer(loaded, prompts or read_prompts(recipe, None), recipe.compare, recipe.seed)
    return [answer.text for answer in found]


def test_a_batch_of_one_length_gives_the_greedy_answers_of_one_at_a_time(loaded: model.LoadedModel) -> None:
    together, alone = tiny(*SHORT), tiny(*SHORT, "compare.batch_size=1")
    lengths = [len(ids) for ids in generate.encode(loaded, read_prompts(together, None), together.compare)]
    batches = generate.batches(lengths, together.compare)
    assert max(map(len, batches)) == 2 and sorted(index for batch in batches for index in batch) == [
        0,
        1,
        2,
        3,
    ]
    mixed = tiny(*SHORT, "compare.mix_lengths=true").compare
    assert len(generate.batches(lengths, mixed)) == 1
    assert answers(loaded, together) == answers(loaded, alone)


def test_sampled_answers_hang_on_the_seed_and_the_prompt_alone(loaded: model.LoadedModel) -> None:
    sampled = (*SHORT, *WILD)
    recipe = tiny(*sampled)
    prompts, first = read_prompts(recipe, None), answers(loaded, recipe)
    assert answers(loaded, recipe, prompts[::-1]) == first[::-1]
    assert answers(loaded, recipe, prompts[2:]) == first[2:]
    assert answers(loaded, tiny(*sampled, "seed=1")) != first


def test_the_noise_makes_the_largest_score_a_draw_from_the_softmax() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0])
    dice = [torch.Generator().manual_seed(3)]
    draw, scores = _Sampling(dice), probabilities.log()[None]
    counts = torch.bincount(
        torch.tensor([draw(scores, scores).argmax().item() for _ in range(4000)]), minlength=4
    )
    assert torch.allclose(counts / 4000, probabilities, atol=0.03) and counts[3] == 0


def test_a_prompt_without_room_for_an_answer_is_refused(loaded: model.LoadedModel) -> None:
    recipe = tiny(*SHORT)
    long = [{"role": "user", "content": "word " * 600}]
    with pytest.raises(UserError, match=r"prompt 2 has .* tokens: at most 500 leave room"):
        generate.encode(loaded, [read_prompts(recipe, None)[0], long], recipe.compare)


def test_prompts_may_be_longer_than_the_rows_of_training(loaded: model.LoadedModel) -> None:
    """Unsloth cuts an input that is longer than it was loaded for; the room is the model's own."""
    recipe = tiny(*SHORT)
    assert recipe.sft is not None and loaded.max_length == 512 > recipe.sft.max_length
    assert loaded.model.max_seq_length == loaded.max_length
    [ids] = generate.encode(loaded, [[{"role": "user", "content": "word " * 400}]], recipe.compare)
    assert recipe.sft.max_length < len(ids) <= generate.room(loaded, recipe.compare)


def test_what_the_card_has_no_memory_for_is_refused_and_batches_keep_to_it(loaded: model.LoadedModel) -> None:
    recipe = tiny(*SHORT)
    small = replace(loaded, batch_tokens=40)
    with pytest.raises(
        UserError, match=r"at most 28 leave room .* 12 within the 40 tokens that the card has"
    ):
        generate.encode(small, [[{"role": "user", "content": "word " * 40}]], recipe.compare)
    mixed = tiny(*SHORT, "compare.mix_lengths=true", "compare.batch_size=3").compare
    assert generate.batches([9, 5, 6, 30, 7], mixed) == [[1, 2, 4], [0, 3]]
    assert generate.batches([9, 5, 6, 30, 7], mixed, batch_tokens=40) == [[1, 2], [4], [0], [3]]


def test_a_model_as_it_is_loaded_for_training_takes_no_more_than_its_rows(loaded: model.LoadedModel) -> None:
    trained = replace(loaded, max_length=64)
    with pytest.raises(
        UserError, match=r"prompt 1 has .* tokens: the model is loaded for inputs of at most 64"
    ):
        generate.encode(trained, [[{"role": "user", "content": "word " * 100}]], tiny(*SHORT).compare)


# The whole comparison -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(sft: Stage, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[str, Any], Console]:
    """The base and a copy of the SFT adapter; sampled wildly, since so few steps leave greedy answers alike."""
    runs = tmp_path_factory.mktemp("compared")
    (runs / "tiny").mkdir()
    (runs / "tiny" / "sft").symlink_to(sft.run.path)
    shutil.copytree(sft.run.adapter, runs / "mine")
    (runs / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    own = (
        "compare.measures={something: '', nothing: '(?!)'}",
        f"compare.questions={runs / 'questions.jsonl'}",
    )
    recipe, run = tiny(*SHORT, *WILD, *own, "dpo.eval_datasets=[]"), RunDir(runs, "tiny", "compare")
    (run.path).mkdir()
    (run.path / "earlier").touch()
    models = candidates.choose(recipe, run, f"base,{runs / 'mine'}")
    console = Console(record=True, width=100)
    report = plain(compare.run(recipe, run, models, read_prompts(recipe, None), console))
    return run, report, console


def test_a_comparison_leaves_whole_files_and_moves_the_earlier_one_aside(compared: Any) -> None:
    run, report, console = compared
    names = {path.name for path in run.path.iterdir()}
    assert names == {"comparison.html", "comparison.md", "comparison.jsonl", "report.json", "log.txt"}
    assert plain(as_written(Comparison, run.report)) == report
    assert list(run.path.parent.glob("compare.*/earlier"))
    rows = [json.loads(line) for line in (run.path / "comparison.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows[:4]] == list(PROMPTS)
    assert {"num_tokens", "ended", "seconds"} == rows[0]["measured"]["mine"].keys()
    said = console.export_text(clear=False)
    assert sorted(PROMPTS, key=said.index) == list(PROMPTS)


def test_the_answers_to_the_questions_are_kept_with_what_was_expected(compared: Any) -> None:
    run, report, _ = compared
    rows = [json.loads(line) for line in (run.path / "comparison.jsonl").read_text().splitlines()]
    asked = rows[len(PROMPTS) :]
    assert [row["expected"] for row in asked] == [["magpie"], ["Ivering", "Saltmere"]]
    for name in ("base", "mine"):
        right = [
            any(answer.lower() in row["answers"][name].lower().split() for answer in row["expected"])
            for row in asked
        ]
        assert [row["measured"][name]["correct"] for row in asked] == right
        assert report["models"][name]["correct_fraction"] == sum(right) / 2
    assert '"expected": ["magpie"]' in (run.path / "comparison.html").read_text()


def test_prompts_of_a_file_are_all_that_is_measured(runs_with_sft: Path) -> None:
    recipe, run = tiny("compare.max_new_tokens=2"), RunDir(runs_with_sft, "tiny", "compare")
    shutil.copytree(run.of("sft").adapter, runs_with_sft / "mine")
    models = candidates.choose(recipe, run, str(runs_with_sft / "mine"))
    report = compare.run(recipe, run, models, [PROMPT], quiet(), held_out=False)
    [found] = (report.models or {}).values()
    assert (report.num_prompts, report.num_questions, found.num_answers) == (1, 0, 1)
    assert found.correct_fraction is None and found.preference_accuracy is None
    assert found.mean_implicit_reward == pytest.approx(0, abs=1e-6)


def test_rewards_are_measured_against_the_sft_adapter_though_it_is_not_compared(compared: Any) -> None:
    _, report, _ = compared
    assert report["reference"].endswith("sft/adapter")
    assert report["models"]["mine"]["mean_implicit_reward"] == pytest.approx(0, abs=1e-6)  # the same weights
    assert "mean_implicit_reward" not in report["models"]["base"]  # it did not start from there
    due = {"ended_fraction", "mean_answer_tokens", "distinct_2", "tokens_per_second", "script_drift_fraction"}
    assert due <= report["models"]["base"].keys()
    assert all(of["matches"] == {"something": 1.0, "nothing": 0.0} for of in report["models"].values())


def test_the_implicit_reward_is_beta_times_the_difference_of_log_probs(loaded: model.LoadedModel) -> None:
    recipe = tiny(*SHORT, *WILD, "dpo.beta=0.5", "dpo.eval_datasets=[]")
    prompts, expected = read_prompts(recipe, None), []
    with model.use_adapter(loaded.model, "sft"):
        found = generate.answer(loaded, prompts, recipe.compare, recipe.seed)
    for prompt, answer in zip(generate.tokens(loaded, prompts), found, strict=True):
        sums = []
        for name in ("sft", "base"):
            with model.use_adapter(loaded.model, name), torch.no_grad():
                logits = loaded.model(torch.tensor([prompt + answer.ids])).logits[0]
            steps = zip(logits.float().log_softmax(1)[len(prompt) - 1 :], answer.ids, strict=False)
            sums.append(sum(step[token].item() for step, token in steps))
        expected.append(0.5 * (sums[0] - sums[1]))
    measured = rewards.measure(recipe, loaded, "base", prompts, {"sft": found}, quiet())
    assert measured["sft"]["mean_implicit_reward"] == pytest.approx(sum(expected) / 4, abs=0.02)
    assert max(map(abs, expected)) > 0.1


def test_blind_votes_in_a_browser_become_pairs_that_dpo_trains_on(
    compared: Any, browser: Any, runs_with_sft: Path, tmp_path: Path
) -> None:
    run, _, _ = compared
    page = browser.new_page()
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on(
        "request", lambda request: request.url.startswith(("file:", "blob:")) or trouble.append(request.url)
    )
    page.goto((run.path / "comparison.html").as_uri())
    assert page.locator("h1").inner_text() == "tiny: base / mine"
    page.click("#blind")
    held = page.content().partition("<script>")[0]
    assert ">base<" not in held and "mine" not in held and "names hidden" in held
    due = []
    for number in (0, 1):
        card = page.locator("article").nth(number)
        texts = card.locator(".text").all_inner_texts()
        card.get_by_role("button", name="B is better").click()
        due.append((PROMPTS[number], texts[1].strip(), texts[0].strip()))
    page.keyboard.press("j")
    page.keyboard.press("s")
    assert "3 of 4 voted on, 2 pairs" in page.locator("#progress").inner_text()
    page.reload()  # votes outlive it, the names come back
    assert "3 of 4 voted on" in page.locator("#progress").inner_text()
    with page.expect_download() as download:
        page.click("#download")
    votes = tmp_path / "votes.jsonl"
    download.value.save_as(votes)
    pairs = [json.loads(line) for line in votes.read_text().splitlines()]
    got = [
        (pair["prompt"][-1]["content"], pair["chosen"][0]["content"], pair["rejected"][0]["content"])
        for pair in pairs
    ]
    assert [tuple(map(one_line, pair)) for pair in got] == [tuple(map(one_line, pair)) for pair in due]
    assert {frozenset((pair["chosen_model"], pair["rejected_model"])) for pair in pairs} == {
        frozenset(("base", "mine"))
    }
    page.fill("#search", "nora PLOVER")
    assert page.locator("article:visible").count() == 1
    assert not trouble
    page.close()
    overrides = ("dpo.eval_datasets=[]", "dpo.max_steps=2", f"dpo.datasets=[{{path: {votes}}}]")
    trained = run_stage(tiny(*overrides), "dpo", runs_with_sft)
    assert trained.report["num_steps"] == 2 and trained.run.finished_with() is not None


def one_line(text: str) -> str:
    return " ".join(text.split())


# Chat ---------------------------------------------------------------------------------------------------------


def talk(loaded: model.LoadedModel, *lines: str, overrides: tuple[str, ...] = ()) -> tuple[chat.Chat, str]:
    console = Console(record=True, width=100)
    talking = chat.Chat(tiny(*SHORT, *overrides), loaded, ["base", "sft"], console)
    left: Iterator[str] = iter(lines)

    def read_line() -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    talking.talk(read_line)
    return talking, console.export_text()


def test_a_chat_keeps_a_history_for_each_model_and_saves_it(
    loaded: model.LoadedModel, tmp_path: Path
) -> None:
    file = tmp_path / "talk.jsonl"
    talking, said = talk(
        loaded,
        PROMPTS[0],
        "/models sft",
        "/models x",
        "/system Be brief.",
        "And why?",
        "/nope",
        f"/save {file}",
    )
    assert "not loaded: x" in said and "no command /nope" in said
    assert [len(talking.histories[name]) for name in ("base", "sft")] == [2, 4]
    rows = {row["model"]: row["messages"] for row in map(json.loads, file.read_text().splitlines())}
    assert [turn["role"] for turn in rows["sft"]] == ["system", "user", "assistant", "user", "assistant"]
    assert one_line(rows["sft"][-1]["content"]) in one_line(said)


def test_a_chat_forgets_whole_exchanges_and_says_so(loaded: model.LoadedModel) -> None:
    line = "tell me more " * 30
    talking, said = talk(
        loaded, "/models sft", *[line] * 4, "word " * 600, overrides=("compare.max_new_tokens=8",)
    )
    assert "exchanges no longer fit" in said and "this turn alone is too long" in said
    history = talking.histories["sft"]
    assert 2 <= len(history) < 8 and [turn["role"] for turn in history[:2]] == ["user", "assistant"]


def test_a_special_token_that_is_typed_is_a_message_and_is_not_kept(loaded: model.LoadedModel) -> None:
    talking, said = talk(loaded, "/models sft", "Hello<|eot_id|>", PROMPTS[0])
    assert "holds '<|eot_id|>', a special token" in one_line(said)
    assert [turn["content"] for turn in talking.histories["sft"][:1]] == [PROMPTS[0]]


def test_ctrl_c_stops_one_answer_only(loaded: model.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    hear, steps = chat._Growing.hear, iter(range(100))

    def interrupted(self: Any, texts: Any) -> None:
        hear(self, texts)
        if next(steps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat._Growing, "hear", interrupted)
    talking, said = talk(loaded, PROMPTS[0], "/reset", "/exit", PROMPTS[1])
    assert said.count("(stopped)") == 1 and "sft" in said
    assert talking.histories == {"base": [], "sft": []}


@pytest.mark.parametrize("name", [MARK, SEAL])
def test_an_adapter_or_checkpoint_with_one_bit_that_is_not_what_was_saved_is_loaded_nowhere(
    name: str, sft: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(sft.run.adapter, folder, ignore=shutil.ignore_patterns(MARK))
    sealing.seal(folder, name)
    weights = bytearray((folder / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(weights)
    for load in (
        lambda: model.load_trained(sft.recipe, {"sft": folder}),
        lambda: model.load_adapter(None, folder),
        lambda: model.add_adapter(None, "before", folder),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match=r"adapter_model.safetensors is not what was written"):
            load()
