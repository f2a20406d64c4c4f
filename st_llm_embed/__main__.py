"""``python -m st_llm_embed`` is ``st-llm-embed``."""

from st_llm_embed.cli import main

raise SystemExit(main())
