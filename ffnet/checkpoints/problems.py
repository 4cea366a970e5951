"""What can be wrong with a checkpoint file, and what its user can do."""

SAVE_AGAIN = (
    "Load it where its classes are installed, if you trust its source, and save it with "
    "torch.save(model.state_dict(), 'weights.pth')."
)
SAVE_ALONE = (
    "If the file is a training checkpoint, save the state_dict inside it alone; entries named 'state_dict' or 'model' "
    "are found."
)
DOWNLOAD_AGAIN = "Download it again, or ask its owner for a state_dict."


class CheckpointProblem(Exception):
    """What is wrong with a checkpoint and what to do; `ffnet.checkpoints.loading` adds the name of the file."""

    def __init__(self, problem: str, remedy: str = SAVE_AGAIN) -> None:
        super().__init__(f"{problem}. {remedy}")


def quoted(key: object) -> str:
    """Return a short text for a key that comes from a file."""
    return repr(key[:80]) if isinstance(key, str) else f"a {type(key).__name__}"
