"""Lines are complete or absent, and wait for room."""

import json
import resource
from pathlib import Path

from toolkit.run.journal import Journal


def test_what_finds_no_room_is_written_later(tmp_path: Path) -> None:
    file, said = tmp_path / "metrics.jsonl", []
    journal = Journal(file, said.append)
    journal.write({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (file.stat().st_size + 5, before[1])
    )  # the kernel's own refusal
    try:
        journal.write({"step": 2})
        journal.write({"step": 3})
        assert file.read_text() == '{"step": 1}\n' and said == [
            "metrics.jsonl cannot be written (File too large); the run goes on"
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    journal.write({"step": 4})
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]
