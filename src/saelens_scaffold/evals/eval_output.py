"""What the result of every evaluation has: the fields of SAEBench's results, in their order.

Programs that read SAEBench's results read these, and this package's own evaluations need no
SAEBench.
"""

# pyright: reportGeneralTypeIssues=false

from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass


@dataclass
class EvalOutput:
    """
    An SAE's result.

    A `Field` without a default is required, but lets a subclass give its own default to any.
    """

    eval_type_id: str = Field(description="Name of the evaluation")
    eval_config: Any = Field(description="Its configuration")
    eval_id: str = Field(description="UUID of the run")
    datetime_epoch_millis: int = Field(description="When, in milliseconds since 1970")
    eval_result_metrics: Any = Field(description="Metrics by category")
    eval_result_details: list[Any] | None = Field(
        default=None, description="What has several values"
    )
    sae_bench_commit_hash: str = Field(description="Commit of SAEBench")
    sae_lens_id: str | None = Field(description="Id of the SAE in its release")
    sae_lens_release_id: str | None = Field(
        description="SAELens release of the SAE, or its name"
    )
    sae_lens_version: str | None = Field(description="Version of SAELens")
    sae_cfg_dict: dict[str, Any] | None = Field(description="Configuration of the SAE")
    eval_result_unstructured: Any | None = Field(
        default=None, description="What fits into no other field"
    )
