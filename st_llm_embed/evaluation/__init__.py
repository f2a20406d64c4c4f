"""Evaluation with mteb: any model under the prompts saved in it, on mteb's tasks and on local data sets."""

try:
    import mteb  # noqa: F401
except ImportError as error:
    raise ImportError("Evaluation needs mteb: pip install 'st-llm-embed[mteb]'.") from error

from .compare import Compared, Difference, compare
from .compression import Compressed, evaluate_compressed
from .encoder import PromptedEncoder
from .evaluate import Evaluated, evaluate
from .evaluator import TaskEvaluator
from .local_tasks import local_task
from .parity import Parity, parity

__all__ = [
    "Compared",
    "Compressed",
    "Difference",
    "Evaluated",
    "Parity",
    "PromptedEncoder",
    "TaskEvaluator",
    "compare",
    "evaluate",
    "evaluate_compressed",
    "local_task",
    "parity",
]
