"""Where training stands, and how a checkpoint says it: whoever goes on from there does what is left to do.

Lightning (2.6) stores its counters as they are in the hook that saves, and how a run goes on depends on
that hook: from a file of an epoch's end every later epoch gets the batches of the one after it, and a run
that ended inside an epoch (max_steps, max_time, should_stop) skips the rest of it. Here the counters are
written anew from what they mean, whoever saves and wherever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where training stands.

    Attributes:
        epochs: Number of epochs that are over, with all that belongs to their end.
        batches: Number of batches of the epoch under way that are in the weights.
        is_whole: Whether these are all batches of the epoch; its end is still to come.
        all_batches: Number of batches of all epochs that are in the weights.
    """

    epochs: int
    batches: int
    is_whole: bool
    all_batches: int


def place(trainer: Any) -> Place:
    """Reads it off the counters of Lightning's loops, in any hook of a run."""
    loop = trainer.fit_loop
    epoch, progress = loop.epoch_progress.current, loop.epoch_loop.batch_progress
    done, total = progress.current.processed, progress.total.processed
    if epoch.started < epoch.ready or not done:  # An epoch begins: the counters are still the last one's.
        return Place(epoch.processed, 0, False, total)
    is_whole = done == progress.current.ready and (
        progress.is_last_batch or done >= trainer.num_training_batches
    )
    is_at_end = epoch.processed == epoch.ready
    if is_whole and is_at_end:
        return Place(epoch.processed, 0, False, total)
    # Gradients are not stored: batches whose step is still to come are read again.
    rest = 0 if is_whole else done % trainer.accumulate_grad_batches
    return Place(epoch.processed - is_at_end, done - rest, is_whole, total - rest)


def stored_epoch(checkpoint: dict[str, Any]) -> tuple[int, bool]:
    """Epoch that a checkpoint is of, counted from 1 (0: before training), and whether all of it."""
    loop = checkpoint["loops"]["fit_loop"]
    epoch, batch = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
    is_whole = epoch["processed"] == epoch["ready"] or batch["is_last_batch"]
    return epoch["ready"], is_whole


def measured_epoch(trainer: Any) -> tuple[int, str]:
    """The epoch that a measurement belongs to, counted from 1, and what to call it: in `fit` the one under
    way or that ended in this process, else that of the checkpoint which the module has loaded.
    """
    now = place(trainer)
    epoch, is_whole = now.epochs + (now.batches > 0), now.is_whole or not now.batches
    if trainer.state.fn != "fit" and not now.all_batches:
        epoch, is_whole = trainer.lightning_module.loaded_epoch
    return epoch, f"epoch {epoch}" + ("" if is_whole else f" (unfinished, step {trainer.global_step})")


def write_place(fit_loop: dict[str, Any], trainer: Any, validated_batches: int) -> bool:
    """Makes the stored state of the loops say where training stands.

    Args:
        fit_loop: State of Lightning's loop as it is to be saved; changed in place.
        trainer: Lightning's.
        validated_batches: `Place.all_batches` at the newest validation that is over.

    Returns:
        Whether what an epoch, or a run inside one, ends with is still to come.
    """
    now, loop = place(trainer), trainer.fit_loop
    total, epoch = now.all_batches, loop.epoch_progress.current
    is_after_batch = 0 < now.batches == loop.epoch_loop.batch_progress.current.ready
    to_validate = (
        is_after_batch
        and total != validated_batches
        and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
    )
    stops = is_after_batch and trainer.should_stop and loop._can_stop_early
    is_ending = now.is_whole or (stops and epoch.processed < epoch.ready)
    # Lightning takes one completed less than processed for "the batch has just ended", and trains on; all
    # alike are "what follows a batch has begun": validation, if its own counters say so, or an epoch's end.
    is_followed = to_validate or is_ending
    begun = now.epochs + (now.batches > 0)
    fit_loop["epoch_progress"] = {
        scope: _counts(begun, begun, now.epochs, now.epochs) for scope in ("total", "current")
    }
    rest = now.batches > 0 and not is_followed
    fit_loop["epoch_loop.batch_progress"] = {
        "total": _counts(total, total, total, total - rest),
        "current": _counts(now.batches, now.batches, now.batches, now.batches - rest),
        "is_last_batch": now.is_whole,
    }
    fit_loop["epoch_loop.val_loop.batch_progress"] = {
        "total": _counts(1, 1, 0, 0) if to_validate else _counts(0, 0, 0, 0),
        "current": _counts(0, 0, 0, 0),
        "is_last_batch": False,
    }
    # The step at which Lightning logs; it is raised once more before the next batch.
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - 1
    for loader in fit_loop["state_dict"].get("combined_loader", []):
        if loader.keys() == {"epoch", "batches"}:
            loader.update(epoch=now.epochs, batches=now.batches)
    return is_ending


def _counts(ready: int, started: int, processed: int, completed: int) -> dict[str, int]:
    return {"ready": ready, "completed": completed, "started": started, "processed": processed}
