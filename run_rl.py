"""Learning from rewards: the policy answers, its answers are scored, and the better ones become likelier.

    python run_rl.py --recipe tiny
    python run_rl.py --recipe tiny --plan
    python run_rl.py --recipe tiny --set rl.algorithm=grpo

Starts from the DPO adapter where the recipe has that stage, else from that of SFT, or from what --from names; writes
runs/<recipe>/rl/, or rl-NAME/ beside it.
"""

from toolkit import cli


def main() -> None:
    job = cli.start("rl", __doc__)
    if job is None:
        return
    with cli.importing(job.console):
        from toolkit.engine.train import rl  # imports torch: only once there is something to run

    cli.finish(rl.run(job), job)


if __name__ == "__main__":
    cli.run(main)
