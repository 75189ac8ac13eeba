"""The demo's options, its run, and what it writes."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from sae_lens.training._interruption import InterruptedException

from saelens_scaffold._util.files import make_writable, new_directory, new_file
from saelens_scaffold._util.interruption import interruptible
from saelens_scaffold._util.provenance import versions
from saelens_scaffold._util.quiet import quiet
from saelens_scaffold.demo.language_model import (
    EmbeddedActivations,
    LanguageModelSettings,
    language_model_configs,
    train_on_language_model,
    with_centred,
)
from saelens_scaffold.demo.measures import Measured
from saelens_scaffold.demo.planted import (
    PlantedActivations,
    PlantedSettings,
    planted_configs,
    train_on_planted,
)
from saelens_scaffold.demo.report import (
    COLUMNS,
    Part,
    dense_latent_summary,
    print_part,
    write_picture,
)

TABLE_WIDTH = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to the command line's parser."""
    parser.add_argument(
        "--seed", type=int, default=0, help="the first seed (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds",
        type=_positive,
        default=1,
        metavar="N",
        help="train with N seeds and report mean and spread (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="train for a fraction of the time: it shows that everything works, "
        "not what scaffolds do",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="directory for the SAEs, demo.json and demo.png (default: %(default)s); "
        "what an earlier run with the same settings finished there is not done again",
    )


def run(options: argparse.Namespace) -> int:
    """
    Run the demo.

    Args:
        options: What `add_arguments` parsed.

    Returns:
        The exit status: 0, 2 if nothing can be written to the directory, 130 after an
        interruption.
    """
    quiet()
    try:
        make_writable(options.out)
    except OSError as error:
        print(f"saelens-scaffold demo: error: --out: {error}", file=sys.stderr)
        return 2
    try:
        with interruptible():
            _run(options)
    except (KeyboardInterrupt, InterruptedException):
        print(
            f"\nsaelens-scaffold demo: interrupted. What is finished is in {options.out}; "
            "repeat the command to go on.",
            file=sys.stderr,
        )
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    planted, language_model = PlantedSettings(), LanguageModelSettings()
    if options.quick:
        planted = replace(planted, steps=150, eval_samples=4096)
        language_model = replace(
            language_model,
            training_tokens=61_440,
            eval_contexts=32,
            eval_contexts_ce=16,
            pca_contexts=64,
        )
    seeds = range(options.seed, options.seed + options.seeds)

    parts = [
        Part(
            "Known truth: sparse features and a dense component, planted",
            _each_seed("planted", planted, _run_planted, seeds, options.out),
        ),
        Part(
            f"A language model: {language_model.hook_name} of py-neox",
            _each_seed(
                "language_model",
                language_model,
                _run_language_model,
                seeds,
                options.out,
            ),
        ),
    ]
    _write_json(
        options.out / "demo.json",
        {
            "seeds": list(seeds),
            "versions": versions(),
            "planted": {
                "settings": asdict(planted),
                "results": [asdict(result) for result in parts[0].results],
            },
            "language_model": {
                "settings": asdict(language_model),
                "results": [asdict(result) for result in parts[1].results],
            },
        },
    )
    write_picture(parts, options.out / "demo.png")
    # as wide as the tables, also where the output goes into a file
    console = Console(width=TABLE_WIDTH, highlight=False)
    for part in parts:
        print_part(part, console)
        for sentence in dense_latent_summary(part):
            console.print(sentence)
        for result in part.results:
            if result.l0_warning is not None:
                console.print(result.l0_warning)
    console.print(f"\n{COLUMNS}")
    console.print(f"\nWritten to {options.out}: demo.json, demo.png, and the SAEs.")


def _run_planted(
    settings: PlantedSettings, seed: int, output_path: Path
) -> list[Measured]:
    planted = PlantedActivations(settings, seed)
    return train_on_planted(planted, planted_configs(settings), seed, output_path)


def _run_language_model(
    settings: LanguageModelSettings, seed: int, output_path: Path
) -> list[Measured]:
    activations = EmbeddedActivations(settings, seed)
    saes = with_centred(language_model_configs(settings))
    return train_on_language_model(activations, saes, seed, output_path)


def _each_seed(
    part: str,
    settings: Any,
    run_seed: Callable[[Any, int, Path], list[Measured]],
    seeds: Sequence[int],
    out: Path,
) -> list[Measured]:
    """One part's results of all seeds, of which those finished before are read."""
    results: list[Measured] = []
    for seed in seeds:
        directory = out / "saes" / part / f"seed-{seed}"
        provenance = {"settings": asdict(settings), "versions": versions()}
        finished = _read_finished(directory / "results.json", provenance)
        if finished is None:
            print(f"{part}, seed {seed}: training and measuring", file=sys.stderr)
            with new_directory(directory, replace=True) as temporary:
                finished = run_seed(settings, seed, temporary)
                _write_json(
                    temporary / "results.json",
                    {**provenance, "results": [asdict(result) for result in finished]},
                )
        else:
            print(f"{part}, seed {seed}: finished before, read", file=sys.stderr)
        results += finished
    return results


def _read_finished(path: Path, provenance: dict[str, Any]) -> list[Measured] | None:
    """An earlier run's results, if they come from the same settings and versions."""
    try:
        content = json.loads(path.read_text())
        results = content.pop("results")
    except (OSError, ValueError, KeyError):
        return None
    # as JSON has it, where tuples are lists
    if content != json.loads(json.dumps(provenance)):
        return None
    return [Measured(**result) for result in results]


def _write_json(path: Path, content: Any) -> None:
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
