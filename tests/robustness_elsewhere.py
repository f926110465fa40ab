"""What has to hold besides the table of pipelines, and the tests that show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Elsewhere:
    """One thing; `test` is a module of tests and a function of it."""

    group: str
    what: str
    outcome: str
    test: str

    @property
    def module(self) -> str:
        return self.test.partition(".")[0]

    @property
    def name(self) -> str:
        return self.test.partition(".")[2]

    @property
    def link(self) -> str:
        return f"[{self.name}](../tests/{self.module}.py)"


def _rows(group: str, *rows: tuple[str, str, str]) -> list[Elsewhere]:
    return [Elsewhere(group, *row) for row in rows]


ELSEWHERE = [
    *_rows(
        "Ways to run",
        ("handle.compile()", "right", "test_compile.test_one_graph_per_pattern_and_the_same_latents"),
        (
            "more patterns than torch recompiles",
            "right",
            "test_compile.test_more_patterns_than_torch_recompiles_one_function",
        ),
        ("steps that run as one batch", "right", "test_speedups.test_batches_of_steps_give_what_single_ones_give"),
        (
            "a ControlNet that is left out at scale 0",
            "right",
            "test_speedups.test_no_controlnet_runs_while_its_scale_is_zero",
        ),
        (
            "any schedule at all (hypothesis)",
            "right",
            "test_oracle.test_runtime_gives_what_the_definition_gives",
        ),
        (
            "generations with random schedules, sizes, samplers, guidance and ways to run, in one process",
            "right, and no growth",
            "test_robustness.test_soak",
        ),
    ),
    *_rows(
        "Files",
        (
            "a schedule file changed anywhere",
            "refused, or means what it says",
            "test_mutants.test_many_mutants",
        ),
        (
            "names, shapes, dtypes, values, bytes of its tensors changed",
            "refused, or fits the schedule",
            "test_mutants.test_many_mutants_of_the_tensors",
        ),
        ("any wrong field", "refused by its name", "test_schedule.test_wrong_files_are_refused_with_the_field"),
        (
            "too large, no text, absent",
            "refused",
            "test_schedule.test_files_that_are_no_text_too_large_or_absent_are_refused",
        ),
        (
            "a header that promises more than there is",
            "refused, nothing allocated",
            "test_mutants.test_sizes_in_a_file_allocate_nothing",
        ),
        ("code in a file", "refused, nothing executed", "test_mutants.test_nothing_in_a_file_is_executed"),
        ("made for another model", "refused", "test_schedule.test_another_model_is_refused"),
        (
            "a full disk while saving",
            "the old file stays",
            "test_faults.test_a_full_disk_leaves_the_file_that_was_there",
        ),
        (
            "kill -9 while saving",
            "a whole file, old or new",
            "test_faults.test_kill_9_while_saving_leaves_a_whole_file",
        ),
    ),
    *_rows(
        "Training",
        (
            "NaN or infinity in a batch",
            "refused by its prompt; the router stays",
            "test_faults.test_a_batch_that_is_not_finite_is_refused_by_its_prompt",
        ),
        (
            "NaN in a gradient",
            "training stops; the router stays",
            "test_faults.test_a_gradient_that_is_not_finite_does_not_reach_the_router",
        ),
        ("an empty data set", "refused", "test_faults.test_an_empty_data_set_is_refused"),
        ("less than one batch", "refused", "test_faults.test_less_than_one_batch_is_refused"),
        (
            "a full disk while a checkpoint is saved",
            "the last checkpoint stays",
            "test_faults.test_a_full_disk_in_training_leaves_the_last_checkpoint",
        ),
        (
            "Ctrl-C, then on from the checkpoint",
            "the same router, bit for bit",
            "test_checkpoints.test_interrupted_training_resumes_to_the_same_router",
        ),
        (
            "kill -9 while a checkpoint is written, then on from the last one",
            "the same router, bit for bit",
            "test_kill.test_killed_while_a_checkpoint_is_written",
        ),
        (
            "kill -9 at random moments, then on from the last checkpoint",
            "the same router, bit for bit",
            "test_kill.test_killed_at_random_moments",
        ),
    ),
    *_rows(
        "Numbers",
        (
            "the same seed again: training, export, pictures",
            "the same bits",
            "test_faults.test_the_same_seed_gives_the_same_bits",
        ),
    ),
]
