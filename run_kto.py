"""Kahneman-Tversky optimisation: teaches the SFT model of the same recipe from replies that are called good or bad.

    python run_kto.py --recipe tiny
    python run_kto.py --recipe tiny --plan
    python run_kto.py --recipe tiny --name beta02 --set kto.beta=0.2

Continues runs/<recipe>/sft/adapter or what --from names, which is also its reference; writes runs/<recipe>/kto/, or
kto-NAME/ beside it.
"""

from toolkit import cli


def main() -> None:
    job = cli.start("kto", __doc__)
    if job is None:
        return
    with cli.importing(job.console):
        from toolkit.engine.train import kto  # imports torch: only once there is something to run

    cli.finish(kto.run(job), job)


if __name__ == "__main__":
    cli.run(main)
