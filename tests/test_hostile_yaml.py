"""Experiments from anywhere: read rightly, or refused in one short line, at once."""

import resource
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saelens_scaffold._util.configs import make_config
from saelens_scaffold._util.errors import UserError, shown
from saelens_scaffold._util.yaml_files import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    read_yaml,
)
from saelens_scaffold.compare.config import (
    MAX_SAES,
    CompareConfig,
    read_config,
)
from saelens_scaffold.evals.runner import evaluate

EXPERIMENT: dict[str, Any] = {
    "model_name": "py-neox",
    "hook_name": "blocks.0.hook_resid_post",
    "dataset_path": "python-stdlib",
    "sae": {"d_in": 256, "d_sae": 64},
    "grid": {"architecture": ["batchtopk"], "k": [4]},
    "evaluations": {"core": None},
}
FIELDS = [*CompareConfig.__dataclass_fields__, "grid.k", "sae.k", "training.lr"]


def bomb(levels: int, width: int) -> str:
    """A list of `width` ** `levels` items."""
    lists = ["x: &a0 [lol]"]
    for level in range(1, levels):
        aliases = ", ".join([f"*a{level - 1}"] * width)
        lists.append(f"x{level}: &a{level} [{aliases}]")
    return "\n".join(lists)


def experiment(field: str, value: str) -> str:
    """The experiment with a value, as YAML, in place of a field's."""
    content = {
        name: {**v} if isinstance(v, dict) else v for name, v in EXPERIMENT.items()
    }
    outer, _, inner = field.partition(".")
    if inner:
        content.setdefault(outer, {})[inner] = "HERE"
    else:
        content[outer] = "HERE"
    return yaml.safe_dump(content, sort_keys=False).replace("HERE", value)


ODD = r"""
~|true|.nan|-.inf|1e999|0x1F|1:30:00|2020-01-01|2020-99-99|!!bool x|!!int ""|!!timestamp x
!!python/object:os.system x|!!binary "é"|!!set {a}|!!omap [a: 1]|"\ud800"|"\0"|= |<<|*nowhere
&a [*a]|&a {b: *a}|{[1]: 2}|{<<: 3}|{a: 1, a: 2}|{1: a, 0x1: b}|- - -|@|`|%|!
"""
scalars = st.one_of(
    st.sampled_from(ODD.strip().replace("\n", "|").split("|")),
    st.integers().map(str),
    st.text(max_size=20).map(repr),
    st.sampled_from(["9" * 4000, "9" * 5000, "1" + ":1" * 2000, "A" * 2000]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(st.tuples(scalars, inner), max_size=4).map(
            lambda pairs: "{" + ", ".join(f"{k}: {v}" for k, v in pairs) + "}"
        ),
    ),
    max_leaves=8,
)
hostile = st.one_of(
    st.builds(experiment, st.sampled_from(FIELDS), values),
    st.builds(
        lambda levels, width, field: (
            bomb(levels, width) + f"\n{experiment(field, f'*a{levels - 1}')}"
        ),
        st.integers(1, 12),
        st.integers(1, 12),
        st.sampled_from(FIELDS),
    ),
    st.builds(
        lambda n, field: experiment(field, "[" * n + "]" * n),
        st.sampled_from([1, 19, 20, 400]),
        st.sampled_from(FIELDS),
    ),
    st.builds(
        lambda n, field: experiment(field, f"[{'1, ' * n}]"),
        st.sampled_from([1, 100, 1001]),
        st.sampled_from(FIELDS),
    ),
    values,
    st.text(max_size=200),
).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=200)


def experiment_is_read(content: bytes, file: Path) -> bool:
    """Whether a file is read as what it is; else it is refused in one short line."""
    file.write_bytes(content)
    try:
        config = read_config(file)
    except UserError as error:
        said = str(error).replace(str(file), "FILE")
        assert len(said) < 2500
        return False
    assert isinstance(config.grid["architecture"], list)
    # what PyYAML itself makes of it, which knows no limits
    assert set(config.grid) == set(yaml.safe_load(content)["grid"])
    return True


