"""What is otherwise than it was is said value by value."""

from toolkit.run.changes import between


def test_of_a_list_of_sections_only_what_differs_is_said() -> None:
    before = {
        "sft.datasets": [{"path": "a.jsonl", "rows": None}],
        "seed": 1,
        "lora.target_modules": ["q", "k"],
    }
    now = {"sft.datasets": [{"path": "b.jsonl", "rows": None}], "seed": 1, "lora.target_modules": ["q"]}
    assert between(before, now) == {
        "sft.datasets": "sft.datasets.0.path: 'a.jsonl' then, 'b.jsonl' now",
        "lora.target_modules": "lora.target_modules: ['q', 'k'] then, ['q'] now",
    }
    assert between(before, now, ["seed"]) == {}
    assert between({}, {"dpo.beta": 0.1}) == {"dpo.beta": "dpo.beta: None then, 0.1 now"}
