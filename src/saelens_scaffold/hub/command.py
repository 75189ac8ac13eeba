"""The command `saelens-scaffold upload`."""

import argparse
import sys

from saelens_scaffold._util.interruption import interruptible
from saelens_scaffold._util.quiet import ignore_model_kwargs
from saelens_scaffold.hub.hub_errors import HubUploadError
from saelens_scaffold.hub.plan import README, UploadSummary
from saelens_scaffold.hub.sources import given_saes, results_folders, split_id
from saelens_scaffold.hub.upload import upload_scaffold_saes


def run(options: argparse.Namespace) -> int:
    """
    Run the command.

    Args:
        options: What the command line's parser made of it.

    Returns:
        The exit status: 0, 1 if the Hub refused or could not be reached, 2 if the input
        makes no sense, 130 after an interruption.
    """
    ignore_model_kwargs()
    try:
        # One directory may be a run, whose own files go along.
        saes = given_saes(options.saes)
        places = [split_id(argument) for argument in options.saes]
        is_one = len(places) == 1 and places[0][0] is None
        with interruptible():
            summary = upload_scaffold_saes(
                places[0][1] if is_one else saes,
                options.repo_id,
                hf_revision=options.revision,
                jumprelu=not options.no_jumprelu,
                eval_results=options.eval_results
                or results_folders(path for _, path in places),
                private=options.private,
                create_pr=options.create_pr,
                overwrite_readme=options.overwrite_readme,
                license=options.license,
                base_model=options.base_model,
                datasets=options.datasets,
                show_progress=sys.stderr.isatty(),
                dry_run=options.dry_run,
            )
    except HubUploadError as error:
        _complain(error)
        return 1
    except (ValueError, OSError) as error:
        _complain(error)
        return 2
    except KeyboardInterrupt:
        print(
            "\nsaelens-scaffold upload: interrupted. SAEs are complete or not there; repeat "
            "the command to go on.",
            file=sys.stderr,
        )
        return 130
    for file in summary.unmatched_results:
        print(f"{file}: is of none of these SAEs, and stays here", file=sys.stderr)
    if options.license is None:
        print(
            "The card names no licence; --license mit, say, would.",
            file=sys.stderr,
        )
    print(_dry_run_text(summary) if options.dry_run else _text(summary))
    return 0


def _complain(error: Exception) -> None:
    said = " ".join(str(error).split())
    print(f"saelens-scaffold upload: error: {said}", file=sys.stderr)


def _text(summary: UploadSummary) -> str:
    lines = [
        f"{sae_id}: {url or 'is there already, unchanged'}"
        for sae_id, url in summary.commits.items()
    ]
    lines.append(
        {
            "written": "The model card has been written.",
            "unchanged": "The model card is there already, unchanged.",
            "kept": f"The repository's {README} is kept; --overwrite_readme replaces it, and "
            "--dry-run shows what would change.",
        }[summary.readme_outcome]
    )
    lines.append(summary.pull_request or summary.repo_url)
    return "\n".join(lines)


def _dry_run_text(summary: UploadSummary) -> str:
    width = max(len(f"{size:,}") for size in summary.files.values())
    lines = [f"{size:>{width},} bytes  {path}" for path, size in summary.files.items()]
    parts = [f"To {summary.repo_url} would go:", *lines, ""]
    if summary.readme_outcome == "kept":
        parts.append(
            f"The repository's {README} would be kept. With --overwrite_readme:"
        )
    elif summary.readme_outcome == "unchanged":
        parts.append(f"The repository's {README} would stay as it is.")
    elif summary.readme_diff is None:
        parts.append(
            f"Whether the repository has a {README} cannot be found out from here; if it "
            "has, it would be kept, unless --overwrite_readme is given. The new one:"
        )
    if summary.readme_outcome != "unchanged":
        parts += ["", summary.readme_diff or summary.readme]
    return "\n".join(parts)
