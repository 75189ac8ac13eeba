"""The command `saelens-scaffold rank`."""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import make_writable
from saelens_scaffold._util.interruption import interruptible
from saelens_scaffold._util.quiet import ignore_model_kwargs
from saelens_scaffold.evals.command_line import BAD_INPUT, choose_device, one_line
from saelens_scaffold.evals.configs import common_model_name, make_config
from saelens_scaffold.evals.rank.analysis import analyse_rank
from saelens_scaffold.evals.rank.report import analysis_text, write_analysis
from saelens_scaffold.evals.selected_saes import load_saes, resolve_saes
from saelens_scaffold.evals.text_data import EMBEDDED_DATASET_NAME
from saelens_scaffold.evals.text_eval_config import TextEvalConfig


def run(options: argparse.Namespace) -> int:
    """
    Run the command.

    Args:
        options: What the command line's parser made of it.

    Returns:
        The exit status: 0, 2 if the input makes no sense, 130 after an interruption.
    """
    ignore_model_kwargs()
    out = Path(options.out)
    try:
        loaded = load_saes([options.sae_path] if options.sae_path else [])
        model_name = options.model_name or (common_model_name(loaded) if loaded else "")
        device = choose_device(options.device)
        sae = None
        if loaded:
            (sae,) = resolve_saes(loaded, device, options.llm_dtype)
        hook_name = options.hook_name or (sae.hook_name if sae else None)
        if hook_name is None:
            raise UserError("name the hook point: --hook_name, or --sae_path")
        split = options.dataset_split or (
            "train" if options.dataset != EMBEDDED_DATASET_NAME else "test"
        )
        config = make_config(
            TextEvalConfig,
            {
                "model_name": model_name,
                "dataset": options.dataset,
                "dataset_split": split,
                "text_column": options.text_column,
                "context_size": options.context_size,
                "n_tokens": options.n_tokens,
                "llm_batch_size": options.llm_batch_size,
                "llm_dtype": options.llm_dtype,
            },
        )
        # what TransformerLens prints goes to stderr
        with interruptible(), redirect_stdout(sys.stderr):
            make_writable(out)
            analysis = analyse_rank(config, hook_name, device, sae)
        write_analysis(analysis, out)
    except BAD_INPUT as error:
        print(f"saelens-scaffold rank: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsaelens-scaffold rank: interrupted.", file=sys.stderr)
        return 130
    print(analysis_text(analysis))
    print(f"The spectrum is in {out / 'rank.png'}, all numbers in rank.json.")
    return 0
