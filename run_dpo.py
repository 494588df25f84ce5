"""Direct preference optimisation: teaches the SFT model of the same recipe which answers are preferred.

    python run_dpo.py --recipe tiny
    python run_dpo.py --recipe llama31_8b --plan
    python run_dpo.py --recipe tiny --name beta02 --set dpo.beta=0.2
    python run_dpo.py --recipe tiny --name again --from dpo-beta02

Continues runs/<recipe>/sft/adapter or what --from names, which is also its reference; writes runs/<recipe>/dpo/, or
dpo-NAME/ beside it.
"""

from toolkit import cli


def main() -> None:
    job = cli.start("dpo", __doc__)
    if job is None:
        return
    with cli.importing(job.console):
        from toolkit.engine.train import dpo  # imports torch: only once there is something to run

    cli.finish(dpo.run(job), job)


if __name__ == "__main__":
    cli.run(main)
