"""How both users of Ray Data (preparation and stream) want it: silent, and stopping at the first error."""

import logging

import ray.data


def quiet(dataset: ray.data.Dataset) -> ray.data.Dataset:
    """The same dataset, whose execution draws no progress bars and logs nothing below warnings."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = dataset.context
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    return dataset
