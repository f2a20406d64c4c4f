"""``st-llm-embed``, run by ``accelerate launch`` under FSDP 2 on CPUs, which accelerate would take to DDP."""

import sys
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from st_llm_embed.cli import main

original = AcceleratorState.__init__


# What accelerate 1.15 does on GPUs.
def initialize(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)


AcceleratorState.__init__ = initialize
sys.exit(main(sys.argv[1:]))
