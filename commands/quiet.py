"""What Lightning says and users cannot act on, left out."""

from __future__ import annotations

import logging
import warnings


def silence_what_users_cannot_act_on() -> None:
    """Filter such warnings and advertisements, in the whole process."""
    # The default data fit in memory, where workers only cost; the advice to use more of them does not hold.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Text is read as it stands, not as samples with indices; predictions of it are numbered in that order.
    warnings.filterwarnings("ignore", message="Couldn't infer the batch indices.*")
    # Lightning 2.6 asks torch >= 2.13 in an older way.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    # A test run has a folder of its own; nothing of the training run's callback is needed there.
    warnings.filterwarnings("ignore", message="The dirpath has changed from.*")
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`.*")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    """Lightning 2.6 recommends a product of its makers at each start."""
    return "litlogger" not in record.getMessage()
