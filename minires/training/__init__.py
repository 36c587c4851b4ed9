"""What a run needs besides its loop: a folder, checkpoints, signals, progress, a log, and the search for NaN.

`Run` is all that most loops need; see run.py.
"""

from minires.training.folder import UsageError
from minires.training.run import Interrupted, Run
from minires.training.storage import CheckpointError
from minires.training.weights import load_model, load_weights, save_weights

__all__ = ["CheckpointError", "Interrupted", "Run", "UsageError", "load_model", "load_weights", "save_weights"]
