"""Supervised fine-tuning: teaches the recipe's base model to answer.

    python run_sft.py --recipe tiny
    python run_sft.py --recipe llama31_8b --plan
    python run_sft.py --recipe llama31_8b --set sft.max_rows=5000

Writes runs/<recipe>/sft/, or sft-NAME/ with --name: adapter/, report.json, metrics.jsonl and what docs/runs.md names.
"""

from toolkit import cli


def main() -> None:
    job = cli.start("sft", __doc__)
    if job is None:
        return
    with cli.importing(job.console):
        from toolkit.engine.train import sft  # imports torch: only once there is something to run

    cli.finish(sft.run(job), job)


if __name__ == "__main__":
    cli.run(main)
