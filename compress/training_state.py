"""What a training that is stopped goes on from, and the picture of its way."""

from pathlib import Path

from weights.files import atomic_path, read_torch, write_torch


class StateFile:
    """The file beside the output that holds a training after one of its steps.

    settings: what must be the same for a training to go on from it, JSON types by the names of flags.
    """

    def __init__(self, path: Path, settings: dict):
        self.path, self.settings = path, settings
        self.step: int | None = None  # after which the training is in the file

    @property
    def words(self) -> str:
        if self.step is None:
            return "nothing of it is kept yet"
        return f"step {self.step} is kept in {self.path}, from which the same command goes on"

    def read(self) -> dict | None:
        """What was written; None: there is no file. Raises ValueError if it is of another training."""
        if not self.path.exists():
            return None
        state = read_torch(self.path)
        if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
            raise ValueError(f"{self.path} is no state of a training; move it away, or choose another --output")
        for name, now in self.settings.items():
            then = state["settings"].get(name)
            if then != now:
                raise ValueError(
                    f"{self.path} is of a training with another {name} ({then}, now {now}); give the same flags to go "
                    "on with it, another --output, or remove it"
                )
        self.step = state["step"]
        return state

    def write(self, state: dict) -> None:
        """Write, whole or not at all; a step that is there already is not written again."""
        if state["step"] == self.step:
            return
        size = 3 * sum(weight.nbytes for weight in state["weights"].values())  # two moments of each
        try:
            write_torch(self.path, state | {"settings": self.settings}, size)
        except ValueError as error:
            raise ValueError(f"{error}; {self.words}") from None
        self.step = state["step"]

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def draw_curve(curve: list[dict], k: int, path: str) -> None:
    """A PNG of the loss and of the guesses accepted, over the minutes of the training."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.5))
    titles = {
        "loss": "KL divergence from the teacher, nats a token",
        "accepted": f"guesses accepted of {k}, held-out text",
    }
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        points = [(point["seconds"] / 60, point[name]) for point in curve if point[name] is not None]
        axes.plot(*zip(*points, strict=True), marker=".")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("minutes trained")
        axes.set_xlim(left=0)  # predictions may be learned from the middle on
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
