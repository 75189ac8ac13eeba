"""Which tokens of a text an evaluation takes: those of the kind the SAEs were trained on."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from itertools import chain, islice
from typing import Annotated, Any

import torch
from pydantic import Field, StrictBool, StrictInt
from sae_lens.pretokenize_runner import get_special_token_from_cfg
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from sae_lens.util import get_special_token_ids
from tqdm.auto import tqdm

from saelens_scaffold._util.configs import documented, make_config
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.base import Evaluation
from saelens_scaffold.evals.eval_configs import TextEvalConfig
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.models.datasets import first_row, open_dataset, rows_with
from saelens_scaffold.models.hook_points import check_context
from saelens_scaffold.models.language_models import (
    LanguageModel,
    ModelClass,
    known_model_name,
)
from saelens_scaffold.saes.metadata import (
    ExcludedTokens,
    Positions,
    SequenceSeparator,
)
from saelens_scaffold.training import pretokenized

logger = logging.getLogger(__name__)

_CONTEXT_FIELDS = ("context_size", "context_length", "llm_context_size", "seq_len")
"""What configurations of evaluations call the tokens per sequence."""

_LABEL = 2**32
"""More than the id of any token."""


@documented(frozen=True)
class TokenSelection:
    """
    How text becomes sequences, and which of their tokens count.

    The fields and their defaults are those of SAELens's runners, which write them into the
    metadata of the SAEs that they train. Whatever they say, BOS, EOS and padding do not
    count, as in SAEBench's core.
    """

    context_size: Annotated[StrictInt, Field(ge=3)] = 128
    """Tokens per sequence, at least 3: BOS, a token, and one to predict."""
    prepend_bos: StrictBool = True
    """Whether each sequence begins with BOS."""
    sequence_separator_token: SequenceSeparator = "bos"
    """Token between the texts of a sequence."""
    disable_concat_sequences: StrictBool = False
    """Whether a sequence is the beginning of one text, and shorter texts are left out."""
    exclude_special_tokens: ExcludedTokens = False
    """Whether the tokenizer's special tokens do not count, or ids of tokens that do not."""
    seqpos_slice: Positions = Field(default_factory=lambda: [None])
    """Positions in the sequence that count, as in slice(start, stop, step)."""

    def __post_init__(self) -> None:
        try:
            n_positions = len(range(self.context_size)[slice(*self.seqpos_slice)])
        except (TypeError, ValueError):  # a slice of no or four numbers, or of step 0
            n_positions = 0
        if n_positions == 0:
            raise ValueError(
                f"seqpos_slice is {self.seqpos_slice}, which takes none of the "
                f"{self.context_size} positions of a sequence"
            )

    def sequences(
        self, texts: Iterator[torch.Tensor], tokenizer: Any
    ) -> Iterator[torch.Tensor]:
        """
        Texts as the language model reads them while an SAE is trained.

        Args:
            texts: Tokens of each text, without BOS, shape (n_tokens,).
            tokenizer: The language model's tokenizer.

        Returns:
            Sequences of shape (context_size,). The last, incomplete one is left out.
        """
        separator = get_special_token_from_cfg(self.sequence_separator_token, tokenizer)
        return concat_and_batch_sequences(
            texts,
            context_size=self.context_size,
            begin_batch_token_id=tokenizer.bos_token_id if self.prepend_bos else None,
            sequence_separator_token_id=separator,
            disable_concat_sequences=self.disable_concat_sequences,
        )

    def counts(
        self, tokens: torch.Tensor, tokenizer: Any, special: bool = False
    ) -> torch.Tensor:
        """
        Mask of the tokens that count.

        Args:
            tokens: Sequences, shape (batch, context_size).
            tokenizer: The language model's tokenizer.
            special: Whether BOS, EOS and padding count as well, even where the SAEs were
                trained without them.

        Returns:
            Shape (batch, context_size).
        """
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        mask[:, slice(*self.seqpos_slice)] = True
        is_excluded = torch.isin(tokens, self._excluded_ids(tokenizer).to(tokens))
        text = is_text(tokens, tokenizer)
        return mask & (~is_excluded | ~text if special else ~is_excluded & text)

    def _excluded_ids(self, tokenizer: Any) -> torch.Tensor:
        excluded = self.exclude_special_tokens
        if isinstance(excluded, bool):
            excluded = get_special_token_ids(tokenizer) if excluded else ()
        return torch.tensor(list(excluded), dtype=torch.long)

    def beyond_whole_texts(self) -> str:
        """
        What it says that SAEBench's probes do not do, which read each text from BOS on and
        take all tokens but BOS, EOS and padding; "" if nothing.
        """
        defaults = TokenSelection()
        differ = [
            name
            for name in ("prepend_bos", "exclude_special_tokens", "seqpos_slice")
            if getattr(self, name) not in (getattr(defaults, name), True)
        ]
        return ", ".join(f"{name} {getattr(self, name)!r}" for name in differ)


