"""Datasets of tfds, prepared once, also where several processes ask at a time."""

import fcntl
import pathlib

import tensorflow_datasets as tfds


def prepared(builder: tfds.core.DatasetBuilder):
    """The data sources of a dataset by split; what is not on disk is made first.

    Runs of a study start together: one of them prepares, the others wait for it.
    """
    folder = pathlib.Path(builder.data_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tfds.disable_progress_bar()  # it takes seconds
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the file, or with the process
        builder.download_and_prepare()
    if not builder.info.splits:  # it was made by another since this one looked
        builder.info.read_from_directory(builder.data_dir)
    return builder.as_data_source()
