"""MMLU (Hendrycks et al. 2021, arXiv 2009.03300): its columns, subjects and categories."""

from saelens_scaffold._util.errors import UserError

MMLU = "cais/mmlu"
"""Its name on the Hub. The columns are question, subject, choices and answer."""

CHOICES_COLUMN = "choices"

SUBJECTS_BY_CATEGORY = {
    "STEM": (
        "abstract_algebra",
        "astronomy",
        "college_biology",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_physics",
        "computer_security",
        "conceptual_physics",
        "electrical_engineering",
        "elementary_mathematics",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_computer_science",
        "high_school_mathematics",
        "high_school_physics",
        "high_school_statistics",
        "machine_learning",
    ),
    "humanities": (
        "formal_logic",
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "international_law",
        "jurisprudence",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "prehistory",
        "professional_law",
        "world_religions",
    ),
    "social sciences": (
        "econometrics",
        "high_school_geography",
        "high_school_government_and_politics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "high_school_psychology",
        "human_sexuality",
        "professional_psychology",
        "public_relations",
        "security_studies",
        "sociology",
        "us_foreign_policy",
    ),
    "other": (
        "anatomy",
        "business_ethics",
        "clinical_knowledge",
        "college_medicine",
        "global_facts",
        "human_aging",
        "management",
        "marketing",
        "medical_genetics",
        "miscellaneous",
        "nutrition",
        "professional_accounting",
        "professional_medicine",
        "virology",
    ),
}
"""The grouping of MMLU's authors (`categories.py` of github.com/hendrycks/test). Other
harnesses differ in places: EleutherAI's has anatomy in STEM."""

_CATEGORIES = {
    subject: category
    for category, subjects in SUBJECTS_BY_CATEGORY.items()
    for subject in subjects
}


def category_of(subject: str) -> str:
    """
    The category of an MMLU subject.

    Raises:
        UserError: It is no subject of MMLU.
    """
    if subject not in _CATEGORIES:
        raise UserError(
            f"topic_grouping is 'mmlu_category', but the label {subject!r} is none of "
            f"MMLU's {len(_CATEGORIES)} subjects ('abstract_algebra' to "
            "'world_religions'); for other labels use topic_grouping 'label'"
        )
    return _CATEGORIES[subject]
