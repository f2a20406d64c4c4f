"""Evaluation with mteb: any model under the prompts saved in it, on mteb's tasks and on local data sets."""

try:
    import mteb  # noqa: F401
except ImportError as error:
    raise ImportError("Evaluation needs mteb: pip install 'st-llm-embed[mteb]'.") from error

from .encoder import PromptedEncoder
from .evaluate import Evaluated, evaluate
from .local_tasks import local_task
from .parity import Parity, parity

__all__ = ["Evaluated", "Parity", "PromptedEncoder", "evaluate", "local_task", "parity"]
