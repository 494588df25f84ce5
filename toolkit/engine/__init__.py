"""The only home of torch, unsloth, trl, transformers, peft and datasets.

Import order is structure here: the environment must be prepared, then unsloth comes before anything that could
import trl, because it patches trl's trainers.
"""

import logging

from toolkit import env

env.require_prepared()

from toolkit.engine.quiet import quiet

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of kernels that this path never uses
with quiet():
    import unsloth  # noqa: F401

import datasets
import transformers

datasets.disable_progress_bars()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