@settings(
    max_examples=1000,
    deadline=2000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(content=hostile)
def test_any_file_is_read_or_refused_in_one_short_line(
    content: bytes, tmp_path: Path
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    experiment_is_read(content, tmp_path / "experiment.yaml")
    assert time.process_time() - started < 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak - before < 300_000  # kB


@pytest.mark.parametrize("field", FIELDS)
def test_aliases_that_stand_for_too_much(field: str, tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(f"{bomb(10, 10)}\n{experiment(field, '*a9')}")
    with pytest.raises(UserError, match="aliases stand for more than 100,000"):
        read_config(file)
    text = "m0: &m0 {a: 1}\n" + "".join(
        f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}\n"
        for i in range(1, 12)
    )
    file.write_text(text)
    with pytest.raises(UserError, match="aliases stand for more than 100,000"):
        read_config(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2", "the key 'a' is there twice.*line 2"),
        ('a: {k: [1], "k": [2]}', "the key 'k' is there twice"),
        ("a: {1: x, 0x1: y}", "the key 1 is there twice"),
        ("a: &a [*a]", "an alias contains itself"),
        ("a: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "more than 20 levels"),
        ("a: " + "[" * 5000 + "]" * 5000, "is not YAML"),
        ("a: " + "x" * MAX_CHARACTERS, "has more than 100,000 characters"),
        ("a: 2020-01-01", "JSON does not have: Object of type date"),
        ("a: .nan", "JSON does not have"),
        ("a: 1e999", "JSON does not have"),
        ("a: !!set {b}", "JSON does not have"),
        ('a: "\\ud800"', "JSON does not have"),
        ("a: !!bool maybe", "is not YAML"),
        ("a: !!timestamp maybe", "is not YAML"),
        ("a: " + "9" * 5000, "is not YAML"),
        ("a: 0x" + "f" * 5000, "JSON does not have"),
    ],
)
def test_what_no_experiment_holds(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=said) as raised:
        read_yaml(file)
    assert len(str(raised.value)) < 600


def test_aliases_merges_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    text = "a: &a {k: [1, 2], lr: 1e-3}\nb: {<<: *a, k: 3}\nc: [*a, *a]\n"
    file.write_text(text, encoding="utf-8-sig")
    a = {"k": [1, 2], "lr": 1e-3}
    assert read_yaml(file) == {"a": a, "b": {**a, "k": 3}, "c": [a, a]}


def test_size_of_a_grid_is_limited_before_its_saes_are_made() -> None:
    most = {"architecture": ["batchtopk"], "k": [*range(1, MAX_SAES + 1)]}
    assert len(CompareConfig(**{**EXPERIMENT, "grid": most}).grid["k"]) == MAX_SAES
    more = {**most, "k": [1, 2, 3], "seed": [*range(334)]}
    with pytest.raises(UserError, match="grid has more than 1,000 combinations"):
        make_config(CompareConfig, {**EXPERIMENT, "grid": more})
    started = time.process_time()
    million = {**most, "k": [*range(1_000_000)]}
    with pytest.raises(UserError, match="at most 1000 items") as raised:
        make_config(CompareConfig, {**EXPERIMENT, "grid": million})
    assert len(str(raised.value)) < 300
    assert time.process_time() - started < 1


def test_a_setting_of_endless_levels_is_one_line() -> None:
    setting = "core.llm_dtype=" + "[" * 100_000
    with pytest.raises(UserError, match="core.llm_dtype: the value has too many"):
        evaluate("core", [setting])


@given(
    st.recursive(
        st.one_of(st.none(), st.integers(), st.floats(), st.text()),
        st.lists,
    )
)
@settings(max_examples=100)
def test_messages_show_small_values_whole_and_large_ones_in_part(value: Any) -> None:
    text = shown(value)
    assert len(text) <= 200
    assert text == repr(value) or "..." in text
    bombs = [value]
    for _ in range(40):
        bombs = [bombs] * 10
    assert len(shown(bombs)) <= 200
    assert shown(10**5000) == "an integer of too many digits"
