"""The only home of torch, unsloth, trl, transformers, peft and datasets.

Import order is structure here: the environment must be prepared, then unsloth comes before anything that could
import trl, because it patches trl's trainers.
"""

from toolkit import env

env.require_prepared()

from toolkit.engine.base.quiet import quiet
from toolkit.run import runlog

runlog.listen()
with quiet():
    import unsloth  # noqa: F401

import datasets
import transformers

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
runlog.take_over()
