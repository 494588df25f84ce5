"""A reward model: learns from pairs to give the better answer the larger score.

    python run_reward.py --recipe tiny
    python run_reward.py --recipe tiny --plan
    python run_reward.py --recipe tiny --set reward.max_rows=200

Starts from runs/<recipe>/sft/adapter where the recipe has SFT, or from what --from names; writes
runs/<recipe>/reward/, or reward-NAME/ beside it.
"""

from toolkit import cli


def main() -> None:
    job = cli.start("reward", __doc__)
    if job is None:
        return
    with cli.importing(job.console):
        from toolkit.engine.train import reward  # imports torch: only once there is something to run

    cli.finish(reward.run(job), job)


if __name__ == "__main__":
    cli.run(main)
