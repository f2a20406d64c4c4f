"""The one gate for folders and repositories that were made elsewhere: fetch, look, load.

A model folder is data, and what it names can be code: a class in ``modules.json``, an ``auto_map`` in any
configuration, an activation, a kernel of the Hub. ``code_in`` reads each file as the loaders do, at every depth, and
names what they would run. Nothing of it runs unless the caller says so.

Promised, of ``check``, ``evaluate``, ``merge``, ``average``, ``export``, ``publish``, ``convert``, ``mine``, ``train``
and ``build_model``: no code of a model, an adapter, its base, a teacher or a judge runs without consent, and none is
asked for on standard input; nothing is read that a folder names outside of it; a file made to hurt ends in one
message. Classes whose files this package ships with models are known by hash: the installed ones stand in for them,
and the hosts are told ``trust_remote_code=False`` even then.

Not promised: faults of memory in torch, tokenizers, safetensors and other native code; data sets whose builder is a
script; a short time for a large model; anything once consent is given. A way around it is best reported as a security
advisory of the repository, before it is public.
"""

from st_llm_embed.trust.code import MODULES, STOCK, check_no_code, code_in, forget_code, has_code
from st_llm_embed.trust.data import check_data, check_model, check_saved, left_by_trainer
from st_llm_embed.trust.opening import OF_A_BASE, check_base, fetch, load_any, load_trusted, loading, model_class

__all__ = [
    "MODULES",
    "OF_A_BASE",
    "STOCK",
    "check_base",
    "check_data",
    "check_model",
    "check_no_code",
    "check_saved",
    "code_in",
    "fetch",
    "forget_code",
    "has_code",
    "left_by_trainer",
    "load_any",
    "load_trusted",
    "loading",
    "model_class",
]
