"""Run by the Python of vLLM's environment: each job's model embeds its texts, or says why it does not.

A job: ``folder``, ``texts``, the ``arguments`` of ``vllm.LLM`` and those of each request. In: a JSON file of jobs.
Out: another, of ``{"vectors": ...}`` or ``{"error": ...}`` in their order.
"""

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


def run(job: dict) -> dict:
    from vllm import LLM, PoolingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    defaults = {"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.1, "runner": "pooling"}
    try:
        llm = LLM(job["folder"], distributed_executor_backend="uni", **{**defaults, **job.get("arguments", {})})
        options = {"pooling_params": PoolingParams(**job.get("request", {})), "use_tqdm": False}
        cut = {"tokenization_kwargs": {"truncate_prompt_tokens": -1}}
        return {"vectors": [one.outputs.embedding for one in llm.embed(job["texts"], **options, **cut)]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    done = [run(job) for job in jobs]
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(done, file)
