"""What can be known of an evaluation before the language model is loaded."""

import importlib
from collections.abc import Sequence

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals import over_seeds
from saelens_scaffold.evals.plan import Job
from saelens_scaffold.evals.scaffold_ablation.eval_config import (
    ScaffoldAblationEvalConfig,
)
from saelens_scaffold.evals.scaffold_ablation.topic_texts import read_topics
from saelens_scaffold.evals.selected_saes import SelectedSAE
from saelens_scaffold.evals.text_data import open_dataset, rows_with


def check_inputs(job: Job, saes: Sequence[SelectedSAE]) -> None:
    """
    See that what an evaluation reads is there, and goes with the SAEs.

    Datasets that SAEBench knows by name are left to SAEBench.

    Args:
        job: The evaluation.
        saes: The SAEs, in the form that it judges. Their weights do not matter.

    Raises:
        UserError: A text cannot be read or is too short, or a value of the
            configuration does not go with an SAE.
    """
    evaluation, config, settings = job
    try:
        if evaluation.data == "text":
            dataset = getattr(config, evaluation.data_field)
            split = getattr(config, "dataset_split", settings.dataset_split)
            column = getattr(config, "text_column", settings.text_column)
            rows_with(open_dataset(dataset, split), dataset, column)
        if isinstance(config, ScaffoldAblationEvalConfig) and config.topics:
            read_topics(config)
        if isinstance(config, over_seeds.OverSeedsEvalConfig):
            main = importlib.import_module(f"{evaluation.package}.main")
            for sae in saes:
                if main.EVALUATOR.check_sae is not None:
                    main.EVALUATOR.check_sae(config, sae)
            over_seeds.read_texts(main.EVALUATOR, config)
    except ValueError as error:
        raise UserError(f"{evaluation.name}: {error}") from error