TOKEN_FIELDS = tuple(field.name for field in fields(TokenSelection))  # type: ignore[arg-type]
"""Names of SAELens's runners for what selects tokens, also in the metadata of SAEs."""


def special_ids(tokenizer: Any) -> torch.Tensor:
    """The ids of BOS, EOS and padding, those that the tokenizer has."""
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return torch.tensor(sorted({token for token in ids if token is not None}))


def is_text(tokens: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Mask of the tokens that are neither BOS, EOS nor padding."""
    return ~torch.isin(tokens, special_ids(tokenizer).to(tokens))


def tokens_of(sae: SelectedSAE, config: Any = None) -> TokenSelection:
    """
    The tokens that an SAE was trained on, as far as a configuration does not say otherwise.

    Args:
        sae: The SAE. What its metadata do not say is SAELens's default.
        config: Configuration of an evaluation. Its fields that are not None count.

    Raises:
        UserError: The metadata say something that cannot be.
    """
    metadata = sae.sae.cfg.metadata
    said = {name: metadata[name] for name in TOKEN_FIELDS if name in metadata}
    said = {
        name: value
        for name, value in said.items()
        # that there is no separator is a choice; elsewhere None says nothing
        if value is not None or name == "sequence_separator_token"
    }
    try:
        return make_config(TokenSelection, {**said, **_given(config)})
    except UserError as error:
        raise UserError(
            f"SAE {sae.label!r}: of the tokens that it was trained on, its metadata say that "
            f"{error}; set this in the evaluation's configuration"
        ) from error


def other_tokens(
    evaluations: Sequence[Evaluation], saes: Sequence[SelectedSAE]
) -> list[str]:
    """A line for each SAE that evaluations judge on tokens it was not trained on."""
    names = [of.name for of in evaluations if of.tokens == "whole_texts"]
    beyond = {sae.label: tokens_of(sae).beyond_whole_texts() for sae in saes if names}
    return [
        f"{', '.join(names)}: took other tokens than {label} was trained on ({said}), since "
        "SAEBench reads whole texts, from BOS on"
        for label, said in beyond.items()
        if said
    ]


def common_tokens(saes: Sequence[SelectedSAE], config: Any = None) -> TokenSelection:
    """
    The tokens that SAEs were trained on, if they agree.

    Args:
        saes: The SAEs.
        config: As for `tokens_of`.

    Raises:
        UserError: They do not agree, or metadata say something that cannot be.
    """
    selections = {sae.label: tokens_of(sae, config) for sae in saes}
    for field in TOKEN_FIELDS:
        values = {label: getattr(of, field) for label, of in selections.items()}
        if any(value != next(iter(values.values())) for value in values.values()):
            raise UserError(
                f"the SAEs were trained with different {field}: {values}; evaluate those "
                f"together that agree, or set {field}"
            )
    found = next(iter(selections.values()), None)
    return found or make_config(TokenSelection, _given(config))


def _given(config: Any) -> dict[str, Any]:
    given = {name: getattr(config, name, None) for name in TOKEN_FIELDS}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("sequence_separator_token") == "none":
        given["sequence_separator_token"] = None
    return given


def check_context_size(
    config: Any,
    saes: Sequence[SelectedSAE],
    model_class_name: ModelClass = "HookedTransformer",
) -> None:
    """
    See, without loading it, that a language model has room for an evaluation's sequences.

    Args:
        config: The evaluation's configuration, with the name of the model.
        saes: Where its context_size is None, theirs counts.
        model_class_name: Class of the language model.

    Raises:
        UserError: It has not.
    """
    model_name = getattr(config, "model_name", None)
    for field in set(_CONTEXT_FIELDS).intersection(vars(config) if model_name else ()):
        size = getattr(config, field) or common_tokens(saes, config).context_size
        name = str(model_name)
        if model_class_name == "HookedTransformer":
            name = known_model_name(name)
        check_context(size, name, model_class_name, field=field)


class TokenStream:
    """
    The text of an evaluation, in batches of whole sequences.

    Args:
        config: Which text.
        model: The language model.
        saes: What config leaves open is taken from how these were trained.
        label_column: Column of the dataset with a label of each text, if it has one.

    Attributes:
        selection: Which tokens are read, and which of them count.
        labels: The labels met so far, by their numbers; number 0 is no label.

    Raises:
        UserError: The text cannot be read, is shorter than one sequence, or the SAEs
            disagree on what config leaves open.
    """

    def __init__(
        self,
        config: TextEvalConfig,
        model: LanguageModel,
        saes: Sequence[SelectedSAE],
        label_column: str | None = None,
    ):
        self.selection = common_tokens(saes, config)
        self.labels = [""]
        self._label_column = label_column
        if self.selection.context_size > model.cfg.n_ctx:
            raise UserError(
                f"context_size is {self.selection.context_size}; {model.cfg.model_name} has "
                f"room for {model.cfg.n_ctx} tokens"
            )
        self.tokenizer: Any = model.tokenizer
        self._config = config
        self._device = model.cfg.device
        self._sequences = self._read(model)

    def _read(self, model: LanguageModel) -> Iterator[torch.Tensor]:
        """
        Sequences of shape (context_size,), on the CPU, until the text ends. What has a label
        is token + number of the label * `_LABEL`, so that both are put together alike.

        Raises:
            UserError: The text cannot be read, or is shorter than one sequence. Raised
                when called, not later.
        """
        dataset, split = self._config.dataset, self._config.dataset_split
        opened, context_size = open_dataset(dataset, split), self.selection.context_size
        if pretokenized.token_column(opened, dataset):
            return pretokenized.pretokenized_rows(opened, dataset, context_size)
        columns = [self._config.text_column]
        if self._label_column in first_row(opened, dataset):
            columns.append(str(self._label_column))
        rows = rows_with(opened, dataset, *columns)
        to_tokens = partial(
            model.to_tokens, prepend_bos=False, truncate=False, move_to_device=False
        )
        texts = (
            self._labelled(to_tokens(text).squeeze(0), *label)
            for text, *label in rows
            if text
        )
        sequences = self.selection.sequences(texts, self.tokenizer)
        first = next(sequences, None)
        if first is None:
            raise UserError(
                f"dataset {dataset!r} ({split}) has no text of {context_size} tokens; "
                "give a longer text, or a smaller context_size"
            )
        return chain([first], sequences)

    def _labelled(self, tokens: torch.Tensor, label: Any = None) -> torch.Tensor:
        if label is None:
            return tokens
        if str(label) not in self.labels:
            self.labels.append(str(label))
        number = self.labels.index(str(label))
        # special tokens are recognised, and not added twice, by their ids
        return tokens + number * _LABEL * is_text(tokens, self.tokenizer)

    def counts(self, tokens: torch.Tensor, special: bool = False) -> torch.Tensor:
        """As `TokenSelection.counts`."""
        return self.selection.counts(tokens, self.tokenizer, special)

    def batches(
        self, n_tokens: int, desc: str
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As `labelled_batches`, without the labels."""
        for tokens, counts, _ in self.labelled_batches(n_tokens, desc):
            yield tokens, counts

    def labelled_batches(
        self, n_tokens: int, desc: str
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """
        The next sequences, with a progress bar, until n_tokens count or the text ends.

        Args:
            n_tokens: How many tokens shall count.
            desc: What the progress bar says.

        Yields:
            Tokens, shape (batch, context_size), on the model's device, the mask of those
            that count, and the numbers of their labels.

        Raises:
            UserError: There is no text left.
        """
        counted = 0
        with tqdm(total=n_tokens, desc=desc, unit="tok", unit_scale=True) as bar:
            while counted < n_tokens:
                batch = list(islice(self._sequences, self._config.llm_batch_size))
                if not batch:
                    break
                both = torch.stack(batch).to(self._device)
                labels, tokens = both // _LABEL, both % _LABEL
                counts = self.counts(tokens)
                in_batch = counts.sum(dim=1).cumsum(0)
                needed = int((in_batch < n_tokens - counted).sum()) + 1
                if needed < len(batch):  # the rest is for the next call
                    tokens, counts = tokens[:needed], counts[:needed]
                    labels = labels[:needed]
                    self._sequences = chain(batch[needed:], self._sequences)
                if counts.any():
                    yield tokens, counts, labels
                counted += int(counts.sum())
                bar.update(int(counts.sum()))
        if counted == 0:
            raise UserError(
                f"dataset {self._config.dataset!r} has no text left for {desc!r}; give a "
                "longer text, or evaluate on fewer tokens"
            )
        if counted < n_tokens:
            ended = (desc, self._config.dataset, f"{counted:,}", f"{n_tokens:,}")
            logger.warning("%s: dataset %r ended after %s of %s tokens", *ended)
