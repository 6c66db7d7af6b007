"""Align any Diffusers model to preferences, and prove that it worked.

`diffalign.train(config)`, `diffalign.load_reward("clip")(images, prompts)` and
`diffalign.evaluate(base, aligned, prompts, ...)` are the Python road; `diffalign --help` is the command line.
"""

from diffalign._torchvision import declare_missing_operators

declare_missing_operators()  # before anything imports diffusers, transformers or peft

# The submodules `train` and `evaluate` are imported first, so that the names below stay the functions.
import diffalign.evaluate  # noqa: E402
import diffalign.train  # noqa: E402, F401
from diffalign.api import evaluate, load_reward, train  # noqa: E402

__all__ = ["evaluate", "load_reward", "train"]
__version__ = "0.1.0"
